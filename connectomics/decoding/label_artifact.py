"""The label artefact: one class of one crop as a multiscale group that is there whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics import __version__
from connectomics.decoding.blocks.table import PARQUET_FILE, TABLE_FILE
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.artifacts import Difference, about, changed_inputs, identity, publish
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import ArrayWriter, create_multiscale, ensure_group
from connectomics.tasks.block_task import TASK_FILE

#: what decode writes into a class's folder
_NAMES = re.compile(rf"\..*|s\d+|{re.escape(TASK_FILE)}|{re.escape(TABLE_FILE)}|{re.escape(PARQUET_FILE)}")
BLOCK = (256, 256, 256)  # voxels held at once; whole chunks of the arrays that are written


@contextmanager
def label_array(
    location: Path, grid: VoxelGrid, dtype: np.dtype[Any], *, class_name: str, kind: str, about: Mapping[str, Any]
) -> Iterator[ArrayWriter]:
    """A writer for the labels at ``location`` (``{out}/{dataset}.zarr/{crop}/{class}``), put there when the block ends.

    Everything goes to a hidden folder beside it, which takes its place when the block ends without an error and is
    removed otherwise; so a killed run never leaves labels that look finished. One process at a time: see
    `connectomics.tasks.lock.leading`.

    Args:
        location: local path of the class's group; what is there is replaced, see `standing_labels`.
        grid: where the labels lie, nm.
        dtype: unsigned integer that holds every id.
        kind: ``semantic`` (0/1) or ``instance`` (ids).
        about: what else the ``connectomics`` attribute says (parameters, source, provenance).
    """
    partial = partial_of(location)
    attrs = label_attrs(grid, class_name=class_name, kind=kind, about=about)
    ensure_group(location.parent)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield create_multiscale(partial, [grid], dtype, attrs={"connectomics": attrs}, name=class_name)[0]
        publish(partial, location)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(location: Path) -> Path:
    """The hidden folder beside ``location`` that holds it while it is made."""
    return location.with_name(f".{location.name}.partial")


def label_attrs(grid: VoxelGrid, *, class_name: str, kind: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The ``connectomics`` attribute of finished labels; the arguments are those of `label_array`."""
    return {
        "artefact": "labels",
        "class_name": class_name,
        "kind": kind,
        "grid": grid.to_dict(),
        "version": __version__,
        **about,
        "complete": True,
    }


def inputs_of(location: str, parameters: DecodeParameters) -> dict[str, str]:
    """Role -> identity of what is decoded: the probabilities at ``location`` and the class that separates its objects.

    Heads are written with the probabilities, by the same run, and have the same identity.
    """
    found = {"probabilities": identity(Multiscale.open(location))}
    if parameters.boundary:
        found["boundary"] = identity(
            Multiscale.open(store.join(location.rstrip("/").rpartition("/")[0], parameters.boundary))
        )
    return found


def standing_labels(
    location: Path, parameters: DecodeParameters, made_from: Mapping[str, str], *, overwrite: bool = False
) -> dict[str, Any] | None:
    """The ``connectomics`` attribute of the labels at ``location`` if they are those of this very decoding, complete.

    Args:
        made_from: role -> identity of the inputs, `connectomics.io.artifacts`.
        overwrite: whether labels of another decoding may be replaced: they count as none.

    Returns:
        None if labels are to be made: none are there, or they may be replaced.

    Raises:
        WriteError: labels of another decoding (without ``overwrite``), or something that decode did not write.
    """
    entries = list(location.iterdir()) if location.is_dir() else []
    if not entries and not location.exists():
        return None
    there = about(location)
    foreign = [path for path in entries if not _NAMES.fullmatch(path.name)]
    if (entries or location.is_file()) and (there.get("artefact") != "labels" or foreign):
        what = foreign[0] if foreign and there.get("artefact") == "labels" else location
        raise WriteError(
            f"{what} was not written by decode and is left alone; choose another output folder, or move it away"
        )
    if overwrite or not entries:
        return None
    if there.get("complete") is not True:
        raise WriteError(f"{location} holds labels that are only half written; overwrite them (--overwrite)")
    mine = parameters.to_dict()
    names = [name for name in mine if there.get("decode", {}).get(name) != mine[name]]
    difference = Difference(names, changed_inputs(there.get("made_from", {}), made_from))
    if difference:
        raise WriteError(
            f"{location} holds labels {difference}; overwrite them (--overwrite), or choose another output folder"
        )
    return there


def write_whole(writer: ArrayWriter, labels: NDArray[Any]) -> None:
    """Write an array that is in memory, block by block, so that no second copy of it is made."""
    for begin, block in VoxelGrid((1, 1, 1), (0, 0, 0), _shape(labels)).blocks(BLOCK):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        writer.write(begin, labels[z, y, x])


def _shape(labels: NDArray[Any]) -> tuple[int, int, int]:
    return labels.shape[0], labels.shape[1], labels.shape[2]
