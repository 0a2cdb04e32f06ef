"""Meshes as files: PLY (binary), OBJ (text), and Neuroglancer's precomputed meshes of one or several resolutions.

Vertices are world positions in nm, order x, y, z; float32 except in OBJ, so exact to 0.06 nm at a distance of 1 mm.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import write_file
from connectomics.morphology.mesh_levels import INFO, SurfaceLevel, encode_levels
from connectomics.morphology.mesh_surface import Mesh

FORMATS = ("ply", "obj", "precomputed", "multilod")

#: Neuroglancer's ``info``, by format.
_INFO: dict[str, dict[str, Any]] = {"precomputed": {"@type": "neuroglancer_legacy_mesh"}, "multilod": INFO}


def check_format(name: str) -> None:
    """Raise `InputError` unless ``name`` is a mesh format."""
    if name not in FORMATS:
        raise InputError(f"unknown mesh format {name!r}; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def file_name(label: int, form: str) -> str:
    """Return the file name of an object's mesh; a precomputed mesh also has the manifest ``{id}:0``, or ``{id}.index``
    if it has several levels of detail (``multilod``)."""
    return str(label) if form in _INFO else f"{label}.{form}"


def write_info(folder: Path, form: str) -> None:
    """Write what a folder of precomputed meshes also needs: Neuroglancer's ``info``."""
    if form in _INFO:
        write_file(folder / "info", json.dumps(_INFO[form]).encode())


def write_levels(folder: Path, label: int, levels: Sequence[SurfaceLevel], grid: VoxelGrid) -> None:
    """Write an object's mesh at several levels of detail into ``folder``, the index last; raises `WriteError`."""
    index, fragments = encode_levels(levels, grid)
    write_file(folder / str(label), fragments)
    write_file(folder / f"{label}.index", index)


def write_mesh(folder: Path, label: int, mesh: Mesh, form: str) -> Path:
    """Write an object's mesh into ``folder``, in one step, and return its path; raises `WriteError`."""
    path = folder / file_name(label, form)
    write_file(path, {"ply": _ply, "obj": _obj, "precomputed": _precomputed}[form](mesh))
    if form == "precomputed":
        write_file(folder / f"{label}:0", json.dumps({"fragments": [path.name]}).encode())
    return path


def _ply(mesh: Mesh) -> bytes:
    header = (
        "ply\nformat binary_little_endian 1.0\ncomment nanometers, x y z\n"
        f"element vertex {len(mesh.vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    faces = np.empty(len(mesh.faces), np.dtype([("n", "u1"), ("corners", "<i4", 3)]))
    faces["n"], faces["corners"] = 3, mesh.faces
    return header.encode() + mesh.vertices.astype("<f4").tobytes() + faces.tobytes()


def _obj(mesh: Mesh) -> bytes:
    lines = ["# nanometers, x y z"]
    lines += [f"v {x:.3f} {y:.3f} {z:.3f}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (mesh.faces.astype(np.int64) + 1).tolist()]
    return ("\n".join(lines) + "\n").encode()


def _precomputed(mesh: Mesh) -> bytes:
    head = np.array([len(mesh.vertices)], "<u4")
    return head.tobytes() + mesh.vertices.astype("<f4").tobytes() + mesh.faces.astype("<u4").tobytes()
