"""Instances in numbers and as surfaces: size, shape, place, contacts between classes, and triangle meshes."""

from connectomics.morphology.contacts import Contacts, ContactSpec, measure_contacts
from connectomics.morphology.instances import Instances, measure_instances
from connectomics.morphology.measure import measure_labels, measure_tables, measure_tasks
from connectomics.morphology.measure_tasks import ContactsTask, MeasureTask
from connectomics.morphology.mesh import mesh_labels, mesh_tasks
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
    "measure_labels",
    "measure_tables",
    "measure_tasks",
    "mesh_labels",
    "mesh_object",
    "mesh_tasks",
]
