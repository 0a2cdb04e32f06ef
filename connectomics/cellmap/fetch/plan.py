"""What to fetch: the objects behind some crops' labels and raw grids, with their sizes, before any of them moves.

Of a label array its finest level is taken, since labels are read from there only; of raw the chunks behind the given
grids, on the level that a read of such a grid takes (`Multiscale.read_raw`). Every group above them comes with its
metadata. What a store does not hold is no error: an absent chunk is "fill value" in labels and "no raw" in raw, here as
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from connectomics.cellmap.catalog import Catalog, Crop, LabelArray
from connectomics.cellmap.labels import arrays_needed
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io import s3
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import StoreOptions, is_s3, join, split_s3

#: The bucket of the public CellMap data: read without credentials.
PUBLIC = "s3://janelia-cosem-datasets"

_METADATA = (".zgroup", ".zattrs", ".zarray", "zarr.json")
_AT_ONCE = 64  # items that are listed between two reports
_WITHOUT_ROWS = 4096  # chunks of one array that are asked for one by one, where keys do not group into rows

#: Told (done, all, what was listed last).
Advance = Callable[[int, int, str], None]


@dataclass(frozen=True, order=True)
class RemoteFile:
    """One object: its key in the bucket, its bytes, its ETag, and its path below the local root."""

    key: str
    size: int
    etag: str
    path: str

    @property
    def is_metadata(self) -> bool:
        """Whether it says what an array or a group is."""
        return PurePosixPath(self.key).name in _METADATA


@dataclass(frozen=True)
class FetchItem:
    """Objects that belong together.

    Attributes:
        name: ``jrc_cos7-1a/crop234/mito``, ``jrc_cos7-1a/raw/s1``, ``jrc_cos7-1a/metadata``.
        files: sorted by key.
        absent: chunks that the store does not hold.
        whole: a label array: with some of its chunks only it would be taken for what it is not.
    """

    name: str
    files: tuple[RemoteFile, ...]
    absent: int = 0
    whole: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class FetchPlan:
    """Everything to fetch from one bucket."""

    source: str
    items: tuple[FetchItem, ...]

    @property
    def number(self) -> int:
        """Objects."""
        return sum(len(item.files) for item in self.items)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(item.size for item in self.items)


def open_source(source: str, options: StoreOptions) -> Catalog:
    """The catalog of a source; `InputError` where it is not on S3, and what `Catalog.open` raises."""
    if not is_s3(source):
        raise InputError(f"data is fetched from S3, found {source}; a local folder needs no fetching: use it as it is")
    return Catalog.open(source, options)


def plan_fetch(
    source: str,
    crops: Sequence[Crop],
    classes: Sequence[str] | None,
    raw: Mapping[str, Sequence[VoxelGrid]],
    options: StoreOptions,
    progress: Advance | None = None,
) -> FetchPlan:
    """List what is behind ``crops`` and ``raw``.

    Args:
        source: ``s3://bucket`` or ``s3://bucket/folder`` that holds ``{dataset}/{dataset}.zarr``.
        crops: crops of the source's catalog whose labels are wanted.
        classes: the arrays that can say something of these; None: all arrays.
        raw: location of a raw group -> grids (nm) that must be readable on it.
        progress: called after each listed item.

    Raises:
        InputError: too many chunks without folders. StoreError: the store refuses or cannot be reached.
    """
    lister = _Lister(source, options)
    tasks: list[tuple[str, Callable[[], FetchItem]]] = []
    groups = set(raw)
    for crop in crops:
        names = list(crop.labels) if classes is None else list(arrays_needed(crop, classes))
        for name in sorted(names):
            label = crop.labels[name]
            at = f"{crop.dataset}/{crop.name}/{name}"
            groups.add(label.location)
            tasks.append((at, partial(lister.labels, at, label)))
    for location, grids in raw.items():
        at = f"{_dataset_of(source, location)}/raw"
        tasks.append((at, partial(lister.raw, at, location, grids)))
    tasks.append(("metadata", partial(lister.metadata, sorted(groups))))
    items = []
    for begin in range(0, len(tasks), _AT_ONCE):
        items += s3.in_parallel(lambda task: task[1](), tasks[begin : begin + _AT_ONCE])
        if progress is not None:
            progress(len(items), len(tasks), tasks[len(items) - 1][0])
    return FetchPlan(source, tuple(item for item in items if item.files or item.absent))


def _dataset_of(source: str, location: str) -> str:
    return location.removeprefix(source.rstrip("/") + "/").split("/")[0]


class _Lister:
    """Lists objects below a source."""

    def __init__(self, source: str, options: StoreOptions) -> None:
        self.options = options
        self.bucket, self.base = split_s3(source)

    def labels(self, name: str, label: LabelArray) -> FetchItem:
        """The finest level of a label array."""
        _, key = split_s3(join(label.location, label.source.levels[0].path))
        files = (self._file(*item) for item in s3.objects(self.bucket, key, self.options))
        return FetchItem(name, tuple(files), whole=True)

    def raw(self, name: str, location: str, grids: Sequence[VoxelGrid]) -> FetchItem:
        """The chunks behind some grids, and the metadata of their levels."""
        source = Multiscale.open(location, self.options)
        wanted: dict[str, None] = {}
        levels: dict[str, None] = {}
        for grid in grids:
            level, chunks = source.chunk_locations(grid)
            wanted |= dict.fromkeys(chunks)
            levels[level] = None
        keys = {split_s3(chunk)[1] for chunk in wanted}
        folders = sorted({key.rpartition("/")[0] for key in keys})
        level_keys = [split_s3(join(location, level))[1] for level in levels]
        if set(folders) <= set(level_keys) and len(keys) > _WITHOUT_ROWS:
            raise InputError(
                f"{location} keeps all chunks in one folder (keys z.y.x) and {len(keys)} of them are wanted; "
                f"fetch fewer crops at a time"
            )
        found: list[tuple[str, int, str]] = []
        for listed in s3.in_parallel(lambda at: s3.files(self.bucket, at, self.options), folders):
            found += [item for item in listed if item[0] in keys]
        for at in level_keys:
            found += self._metadata_at(at)
        there = {key for key, _, _ in found}
        return FetchItem(name, tuple(sorted(self._file(*item) for item in set(found))), len(keys - there))

    def metadata(self, groups: Sequence[str]) -> FetchItem:
        """The metadata of these groups and of all above them."""
        places: dict[str, None] = {}
        for group in groups:
            path = PurePosixPath(split_s3(group)[1])
            for folder in (path, *path.parents):
                places[str(folder)] = None
                if folder.suffix == ".zarr":
                    break
        found = s3.in_parallel(self._metadata_at, sorted(places))
        return FetchItem("metadata", tuple(sorted({self._file(*item) for items in found for item in items})))

    def _metadata_at(self, key: str) -> list[tuple[str, int, str]]:
        listed = s3.files(self.bucket, key, self.options)
        return [item for item in listed if PurePosixPath(item[0]).name in _METADATA]

    def _file(self, key: str, size: int, etag: str) -> RemoteFile:
        path = key.removeprefix(f"{self.base}/") if self.base else key
        return RemoteFile(key, size, etag.strip('"'), path)
