"""Put files and folders in place in one step, and decide what they may replace.

A file may be replaced only by the verb that wrote it; its content shows which one. Folders and Zarr groups say it in
their attributes (`connectomics.io.artifacts`). Everything else is left alone.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from connectomics.errors import InputError, WriteError, as_write_error
from connectomics.io.location import Location, local_path
from connectomics.io.place import S3Path, move_tree, remove_tree
from connectomics.io.store import is_array, is_group

#: Whether the content of a file is what a verb writes.
IsOwn = Callable[[bytes], bool]

_ABANDONED_S = 86400.0  # an unfinished folder of another machine that did not change for so long has lost its process


def has_keys(*keys: str) -> IsOwn:
    """Accept a JSON object with these keys."""

    def is_own(data: bytes) -> bool:
        try:
            value = json.loads(data)
        except ValueError:
            return False
        return isinstance(value, dict) and set(keys) <= value.keys()

    return is_own


def has_column(first: str) -> IsOwn:
    """Accept a CSV table with this first column."""
    return lambda data: data.split(b"\n", 1)[0].decode(errors="replace").strip().split(",")[0] == first


def contains(text: str) -> IsOwn:
    """Accept text or markup that contains these words."""
    return lambda data: text.encode() in data


def require_own(location: Location, is_own: IsOwn, verb: str, *, overwrite: bool = True) -> Path:
    """Return the path of a file that ``verb`` is about to write: a free one, an empty file, or one it wrote earlier.

    Raises `WriteError` for anything else, and without ``overwrite`` for any file that exists. Call it before the work,
    and again when the file is written.
    """
    path = local_path(location)
    try:
        found = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except IsADirectoryError:
        raise WriteError(f"{path} is a folder; expected a file name, as {path / 'name'}{path.suffix}") from None
    except OSError as error:
        raise WriteError(f"cannot replace {path}: {error.strerror}; choose another output") from error
    if not overwrite:
        raise WriteError(f"{path} exists; add --overwrite to replace it, or give another name")
    if found.strip() and not is_own(found):
        raise not_ours(path, verb)
    return path


def not_ours(path: Path, verb: str) -> WriteError:
    """Return the error for something at ``path`` that ``verb`` did not write."""
    return WriteError(f"{path} was not written by {verb} and is left alone; choose another output, or move it away")


def require_replaceable(path: Path, overwrite: bool) -> None:
    """Raise `WriteError` unless ``path`` is free, or (with ``overwrite``) holds only one array or one multiscale.

    A group that holds other arrays or files is more than what would replace it.
    """
    if not path.exists():
        return
    if not overwrite:
        raise WriteError(f"{path} is already there; pass overwrite=True to replace it, or choose another place")
    if is_array(path):
        return
    for inner in sorted(path.iterdir()) if path.is_dir() else [path]:
        # hidden: metadata, and leftovers of a killed writer
        if not (inner.name == "zarr.json" or inner.name.startswith(".") or _is_level(inner)):
            raise WriteError(f"{path} is not replaced: {inner} is no part of a multiscale; move it away")


def write_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file in one step (temporary name, then rename; on S3 one request). Missing folders are created. Raises
    `WriteError`."""
    if isinstance(path, S3Path):
        path.put(data)
        return
    local_path(path)  # refuses URLs
    part = part_of(path)
    try:
        with as_write_error(f"cannot write {path}", "free space or choose a folder you may write to"):
            try:
                handle = part.open("wb")
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = part.open("wb")
            with handle:
                handle.write(data)
            part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # if even its folder is no folder
            part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one step; numpy values and paths are converted. Raises `InputError`, `WriteError`."""
    try:
        text = json.dumps(value, indent=2, default=_json_value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot store these attributes in {path}: {error}") from error
    write_file(path, text.encode())


def _json_value(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be stored in JSON")


def publish(finished: Path, location: Path) -> None:
    """Rename a finished folder to ``location``; what was there is removed after the new folder is in place.

    The caller decides whether it may be replaced. If this raises `WriteError`, the old content is unchanged. On S3 see
    `connectomics.io.place.move_tree`.
    """
    if isinstance(finished, S3Path) and isinstance(location, S3Path):
        move_tree(finished, location)
        return
    old = part_of(location, "old")
    with as_write_error(f"cannot move {finished} to {location}"):
        if location.exists():
            location.rename(old)
        try:
            finished.rename(location)
        except OSError:
            if old.exists():
                old.rename(location)
            raise
    _remove_aside(location)


def put_aside(location: Path) -> None:
    """Remove the folder at ``location``, which disappears in one step; raise `WriteError` if that fails. On S3 see
    `connectomics.io.place.remove_tree`."""
    if isinstance(location, S3Path):
        remove_tree(location)
        return
    with as_write_error(f"cannot replace {location}"):
        location.rename(part_of(location, "old"))
    _remove_aside(location)


@contextlib.contextmanager
def unfinished_folder(place: Path) -> Iterator[Path]:
    """Yield a new name beside ``place``, for a folder that will be moved there; what is left of it is removed at the
    end, and what killed processes have left of theirs at the beginning."""
    prefix = f".{place.name}.partial-"
    remove_abandoned(place.parent, prefix)
    folder = unfinished(place.parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """Make ``target`` a hard link to a file, or a copy on another disk or a file system without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def part_of(path: Path, what: str = "part") -> Path:
    """Return a new hidden name beside ``path``, for a file or folder that this process moves there, or away."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def unfinished(parent: Path, prefix: str) -> Path:
    """Return a new name in ``parent`` that starts with ``prefix`` and contains this host and process."""
    return parent / f"{prefix}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders named by `unfinished` with this ``prefix`` whose process has ended."""
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        host, _, pid = folder.name.removeprefix(prefix).rpartition("-")[0].rpartition("-")
        try:
            if host == _host() and pid.isdigit():
                abandoned = not psutil.pid_exists(int(pid))
            else:
                abandoned = time.time() - folder.stat().st_mtime > _ABANDONED_S
        except FileNotFoundError:  # its process just finished
            continue
        if abandoned:
            shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    return platform.node() or "localhost"


def _remove_aside(location: Path) -> None:
    """Remove what was replaced at ``location``, also by a run that was killed while doing so."""
    for old in location.parent.glob(f".{glob.escape(location.name)}.old-*"):
        shutil.rmtree(old, ignore_errors=True)


def _is_level(path: Path) -> bool:
    """Whether a folder holds an array, or the beginning of one: attributes but no chunk."""
    if not path.is_dir() or is_group(path):
        return False
    return is_array(path) or all(inner.name.startswith(".") for inner in path.iterdir())
