"""Check one array of a submission: its grid against the crop table, and its values, read one slab at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import TableEntry
from connectomics.errors import MetadataError, number_of
from connectomics.geometry import Triple, VoxelGrid, index
from connectomics.metrics.challenge.align import source_of
from connectomics.metrics.challenge.rules import instance_limit
from connectomics.metrics.challenge.zarr_v2 import Archive, ZarrArray
from connectomics.submission.findings import Finding, error, warning

_EXPORT = "export it on the table's grid"
# Without a ground truth, assume so many instances in a crop: most crops hold one or two cells or nuclei.
_FEW = {"cell": 1, "nuc": 1}
_USUAL = 5


def open_array(archive: Archive, path: str) -> ZarrArray:
    """Open one array; `MetadataError` if it is not a Zarr v2 array that can be decoded."""
    meta = archive.json(f"{path}/.zarray")
    if meta is not None and meta.get("zarr_format") != 2:
        raise MetadataError(f"{path}/.zarray: expected zarr_format 2, got zarr_format {meta.get('zarr_format')!r}")
    return ZarrArray(archive, path)


def slabs(archive: Archive, array: ZarrArray) -> Iterator[NDArray[Any] | None]:
    """Yield consecutive slabs along the first axis, one chunk thick; None for a slab with no stored chunk.

    Raises `CorruptDataError` with the path of a chunk that cannot be decoded.
    """
    counts = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    for first in range(counts[0]):
        names = (f"{array.path}/{array.chunk_name((first, *rest))}" for rest in np.ndindex(*counts[1:]))
        if array.fill == 0 and not any(name in archive for name in names):
            yield None
            continue
        begin = first * array.chunks[0]
        thickness = min(array.chunks[0], array.shape[0] - begin)
        yield array.read((begin, 0, 0), (thickness, *array.shape[1:]))


# -- the grid ----------------------------------------------------------------------------------------------------------
def check_grid(array: ZarrArray, entry: TableEntry) -> Iterator[Finding]:
    """Compare voxel size, translation, shape and axis order with the table."""
    target, path = entry.grid, array.path
    shape = index(array.shape)
    try:
        own = source_of(array, array.attrs)
    except MetadataError as problem:
        yield error("attributes", path, str(problem), "three numbers, nm, z y x", _EXPORT)
        return
    size, first = own.voxel_size, own.translation
    if size is None:
        yield _absent_attribute(path, "voxel_size", target.voxel_size, shape, target)
    if first is None:
        yield _absent_attribute(path, "translation", target.translation, shape, target)
    if swapped := list(_axis_order(path, size, first, shape, target)):
        yield from swapped
    elif size is not None and first is not None:
        yield from _check_placement(path, VoxelGrid(size, first, shape), target)
    elif size is not None and not _same(size, target.voxel_size):
        yield error("voxel-size", path, f"voxel_size {_text(size)}", _text(target.voxel_size), _EXPORT)


def _check_placement(path: str, own: VoxelGrid, target: VoxelGrid) -> Iterator[Finding]:
    """Check whether an array with all of its attributes lies on the table's grid, or at least covers it."""
    same_size = _same(own.voxel_size, target.voxel_size)
    rule = "shape" if same_size else "voxel-size"
    share = math.prod(target.box.intersect(own.box).extent) / max(math.prod(target.box.extent), 1e-300)
    if same_size and own.shape == target.shape:
        shift = target.to_index(own.translation)
        worst = float(np.max(np.abs(shift)))
        if worst >= 1e-3:
            what = f"translation {_text(own.translation)}, off by {_text([float(s) for s in shift])} voxels"
            hint = "it is the center of the first voxel, not its corner; " if abs(worst - 0.5) < 1e-3 else ""
            kind = error if worst >= 0.5 else warning
            yield kind("translation", path, what, _text(target.translation), hint + _EXPORT)
    elif own.shape == target.shape:
        what = f"voxel_size {_text(own.voxel_size)} with the table's shape"
        yield error("voxel-size", path, what, _text(target.voxel_size), f"the portal would stretch it; {_EXPORT}")
    elif share < 1 - 1e-6:
        what = f"{own}, which covers {share:.1%} of the crop"
        yield error(rule, path, what, str(target), f"the rest counts as background; {_EXPORT}")
    else:
        what = f"{own}, another {rule.replace('-', ' ')}"
        yield warning(rule, path, what, str(target), f"the portal resamples it by its own rules; {_EXPORT}")


def _axis_order(
    path: str, size: Triple | None, first: Triple | None, shape: Sequence[float], target: VoxelGrid
) -> Iterator[Finding]:
    """Find values that are the table's in another order."""
    # A permuted shape is wrong only if the voxel size says that it should be the table's.
    comparable = size is None or _same(sorted(size), sorted(target.voxel_size))
    for name, own, wanted in (
        ("voxel_size", size, target.voxel_size),
        ("translation", first, target.translation),
        ("shape", shape if comparable else None, target.shape),
    ):
        if own is not None and not _same(own, wanted) and _same(sorted(own), sorted(wanted)):
            what = f"{name} {_text(own)}, the table's in another order"
            yield error("axis-order", path, what, f"{_text(wanted)} (z, y, x)", _EXPORT)


def _absent_attribute(path: str, name: str, value: Triple, shape: Sequence[int], target: VoxelGrid) -> Finding:
    """Report an absent attribute: harmless for the score if the shape is the crop's, else the array is misplaced."""
    rule, expected = f"no-{name.replace('_', '-')}", f"{name} = {list(value)}"
    if tuple(shape) == target.shape:
        advice = "add it; the portal assumes the crop's grid, because the shape matches"
        return warning(rule, path, f"no attribute {name}", expected, advice)
    what = f"no attribute {name} and shape {tuple(shape)}"
    return error(
        rule, path, what, f"{expected} and shape {target.shape}", f"the portal would center or pad it; {_EXPORT}"
    )


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return bool(np.allclose(one, other, rtol=1e-5, atol=1e-6))


def _text(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:.8g}" for v in values) + "]"


# -- the values --------------------------------------------------------------------------------------------------------
@dataclass
class Summary:
    """Values of one array.

    Attributes:
        low, high: smallest and largest value (0 if nothing is stored), without NaN.
        foreground: voxels above 0. nan: voxels that are NaN.
        whole: whether all values are whole numbers.
        used: number of different values above 0; counted with the components, for 8 and 16 bits only.
        components: 26-connected components of equal value, as the scorer counts instances; None if not counted.
    """

    low: float = 0.0
    high: float = 0.0
    foreground: int = 0
    nan: int = 0
    whole: bool = True
    used: int = 0
    components: int | None = None


def summarize(archive: Archive, array: ZarrArray, count_components: bool) -> Summary:
    """Read an array slab by slab; memory is about six bytes per voxel of a slab."""
    from connectomics.metrics.challenge.blocks import SlabComponents  # with compiled code, slow to import

    result = Summary()
    counter = SlabComponents() if count_components else None
    unsigned = array.dtype.kind in "bu"
    narrow = count_components and array.dtype.kind == "u" and array.dtype.itemsize <= 2
    used = np.zeros(1 << 16, np.bool_) if narrow else None
    for slab in slabs(archive, array):
        if slab is None or not slab.any():
            if counter is not None:
                counter.skip()
            continue
        if slab.dtype.kind == "f":
            missing = np.isnan(slab)
            result.nan += int(missing.sum())
            slab = np.where(missing, 0, slab)
            result.whole = result.whole and bool(np.all(slab == np.rint(slab)))
        result.low = result.low if unsigned else min(result.low, float(slab.min()))
        result.high = max(result.high, float(slab.max()))
        result.foreground += int(np.count_nonzero(slab if unsigned else slab > 0))
        if used is not None:
            used[slab] = True
        if counter is not None and result.whole:
            counter.add(np.ascontiguousarray(slab, np.int64 if slab.dtype.kind == "f" else None))
    if used is not None:
        result.used = int(used[1:].sum())
    if counter is not None and result.whole:
        parents = counter.parents()
        result.components = int(np.count_nonzero(parents == np.arange(parents.size))) - 1
    return result


def check_content(
    archive: Archive, array: ZarrArray, class_name: str, truth: tuple[Archive, ZarrArray] | None
) -> Iterator[Finding]:
    """Check the chunk names and values; `CorruptDataError` names a chunk that cannot be read.

    ``truth``: the ground truth of the array and where it is, if known.
    """
    path = array.path
    # Chunks with other names are not found and read as 0.
    strange = sorted(n for n in archive.files_below(path) if not n.startswith(".") and not array.is_chunk(n))
    if strange:
        what = f"{number_of(len(strange), 'file')} not of its chunks, such as {path}/{strange[0]}"
        advice = "they are not read; set dimension_separator and chunks in .zarray as they were written"
        yield error("chunk-names", path, what, f"names like {path}/{array.chunk_name((0, 0, 0))}", advice)
    is_instance = is_instance_class(class_name)
    found = summarize(archive, array, is_instance)
    if found.nan:
        what = f"{number_of(found.nan, 'voxel')} of NaN"
        yield warning("nan", path, what, "numbers", "they count as background; write 0")
    if found.low < 0:
        what = f"negative values (down to {found.low:.6g}) in {array.dtype}"
        advice = "ids have wrapped or background is not 0; export it with an unsigned type that holds the ids"
        yield error("dtype", path, what, "0 for background, ids above", advice)
    if array.dtype.kind == "f" and found.whole:
        advice = "it is read, but wastes space; export it again"
        yield warning("dtype", path, f"whole numbers as {array.dtype}", "unsigned integers", advice)
    elif array.dtype.kind == "f":
        what = f"fractions (up to {found.high:.6g}) in {array.dtype}, such as probabilities"
        yield error("dtype", path, what, "labels", "every voxel above 0 counts as present; decode and export it")
    largest = None
    if truth is not None:
        largest = max((float(slab.max()) for slab in slabs(*truth) if slab is not None and slab.size), default=0.0)
    if is_instance and found.components is not None:
        yield from _check_instances(array, found, found.components, class_name, largest)
    if found.foreground == 0 and largest is None:
        advice = "every object of the ground truth counts as missed; check the threshold"
        yield warning("empty", path, "no voxel above 0", "some, unless the class is absent", advice)
    elif found.foreground == 0 and largest:
        advice = "all of it counts as missed; check the threshold"
        yield error("empty", path, "no voxel above 0", "some: the ground truth is not empty", advice)


def _check_instances(
    array: ZarrArray, found: Summary, components: int, class_name: str, largest: float | None
) -> Iterator[Finding]:
    """Check ids and number of instances; ``largest`` is the largest id of the ground truth, None if unknown."""
    path = array.path
    top = np.iinfo(array.dtype).max if array.dtype.kind == "u" and array.dtype.itemsize <= 2 else None
    if top is not None and found.used == top and components > top:
        what = f"{number_of(components, 'object')}, but ids 1 to {top} of {array.dtype} all in use"
        advice = "ids beyond the type have probably wrapped; export it with a type that holds them"
        yield error("wrapped-ids", path, what, "a type that holds every id", advice)
    if found.high > np.iinfo(np.uint32).max:
        what, advice = f"ids up to {found.high:.6g}", "renumber them; export does"
        yield warning("large-ids", path, what, "ids that fit in 32 bits", advice)
    assumed = _FEW.get(class_name, _USUAL) if largest is None else int(largest)
    limit, what = math.floor(instance_limit(assumed)), number_of(components, "object")
    if largest == 0 or components <= instance_limit(assumed):
        return
    if largest is not None:
        advice = "the crop is dropped from the class's score; remove small objects"
        yield error("too-many-instances", path, what, f"at most {limit} for {assumed} true ones", advice)
    else:
        needed = next(n for n in range(assumed, components + 2) if components <= instance_limit(n))
        advice = f"the crop is dropped unless the ground truth holds at least {needed}; remove small objects"
        yield warning("too-many-instances", path, what, f"at most {limit} if there are {assumed}", advice)
