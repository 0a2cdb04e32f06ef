"""Pack labels into the zip that the challenge's portal takes, or write one array as a TIFF stack."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import box_of
from connectomics.cellmap.crop_table import CropTable
from connectomics.errors import InputError, WriteError, first_of
from connectomics.geometry import Index, VoxelGrid
from connectomics.io.artifacts import require_complete
from connectomics.io.formats.tiff import write_tiff
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import array_place
from connectomics.pipeline.results import ArrayFolder, Labels, Probabilities, chosen_arrays
from connectomics.progress import Progress, silent
from connectomics.submission import ExportResult, export_submission

_BLOCK_VOXELS = 1 << 25  # read at a time, at least one plane


def export(
    labels: Labels | str | Path,
    out: str | Path,
    *,
    crops: CropTable | str | Path | None = None,
    classes: Collection[str] | None = None,
    datasets: Collection[str] | None = None,
    probabilities: Probabilities | str | Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Pack labels for the rows of a crop table, on each crop's own grid, check the result, and return the findings.

    Args:
        labels: what `decode` returned, or a folder of labels (or probabilities).
        out: the submission, ``submission.zip``; a name without ``.zip`` gives a folder.
        crops: crop table, its path, or "challenge"; default: the table that was predicted, else the challenge's.
        classes, datasets: only these.
        probabilities: what `predict` returned: borders of semantic classes then come from it, finer than from labels.
        strict: refuse if a row of the table has no prediction.

    Raises:
        MissingError, UnknownNameError, InputError, WriteError: see `connectomics.submission.export_submission`.
    """
    source = Labels.open(labels)
    chosen = crops if crops is not None else source.crops
    table = CropTable.resolve(chosen if chosen is not None else "challenge").select(None, classes, datasets)
    finer = None if probabilities is None else Probabilities.open(probabilities).folder
    return export_submission(source.folder, out, crops=table, probabilities_dir=finer, strict=strict, progress=progress)


def export_tiff(
    labels: Labels | Probabilities | str | Path,
    out: str | Path,
    *,
    class_name: str | None = None,
    dataset: str | None = None,
    crop: str | None = None,
    box: str | None = None,
    progress: Progress | None = None,
) -> tuple[np.dtype[Any], VoxelGrid]:
    """Write labels or probabilities of one array as a TIFF stack with its voxel size, for Fiji, Amira and others.

    Memory is bounded: some planes are read at a time. Labels get the narrowest unsigned type that holds them.

    Args:
        labels: what `decode` or `predict` returned, or its folder, also on S3.
        out: the file, on a local disk; it must not exist, and appears in one step.
        class_name: the class; it, the data set and the crop may be left out if only one array is left.
        dataset: the data set.
        crop: the crop or box, as the folder names it.
        box: only this part, ``DATASET:z0,y0,x0:z1,y1,x1`` (nm).
        progress: called with the number of planes.

    Returns:
        The type of the values, and their grid.

    Raises:
        InputError: several arrays fit, or the box lies outside.
        WriteError: the file exists or cannot be written.
        UnknownNameError, MissingError, IncompleteError, MetadataError: there is no such finished array.
    """
    path = local_path(out)
    if path.exists():
        raise WriteError(f"{path} exists; remove it, or choose another name")
    named, region = (dataset, None) if box is None else box_of(box)
    if dataset not in (None, named):
        raise InputError(f"--dataset {dataset} and --box {box} name different data sets; leave --dataset out")
    folder = labels.folder if isinstance(labels, ArrayFolder) else Labels.open(labels).folder
    fits = chosen_arrays(folder, named and [named], crop and [crop], class_name and [class_name])
    if len(fits) != 1:
        names = first_of(("/".join(item) for item in fits), 6)
        raise InputError(
            f"a TIFF stack holds one array, and {len(fits)} in {folder} fit: {names}; choose one by --class, --dataset "
            "and --crop"
        )
    place = array_place(folder, *fits[0])
    require_complete(place, foreign=True)
    source = Multiscale.open(place)
    begin, grid = source.grid.part(source.grid.box if region is None else region)
    if grid.size == 0:
        raise InputError(f"the box {box} lies outside of {place}, which is {source.grid.box}")
    blocks = partial(_blocks, source, begin, grid)
    dtype = np.dtype(np.float32) if source.levels[0].dtype.kind == "f" else source.levels[0].dtype
    if dtype.kind == "u" and dtype.itemsize > 1:
        dtype = np.min_scalar_type(max(int(block.max()) for block in blocks()))
    if dtype.itemsize == 8:
        raise InputError(f"{place} has IDs beyond 32 bits, which TIFF programs do not read; give a smaller --box")
    report, done = progress or silent, 0

    def planes() -> Iterator[NDArray[Any]]:
        nonlocal done
        for block in blocks():
            for plane in block.astype(dtype, copy=False):
                yield plane
                done += 1
                report(done, grid.shape[0])

    write_tiff(path, planes(), dtype, grid)
    return dtype, grid


def _blocks(source: Multiscale, begin: Index, grid: VoxelGrid) -> Iterator[NDArray[Any]]:
    """Whole planes of a part of the finest level, some at a time."""
    depth = max(1, min(source.levels[0].chunks[0], _BLOCK_VOXELS // (grid.shape[1] * grid.shape[2])))
    for first, block in grid.blocks((depth, *grid.shape[1:])):
        yield source.read_level(0, np.add(begin, first), block.shape, absent_is_missing=False)[0]
