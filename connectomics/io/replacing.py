"""Replacing a single file: only one that the same verb wrote.

What a verb writes shows by its content what it is: JSON by its keys, a table by its first column, a page or a
configuration by a line. Anything else at that place is of somebody else and is left alone. Folders and Zarr groups say
what they are by their attributes (`connectomics.io.artifacts`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from connectomics.errors import WriteError
from connectomics.io.location import Location, local_path

#: Whether the content of a file is what a verb writes.
IsOwn = Callable[[bytes], bool]


def has_keys(*keys: str) -> IsOwn:
    """A JSON object with these keys."""

    def is_own(data: bytes) -> bool:
        try:
            value = json.loads(data)
        except ValueError:
            return False
        return isinstance(value, dict) and set(keys) <= value.keys()

    return is_own


def has_column(first: str) -> IsOwn:
    """A CSV table with this first column."""
    return lambda data: data.split(b"\n", 1)[0].decode(errors="replace").strip().split(",")[0] == first


def contains(text: str) -> IsOwn:
    """Text or markup with these words in it."""
    return lambda data: text.encode() in data


def require_own(location: Location, is_own: IsOwn, verb: str) -> Path:
    """The path of a file that ``verb`` is about to write: free, empty, or an earlier file of that verb.

    Raises `WriteError` for anything else; ask before the work, and again when the file is written.
    """
    path = local_path(location)
    try:
        found = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except IsADirectoryError:
        raise WriteError(f"{path} is a folder; expected a file's name, as {path / 'name'}{path.suffix}") from None
    except OSError as error:
        raise WriteError(f"cannot replace {path}: {error.strerror}; choose another output") from error
    if found.strip() and not is_own(found):
        raise not_ours(path, verb)
    return path


def not_ours(path: Path, verb: str) -> WriteError:
    """The error for something at ``path`` that ``verb`` did not write."""
    return WriteError(f"{path} was not written by {verb} and is left alone; choose another output, or move it away")
