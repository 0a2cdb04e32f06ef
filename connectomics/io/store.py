"""Locations: local paths and ``s3://bucket/key`` URLs, and the small things read from them (JSON, listings).

Bulk data goes through `connectomics.io.array`; nothing here reads chunks. S3 is read anonymously; another server than
Amazon's is named by `StoreOptions.endpoint` or the environment variable ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.errors import InputError, MetadataError, MissingError

if TYPE_CHECKING:
    from obstore.store import S3Store

Location = str | os.PathLike[str]

_S3 = "s3://"


class StoreError(MissingError):
    """A store refuses or cannot be reached, so that nobody can say whether something is there."""


@dataclass(frozen=True)
class StoreOptions:
    """How volumes are read.

    Attributes:
        endpoint: URL of an S3-compatible server; None takes ``AWS_ENDPOINT_URL``, or Amazon's where that is unset.
        region: S3 region; None takes ``AWS_REGION``, or ``us-east-1`` (where the public CellMap bucket is).
        cache_bytes: decoded chunks kept per process and per option set, in bytes.
        threads: threads that decode chunks, per process; loader workers should keep 1.
    """

    endpoint: str | None = None
    region: str | None = None
    cache_bytes: int = 64 << 20
    threads: int = 1

    def __post_init__(self) -> None:
        if self.cache_bytes < 0 or self.threads < 1:
            raise InputError(
                f"StoreOptions needs cache_bytes >= 0 and threads >= 1, found {self.cache_bytes} and {self.threads}"
            )

    @property
    def s3_endpoint(self) -> str | None:
        """The endpoint in force: the option, else the environment, else None (Amazon)."""
        return self.endpoint or os.environ.get("AWS_ENDPOINT_URL") or None

    @property
    def s3_region(self) -> str:
        """The region in force: the option, else the environment, else ``us-east-1``."""
        return self.region or os.environ.get("AWS_REGION") or "us-east-1"


DEFAULT_OPTIONS = StoreOptions()


def is_s3(location: Location) -> bool:
    """Whether ``location`` is an S3 URL."""
    return str(location).startswith(_S3)


def split_s3(location: Location) -> tuple[str, str]:
    """Bucket and key (no slash at either end) of an S3 URL; `InputError` where there is no bucket."""
    bucket, _, key = str(location).removeprefix(_S3).partition("/")
    if not is_s3(location) or not bucket:
        raise InputError(f"expected s3://bucket/path, found {str(location)!r}")
    return bucket, "/".join(part for part in key.split("/") if part)


def normalize(location: Location) -> str:
    """The location as a string without a trailing slash; a leading ``~`` of a local path is expanded."""
    if is_s3(location):
        bucket, key = split_s3(location)
        return f"{_S3}{bucket}/{key}" if key else f"{_S3}{bucket}"
    text = os.fspath(location)
    return str(Path(text.removeprefix("file://")).expanduser())


def join(location: Location, *parts: str) -> str:
    """``location/part/part...`` for local paths and S3 URLs alike."""
    text = normalize(location)
    for part in parts:
        text = f"{text.rstrip('/')}/{part.strip('/')}"
    return text


def name_of(location: Location) -> str:
    """The last component."""
    return normalize(location).rstrip("/").rsplit("/", 1)[-1]


def read_bytes(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bytes | None:
    """The whole content of one small file or object, None where there is none. `StoreError` where refused."""
    if is_s3(location):
        bucket, key = split_s3(location)
        try:
            return bytes(s3_store(bucket, options).get(key).bytes())
        except FileNotFoundError:
            return None
        except _s3_errors() as error:
            raise _unreachable(location, error) from error
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
        return Path(normalize(location)).exists()
    bucket, key = split_s3(location)
    if key and object_exists(location, options):
        return True
    listed = _list(bucket, key, options)
    return bool(listed["common_prefixes"] or listed["objects"])


def object_exists(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> bool:
    """Whether one file or S3 object is there (folders and prefixes do not count)."""
    if not is_s3(location):
        return os.path.isfile(normalize(location))
    bucket, key = split_s3(location)
    try:
        s3_store(bucket, options).head(key)
    except FileNotFoundError:
        return False
    except _s3_errors() as error:
        raise _unreachable(location, error) from error
    return True


def list_groups(location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> list[str]:
    """Names of the child folders (groups, arrays) of ``location``, sorted; hidden ones left out, [] where none."""
    if is_s3(location):
        bucket, key = split_s3(location)
        names = [
            str(prefix).rstrip("/").rsplit("/", 1)[-1] for prefix in _list(bucket, key, options)["common_prefixes"]
        ]
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


@lru_cache(maxsize=64)
def _s3_store(bucket: str, endpoint: str | None, region: str, pid: int) -> S3Store:
    from obstore.store import S3Store

    return S3Store(
        bucket,
        endpoint=endpoint,
        region=region,
        skip_signature=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
        retry_config={"max_retries": 5},
    )


def s3_store(bucket: str, options: StoreOptions) -> S3Store:
    """The anonymous obstore store of a bucket, one per process."""
    return _s3_store(bucket, options.s3_endpoint, options.s3_region, os.getpid())


def _list(bucket: str, key: str, options: StoreOptions) -> Any:
    prefix = f"{key}/" if key else None
    try:
        return s3_store(bucket, options).list_with_delimiter(prefix)
    except FileNotFoundError:
        return {"common_prefixes": [], "objects": []}
    except _s3_errors() as error:
        raise _unreachable(f"{_S3}{bucket}/{key}", error) from error


def _s3_errors() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return (BaseError, OSError)


def _unreachable(location: Location, error: Exception) -> StoreError:
    reason = " ".join(str(error).split("Debug source")[0].split())[:300]
    return StoreError(f"cannot read {location}: {reason}; check the address, the endpoint and public access")
