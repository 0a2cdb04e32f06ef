"""Instances in numbers and as surfaces: size, shape, position, contacts between classes, and triangle meshes.

`connectomics.pipeline.measure` and `connectomics.pipeline.mesh` apply these to folders of labels.
"""

from connectomics.morphology.contacts import Contacts, ContactSpec, measure_contacts
from connectomics.morphology.instances import Instances, measure_instances
from connectomics.morphology.measure_tasks import ContactsTask, MeasureTask
from connectomics.morphology.mesh_surface import Mesh, mesh_object
from connectomics.morphology.mesh_task import MeshTask

__all__ = [
    "ContactSpec",
    "Contacts",
    "ContactsTask",
    "Instances",
    "MeasureTask",
    "Mesh",
    "MeshTask",
    "measure_contacts",
    "measure_instances",
    "mesh_object",
]
