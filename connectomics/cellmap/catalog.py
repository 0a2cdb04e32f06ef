"""What a data root holds: data sets, crops, and the label array of every class, found lazily.

Opening a catalog lists the root, listing crops lists folders (and checks groups whose name is not a class of the
challenge for an annotation), and the metadata of a label array is read when its grid or annotation is first used. Roots
may be local folders or ``s3://`` URLs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation
from connectomics.cellmap.classes import CLASSES
from connectomics.errors import InputError, MetadataError, MissingError, require_known
from connectomics.geometry import Box, Index, VoxelGrid, triple
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.io.s3 import in_parallel
from connectomics.io.store import DEFAULT_OPTIONS, StoreOptions

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

GROUND_TRUTH = "recon-1/labels/groundtruth"
EM = "recon-1/em"
_BLOCK_VOXELS = 2**24  # of a label array read at once


class LabelBlock(NamedTuple):
    """A block of labels: first index in what is read, grid, stored values, where the class is present, where known."""

    begin: Index
    grid: VoxelGrid
    stored: NDArray[Any]
    present: NDArray[np.bool_]
    known: NDArray[np.bool_]


@dataclass(frozen=True)
class LabelArray:
    """The labels of one class in one crop: a small multiscale array with its annotation."""

    class_name: str
    location: str
    options: StoreOptions = field(default=DEFAULT_OPTIONS, compare=False, repr=False)

    @cached_property
    def source(self) -> Multiscale:
        """The array's levels, opened once per process."""
        return Multiscale.open(self.location, self.options)

    @property
    def grid(self) -> VoxelGrid:
        """The grid of the finest level."""
        return self.source.levels[0].grid

    def read_stored(self, begin: Sequence[int] | NDArray[Any], shape: Sequence[int], level: int = 0) -> NDArray[Any]:
        """Return the stored values of a block of one level (voxels, z y x).

        An absent chunk gives the fill value, which may mean absent or unknown: writers leave such chunks out.
        """
        return self.source.read_level(level, begin, shape, absent_is_missing=False)[0]

    def blocks(self, part: VoxelGrid | None = None, level: int = 0) -> Iterator[LabelBlock]:
        """Yield a level, or only the ``part`` of its grid, in blocks of whole planes, so that memory is bounded."""
        whole, chunk = self.source.levels[level].grid, self.source.levels[level].chunks[0]
        grid = whole if part is None else part
        first = whole.index_range(grid.box)[0] if grid.size else (0, 0, 0)
        depth = max(1, _BLOCK_VOXELS // max(1, grid.shape[1] * grid.shape[2]))
        depth -= depth % chunk if depth > chunk else 0  # no chunk is decoded twice
        for begin, block in grid.blocks((depth, grid.shape[1], grid.shape[2])):
            stored = self.read_stored(np.add(first, begin), block.shape, level)
            yield LabelBlock(begin, block, stored, *self.annotation.decode(stored))

    @cached_property
    def annotation(self) -> Annotation:
        """The meaning of its values; raises `MetadataError` if the attributes are missing or broken."""
        return Annotation.from_attrs(self.source.attrs, self._finest_attrs(), self.location)

    @property
    def is_annotated(self) -> bool:
        """Whether the attributes say what the values mean; raises `StoreError` if they cannot be read."""
        try:
            group = store.read_attrs(self.location, self.options)
            return "cellmap" in group or "cellmap" in self._finest_attrs()
        except store.StoreError:
            raise
        except (MissingError, MetadataError):  # a folder, a group of groups, another kind of array
            return False

    def _finest_attrs(self) -> dict[str, Any]:
        return store.read_attrs(store.join(self.location, self.source.levels[0].path), self.options)


@dataclass(frozen=True)
class Crop:
    """A labeled region of a data set.

    Attributes:
        dataset: the data set's name.
        name: ``crop234``.
        raw: location of the data set's raw multiscale group.
        labels: the label arrays by class name; a class without an array is unknown in this crop. Without any, the crop
            is a part of raw.
        options: how the arrays are read (cache, threads, endpoint); not compared.
        not_annotated: names of further groups that are no class of the challenge and have no annotation (``all``).
        region: the part of the crop that is used (nm), such as one side of a split; None: all of it.
        excluded: boxes (nm) of a part of raw whose voxels do not count.
    """

    dataset: str
    name: str
    raw: str
    labels: dict[str, LabelArray] = field(hash=False)
    options: StoreOptions = field(default=DEFAULT_OPTIONS, compare=False, repr=False)
    not_annotated: tuple[str, ...] = ()
    region: Box | None = None
    excluded: tuple[Box, ...] = ()

    @property
    def key(self) -> str:
        """``dataset/crop``: unique in a root."""
        return f"{self.dataset}/{self.name}"

    @cached_property
    def grid(self) -> VoxelGrid:
        """The finest grid among the crop's label arrays that have voxels, cut to the region."""
        there = [label.grid for label in self._readable()] or [self.raw_source.grid]
        grids = [grid for grid in there if grid.size] or there
        finest = min(grids, key=lambda g: (g.voxel_size[0] * g.voxel_size[1] * g.voxel_size[2], g.translation))
        return self.within(finest)

    @cached_property
    def box(self) -> Box:
        """The world box around all of the crop's label arrays that have voxels, cut to the region."""
        boxes = [label.grid.box for label in self._readable() if label.grid.size]
        box = reduce(Box.hull, boxes) if boxes else self.grid.box
        return box if self.region is None else box.intersect(self.region)

    def check_voxels(self) -> None:
        """Raise `InputError` if the crop has no voxels."""
        if self.grid.size == 0:
            raise InputError(f"{self.key} is empty, with labels of {self.grid.shape}; ingest them again, or remove it")

    def within(self, grid: VoxelGrid) -> VoxelGrid:
        """Return the voxels of ``grid`` that touch the crop's region; all of them if it has none."""
        return grid if self.region is None else grid.part(self.region)[1]

    @cached_property
    def raw_source(self) -> Multiscale:
        """The raw volume's levels, opened once per process."""
        return Multiscale.open(self.raw, self.options)

    def _readable(self) -> list[LabelArray]:
        """The label arrays with readable metadata. A broken array stops only a run that reads it; raises if all are
        broken. On S3 several are opened at a time, since each takes a few requests in sequence."""
        arrays = list(self.labels.values())
        closed = [label for label in arrays if "source" not in label.__dict__]
        errors = in_parallel(self._open, closed) if store.is_s3(self.raw) else [self._open(label) for label in closed]
        broken = {label.class_name: error for label, error in zip(closed, errors, strict=True) if error is not None}
        if broken and len(broken) == len(arrays):
            raise next(iter(broken.values()))
        for name, error in broken.items():
            log.warning(
                "%s: ignoring the labels of %s in the crop's box; they cannot be read: %s", self.key, name, error
            )
        return [label for label in arrays if label.class_name not in broken]

    @staticmethod
    def _open(label: LabelArray) -> Exception | None:
        """Open a label array; return the error in its metadata, or None."""
        try:
            # not by the property: Python 3.11 holds one lock for all instances while it is computed
            label.__dict__["source"] = Multiscale.open(label.location, label.options)
        except store.StoreError:
            raise
        except (MissingError, MetadataError) as error:
            return error
        return None


class Catalog:
    """The data sets and crops below a data root."""

    def __init__(self, root: str, options: StoreOptions = DEFAULT_OPTIONS) -> None:
        """Use `open`."""
        self.root = root
        self.options = options
        self._crop_names: dict[str, list[str]] = {}
        self._raw: dict[str, str] = {}

    @classmethod
    def open(cls, root: str, options: StoreOptions = DEFAULT_OPTIONS) -> Catalog:
        """Open a root that holds ``{dataset}/{dataset}.zarr`` folders; `MissingError` if it does not.

        ``options`` apply to everything below it.
        """
        root = str(root).rstrip("/")
        if not store.exists(root, options):
            raise MissingError(f"no data root at {root}; give the folder that holds {{dataset}}/{{dataset}}.zarr")
        catalog = cls(root, options.resolved())
        if not catalog.datasets:
            raise MissingError(
                f"{root} holds no data set: expected folders {{dataset}}/{{dataset}}.zarr/recon-1, "
                f"got {', '.join(store.list_groups(root, options)[:5]) or 'nothing'}"
            )
        return catalog

    @cached_property
    def datasets(self) -> list[str]:
        """Names of the data sets, sorted."""
        names = store.list_groups(self.root, self.options)
        there = self._each(lambda n: store.exists(store.join(self.root, n, f"{n}.zarr"), self.options), names)
        return sorted(name for name, found in zip(names, there, strict=True) if found)

    def location(self, dataset: str) -> str:
        """Return the location of a data set's Zarr root; `UnknownNameError` with the nearest name if there is none."""
        require_known("data set", [dataset], self.datasets, self.root)
        return store.join(self.root, dataset, f"{dataset}.zarr")

    def raw_location(self, dataset: str) -> str:
        """Return the location of the data set's raw multiscale group.

        That is ``em/fibsem-uint8`` if it exists, else the only group below ``em``; `MissingError` for any other number.
        """
        if dataset in self._raw:
            return self._raw[dataset]
        em = store.join(self.location(dataset), EM)
        names = store.list_groups(em, self.options)
        if "fibsem-uint8" in names or len(names) == 1:
            self._raw[dataset] = store.join(em, "fibsem-uint8" if "fibsem-uint8" in names else names[0])
            return self._raw[dataset]
        raise MissingError(f"{em}: expected a raw volume fibsem-uint8, got {', '.join(names) or 'nothing'}")

    def crop_names(self, dataset: str) -> list[str]:
        """Return the names of the data set's crops (``crop234``), by number."""
        if dataset not in self._crop_names:
            truth = store.join(self.location(dataset), GROUND_TRUTH)
            names = store.list_groups(truth, self.options)
            crops = [n for n in names if re.fullmatch(r"crop\d+", n)]
            self._crop_names[dataset] = sorted(crops, key=lambda name: int(name.removeprefix("crop")))
        return self._crop_names[dataset]

    def crop(self, dataset: str, name: str, raw: str | None = None) -> Crop:
        """Return one crop with all of its classes; other groups (``all``) are listed in `Crop.not_annotated`.

        ``raw``: location of the raw if the data set has none itself.
        """
        names = self.crop_names(dataset)
        require_known("crop", [name], names, f"data set {dataset} of {self.root}")
        location = store.join(self.location(dataset), GROUND_TRUTH, name)
        found = [
            LabelArray(c, store.join(location, c), self.options) for c in store.list_groups(location, self.options)
        ]
        # a group named like a class counts as one, so that the run that reads it finds a lost annotation
        others = tuple(a.class_name for a in found if a.class_name not in CLASSES and not a.is_annotated)
        labels = {a.class_name: a for a in found if a.class_name not in others}
        return Crop(dataset, name, raw or self.raw_location(dataset), labels, self.options, others)

    def _each(self, ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Call ``ask`` for every item: in sequence on a disk, in several threads on S3, where answers take long."""
        return in_parallel(ask, items) if store.is_s3(self.root) else [ask(item) for item in items]

    def crops(
        self,
        datasets: Sequence[str] | None = None,
        crops: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> list[Crop]:
        """Return the crops of these data sets and names that can tell about one of ``classes``; None means all.

        A crop can tell about a class if the class, one of its atoms, or a group that contains it has an array. Raises
        `UnknownNameError` (nearest name) for a data set or crop that does not exist, and for a class that neither the
        challenge nor a crop has; `MissingError` if no crop is left.
        """
        chosen = list(datasets) if datasets is not None else self.datasets
        names = dict(zip(chosen, self._each(self.crop_names, chosen), strict=True))
        there = [name for found in names.values() for name in found]
        require_known("crop", crops, there, f"{', '.join(chosen)} of {self.root}")
        wanted_crops = [(d, n) for d in chosen for n in names[d] if crops is None or n in crops]
        found = [c for c in self._each(lambda pair: self.crop(*pair), wanted_crops) if c.labels]
        if classes is not None:
            labeled = {name for crop in found for name in crop.labels}
            require_known("class", classes, labeled | set(CLASSES), "the data root and the challenge")
            found = [c for c in found if any(informs(name, c.labels) for name in classes)]
        if not found:
            what = f"with a label of {', '.join(classes)}" if classes else "with labels"
            named = f" named {', '.join(crops)}" if crops else ""
            raise MissingError(
                f"no crop{named} {what} in {', '.join(chosen) or 'no data set'} of {self.root}; see `pytc describe`, "
                "and ingest labels (`pytc ingest --labels`) or choose others"
            )
        return found


def open_root(root: str | os.PathLike[str] | Catalog) -> Catalog:
    """Return the catalog of a data root: data sets, crops, classes, and where each array is.

    Args:
        root: folder or ``s3://`` URL that holds ``{dataset}/{dataset}.zarr``, or a catalog, which is returned.

    Raises:
        MissingError: no such root, or one without data sets.
    """
    return root if isinstance(root, Catalog) else Catalog.open(os.fspath(root))


def informs(class_name: str, available: Iterable[str]) -> bool:
    """Return whether arrays of the ``available`` classes can tell about ``class_name``.

    They can if they contain the class itself, one of its atoms, or a group that contains it (a group that is absent
    makes the class absent).
    """
    there = set(available)
    known = CLASSES.get(class_name)
    if class_name in there or known is None:
        return class_name in there
    if known.is_group:
        return bool(there & set(known.atoms))
    return any(class_name in CLASSES[name].atoms for name in there if name in CLASSES)


def box_of(text: str) -> tuple[str, Box]:
    """Return the data set and the box (faces, nm) of ``DATASET:z0,y0,x0:z1,y1,x1``; raise `InputError`."""
    parts = text.rsplit(":", 2)
    try:
        begin, end = (triple([float(v) for v in part.split(",")], "a corner") for part in parts[1:])
    except ValueError as error:
        raise InputError(f"a box is DATASET:z0,y0,x0:z1,y1,x1 in nm, got {text!r} ({error})") from error
    box = Box(begin, end)
    if not parts[0] or box.is_empty:
        raise InputError(f"a box is DATASET:z0,y0,x0:z1,y1,x1 in nm with each end above its begin, got {text!r}")
    return parts[0], box
