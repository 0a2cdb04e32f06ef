"""Where volumes are and how they are read: local paths, ``s3://bucket/key`` URLs, `StoreOptions`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from connectomics.errors import EngineError, InputError, MissingError, WriteError

Location = str | os.PathLike[str]

_S3 = "s3://"
# A single letter is a Windows drive; a `Path` made of a URL keeps only one slash.
_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/")


class StoreError(MissingError):
    """A store refuses or cannot be reached, so it is unknown whether something exists."""


@dataclass(frozen=True)
class StoreOptions:
    """How volumes are read.

    Attributes:
        endpoint: URL of an S3-compatible server; None: ``AWS_ENDPOINT_URL`` if set, else Amazon.
        region: S3 region; None: ``AWS_REGION`` if set, else ``us-east-1`` (where the public CellMap bucket is).
        cache_bytes: bytes of decoded chunks kept per process and per option set.
        threads: threads that decode chunks, per process; use 1 in loader workers.
        retries: how often a failed S3 request (5xx, broken connection, truncated body, silence) is sent again. The
            delay starts at 0.1 s and doubles up to 5 s, with jitter.
        timeout: seconds until a silent S3 server is an error, including all retries. tensorstore uses the first value
            of a process.
    """

    endpoint: str | None = None
    region: str | None = None
    cache_bytes: int = 64 << 20
    threads: int = 1
    retries: int = 6
    timeout: float = 60.0

    def __post_init__(self) -> None:
        fit = self.cache_bytes >= 0 and self.threads >= 1 and self.retries >= 0 and 0 < self.timeout < float("inf")
        if not fit:
            raise InputError(
                f"expected cache_bytes >= 0, threads >= 1, retries >= 0 and a finite timeout > 0 s, got {self}"
            )

    @property
    def s3_endpoint(self) -> str | None:
        """The endpoint in use: the option, else the environment variable, else None (Amazon)."""
        return self.endpoint or os.environ.get("AWS_ENDPOINT_URL") or None

    @property
    def s3_region(self) -> str:
        """The region in use: the option, else the environment variable, else ``us-east-1``."""
        return self.region or os.environ.get("AWS_REGION") or "us-east-1"

    def resolved(self) -> StoreOptions:
        """Return these options with the endpoint and region in use now: a worker may have another environment."""
        return replace(self, endpoint=self.s3_endpoint, region=self.s3_region)

    @property
    def attempt_timeout(self) -> float:
        """Seconds of silence that end one attempt; all attempts and the delays between them add up to `timeout`."""
        return max(1.0, self.timeout / (self.retries + 2))


DEFAULT_OPTIONS = StoreOptions()


@cache
def _first_user() -> int:
    """The process that first read a volume; a forked child inherits its parent's answer."""
    return os.getpid()


def was_forked() -> bool:
    """Return whether this process was forked after its parent read a volume.

    There, tensorstore would abort the process and obstore would hang: their threads do not survive a fork.
    """
    return _first_user() != os.getpid()


def refuse_forked_process(what: str) -> None:
    """Raise `EngineError` for ``what`` in a process forked after its parent read a volume.

    Local arrays that are not sharded, or that this program wrote, can still be read there.
    """
    if was_forked():
        raise EngineError(
            f"cannot read from {what} in a process that was forked after its parent had read a volume; start "
            "workers with 'forkserver' or 'spawn', such as DataLoader(..., multiprocessing_context='forkserver')"
        )


def is_s3(location: Location) -> bool:
    """Return whether ``location`` is an S3 URL."""
    return str(location).startswith(_S3)


def is_url(location: Location) -> bool:
    """Return whether ``location`` is a URL of a remote place, also one that was converted to a `Path`."""
    return _URL.match(os.fspath(location)) is not None


def local_path(location: Location) -> Path:
    """Return an output path with ``~`` expanded; raise `WriteError` for a URL (``s3://``, ...)."""
    if is_url(location):
        raise WriteError(
            f"cannot write to {location}: output must be on a local disk; expected a path, got a URL; write to a local "
            "folder and copy it from there"
        )
    return Path(normalize(location))


def absolute(location: Location) -> str:
    """Return a location that means the same in every process: local paths absolute, S3 URLs unchanged."""
    where = normalize(location)
    return where if is_s3(where) else os.path.abspath(where)


def split_s3(location: Location) -> tuple[str, str]:
    """Return bucket and key (without slashes at its ends) of an S3 URL; raise `InputError` if it has no bucket."""
    bucket, _, key = str(location).removeprefix(_S3).partition("/")
    if not is_s3(location) or not bucket:
        raise InputError(f"expected s3://bucket/path, got {str(location)!r}")
    return bucket, "/".join(part for part in key.split("/") if part)


def normalize(location: Location) -> str:
    """Return the location as text without a trailing slash; a leading ``~`` of a local path is expanded."""
    if is_s3(location):
        bucket, key = split_s3(location)
        return f"{_S3}{bucket}/{key}" if key else f"{_S3}{bucket}"
    return str(Path(os.fspath(location).removeprefix("file://")).expanduser())


def join(location: Location, *parts: str) -> str:
    """Return ``location/part/part...``, for local paths and S3 URLs alike."""
    text = normalize(location)
    for part in parts:
        text = f"{text.rstrip('/')}/{part.strip('/')}"
    return text
