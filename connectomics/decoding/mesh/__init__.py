"""Meshes: the surface of every instance as triangles, from labels of any size."""

from connectomics.decoding.mesh.run import mesh_labels, mesh_tasks
from connectomics.decoding.mesh.surface import Mesh, mesh_object
from connectomics.decoding.mesh.task import MeshTask

__all__ = ["Mesh", "MeshTask", "mesh_labels", "mesh_object", "mesh_tasks"]
