"""Leases: what locks are on a disk, on an object store, which has none.

A lease is an object that is created only if there is none (``If-None-Match``), and that its holder writes again every
`RENEW_S`, only if it is still its own (``If-Match``). It has expired once it stayed the same for `LEASE_S` on the clock
of whoever looks at it, so that clocks need not agree; or at once if its holder was a process of this machine and has
ended. Whoever first replaces an expired lease has it.

A lease saves work that would be done twice. The output does not depend on it, since a process may sleep through its
own lease: blocks give the same bytes whoever does them, and `change` adds to what others have recorded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from connectomics.errors import ConnectomicsError, WriteError
from connectomics.io.location import DEFAULT_OPTIONS, split_s3
from connectomics.io.place import S3Path

log = logging.getLogger(__name__)

LEASE_S, RENEW_S = 30.0, 10.0
MINE, FREE, HELD, UNCLEAR = "mine", "free", "held", "unclear"  # what is known of a lease
_CLOCK_S = 10.0  # by so much the time of a process's start may differ when the clock was set
_conditions: dict[tuple[str, str | None], bool] = {}  # bucket and endpoint -> whether the store heeds conditions


class Watch:
    """Looks at a lease of another process: several looks tell whether its holder is alive."""

    def __init__(self, path: S3Path) -> None:
        self.path, self.holder = path, "another process"
        self._latest: tuple[str, float] | None = None  # ETag, and since when it is the same
        self._alive = False  # it has changed

    def look(self) -> tuple[str, str]:
        """Return what is known (`FREE`, `HELD`; `UNCLEAR`: look again) and the ETag of the object, "" without one."""
        found = self.path.read_tagged()
        if found is None:
            return FREE, ""
        about, tag = _read(found[0]), found[1]
        self.holder = f"process {about.get('process')} on {about.get('host')}"
        if about.get("machine") == _machine():
            return (HELD if _is_running(about) else FREE), tag
        if self._latest is None or self._latest[0] != tag:
            self._alive, self._latest = self._latest is not None, (tag, time.monotonic())
        if time.monotonic() - self._latest[1] > LEASE_S:
            return FREE, tag
        return (HELD if self._alive else UNCLEAR), tag


class Lease:
    """A lease that this process takes, renews in a thread, and lets go."""

    def __init__(self, path: S3Path) -> None:
        self.path, self._watch, self._token, self._beat = path, Watch(path), uuid.uuid4().hex, 0
        self._tag: str | None = None  # of our object, while we hold it
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    @property
    def holder(self) -> str:
        """Who holds it, after `take` has not returned `MINE`."""
        return self._watch.holder

    def take(self) -> str:
        """Take the lease if it is free; return `MINE`, `HELD` by another process, or `UNCLEAR`: try again."""
        state, tag = self._watch.look()
        if state != FREE:
            return state
        self._tag = self._put(tag)
        if self._tag is None:
            return UNCLEAR  # somebody was faster
        bucket = _bucket(self.path)
        if bucket not in _conditions and not tag:
            again = self.path.put(self._content(), match="")
            self._tag = again or self._tag
            _conditions[bucket] = again is None
            if again is not None:
                log.warning("%s: this store ignores conditions; do not start two processes on one output", self.path)
        self._thread.start()
        return MINE

    def require(self) -> None:
        """Raise `WriteError` if another process has taken it, because this one was silent for too long."""
        if self._tag is None:
            raise WriteError(
                f"another process has taken over {self.path}, since this one was suspended or cut off for more than "
                f"{LEASE_S:g} s; rerun the same command"
            )

    def close(self) -> None:
        """Let it go."""
        self._closing.set()
        if self._tag is not None:
            self._thread.join()
            with contextlib.suppress(ConnectomicsError):  # it expires
                if self._tag is not None:
                    self.path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while self._tag is not None and not self._closing.wait(RENEW_S):
            self._beat += 1
            with contextlib.suppress(ConnectomicsError):  # the store does not answer: next time
                self._tag = self._put(self._tag)

    def _put(self, match: str) -> str | None:
        """Write the object if it still has the ETag ``match`` ("": if there is none); return its new one, or None."""
        tag = put_if(self.path, self._content(), match)
        if tag is None:  # perhaps it is ours: the first answer was lost, and the request sent again
            found = self.path.read_tagged()
            tag = found[1] if found is not None and _read(found[0]).get("token") == self._token else None
        return tag

    def _content(self) -> bytes:
        started = psutil.Process().create_time()
        about = {"process": os.getpid(), "host": platform.node(), "machine": _machine(), "started": started}
        return json.dumps({**about, "token": self._token, "beat": self._beat}).encode()


def put_if(path: S3Path, data: bytes, match: str) -> str | None:
    """Store an object if it has the ETag ``match`` ("": if there is none); return its ETag, None if it has another.

    Stores without conditional writes store it in any case.
    """
    if has_conditions(path):
        try:
            return path.put(data, match=match)
        except WriteError as error:
            if "NotImplemented" not in str(error):
                raise
            _conditions[_bucket(path)] = False
    return path.put(data)


def has_conditions(path: S3Path) -> bool:
    """Return whether the store heeds conditions; known once a lease was taken in its bucket."""
    return _conditions.get(_bucket(path), True)


def change(path: S3Path, edit: Callable[[bytes], bytes]) -> bytes | None:
    """Replace the content of an object that others change too; return the new content, None if there is no object.

    edit: is called again with what another process has stored meanwhile.
    """
    while (found := path.read_tagged()) is not None:
        content = edit(found[0])
        if content == found[0] or put_if(path, content, found[1]) is not None:
            return content
        time.sleep(0.2 * random.random())
    return None


def _bucket(path: S3Path) -> tuple[str, str | None]:
    return split_s3(path)[0], DEFAULT_OPTIONS.s3_endpoint


def _read(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_running(about: Mapping[str, Any]) -> bool:
    """Whether the process of this machine that wrote a lease has not ended."""
    try:
        process = psutil.Process(int(about["process"]))
        same = abs(process.create_time() - float(about["started"])) < _CLOCK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


@cache
def _machine() -> str:
    """What processes have in common that see each other: host, its start, and the namespace of process ids."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        start = f"{psutil.boot_time():.0f}"
    return f"{platform.node()} {start}"
