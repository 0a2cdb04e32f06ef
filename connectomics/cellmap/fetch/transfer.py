"""Moving objects: several at a time, each checked and put in its place in one step."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from connectomics.cellmap.fetch.landing import Landing
from connectomics.cellmap.fetch.plan import FetchPlan, RemoteFile
from connectomics.errors import CorruptDataError, InputError, WriteError
from connectomics.io import s3
from connectomics.io.location import local_path
from connectomics.io.replacing import not_ours
from connectomics.io.store import StoreError, StoreOptions, split_s3

#: In the root: one line for each object that is there and checked: key, bytes, ETag, with tabs between.
LOG_FILE = ".fetched.tsv"
_ATTEMPTS = 3  # times that an object is asked for whose bytes are not those that were listed
_SPARE = 1.02  # bytes that must be free, beside those that come
_NAMED = 3  # objects that failed which the error names

#: Told (objects done, all, bytes done, all bytes).
Moved = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class Missing:
    """What of a plan is not below a root, or is there in another version.

    Attributes:
        items: for each item of the plan, in its order, the objects that are missing.
    """

    plan: FetchPlan
    items: tuple[tuple[RemoteFile, ...], ...]

    @classmethod
    def below(cls, root: Path, plan: FetchPlan) -> Missing:
        """Compare with what is there. A label array of which a chunk is missing also lacks its metadata then."""
        known = _read_log(root / LOG_FILE)
        found = []
        for item in plan.items:
            lacking = {file for file in item.files if not _is_there(file, root, known)}
            if item.whole and lacking:
                lacking |= {file for file in item.files if file.is_metadata}
            found.append(tuple(sorted(lacking)))
        return cls(plan, tuple(found))

    @property
    def number(self) -> int:
        """Objects."""
        return sum(len(files) for files in self.items)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for files in self.items for file in files)


def transfer(
    missing: Missing,
    root: Path,
    options: StoreOptions,
    *,
    threads: int = 16,
    progress: Moved | None = None,
) -> int:
    """Bring what is missing below ``root``; returns the number of objects that came.

    An object appears in one step. Sizes are compared with the listing, and bytes with the ETag where that is an MD5 sum
    (objects that were uploaded in parts have another). One that cannot be had does not keep others from coming. The
    metadata of an array comes after all of its chunks, and not where one failed: a label array that is only half there
    cannot be opened, and never reads as "absent". Memory: one object a thread. What a fetch that was killed had half
    written is removed.

    Args:
        progress: called after each object, in this thread.

    Raises:
        WriteError: not enough space, no permission, a file that was not fetched is in the way. StoreError: objects that
        cannot be had, or are never what was listed, after all others came. InputError: a key that leads out of the
        root.
    """
    root = local_path(root)
    bucket, _ = split_s3(missing.plan.source)
    _refuse_foreign(missing, root)
    free = _free(root)
    if missing.size * _SPARE > free:
        raise WriteError(
            f"{root} has {free / 1e9:.2f} GB free, {missing.size / 1e9:.2f} GB are to come; free some, or fetch fewer "
            f"crops, classes or a coarser voxel size"
        )
    failed: list[str] = []
    done = size = 0
    if progress is not None:
        progress(0, missing.number, 0, missing.size)
    with (
        Landing(root) as landing,
        _Log(root / LOG_FILE) as log,
        ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool,
    ):

        def work(file: RemoteFile) -> None:
            _fetch(file, bucket, root, options, log, landing)

        def bring(files: Iterable[tuple[int, RemoteFile]]) -> set[int]:
            """Fetch files of items; returns the numbers of the items of which one failed."""
            nonlocal done, size
            broken = set()
            for number, file, error in _results(pool, files, threads, work):
                if error is not None:
                    failed.append(str(error))
                    broken.add(number)
                    continue
                done, size = done + 1, size + file.size
                if progress is not None:
                    progress(done, missing.number, size, missing.size)
            return broken

        for item, files in zip(missing.plan.items, missing.items, strict=True):
            if item.whole:
                for file in files:
                    if file.is_metadata:
                        _place(file, root).unlink(missing_ok=True)
        every = [(number, file) for number, files in enumerate(missing.items) for file in files]
        broken = bring(pair for pair in every if not pair[1].is_metadata)
        bring(pair for pair in every if pair[1].is_metadata and pair[0] not in broken)
    if failed:
        more = f"; and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise StoreError(
            f"{len(failed)} of {missing.number} objects did not come ({'; '.join(failed[:_NAMED])}{more}); "
            f"run the same command again: what came is kept"
        )
    return done


def _refuse_foreign(missing: Missing, root: Path) -> None:
    """`WriteError` if a file that did not come by a fetch lies where an object goes.

    What the log names came by a fetch, also if it is damaged now or the store has a newer version. A file that has the
    object's size may be of a fetch that was killed before it could write the log.
    """
    known = _read_log(root / LOG_FILE)
    for file in (file for files in missing.items for file in files):
        place = _place(file, root)
        if file.key not in known and place.exists() and (_is_md5(file.etag) or place.stat().st_size != file.size):
            raise not_ours(place, "fetch")


def _free(root: Path) -> int:
    """Bytes that are free where ``root`` is; the folder is made."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(root).free
    except OSError as error:
        raise WriteError(f"cannot write to {root}: {error.strerror}; choose a folder you may write to") from error


def _results(
    pool: ThreadPoolExecutor,
    files: Iterable[tuple[int, RemoteFile]],
    threads: int,
    work: Callable[[RemoteFile], None],
) -> Iterator[tuple[int, RemoteFile, Exception | None]]:
    """Each file as its work ends, with what went wrong; few are handed out ahead, so that an interrupt ends it soon."""
    todo = iter(files)
    running: dict[Future[None], tuple[int, RemoteFile]] = {}
    while True:
        while len(running) < 2 * threads and (pair := next(todo, None)) is not None:
            running[pool.submit(work, pair[1])] = pair
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            number, file = running.pop(future)
            error = future.exception()
            if error is None or isinstance(error, StoreError | CorruptDataError):
                yield number, file, error
                continue
            for other in running:
                other.cancel()
            raise error


def _fetch(file: RemoteFile, bucket: str, root: Path, options: StoreOptions, log: _Log, landing: Landing) -> None:
    place = _place(file, root)
    for attempt in range(_ATTEMPTS):
        data = s3.get(bucket, file.key, options)
        if data is None:
            raise StoreError(f"s3://{bucket}/{file.key} was listed and is gone; run the same command again")
        if wrong := _mismatch(file, data):
            if attempt + 1 < _ATTEMPTS:
                continue
            raise CorruptDataError(f"s3://{bucket}/{file.key}: {wrong}, {_ATTEMPTS} times; it is being changed there")
        landing.put(place, data)
        log.add(file)
        return


def _mismatch(file: RemoteFile, data: bytes) -> str:
    """What is wrong with an object's bytes, or ""."""
    if len(data) != file.size:
        return f"expected {file.size} bytes, found {len(data)}"
    if _is_md5(file.etag) and (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != file.etag:
        return f"expected the MD5 sum {file.etag}, found {found}"
    return ""


def _is_md5(etag: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", etag) is not None


def _place(file: RemoteFile, root: Path) -> Path:
    """Where an object goes; a key that leads out of the root is refused."""
    parts = file.path.split("/")
    if any(part in ("", ".", "..") for part in parts) or os.path.isabs(file.path) or "\\" in file.path:
        raise InputError(f"the store lists an object {file.key!r}, whose path leads out of {root}; it is not fetched")
    return root.joinpath(*parts)


def _is_there(file: RemoteFile, root: Path, known: dict[str, tuple[int, str]]) -> bool:
    place = _place(file, root)
    try:
        size = place.stat().st_size
    except OSError:
        return False
    if size != file.size:
        return False
    logged = known.get(file.key)
    if logged is not None:
        return logged == (file.size, file.etag)
    # written, and the run was killed before the log said so; or it came by other means
    return _is_md5(file.etag) and not _mismatch(file, place.read_bytes())


def _read_log(path: Path) -> dict[str, tuple[int, str]]:
    known = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # a line without its end was cut off by a kill
            key, _, rest = line.partition("\t")
            size, _, etag = rest.partition("\t")
            if size.isdigit():
                known[key] = (int(size), etag)
    return known


class _Log:
    """Appends lines to the log of fetched objects; from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def __enter__(self) -> _Log:
        cut = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        self._file = self._path.open("a", encoding="utf-8")
        if cut:
            self._file.write("\n")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, file: RemoteFile) -> None:
        with self._lock:
            self._file.write(f"{file.key}\t{file.size}\t{file.etag}\n")
            self._file.flush()
