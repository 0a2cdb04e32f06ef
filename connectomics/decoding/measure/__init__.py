"""Labels to numbers: size, surface, shape and place of every instance, and contacts between classes."""

from connectomics.decoding.measure.contacts import Contacts, ContactSpec, measure_contacts
from connectomics.decoding.measure.instances import Instances, measure_instances
from connectomics.decoding.measure.run import measure_labels, measure_tables, measure_tasks
from connectomics.decoding.measure.task import ContactsTask, MeasureTask

__all__ = [
    "ContactSpec",
    "Contacts",
    "ContactsTask",
    "Instances",
    "MeasureTask",
    "measure_contacts",
    "measure_instances",
    "measure_labels",
    "measure_tables",
    "measure_tasks",
]
