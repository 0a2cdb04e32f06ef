"""The small things read from locations: JSON, attributes, listings.

Bulk data goes through `connectomics.io.array`; nothing here reads chunks. S3 is read anonymously; another server than
Amazon's is named by `StoreOptions.endpoint` or the environment variable ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from connectomics.errors import MetadataError, MissingError
from connectomics.io import s3
from connectomics.io.location import (
    DEFAULT_OPTIONS,
    Location,
    StoreError,
    StoreOptions,
    is_s3,
    join,
    name_of,
    normalize,
    split_s3,
)


def read_bytes(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bytes | None:
    """The whole content of one small file or object, None where there is none. `StoreError` where refused."""
    if is_s3(location):
        return s3.get(*split_s3(location), options)
    try:
        return Path(normalize(location)).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"cannot read {location}: {error.strerror}; check the file and its permissions") from error


def read_json(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> dict[str, Any] | None:
    """The JSON object stored at ``location``, None where there is none; `MetadataError` where it is no JSON object."""
    data = read_bytes(location, options)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except ValueError as error:
        raise MetadataError(f"{location} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise MetadataError(f"{location} must hold a JSON object, found {type(value).__name__}; restore the file")
    return value


def exists(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bool:
    """Whether a file, folder, object or S3 prefix is there."""
    if not is_s3(location):
        return _mode(location) is not None
    bucket, key = split_s3(location)
    return (bool(key) and s3.head(bucket, key, options)) or any(s3.children(bucket, key, options))


def object_exists(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bool:
    """Whether one file or S3 object is there (S3 prefixes do not count); `StoreError` for a folder in its place, and if
    nobody can say: no permission, an I/O error."""
    if is_s3(location):
        return s3.head(*split_s3(location), options)
    mode = _mode(location)
    if mode is not None and not stat.S_ISREG(mode):
        raise StoreError(f"{location} is no file, expected one; remove what is in its place, or restore the file")
    return mode is not None


def list_objects(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> list[str]:
    """Names of the files right below a local folder, or of the objects right below an S3 prefix; [] if there is none.
    `StoreError` if it cannot be listed."""
    if is_s3(location):
        return s3.children(*split_s3(location), options)[1]
    try:
        with os.scandir(normalize(location)) as entries:
            return [e.name for e in entries if e.is_file(follow_symlinks=False) or (e.is_symlink() and exists(e.path))]
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot list {location}: {error.strerror}; check its permissions") from error


def _mode(location: Location) -> int | None:
    """The mode of a local file or folder, None if it is not there."""
    try:
        return os.stat(normalize(location)).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"cannot read {location}: {error.strerror}; check the file and its permissions") from error


def list_groups(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> list[str]:
    """Names of the child folders (groups, arrays) of ``location``, sorted; hidden ones left out, [] where none."""
    if is_s3(location):
        names = s3.children(*split_s3(location), options)[0]
    else:
        try:
            with os.scandir(normalize(location)) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            raise StoreError(f"cannot list {location}: {error.strerror}; check its permissions") from error
    return sorted(name for name in names if not name.startswith("."))


def read_attrs(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> dict[str, Any]:
    """Attributes of a Zarr group or array, v2 or v3; {} where it has none. `MissingError` where no node is there."""
    attrs = read_json(join(location, ".zattrs"), options)
    if attrs is not None:
        return attrs
    for name in (".zgroup", ".zarray"):
        if object_exists(join(location, name), options):
            return {}
    node = read_json(join(location, "zarr.json"), options)
    if node is not None:
        attributes = node.get("attributes", {})
        if not isinstance(attributes, dict):
            raise MetadataError(f"attributes in {join(location, 'zarr.json')} must be an object; restore the file")
        return attributes
    raise MissingError(f"no Zarr group or array at {location}: neither .zgroup, .zarray nor zarr.json is there")


__all__ = [
    "DEFAULT_OPTIONS",
    "Location",
    "StoreError",
    "StoreOptions",
    "exists",
    "is_s3",
    "join",
    "list_groups",
    "list_objects",
    "name_of",
    "normalize",
    "object_exists",
    "read_attrs",
    "read_bytes",
    "read_json",
    "split_s3",
]
