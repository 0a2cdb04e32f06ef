"""The label artefact: one class of one crop as a multiscale group that is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics import __version__
from connectomics.errors import WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import ArrayWriter, create_multiscale, ensure_group

BLOCK = (256, 256, 256)  # voxels held at once; whole chunks of the arrays that are written


@contextmanager
def label_array(
    location: Path, grid: VoxelGrid, dtype: np.dtype[Any], *, class_name: str, kind: str, about: Mapping[str, Any]
) -> Iterator[ArrayWriter]:
    """A writer for the labels at ``location`` (``{out}/{dataset}.zarr/{crop}/{class}``), replaced when the block ends.

    Everything goes to a hidden folder beside it, which takes its place when the block ends without an error and is
    removed otherwise; so a killed run never leaves labels that look finished.

    Args:
        location: local path of the class's group.
        grid: where the labels lie, nm.
        dtype: unsigned integer that holds every id.
        kind: ``semantic`` (0/1) or ``instance`` (ids).
        about: what else the ``connectomics`` attribute says (parameters, source).
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


def publish(partial: Path, location: Path) -> None:
    """Put what is finished in the place of ``location``; `WriteError`."""
    try:
        if location.exists():
            shutil.rmtree(location)
        partial.rename(location)
    except OSError as error:
        raise WriteError(f"cannot put the labels at {location}: {error.strerror or error}") from error


def write_whole(writer: ArrayWriter, labels: NDArray[Any]) -> None:
    """Write an array that is in memory, block by block, so that no second copy of it is made."""
    for begin, block in VoxelGrid((1, 1, 1), (0, 0, 0), _shape(labels)).blocks(BLOCK):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        writer.write(begin, labels[z, y, x])


def _shape(labels: NDArray[Any]) -> tuple[int, int, int]:
    return labels.shape[0], labels.shape[1], labels.shape[2]
