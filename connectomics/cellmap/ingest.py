"""Bring your own: volumes of any known format into the CellMap layout, block by block.

What is written is a data root like any other (`connectomics.cellmap.catalog`): raw as a pyramid below
``recon-1/em``, each class's labels as one below ``recon-1/labels/groundtruth/crop{N}`` with the annotation that says
what its numbers mean. An array appears in one step, whole. Memory: a few blocks, whatever the volume.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation, Kind
from connectomics.cellmap.catalog import EM, GROUND_TRUTH, Catalog
from connectomics.cellmap.classes import is_instance_class
from connectomics.errors import InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import Index, Triple, VoxelGrid, triple
from connectomics.io.artifacts import ATTRIBUTE, Provenance, about, publish
from connectomics.io.formats import VolumeSource
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.replacing import not_ours, remove_abandoned, unfinished
from connectomics.io.write import ArrayWriter, build_levels, create_multiscale, ensure_group, update_attrs

_BLOCK = (64, 512, 512)  # voxels held at once: whole chunks
_PLANES = 1 << 28  # bytes of planes decoded at a time, where a block costs as much as its planes
_ARTEFACT = "ingested"  # what the attributes of a volume say that this module wrote
_LEAST = 32  # voxels: a level whose longest side is below needs no coarser one

#: Told (done, all) blocks.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Known:
    """Which voxels of drawn labels count; all others are unknown.

    Attributes:
        unknown: a stored value that means "not looked at".
        mask: a volume of the labels' shape, not 0 where somebody looked.
        slices: sections (z) that were drawn, None: all.
    """

    unknown: int | None = None
    mask: VolumeSource | None = None
    slices: frozenset[int] | None = None

    @property
    def is_partial(self) -> bool:
        """Whether anything can be unknown."""
        return self.unknown is not None or self.mask is not None or self.slices is not None

    def of(self, values: NDArray[Any], begin: Sequence[int]) -> NDArray[np.bool_]:
        """The known voxels of a block of stored values that starts at index ``begin``."""
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
        class_name: what it is called. source: the volume.
        kind: ``semantic`` or ``instance``; None: instances where the class is one that the challenge scores so and
            there is more than one id.
        values: the stored values that are this class, None: all but 0. For instances the ids stay.
    """

    class_name: str
    source: VolumeSource = field(repr=False)
    kind: Kind | None = None
    values: frozenset[int] | None = None


def ingest_raw(
    root: Path,
    dataset: str,
    source: VolumeSource,
    voxel_size: Sequence[float] | None = None,
    value_range: tuple[float, float] | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write raw as ``{root}/{dataset}/{dataset}.zarr/recon-1/em/fibsem-uint8`` with its pyramid.

    Args:
        voxel_size: nm, z y x; None: what the file says. Where the file does not say where it lies, the first voxel's
            centre is the origin of the data set's world.
        value_range: values that become 0 and 255 of uint8, linearly (beyond is cut off); None: values stay as they are
            (then the group is called ``fibsem-{dtype}``).

    Raises:
        InputError: no voxel size, a name that cannot be one. WriteError: it is there. Whatever reading raises.
    """
    size = _voxel_size(source, voxel_size)
    dtype = (
        np.dtype(np.uint8) if value_range is not None or source.dtype == np.bool_ else source.dtype.newbyteorder("=")
    )
    first = (0.0, 0.0, 0.0) if source.begin is None else _centre(source.begin, size)
    grid = VoxelGrid(size, first, _shape(source))
    em = _data_set(root, dataset) / EM
    place = em / f"fibsem-{dtype.name}"
    others = [p.name for p in em.iterdir() if p.is_dir()] if em.is_dir() else []
    if [name for name in others if name != place.name and not name.startswith(".")]:
        raise WriteError(f"{em} holds raw already ({', '.join(others)}); remove it, or give another --dataset name")

    def convert(values: NDArray[Any], begin: Sequence[int]) -> NDArray[Any]:
        if value_range is None:
            return values.astype(dtype, copy=False)
        low, high = value_range
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    if value_range is not None and not value_range[0] < value_range[1]:
        raise InputError(f"the range must be two ascending values, found {value_range}")
    with _appearing(place, overwrite) as part:
        (writer,) = create_multiscale(part.folder, [grid], dtype, name=place.name)
        _copy(source, writer, convert, progress)
        build_levels(part.folder, _levels(grid), "raw")
        part.done = True
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
    progress: Progress | None = None,
) -> Path:
    """Write the labels of one class as ``.../labels/groundtruth/{crop}/{class}`` with pyramid and annotation.

    Args:
        voxel_size: nm, z y x; None: what the file says, else the raw's.
        begin: nm, z y x, from the first face of the raw to that of the labels; None: where in the world the file says
            that it lies, else 0.
        known: which voxels count; None: all.

    Raises:
        MissingError: the data set has no raw yet. InputError: shapes that do not fit, values that are no ids, a name
        that cannot be one. WriteError: it is there.
    """
    source, chosen = drawn.source, known or Known()
    raw = Multiscale.open(Catalog.open(str(root)).raw_location(dataset)).levels[0].grid
    size = triple(voxel_size, "voxel_size") if voxel_size is not None else source.voxel_size or raw.voxel_size
    if begin is None and source.begin is not None:
        face = source.begin
    else:
        face = triple(np.add(raw.box.begin, triple(begin or (0.0, 0.0, 0.0), "begin")).tolist())
    grid = VoxelGrid(size, _centre(face, size), _shape(source))
    _check_labels(drawn, chosen, crop)
    if grid.box.intersect(raw.box).is_empty:
        raise InputError(
            f"{source.location}: labels from {_nm(grid.box.begin)} to {_nm(grid.box.end)} nm lie outside the raw of "
            f"{dataset} ({_nm(raw.box.begin)} to {_nm(raw.box.end)} nm); check --begin and --voxel-size"
        )
    largest, several = _survey(drawn, chosen)
    kind = drawn.kind or ("instance" if is_instance_class(drawn.class_name) and several else "semantic")
    ids = largest if kind == "instance" else 1
    unknown = _unknown_value(ids) if chosen.is_partial else None
    dtype = np.min_scalar_type(max(ids, unknown or 0))
    counts = {"absent": 0, "unknown": 0}

    def convert(values: NDArray[Any], at: Sequence[int]) -> NDArray[Any]:
        looked = chosen.of(values, at)
        inside = _inside(drawn, values)
        out = np.where(inside, values if kind == "instance" else 1, 0).astype(dtype)
        counts["absent"] += int(np.count_nonzero(looked & ~inside))
        counts["unknown"] += int(np.count_nonzero(~looked))
        if unknown is not None:
            out[~looked] = unknown
        return out

    place = _data_set(root, dataset) / GROUND_TRUTH / crop / drawn.class_name
    with _appearing(place, overwrite) as part:
        annotation = Annotation(drawn.class_name, kind, 0, unknown, counts)
        attrs = annotation.to_attrs(with_counts=False)
        (writer,) = create_multiscale(part.folder, [grid], dtype, attrs=attrs, name=drawn.class_name)
        _copy(source, writer, convert, progress)
        build_levels(part.folder, _levels(grid), "label")
        update_attrs(part.folder / "s0", annotation.to_attrs())
        part.done = True
    return place


def drawn_by_table(source: VolumeSource, table: Path) -> list[Drawn]:
    """One `Drawn` for each class of a table of values: a CSV file with the columns ``value`` and ``class`` and, where
    wanted, ``kind`` (``semantic``, ``instance``). Several values may be one class.

    Raises `MissingError` where there is no such file, `MetadataError` naming the row that cannot be read.
    """
    if not table.is_file():
        raise MissingError(f"no table of values at {table}; give a CSV file with the columns value and class")
    values: dict[str, set[int]] = {}
    kinds: dict[str, Kind | None] = {}
    with table.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                value, name = int(row["value"]), row["class"].strip()
                kind = (row.get("kind") or "").strip() or None
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise MetadataError(
                    f"{table}, line {number}: expected a whole number in the column value and a name in the column "
                    f"class, found {row}"
                ) from error
            if kind not in (None, "semantic", "instance"):
                raise MetadataError(f"{table}, line {number}: kind must be semantic or instance, found {kind!r}")
            values.setdefault(name, set()).add(value)
            kinds[name] = kind  # type: ignore[assignment]
    if not values:
        raise MetadataError(f"{table} has no rows; expected value,class")
    return [Drawn(name, source, kinds[name], frozenset(found)) for name, found in values.items()]


# -- parts -----------------------------------------------------------------------------------------------------------
@dataclass
class _Part:
    """A hidden folder that takes its place when it is done."""

    folder: Path
    place: Path
    overwrite: bool
    done: bool = False

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self.done:
                provenance = Provenance().to_dict()
                update_attrs(self.folder, {ATTRIBUTE: {"artefact": _ARTEFACT, "complete": True, **provenance}})
                _check_place(self.place, self.overwrite)  # another process may have been quicker
                if self.overwrite:
                    publish(self.folder, self.place)
                else:
                    self.folder.rename(self.place)
        except OSError as problem:
            if isinstance(problem, WriteError):
                raise
            raise WriteError(f"cannot put the volume at {self.place}: {problem.strerror or problem}") from problem
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def _appearing(place: Path, overwrite: bool) -> _Part:
    _check_place(place, overwrite)
    ensure_group(place.parent)
    prefix = f".{place.name}.partial-"
    remove_abandoned(place.parent, prefix)
    return _Part(unfinished(place.parent, prefix), place, overwrite)


def _check_place(place: Path, overwrite: bool) -> None:
    """`WriteError` if something is there that may not be replaced."""
    if not place.exists():
        return
    if not overwrite:
        raise WriteError(f"{place} is there already; give --overwrite to replace it, or another name")
    if about(place).get("artefact") != _ARTEFACT:
        raise not_ours(place, "ingest")


def _data_set(root: Path, name: str) -> Path:
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise InputError(f"a data set's name is letters, digits, - _ . +, found {name!r}")
    return local_path(root) / name / f"{name}.zarr"


def _voxel_size(source: VolumeSource, given: Sequence[float] | None) -> Triple:
    size = triple(given, "voxel_size") if given is not None else source.voxel_size
    if size is None:
        raise InputError(f"{source.location} does not say how large its voxels are; give --voxel-size z,y,x in nm")
    return size


def _centre(face: Triple, size: Triple) -> Triple:
    """The centre of the first voxel of a volume that begins at ``face``."""
    return triple([f + s / 2 for f, s in zip(face, size, strict=True)])


def _shape(source: VolumeSource) -> Index:
    z, y, x = source.shape
    return z, y, x


def _levels(grid: VoxelGrid) -> int:
    """Levels until the longest side is short."""
    levels, longest = 1, max(grid.shape)
    while longest > 2 * _LEAST and levels < 12:
        longest, levels = -(-longest // 2), levels + 1
    return levels


def _blocks(source: VolumeSource) -> Iterator[tuple[Index, Index]]:
    """(begin, shape) of the blocks in which a source is read: whole chunks, or of planes as many rows as fit."""
    depth, height, width = _BLOCK
    if source.by_plane:
        width = source.shape[2]
        rows = _PLANES // max(1, depth * width * source.dtype.itemsize)
        height = max(64, rows // 64 * 64)
    shape = _shape(source)
    for z in range(0, shape[0], depth):
        for y in range(0, shape[1], height):
            for x in range(0, shape[2], width):
                yield (z, y, x), (min(depth, shape[0] - z), min(height, shape[1] - y), min(width, shape[2] - x))


def _copy(
    source: VolumeSource,
    writer: ArrayWriter,
    convert: Callable[[NDArray[Any], Sequence[int]], NDArray[Any]],
    progress: Progress | None,
) -> None:
    blocks = list(_blocks(source))
    for done, (begin, shape) in enumerate(blocks, start=1):
        writer.write(begin, convert(source.read(begin, shape), begin))
        if progress is not None:
            progress(done, len(blocks))


def _check_labels(drawn: Drawn, known: Known, crop: str) -> None:
    source = drawn.source
    if source.dtype.kind == "f":
        raise InputError(f"{source.location} holds {source.dtype}, labels must be whole numbers; round them first")
    if not re.fullmatch(r"crop\d+", crop):
        raise InputError(f"a crop's name is crop and a number, as crop1, found {crop!r}")
    if not re.fullmatch(r"[\w+-]+", drawn.class_name):
        raise InputError(f"a class's name is letters, digits, - _ +, found {drawn.class_name!r}")
    if known.mask is not None and known.mask.shape != source.shape:
        raise InputError(
            f"{known.mask.location} has shape {known.mask.shape}, the labels {source.shape}; a mask of what is known "
            f"must have the labels' shape"
        )
    if known.slices is not None and (wrong := [z for z in sorted(known.slices) if not 0 <= z < source.shape[0]]):
        raise InputError(f"slices {wrong} are not there: {source.location} has sections 0 to {source.shape[0] - 1}")


def _survey(drawn: Drawn, known: Known) -> tuple[int, bool]:
    """The largest id of the class, and whether there are several; one pass over the volume."""
    largest, first, several = 0, 0, False
    for begin, shape in _blocks(drawn.source):
        values = drawn.source.read(begin, shape)
        if values.dtype.kind == "i" and int(values.min(initial=0)) < 0 and known.unknown is None:
            raise InputError(
                f"{drawn.source.location} holds negative values, labels are 0 and above; name the value that means "
                f"unknown (--unknown), or convert it"
            )
        ids = values[_inside(drawn, values) & known.of(values, begin)]
        if ids.size:
            low, high = int(ids.min()), int(ids.max())
            several = several or low != high or (first not in (0, low))
            first, largest = first or low, max(largest, high)
    return largest, several


def _inside(drawn: Drawn, values: NDArray[Any]) -> NDArray[np.bool_]:
    if drawn.values is None:
        return values != 0
    return np.isin(values, np.fromiter(drawn.values, np.int64))


def _unknown_value(largest: int) -> int:
    """255, or where ids reach that the largest number of the next type."""
    for bits in (8, 16, 32):
        if largest < 2**bits - 1:
            return 2**bits - 1
    raise InputError(f"ids up to {largest} leave no room for unknown; renumber them to 1..n")


def _nm(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"
