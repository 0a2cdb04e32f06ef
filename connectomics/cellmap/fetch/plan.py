"""What to fetch: the objects behind the labels and raw grids of some crops, with their sizes, before any is downloaded.

Of a label array only the finest level is needed, since labels are read from there. Of raw, the chunks behind the given
grids are needed, on the level that `Multiscale.read_raw` reads for them. All groups above them are fetched with their
metadata. An object that the store does not have is no error: an absent chunk means "fill value" in labels and "no raw"
in raw.
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
from connectomics.progress import Progress, silent

#: The bucket of the public CellMap data; it needs no credentials.
PUBLIC = "s3://janelia-cosem-datasets"

_METADATA = (".zgroup", ".zattrs", ".zarray", "zarr.json")
_AT_ONCE = 64  # items listed between two progress reports
_WITHOUT_ROWS = 4096  # chunks requested one by one if their keys do not group into rows


@dataclass(frozen=True, order=True)
class RemoteFile:
    """One object: key in the bucket, bytes, ETag, and path below the local root."""

    key: str
    size: int
    etag: str
    path: str

    @property
    def is_metadata(self) -> bool:
        """Whether it is the metadata of an array or group."""
        return PurePosixPath(self.key).name in _METADATA


@dataclass(frozen=True)
class FetchItem:
    """Objects that are listed and fetched together.

    Attributes:
        name: ``jrc_cos7-1a/crop234/mito``, ``jrc_cos7-1a/raw/s1``, ``jrc_cos7-1a/metadata``.
        files: sorted by key.
        absent: paths of the chunks of raw that the store does not have.
        whole: a label array, which reads wrongly if some of its chunks are missing.
    """

    name: str
    files: tuple[RemoteFile, ...]
    absent: frozenset[str] = frozenset()
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
    """Open the catalog of a source; `InputError` if it is not on S3, and the errors of `Catalog.open`."""
    if not is_s3(source):
        raise InputError(f"cannot fetch from {source}: expected an S3 URL; a local data root needs no fetching")
    return Catalog.open(source, options)


def plan_fetch(
    source: str,
    crops: Sequence[Crop],
    classes: Sequence[str] | None,
    raw: Mapping[str, Sequence[VoxelGrid]],
    options: StoreOptions,
    progress: Progress = silent,
) -> FetchPlan:
    """List the objects behind ``crops`` and ``raw``.

    Args:
        source: ``s3://bucket`` or ``s3://bucket/folder`` that holds ``{dataset}/{dataset}.zarr``.
        crops: crops of the source's catalog whose labels are needed.
        classes: fetch the arrays that hold information about these classes; None: all arrays.
        raw: location of a raw group -> grids (nm) that must be readable on it.

    Raises:
        InputError: too many chunks in one folder.
        StoreError: the store refuses or cannot be reached.
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
        at = f"{location.removeprefix(source.rstrip('/') + '/').split('/')[0]}/raw"
        tasks.append((at, partial(lister.raw, at, location, grids)))
    tasks.append(("metadata", partial(lister.metadata, sorted(groups))))
    items = []
    for begin in range(0, len(tasks), _AT_ONCE):
        items += s3.in_parallel(lambda task: task[1](), tasks[begin : begin + _AT_ONCE])
        progress(len(items), len(tasks), tasks[len(items) - 1][0])
    return FetchPlan(source, tuple(item for item in items if item.files or item.absent))


class _Lister:
    """Lists the objects below a source."""

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
        found_on = [source.chunk_locations(grid) for grid in grids]
        keys = {split_s3(chunk)[1] for _, chunks in found_on for chunk in chunks}
        folders = sorted({key.rpartition("/")[0] for key in keys})
        level_keys = [split_s3(join(location, level))[1] for level in dict.fromkeys(level for level, _ in found_on)]
        if set(folders) <= set(level_keys) and len(keys) > _WITHOUT_ROWS:
            raise InputError(
                f"{location} keeps all chunks in one folder (keys z.y.x) and {len(keys)} of them are needed; "
                f"fetch fewer crops at a time"
            )
        found: list[tuple[str, int, str]] = []
        for listed in s3.in_parallel(lambda at: s3.files(self.bucket, at, self.options), folders):
            found += [item for item in listed if item[0] in keys]
        for at in level_keys:
            found += self._metadata_at(at)
        there = {key for key, _, _ in found}
        absent = frozenset(self._path(key) for key in keys - there)
        return FetchItem(name, tuple(sorted(self._file(*item) for item in set(found))), absent)

    def metadata(self, groups: Sequence[str]) -> FetchItem:
        """The metadata of these groups and of all groups above them."""
        places: set[str] = set()
        for group in groups:
            path = PurePosixPath(split_s3(group)[1])
            for folder in (path, *path.parents):
                places.add(str(folder))
                if folder.suffix == ".zarr":
                    break
        found = s3.in_parallel(self._metadata_at, sorted(places))
        return FetchItem("metadata", tuple(sorted({self._file(*item) for items in found for item in items})))

    def _metadata_at(self, key: str) -> list[tuple[str, int, str]]:
        listed = s3.files(self.bucket, key, self.options)
        return [item for item in listed if PurePosixPath(item[0]).name in _METADATA]

    def _file(self, key: str, size: int, etag: str) -> RemoteFile:
        return RemoteFile(key, size, etag.strip('"'), self._path(key))

    def _path(self, key: str) -> str:
        return key.removeprefix(f"{self.base}/") if self.base else key
