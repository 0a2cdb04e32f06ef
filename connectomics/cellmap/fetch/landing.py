"""Where an object is written before it takes its place: one folder in the root for each fetch that runs.

So what a killed fetch was writing is found again, whatever it was, without looking through the root: the next fetch
removes the folders of processes that are gone.
"""

from __future__ import annotations

import errno
import shutil
import uuid
from pathlib import Path
from typing import Self

from connectomics.errors import WriteError
from connectomics.io.replacing import remove_abandoned, unfinished
from connectomics.io.write import write_file

_PREFIX = ".fetching-"


class Landing:
    """A folder in ``root`` while the block runs; removed at its end, with those that killed fetches left."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = unfinished(root, _PREFIX)

    def __enter__(self) -> Self:
        remove_abandoned(self._root, _PREFIX)
        try:
            self._folder.mkdir()
        except OSError as error:
            raise WriteError(f"cannot write to {self._root}: {error.strerror}; choose another folder") from error
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, place: Path, data: bytes) -> None:
        """Write a file below the root in one step; folders are made. From any thread. `WriteError`."""
        part = self._folder / uuid.uuid4().hex
        try:
            part.write_bytes(data)
            try:
                part.replace(place)
            except FileNotFoundError:
                place.parent.mkdir(parents=True, exist_ok=True)
                part.replace(place)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno == errno.EXDEV:  # a data set of the root is a link to another disk
                write_file(place, data)
                return
            raise WriteError(f"cannot write {place}: {error.strerror}; free space, or choose another folder") from error
