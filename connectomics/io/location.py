"""Where volumes are and how they are read: local paths, ``s3://bucket/key`` URLs, `StoreOptions`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from connectomics.errors import InputError, MissingError, WriteError

Location = str | os.PathLike[str]

_S3 = "s3://"
# one letter is a drive of Windows; a `Path` of a URL has one slash only
_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/")


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
        retries: how often a failed S3 request (5xx, broken connection, body cut short, silence) is sent again, after
            0.1 s and then twice as long each time, up to 5 s, with jitter.
        timeout: seconds after which an S3 server that does not answer is an error, all retries included. tensorstore
            takes the first that it meets in a process.
    """

    endpoint: str | None = None
    region: str | None = None
    cache_bytes: int = 64 << 20
    threads: int = 1
    retries: int = 6
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.cache_bytes < 0 or self.threads < 1:
            raise InputError(
                f"StoreOptions needs cache_bytes >= 0 and threads >= 1, found {self.cache_bytes} and {self.threads}"
            )
        if self.retries < 0 or not 0 < self.timeout < float("inf"):
            raise InputError(
                f"StoreOptions needs retries >= 0 and a timeout > 0 s, found {self.retries} and {self.timeout}"
            )

    @property
    def s3_endpoint(self) -> str | None:
        """The endpoint in force: the option, else the environment, else None (Amazon)."""
        return self.endpoint or os.environ.get("AWS_ENDPOINT_URL") or None

    @property
    def s3_region(self) -> str:
        """The region in force: the option, else the environment, else ``us-east-1``."""
        return self.region or os.environ.get("AWS_REGION") or "us-east-1"

    def resolved(self) -> StoreOptions:
        """With the endpoint and the region that are in force now: a process that gets these options may have another
        environment (a fork server keeps that of its own start)."""
        return replace(self, endpoint=self.s3_endpoint, region=self.s3_region)

    @property
    def attempt_timeout(self) -> float:
        """Seconds of silence that end one attempt of a request; the attempts and the waits between make `timeout`."""
        return max(1.0, self.timeout / (self.retries + 2))


DEFAULT_OPTIONS = StoreOptions()


def is_s3(location: Location) -> bool:
    """Whether ``location`` is an S3 URL."""
    return str(location).startswith(_S3)


def is_url(location: Location) -> bool:
    """Whether ``location`` is a URL of a remote place, also one that was made a `Path` of."""
    return _URL.match(os.fspath(location)) is not None


def local_path(location: Location) -> Path:
    """The path of a place that is written to, with ``~`` expanded; `WriteError` if it is a URL (``s3://``, ...)."""
    if is_url(location):
        raise WriteError(
            f"cannot write to {location}: output goes to a local disk; expected a path, got a URL. Write to a local "
            "folder and copy it from there"
        )
    return Path(normalize(location))


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
