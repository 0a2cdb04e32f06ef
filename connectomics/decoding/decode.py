"""Probabilities to labels, one class of one crop after the other, from artefact to artefact."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.components import ComponentsTask, needs_whole_array
from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.blocks.stitched import objects_of
from connectomics.decoding.blocks.table import TABLE_FILE, write_table
from connectomics.decoding.cellmap_postprocess import components, fill_holes, filter_by_size, semantic_to_instance
from connectomics.decoding.labels import BLOCK, label_array, write_whole
from connectomics.decoding.parameters import DecodeParameters, default_parameters
from connectomics.decoding.probabilities import above, read_block
from connectomics.errors import IncompleteError, InputError, MetadataError, MissingError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import update_attrs
from connectomics.tasks import run_task

#: Told after each array: how many are done, how many there are, and which one it was.
Progress = Callable[[int, int, str], None]


#: Components of arrays of more voxels than this are found block by block; such an array takes about 0.8 GB whole.
BLOCKWISE_ABOVE = 512**3


@dataclass(frozen=True)
class DecodedArray:
    """One label array: where it is, how many objects (a mask: 0 or 1) it holds, and whether it was there already."""

    dataset: str
    crop: str
    class_name: str
    location: str
    objects: int
    skipped: bool


def decode_class(
    probabilities: NDArray[Any], voxel_size: Sequence[float], parameters: DecodeParameters
) -> NDArray[Any]:
    """Labels of one class in memory.

    Args:
        probabilities: (D, H, W), see `above`.
        voxel_size: nm, z y x.
        parameters: what to do.

    Returns:
        (D, H, W): uint8 0/1 for the method ``threshold``, else ids 1..n in the narrowest unsigned type.
    """
    return decode_mask(above(probabilities, parameters.threshold), voxel_size, parameters)


def decode_mask(mask: NDArray[np.bool_], voxel_size: Sequence[float], parameters: DecodeParameters) -> NDArray[Any]:
    """`decode_class` from the thresholded mask on."""
    if mask.ndim != 3:
        raise InputError(f"decoding needs a (D, H, W) volume, found shape {mask.shape}")
    least = parameters.min_voxels(voxel_size)
    if parameters.method != "threshold":
        return semantic_to_instance(
            mask,
            least,
            parameters.method,
            connectivity=parameters.connectivity,
            fill_holes=parameters.fill_holes,
            min_distance=parameters.min_distance_nm,
            voxel_size=voxel_size,
        )
    if parameters.is_local or mask.size == 0:
        return mask.astype(np.uint8)
    pieces = components(mask, parameters.connectivity)
    if parameters.fill_holes:
        pieces = fill_holes(pieces, parameters.connectivity)
    return (filter_by_size(pieces, least) > 0).astype(np.uint8)


def decode_between(
    mask: NDArray[np.bool_], walls: NDArray[np.uint8], voxel_size: Sequence[float], parameters: DecodeParameters
) -> NDArray[Any]:
    """`decode_mask` for objects that touch: found where there is no wall, then grown back over it.

    Args:
        mask: (D, H, W), where the class is.
        walls: (D, H, W) uint8, the probability (value/255) of the class that separates the objects.
        voxel_size: nm, z y x.
        parameters: ``threshold`` holds for the walls too.

    Returns:
        (D, H, W) ids. Growing is a watershed on the walls' probability: objects meet where it is highest.
    """
    from skimage.segmentation import watershed

    cores = decode_mask(mask & ~above(walls, parameters.threshold), voxel_size, parameters)
    grown = watershed(walls, cores.astype(np.int32), mask=mask)
    return np.asarray(grown).astype(cores.dtype)


def decode_predictions(
    predictions_dir: str | Path,
    output_dir: str | Path,
    parameters: Mapping[str, DecodeParameters] | None = None,
    *,
    classes: Collection[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    blockwise_above: int = BLOCKWISE_ABOVE,
    block_progress: Progress | None = None,
) -> list[DecodedArray]:
    """Decode every class of every crop of a predictions folder.

    Reads ``{dataset}.zarr/{crop}/{class}`` (uint8 probabilities) and writes labels at the same places below
    ``output_dir``, on the same grids. Labels that were made from the same prediction with the same parameters are left
    as they are, so a killed run goes on where it stopped; others are replaced. Masks without a minimum size or hole
    filling, and the components of large arrays, are made block by block (`connectomics.decoding.blocks`), with the same
    result; the rest hold one class of one crop (about 6 bytes a voxel; watershed about 16 for the largest object's
    box). Beside instances lies a table of them, ``instances.csv``.

    Args:
        parameters: by class; a class without an entry gets its kind's defaults.
        classes: decode only these.
        overwrite: decode again also what is already there.
        progress: told after each array.
        blockwise_above: voxels; components of larger arrays are found block by block (method ``cc3d`` without hole
            filling and boundary).
        block_progress: told after each block of such an array: how many steps of it are done, and how many there are.

    Raises:
        MissingError: no predictions there. IncompleteError: a prediction is only half written (checked for all before
        the first is decoded). MetadataError: an array that is no prediction. UnknownNameError: a class of ``classes``
        that no crop has.
    """
    root, out = Path(predictions_dir), Path(output_dir)
    if root.resolve() == out.resolve():
        raise InputError(f"labels cannot be written into the predictions folder {root}; give another output folder")
    found = list(find_arrays(root))
    if not found:
        raise MissingError(f"no predictions in {root}: expected {{dataset}}.zarr/{{crop}}/{{class}}; run predict first")
    known = {name for _, _, name in found}
    for name in classes or ():
        if name not in known:
            raise unknown_name("class", name, known, str(root))
    found = [place for place in found if classes is None or place[2] in classes]
    sources = [open_prediction(root, *place) for place in found]
    wanted = [(parameters or {}).get(name) or default_parameters(name) for _, _, name in found]
    between = [
        open_prediction(root, dataset, crop, chosen.boundary) if chosen.boundary else None
        for (dataset, crop, _), chosen in zip(found, wanted, strict=True)
    ]
    results = []
    for done, (place, source, walls, chosen) in enumerate(zip(found, sources, between, wanted, strict=True), start=1):
        dataset, crop, name = place
        result = _decode_array(
            source, walls, out, dataset, crop, name, chosen, overwrite, blockwise_above, block_progress
        )
        results.append(result)
        if done == len(found) or found[done][:2] != (dataset, crop):
            update_attrs(out / f"{dataset}.zarr" / crop, {"connectomics": {"artefact": "labels", "complete": True}})
        if progress is not None:
            progress(done, len(found), f"{dataset}/{crop}/{name}")
    return results


def find_arrays(root: str | Path) -> Iterator[tuple[str, str, str]]:
    """(data set, crop, class) of every array below a folder of predictions or labels, in sorted order."""
    for dataset in store.list_groups(str(root)):
        if not dataset.endswith(".zarr"):
            continue
        for crop in store.list_groups(store.join(str(root), dataset)):
            for name in store.list_groups(store.join(str(root), dataset, crop)):
                yield dataset.removesuffix(".zarr"), crop, name


def open_prediction(root: Path, dataset: str, crop: str, name: str) -> Multiscale:
    """The opened prediction, checked to be one and to be whole."""
    location = root / f"{dataset}.zarr" / crop / name
    about = store.read_attrs(str(location)).get("connectomics")
    if not isinstance(about, dict) or about.get("artefact") != "probability":
        kind = about.get("artefact") if isinstance(about, dict) else "no 'connectomics' attribute"
        raise MetadataError(f"{location}: expected probabilities written by predict, found {kind}")
    if about.get("complete") is not True:
        raise IncompleteError(f"{location} is only half written; run predict to its end first")
    source = Multiscale.open(str(location))
    if source.levels[0].dtype != np.uint8:
        raise MetadataError(f"{location}: probabilities must be uint8 (value/255), found {source.levels[0].dtype}")
    return source


def _decode_array(
    source: Multiscale,
    walls: Multiscale | None,
    out: Path,
    dataset: str,
    crop: str,
    name: str,
    parameters: DecodeParameters,
    overwrite: bool,
    blockwise_above: int,
    block_progress: Progress | None,
) -> DecodedArray:
    location = out / f"{dataset}.zarr" / crop / name
    made_from = {k: v for k, v in source.attrs["connectomics"].items() if k not in ("artefact", "complete")}
    about: dict[str, Any] = {"decode": parameters.to_dict(), "source": made_from}
    if not overwrite and location.exists():
        there = store.read_attrs(str(location)).get("connectomics", {})
        if there.get("complete") is True and all(there.get(k) == v for k, v in about.items()):
            return DecodedArray(dataset, crop, name, str(location), int(there["objects"]), True)
    grid = source.levels[0].grid
    if parameters.is_local:
        # Whether there is any object is known only at the end, so a mask's attribute is set after its blocks.
        present = False
        with label_array(location, grid, np.dtype(np.uint8), class_name=name, kind="semantic", about=about) as writer:
            for begin, block in grid.blocks(BLOCK):
                mask = above(read_block(source, begin, block.shape), parameters.threshold)
                present = present or bool(mask.any())
                writer.write(begin, mask.view(np.uint8))
            _count(Path(writer.location).parent, int(present))
        return DecodedArray(dataset, crop, name, str(location), int(present), False)
    if grid.size > blockwise_above and not needs_whole_array(parameters):
        task = ComponentsTask(source.location, str(location), name, parameters, source=made_from)
        tell = None if block_progress is None else partial(_tell, block_progress, f"{dataset}/{crop}/{name}")
        run_task(task, None, tell, overwrite=overwrite or not task.is_begun)
        return DecodedArray(dataset, crop, name, str(location), objects_of(task), False)
    mask = np.zeros(grid.shape, np.bool_)
    for begin, block in grid.blocks(BLOCK):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        mask[z, y, x] = above(read_block(source, begin, block.shape), parameters.threshold)
    if walls is None:
        labels = decode_mask(mask, grid.voxel_size, parameters)
    else:
        labels = decode_between(mask, read_on(walls, grid), grid.voxel_size, parameters)
    objects = int(labels.max(initial=0))
    del mask
    about["objects"] = objects
    with label_array(location, grid, labels.dtype, class_name=name, kind=parameters.kind, about=about) as writer:
        write_whole(writer, labels)
        if parameters.kind == "instance":
            found = Pieces.measured(labels, objects, (0, 0, 0), labels.shape)
            write_table(Path(writer.location).parent / TABLE_FILE, found, grid)
    return DecodedArray(dataset, crop, name, str(location), objects, False)


def read_on(source: Multiscale, grid: VoxelGrid) -> NDArray[np.uint8]:
    """The probabilities of another class on this grid, read block by block."""
    values = np.zeros(grid.shape, np.uint8)
    for begin, block in grid.blocks(BLOCK):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        values[z, y, x] = np.rint(source.read_raw(block)[0]).astype(np.uint8)
    return values


def _tell(progress: Progress, name: str, stage: str, done: int, number: int) -> None:
    progress(done, number, f"{name} ({stage})")


def _count(group: Path, objects: int) -> None:
    about = store.read_attrs(str(group))["connectomics"]
    update_attrs(group, {"connectomics": {**about, "objects": objects}})
