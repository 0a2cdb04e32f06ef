"""Read JSON, attributes and listings from local paths and S3. Chunks are read by `connectomics.io.array`.

For S3 see `connectomics.io.s3`. `StoreOptions.endpoint` or the environment variable ``AWS_ENDPOINT_URL`` selects a
server other than Amazon's.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from connectomics.errors import MetadataError, MissingError
from connectomics.io import s3
from connectomics.io.location import DEFAULT_OPTIONS as DEFAULT_OPTIONS
from connectomics.io.location import Location as Location
from connectomics.io.location import StoreError as StoreError
from connectomics.io.location import StoreOptions as StoreOptions
from connectomics.io.location import is_s3 as is_s3
from connectomics.io.location import join as join
from connectomics.io.location import normalize as normalize
from connectomics.io.location import split_s3 as split_s3

T = TypeVar("T")


def read_bytes(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bytes | None:
    """Return the content of one small file or object, None if it does not exist; `StoreError` if it is unreadable."""
    if is_s3(location):
        return s3.get(*split_s3(location), options)
    return if_there(location, lambda path: Path(normalize(path)).read_bytes())


def read_json(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> dict[str, Any] | None:
    """Return the JSON object stored at ``location``, None if there is none; `MetadataError` for any other content."""
    data = read_bytes(location, options)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except ValueError as error:
        raise MetadataError(f"{location} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise MetadataError(f"{location} must hold a JSON object, got {type(value).__name__}; restore the file")
    return value


def exists(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bool:
    """Return whether a file, folder, object or S3 prefix exists."""
    if not is_s3(location):
        return _mode(location) is not None
    bucket, key = split_s3(location)
    return (bool(key) and s3.head(bucket, key, options) is not None) or any(s3.children(bucket, key, options))


def object_exists(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bool:
    """Return whether one file or S3 object exists (S3 prefixes do not count).

    Raises `StoreError` if that is unknown (no permission, an I/O error), and if it is a folder.
    """
    if is_s3(location):
        return s3.head(*split_s3(location), options) is not None
    mode = _mode(location)
    if mode is not None and not stat.S_ISREG(mode):
        raise StoreError(f"{location}: expected a file, found a folder or special file; remove it or restore the file")
    return mode is not None


def list_objects(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> list[str]:
    """Return the names of the files in a local folder, or of the objects directly below an S3 prefix; [] if absent.

    Raises `StoreError` if it cannot be listed.
    """
    if is_s3(location):
        return s3.children(*split_s3(location), options)[1]
    return _names(location, lambda e: e.is_file(follow_symlinks=False) or (e.is_symlink() and exists(e.path)))


def list_groups(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> list[str]:
    """Return the sorted names of the child folders (groups, arrays) of ``location``, hidden ones left out."""
    if is_s3(location):
        names = s3.children(*split_s3(location), options)[0]
    else:
        names = _names(location, lambda entry: entry.is_dir())
    return sorted(name for name in names if not name.startswith("."))


def read_attrs(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> dict[str, Any]:
    """Return the attributes of a Zarr group or array, v2 or v3; `MissingError` if there is neither."""
    attrs = read_json(join(location, ".zattrs"), options)
    if attrs is not None:
        return attrs
    for name in (".zgroup", ".zarray"):
        if object_exists(join(location, name), options):
            return {}
    node = read_json(join(location, "zarr.json"), options)
    if node is None:
        raise MissingError(f"no Zarr group or array at {location}: neither .zgroup, .zarray nor zarr.json exists")
    attributes = node.get("attributes", {})
    if not isinstance(attributes, dict):
        raise MetadataError(f"attributes in {join(location, 'zarr.json')} must be an object; restore the file")
    return attributes


def is_array(path: Path) -> bool:
    """Return whether a local folder is a Zarr array, v2 or v3."""
    return (path / ".zarray").exists() or _node_type(path) == "array"


def is_group(path: Path) -> bool:
    """Return whether a local folder is a Zarr group, v2 or v3."""
    return (path / ".zgroup").exists() or _node_type(path) == "group"


def _node_type(path: Path) -> str:
    return str((read_json(path / "zarr.json") or {}).get("node_type", ""))


def if_there(location: Location, read: Callable[[Location], T]) -> T | None:
    """Return what ``read`` finds at a local path, None if nothing is there; `StoreError` if it cannot be read."""
    try:
        return read(location)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"cannot read {location}: {error.strerror}; check the file and its permissions") from error


def _mode(location: Location) -> int | None:
    """The mode of a local file or folder, None if it does not exist."""
    return if_there(location, lambda path: os.stat(normalize(path)).st_mode)


def _names(location: Location, keep: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Names in a local folder, [] if it does not exist."""
    try:
        with os.scandir(normalize(location)) as entries:
            return [entry.name for entry in entries if keep(entry)]
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot list {location}: {error.strerror}; check its permissions") from error
