"""Names of unfinished folders that say whose they are, so that what a killed process left is found and removed."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import time
import uuid
from pathlib import Path

import psutil

_ELSEWHERE_S = 86400.0  # a folder of another machine in which nothing appeared for so long is of a process that is gone


def unfinished(parent: Path, prefix: str) -> Path:
    """A new name in ``parent`` that begins with ``prefix`` and says which process it belongs to."""
    return parent / f"{prefix}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders of this ``prefix`` whose process has ended."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        if _is_left(folder, prefix):
            shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    return platform.node() or "localhost"


def _is_left(folder: Path, prefix: str) -> bool:
    host, _, pid = folder.name.removeprefix(prefix).rpartition("-")[0].rpartition("-")
    if host == _host() and pid.isdigit():
        return not psutil.pid_exists(int(pid))
    try:
        return time.time() - folder.stat().st_mtime > _ELSEWHERE_S
    except FileNotFoundError:  # it ended right now
        return False
