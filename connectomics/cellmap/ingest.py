"""Write volumes of any known format into the CellMap layout, block by block.

The result is a data root like any other (`connectomics.cellmap.catalog`): raw as a pyramid below ``recon-1/em``, the
labels of each class as one below ``recon-1/labels/groundtruth/crop{N}``, with the annotation that says what its values
mean. Each volume appears in one step. Memory: a few blocks, whatever the volume's size.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation, Kind
from connectomics.cellmap.catalog import EM, GROUND_TRUTH, Catalog
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import csv_rows
from connectomics.errors import InputError, MetadataError, MissingError, WriteError, as_write_error, first_of
from connectomics.geometry import Index, Triple, VoxelGrid, index, triple
from connectomics.io.artifacts import ATTRIBUTE, Provenance, about
from connectomics.io.formats import VolumeSource
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.replacing import not_ours, publish, unfinished_folder
from connectomics.io.write import ArrayWriter, build_levels, create_multiscale, update_attrs
from connectomics.progress import Progress, silent

log = logging.getLogger(__name__)

_BLOCK = (64, 512, 512)  # voxels held at a time: whole chunks
_PLANES = 1 << 28  # bytes of planes decoded at a time, if a block costs as much as its planes
_INGESTED = "ingested"  # the artifact kind of volumes written here
_LEAST = 32  # voxels: a level with a shorter longest side needs no coarser one

#: Converts stored values of a block that starts at an index.
Convert = Callable[[NDArray[Any], Sequence[int]], NDArray[Any]]


@dataclass(frozen=True)
class Known:
    """Which voxels of drawn labels count as annotated; all others are unknown.

    Attributes:
        unknown: stored value that means "not annotated".
        mask: volume of the labels' shape, nonzero where voxels are annotated.
        slices: annotated sections (z); None: all.
    """

    unknown: int | None = None
    mask: VolumeSource | None = None
    slices: frozenset[int] | None = None

    def of(self, values: NDArray[Any], begin: Sequence[int]) -> NDArray[np.bool_]:
        """Return the known voxels of a block of stored values that starts at index ``begin``."""
        known = np.ones(values.shape, bool) if self.unknown is None else values != self.unknown
        if self.mask is not None:
            known &= self.mask.read(begin, values.shape) != 0
        if self.slices is not None:
            drawn = [begin[0] + z in self.slices for z in range(values.shape[0])]
            known &= np.asarray(drawn)[:, None, None]
        return known


@dataclass(frozen=True)
class Drawn:
    """The labels of one class in a volume.

    Attributes:
        class_name: name of the class.
        source: the volume.
        kind: ``semantic`` or ``instance``; None: ``instance`` if the challenge scores the class by instances and there
            is more than one id.
        values: stored values that are this class, None: all but 0. Instance ids are kept.
    """

    class_name: str
    source: VolumeSource = field(repr=False)
    kind: Kind | None = None
    values: frozenset[int] | None = None

    def inside(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where stored values are this class."""
        if self.values is None:
            return values != 0
        dtype = np.dtype(np.uint8) if values.dtype == np.bool_ else values.dtype
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        return np.isin(values, np.array([v for v in self.values if low <= v <= high], dtype))


def ingest_raw(
    root: Path,
    dataset: str,
    source: VolumeSource,
    voxel_size: Sequence[float] | None = None,
    value_range: Sequence[float] | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write raw as ``{root}/{dataset}/{dataset}.zarr/recon-1/em/fibsem-uint8`` with its pyramid.

    Args:
        voxel_size: nm, z y x; None: as in the file. If the file gives no position, the first voxel's center is the
            origin of the data set's world.
        value_range: values mapped linearly to 0 and 255 of uint8, and clipped; None: values are kept, and the group is
            called ``fibsem-{dtype}``.

    Raises:
        InputError: no voxel size, or an invalid name.
        WriteError: it exists already. Errors of the reader.
    """
    size = triple(voxel_size, "voxel_size") if voxel_size is not None else source.voxel_size
    if size is None:
        raise InputError(f"{source.location} does not contain its voxel size; give --voxel-size z,y,x in nm")
    if value_range is not None and not value_range[0] < value_range[1]:
        raise InputError(f"the range must be two ascending values, got {value_range}")
    is_byte = value_range is not None or source.dtype == np.bool_
    dtype = np.dtype(np.uint8) if is_byte else source.dtype.newbyteorder("=")
    first = (0.0, 0.0, 0.0) if source.begin is None else _center(source.begin, size)
    grid = VoxelGrid(size, first, index(source.shape))
    em = _data_set(root, dataset) / EM
    place = em / f"fibsem-{dtype.name}"
    others = {path.name for path in em.glob("[!.]*/")} - {place.name}
    if others:
        raise WriteError(f"{em} holds raw already ({', '.join(others)}); remove it, or give another --dataset name")

    def convert(values: NDArray[Any], begin: Sequence[int]) -> NDArray[Any]:
        if not np.isfinite(values).all():
            raise InputError(
                f"{source.location} holds values that are not finite in the block at {tuple(begin)}, voxels z y x; "
                "replace them, for example by the mean"
            )
        if value_range is None:
            return values.astype(dtype, copy=False)
        low, high = value_range
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    labels = sorted((_data_set(root, dataset) / GROUND_TRUTH).glob("crop*/*/s0"))
    before = Multiscale.open(str(place)).grid if place.exists() and labels else grid
    if (before.voxel_size, before.translation) != (grid.voxel_size, grid.translation):
        crops = first_of(sorted({label.parent.parent.name for label in labels}), 3)
        log.warning(
            "%s: the raw has another voxel size or position now, and labels stay where they were drawn on the earlier "
            "one (%s); ingest them again", dataset, crops,
        )  # fmt: skip
    with _placed(place, overwrite) as folder:
        (writer,) = create_multiscale(folder, [grid], dtype, name=place.name)
        _copy(source, writer, convert, progress)
        build_levels(folder, _levels(grid), "raw")
    return place


def ingest_labels(
    root: Path,
    dataset: str,
    crop: str,
    drawn: Drawn,
    voxel_size: Sequence[float] | None = None,
    begin: Sequence[float] | None = None,
    known: Known | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the labels of one class as ``.../labels/groundtruth/{crop}/{class}`` with pyramid and annotation.

    Args:
        voxel_size: nm, z y x; None: as in the file, else as the raw.
        begin: nm, z y x, from the first face of the raw to that of the labels; None: the world position in the file,
            else 0.
        known: which voxels are annotated; None: all.

    Raises:
        MissingError: the data set has no raw yet.
        InputError: shapes that do not fit, values that are no ids, an invalid name.
        WriteError: it exists already.
    """
    source, chosen = drawn.source, known or Known()
    raw = Multiscale.open(Catalog.open(str(root)).raw_location(dataset)).grid
    size = triple(voxel_size, "voxel_size") if voxel_size is not None else source.voxel_size or raw.voxel_size
    if voxel_size is None and source.shape == raw.shape and not np.allclose(size, raw.voxel_size, rtol=1e-3):
        log.warning(
            "%s has the shape of the raw of %s, but voxels of %s nm, as the file says, instead of %s; give "
            "--voxel-size if they are the same voxels", source.location, dataset, _nm(size), _nm(raw.voxel_size),
        )  # fmt: skip
    if begin is None and source.begin is not None:
        face = source.begin
    else:
        face = triple(np.add(raw.box.begin, triple(begin or (0.0, 0.0, 0.0), "begin")))
    grid = VoxelGrid(size, _center(face, size), index(source.shape))
    _check_labels(drawn, chosen, crop)
    begins, ends = _nm(grid.box.begin), _nm(grid.box.end)
    about = f"({_nm(raw.box.begin)} to {_nm(raw.box.end)} nm); check --begin and --voxel-size"
    if grid.box.intersect(raw.box).is_empty:
        raise InputError(
            f"{source.location}: labels from {begins} to {ends} nm lie outside the raw of {dataset} {about}"
        )
    low, high = np.subtract(raw.box.begin, grid.box.begin), np.subtract(grid.box.end, raw.box.end)
    far = np.maximum(size, raw.voxel_size)
    beyond = np.any(np.maximum(low, high) > far)
    if beyond or (begin is None and source.begin is None and np.any(high < -far)):
        does = "reach beyond" if beyond else "cover a part of"
        message = "%s: labels from %s to %s nm %s the raw of %s %s"
        log.warning(message, source.location, begins, ends, does, dataset, about)
    largest, several = _survey(drawn, chosen)
    kind = drawn.kind or ("instance" if is_instance_class(drawn.class_name) and several else "semantic")
    ids = largest if kind == "instance" else 1
    unknown = _unknown_value(ids) if chosen != Known() else None
    dtype = np.min_scalar_type(max(ids, unknown or 0))
    counts = {"absent": 0, "unknown": 0}

    def convert(values: NDArray[Any], at: Sequence[int]) -> NDArray[Any]:
        annotated, inside = chosen.of(values, at), drawn.inside(values)
        out = np.where(inside, values if kind == "instance" else 1, 0).astype(dtype)
        counts["absent"] += int(np.count_nonzero(annotated & ~inside))
        counts["unknown"] += int(np.count_nonzero(~annotated))
        if unknown is not None:
            out[~annotated] = unknown
        return out

    place = _data_set(root, dataset) / GROUND_TRUTH / crop / drawn.class_name
    with _placed(place, overwrite) as folder:
        annotation = Annotation(drawn.class_name, kind, 0, unknown, counts)
        attrs = annotation.to_attrs(with_counts=False)
        (writer,) = create_multiscale(folder, [grid], dtype, attrs=attrs, name=drawn.class_name)
        _copy(source, writer, convert, progress)
        build_levels(folder, _levels(grid), "label")
        update_attrs(folder / "s0", annotation.to_attrs())
    if counts["unknown"] == grid.size:
        log.warning("no voxel of %s in %s is annotated: all are unknown", drawn.class_name, crop)
    return place


def drawn_by_table(source: VolumeSource, table: Path) -> list[Drawn]:
    """Return one `Drawn` for each class in a table of values.

    The table is a CSV file with the columns ``value`` and ``class`` and, optionally, ``kind`` (``semantic``,
    ``instance``). Several values may be one class.

    Raises `MissingError` if the file does not exist, `MetadataError` naming the row that cannot be read.
    """
    if not table.is_file():
        raise MissingError(f"no table of values at {table}; give a CSV file with the columns value and class")
    values: dict[str, set[int]] = {}
    kinds: dict[str, Kind | None] = {}
    for place, row in csv_rows(table.read_text(encoding="utf-8-sig"), ("value", "class"), str(table)):
        name, kind = row["class"].strip(), (row.get("kind") or "").strip() or None
        try:
            number = int(row["value"])
            if not -(2**63) <= number < 2**64:
                raise ValueError(number)
            values.setdefault(name, set()).add(number)
        except ValueError as error:
            raise MetadataError(f"{place}: value must be a whole number of 64 bits, got {row['value']!r}") from error
        if kind not in (None, "semantic", "instance"):
            raise MetadataError(f"{place}: kind must be semantic or instance, got {kind!r}")
        kinds[name] = cast(Kind | None, kind)
    if not values:
        raise MetadataError(f"{table} has no rows; expected value,class")
    return [Drawn(name, source, kinds[name], frozenset(found)) for name, found in values.items()]


def unlisted_values(source: VolumeSource, drawn: Sequence[Drawn], known: Known | None = None) -> list[int]:
    """Return annotated values of a label map, other than 0, that are no class of its table: the five smallest.

    Args:
        drawn: what `drawn_by_table` returned.
        known: which voxels are annotated; None: all.
    """
    listed, found = set().union(*(item.values or () for item in drawn)), set[int]()
    for begin, shape in _blocks(source):
        values = source.read(begin, shape)
        used = np.unique(values[(known or Known()).of(values, begin) & (values != 0)])
        found = set(sorted(found.union(used.tolist()) - listed)[:5])
    return sorted(found)


@contextmanager
def _placed(place: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder that is renamed to ``place`` if the block completes."""
    _check_place(place, overwrite)
    new = [parent for parent in place.parents if not parent.exists()]
    try:
        with unfinished_folder(place) as folder:
            yield folder
            with as_write_error(f"cannot move the volume to {place}"):
                attribute = {"artefact": _INGESTED, "complete": True, **Provenance().to_dict()}
                update_attrs(folder, {ATTRIBUTE: attribute})
                _check_place(place, overwrite)  # another process may have been faster
                if overwrite:
                    publish(folder, place)
                else:
                    folder.rename(place)
    finally:
        for parent in new:  # a data set without raw, or a crop without classes, would stop other verbs
            if all(inner.name == ".zgroup" for inner in parent.glob("*")):
                shutil.rmtree(parent, ignore_errors=True)


def _check_place(place: Path, overwrite: bool) -> None:
    """Raise `WriteError` if something is there that may not be replaced."""
    if not place.exists():
        return
    if not overwrite:
        raise WriteError(f"{place} is there already; give --overwrite to replace it, or another name")
    if about(place).get("artefact") != _INGESTED:
        raise not_ours(place, "ingest")


def _data_set(root: Path, name: str) -> Path:
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise InputError(f"a data set's name is letters, digits, - _ . +, got {name!r}")
    return local_path(root) / name / f"{name}.zarr"


def _center(face: Triple, size: Triple) -> Triple:
    """The center of the first voxel of a volume that begins at ``face``."""
    return triple(np.add(face, np.divide(size, 2)))


def _levels(grid: VoxelGrid) -> int:
    """Number of levels until the longest side is short."""
    return int(np.clip(np.ceil(np.log2(max(grid.shape) / _LEAST)), 1, 12))


def _blocks(source: VolumeSource) -> list[tuple[Index, Index]]:
    """(begin, shape) of the blocks in which a source is read: whole chunks, or as many rows of planes as fit."""
    depth, height, width = _BLOCK
    if source.by_plane:
        width = source.shape[2]
        height = max(64, _PLANES // max(1, depth * width * source.dtype.itemsize) // 64 * 64)
    grid = VoxelGrid((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), index(source.shape))
    return [(begin, block.shape) for begin, block in grid.blocks((depth, height, width))]


def _copy(source: VolumeSource, writer: ArrayWriter, convert: Convert, progress: Progress) -> None:
    blocks = _blocks(source)
    for done, (begin, shape) in enumerate(blocks, start=1):
        writer.write(begin, convert(source.read(begin, shape), begin))
        progress(done, len(blocks), "blocks")


def _check_labels(drawn: Drawn, known: Known, crop: str) -> None:
    source = drawn.source
    if source.dtype.kind == "f":
        raise InputError(f"{source.location} holds {source.dtype}, labels must be whole numbers; round them first")
    if not re.fullmatch(r"crop\d+", crop):
        raise InputError(f"a crop's name is crop and a number, as crop1, got {crop!r}")
    if not re.fullmatch(r"[\w+-]+", drawn.class_name):
        raise InputError(f"a class's name is letters, digits, - _ +, got {drawn.class_name!r}")
    if known.mask is not None and known.mask.shape != source.shape:
        raise InputError(
            f"{known.mask.location} has shape {known.mask.shape}, the labels {source.shape}; a mask of known voxels "
            f"must have the labels' shape"
        )
    if wrong := [str(z) for z in sorted(known.slices or ()) if not 0 <= z < source.shape[0]]:
        sections = f"{source.location} has sections 0 to {source.shape[0] - 1}"
        raise InputError(f"slices {first_of(wrong, 3)} do not exist: {sections}")


def _survey(drawn: Drawn, known: Known) -> tuple[int, bool]:
    """The largest id of the class, and whether there is more than one; one pass over the volume."""
    ends = list[int]()  # smallest and largest id of each block
    for begin, shape in _blocks(drawn.source):
        values = drawn.source.read(begin, shape)
        annotated, inside = known.of(values, begin), drawn.inside(values)
        negative = (values < 0) & annotated
        if np.any(negative if known.unknown is None else negative & inside):
            raise InputError(
                f"{drawn.source.location} holds negative values, labels are 0 and above; give the value that means "
                f"unknown (--unknown), or convert it"
            )
        ids = values[inside & annotated]
        if ids.size:
            ends += [int(ids.min()), int(ids.max())]
    return max(ends, default=0), len(set(ends)) > 1


def _unknown_value(largest: int) -> int:
    """255, or if ids reach that the largest number of the next type."""
    for bits in (8, 16, 32, 64):
        if largest < 2**bits - 1:
            return 2**bits - 1
    raise InputError(f"ids up to {largest} leave no value for unknown; renumber them to 1..n")


def _nm(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"
