"""Places to write to, on a local disk or on S3, behind one kind of path.

`place` returns a `pathlib.Path`, or for ``s3://bucket/key`` an `S3Path`, which does with objects what outputs need of
files. A file appears whole or not at all on both: `connectomics.io.replacing.write_file` renames a temporary file, or
sends one request. S3 cannot rename or remove a folder in one step; `remove_tree` and `move_tree` do it object by object
in an order in which a killed run can repeat them.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Generator, Iterator
from io import BufferedReader, RawIOBase
from pathlib import Path, PosixPath
from typing import IO, Any

from connectomics.errors import WriteError
from connectomics.io import s3, store
from connectomics.io.location import DEFAULT_OPTIONS, Location, is_s3, is_url, local_path, normalize, split_s3

_RANGE = 64 << 10  # bytes of the smallest range that is read

#: File beside an unfinished output that says what it is; it is removed after all else.
TASK_FILE = "task.json"


class S3Path(PosixPath):
    """An object or prefix on S3, with the methods of `pathlib.Path` that outputs use; none touches the local disk."""

    def __str__(self) -> str:
        return re.sub("^s3:/", "s3://", super().__str__())

    def __fspath__(self) -> str:
        return str(self)

    def absolute(self) -> S3Path:
        return self

    def resolve(self, strict: bool = False) -> S3Path:
        return self

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return store.exists(self)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return store.object_exists(self)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return any(s3.children(*split_s3(self), DEFAULT_OPTIONS))

    def iterdir(self) -> Generator[S3Path, None, None]:
        prefixes, names = s3.children(*split_s3(self), DEFAULT_OPTIONS)
        yield from (self / name for name in (*prefixes, *names))

    def glob(self, pattern: str, **_: Any) -> Iterator[S3Path]:  # type: ignore[override]
        if "/" in pattern:
            raise NotImplementedError(pattern)
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        data = store.read_bytes(self)
        if data is None:
            raise FileNotFoundError(2, "no such object", str(self))
        return data

    def read_text(self, *_: Any, **__: Any) -> str:
        return self.read_bytes().decode()

    def open(self, mode: str = "r", *_: Any, **__: Any) -> Any:
        """Return a binary file that reads ranges of the object as they are needed; only for the mode ``rb``."""
        if mode != "rb":
            raise NotImplementedError(f"{self} is no local file")
        return BufferedReader(_Ranges(self), _RANGE)

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Do nothing: a prefix exists with its objects."""

    def unlink(self, missing_ok: bool = False) -> None:
        bucket, key = split_s3(self)
        s3.delete(bucket, [key], DEFAULT_OPTIONS)

    # -- only on S3 ----------------------------------------------------------------------------------------------------
    def read_tagged(self) -> tuple[bytes, str] | None:
        """Return content and ETag, None if there is no such object."""
        return s3.get_with_tag(*split_s3(self), DEFAULT_OPTIONS)

    def read_start(self, size: int) -> bytes:
        """Return the first ``size`` bytes, or all if there are fewer."""
        data = s3.get_range(*split_s3(self), 0, size, DEFAULT_OPTIONS)
        if data is None:
            raise FileNotFoundError(2, "no such object", str(self))
        return data

    def download(self, file: IO[bytes]) -> None:
        """Write the content into an open file, part by part."""
        s3.download(*split_s3(self), file, DEFAULT_OPTIONS)

    def put(self, data: bytes | bytearray | memoryview | IO[bytes], match: str | None = None) -> str | None:
        """Store the object and return its ETag; ``match`` as for `connectomics.io.s3.put`."""
        return s3.put(*split_s3(self), data, DEFAULT_OPTIONS, match=match)


class _Ranges(RawIOBase):
    """An object as a file; raises `FileNotFoundError` if there is none."""

    def __init__(self, path: S3Path) -> None:
        size = s3.head(*split_s3(path), DEFAULT_OPTIONS)
        if size is None:
            raise FileNotFoundError(2, "no such object", str(path))
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = s3.get_range(*split_s3(self._path), self._at, end, DEFAULT_OPTIONS) or b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def array_place(root: Path, dataset: str, crop: str, name: str) -> Path:
    """Return the folder of a class of a crop, below predictions or labels: ``{root}/{dataset}.zarr/{crop}/{name}``."""
    return root / f"{dataset}.zarr" / crop / name


def place(location: Location) -> Path:
    """Return a local path with ``~`` expanded, or an `S3Path` for an S3 URL (also one that went through `Path`)."""
    text = re.sub("^s3:/+", "s3://", os.fspath(location))
    return S3Path(f"s3://{'/'.join(split_s3(text)).rstrip('/')}") if is_s3(text) else Path(normalize(text))


def output_place(location: Location, *, credentials: bool = True) -> Path:
    """Return the `place` of an output; raise `WriteError` for a URL other than ``s3://``, and without ``credentials``.

    Sends no request: that the bucket exists and can be written turns out with the first object.
    """
    if isinstance(found := place(location), S3Path):
        if credentials:
            s3.require_credentials(*split_s3(found))
        return found
    if is_url(location):
        raise WriteError(
            f"cannot write to {location}: expected a path, got a URL; this output must be on a local disk or on S3 "
            "(s3://bucket/folder)"
        )
    return local_path(location)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield folder, names of its folders and names of its files, from the top as `os.walk` does; folders whose names
    are removed from the list are left out."""
    if not isinstance(root, S3Path):
        for folder, folders, files in os.walk(root):
            yield Path(folder), folders, files
        return
    folders, files = s3.children(*split_s3(root), DEFAULT_OPTIONS)
    yield root, folders, files
    for name in folders:
        yield from walk(root / name)


def remove_tree(path: Path, keep: Collection[str] = ()) -> None:
    """Remove a folder with all that it holds; on S3 all but the files ``keep`` directly in it.

    On S3, groups are first marked as incomplete and records of what is done removed, so that nobody reads what is left
    of the data; attributes and `TASK_FILE` go last, so that a killed run still knows whose it is. `WriteError`; locally
    errors are ignored.
    """
    if not isinstance(path, S3Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    bucket, key = split_s3(path)
    if not key:
        raise WriteError(f"cannot replace the bucket {path}; choose a folder in it, {path}/name")
    kept = {f"{key}/{name}" for name in (*keep, TASK_FILE)}
    for step in ("records", "data", "attributes"):
        for page in s3.pages(bucket, key, DEFAULT_OPTIONS):
            found = [name for name, *_ in page if name not in kept]
            if step == "records":
                for name in filter(_holds_attributes, found):
                    _mark_incomplete(S3Path(f"s3://{bucket}/{name}"))
                found = [name for name in found if "/.done-" in name]
            elif step == "data":
                found = [name for name in found if not _holds_attributes(name)]
            s3.delete(bucket, found, DEFAULT_OPTIONS)
    if TASK_FILE not in keep:
        (path / TASK_FILE).unlink()


def move_tree(finished: S3Path, location: S3Path) -> None:
    """Move a finished Zarr group, which replaces what is at ``location``: the store copies object by object, and files
    of the group itself after its arrays, so that a table is not older than its labels.

    Until the last object is copied, the group at ``location`` says that it is not complete. A killed run can repeat
    this: `TASK_FILE` of the finished group is only removed once all is in place.
    """
    bucket, source = split_s3(finished)
    target = split_s3(location)[1]
    name = "zarr.json" if (finished / "zarr.json").is_file() else ".zattrs"
    (location / name).put(_incomplete((finished / name).read_bytes()))
    remove_tree(location, keep=(name, TASK_FILE))
    own = [key for key, *_ in s3.files(bucket, source, DEFAULT_OPTIONS) if key != f"{source}/{name}"]
    pages = s3.pages(bucket, source, DEFAULT_OPTIONS)
    arrays = ([key for key, *_ in page if "/" in key[len(source) + 1 :]] for page in pages)
    for keys in itertools.chain(arrays, (own, [f"{source}/{name}"])):
        s3.in_parallel(lambda key: s3.copy(bucket, key, target + key[len(source) :], DEFAULT_OPTIONS), keys)
    (finished / TASK_FILE).unlink()
    remove_tree(finished)


def _holds_attributes(key: str) -> bool:
    return key.rpartition("/")[2] in (".zattrs", "zarr.json")


def _mark_incomplete(path: S3Path) -> None:
    content = store.read_bytes(path)
    if content is not None and (marked := _incomplete(content)) != content:
        path.put(marked)


def _incomplete(content: bytes) -> bytes:
    """Attributes of a group (Zarr v2, or with the rest of ``zarr.json``) that say that it is not complete, and do not
    name its levels; others unchanged."""
    try:
        node = json.loads(content)
        attrs = node["attributes"] if "zarr_format" in node else node
        ours = {"connectomics": {**attrs["connectomics"], "complete": False}}
    except (ValueError, KeyError, TypeError):
        return content
    return json.dumps({**node, "attributes": ours} if "zarr_format" in node else ours).encode()
