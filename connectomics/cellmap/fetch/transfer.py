"""Download objects: several at a time, each verified and written in one step."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.fetch.plan import FetchPlan, RemoteFile
from connectomics.errors import CorruptDataError, InputError, MissingError, WriteError
from connectomics.io import s3
from connectomics.io.location import local_path
from connectomics.io.replacing import not_ours, remove_abandoned, require_own, unfinished
from connectomics.io.store import StoreError, StoreOptions, split_s3
from connectomics.io.write import write_file

#: In the root: one line per fetched and verified object: key, bytes, ETag, separated by tabs.
LOG_FILE = ".fetched.tsv"
_PARTIAL = ".fetching-"  # prefix of the folder with the objects that are being written
_ATTEMPTS = 3  # downloads of an object whose bytes do not match the listing
_SPARE = 1.02  # free bytes needed per byte to download
_NAMED = 3  # failed objects named in the error
_MOST = 1 << 26  # bytes of a crop table

#: Called with (objects done, all objects, bytes done, all bytes).
Moved = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class Missing:
    """The objects of a plan that are missing below a root, or exist there in another version.

    Attributes:
        items: for each item of the plan, in its order, the missing objects.
        stale: files to remove first: metadata of label arrays of which something is missing, and chunks that were
            fetched and that the store does not have any more.
    """

    plan: FetchPlan
    items: tuple[tuple[RemoteFile, ...], ...]
    stale: tuple[Path, ...] = ()

    @classmethod
    def below(cls, root: Path, plan: FetchPlan) -> Missing:
        """Compare with the root. Metadata of a label array is missing if a chunk of it is missing or stale."""
        labels = (file for item in plan.items if item.whole for file in item.files)
        # before the log is read: metadata that another fetch writes from now on is that of a whole array, and stays
        closed = {file for file in labels if file.is_metadata and _place(file, root).exists()}
        known, (_, base) = _read_log(root), split_s3(plan.source)
        before = f"{base}/" if base else ""
        found, stale = list[tuple[RemoteFile, ...]](), list[Path]()
        for item in plan.items:
            lacking = {file for file in item.files if not _is_fetched(file, root, known)}
            others = (root / path for path in item.absent)
            if item.whole:
                there = {_place(file, root) for file in item.files}
                folders = {_place(file, root).parent for file in item.files if file.is_metadata}
                others = (place for folder in folders for place in folder.rglob("*") if place not in there)
            gone = [p for p in others if before + p.relative_to(root).as_posix() in known and p.is_file()]
            metadata = {file for file in item.files if file.is_metadata}
            if item.whole and (gone or lacking - metadata):
                lacking |= metadata
                stale += [_place(file, root) for file in sorted(metadata & closed)]  # .zarray first
            stale += gone  # after the metadata
            found.append(tuple(sorted(lacking)))
        return cls(plan, tuple(found), tuple(stale))

    @property
    def number(self) -> int:
        """Objects."""
        return sum(len(files) for files in self.items)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for files in self.items for file in files)


def resolve_table(where: str, keep_in: Path | None = None) -> CropTable:
    """Return the crop table "challenge" (the one shipped with the package), of a file, or of a URL.

    Args:
        keep_in: folder that stores a table read from a URL, as ``crop_table.csv`` or ``.json``.

    Raises:
        MissingError: nothing exists there, or the server cannot be reached.
        MetadataError: it is no crop table.
    """
    if not where.startswith(("http://", "https://")):
        return CropTable.resolve(where)
    is_json = where.split("?")[0].endswith(".json")
    try:
        with urllib.request.urlopen(where, timeout=60) as answer:
            data = answer.read(_MOST)
    except OSError as error:
        raise MissingError(f"cannot read the crop table {where}: {error}; check the address") from error
    table = CropTable.parse(data, where, is_json=is_json)
    if keep_in is not None:
        file = keep_in / ("crop_table.json" if is_json else "crop_table.csv")
        write_file(require_own(file, lambda there: there == data, "fetch"), data)
    return table


def transfer(
    missing: Missing, root: Path, options: StoreOptions, *, threads: int = 16, progress: Moved = lambda *_: None
) -> int:
    """Download the missing objects below ``root``; return the number of downloaded objects.

    Each object appears in one step. Its size is compared with the listing, and its bytes with the ETag if that is an
    MD5 sum (objects uploaded in parts have another one). An object that fails does not stop the others. The metadata of
    an array is written after all of its chunks, ``.zarray`` last, and only if none failed: an incomplete label array
    cannot be opened, so it never reads as "absent". Stale chunks, which would be read, and partial files of a killed
    fetch are removed. Memory: one object per thread.

    Args:
        progress: called after each object, in this thread.

    Raises:
        WriteError: not enough space, no permission, or a file that was not fetched is in the way.
        StoreError: some objects failed; all others were downloaded.
        InputError: a key leads out of the root.
    """
    root = local_path(root)
    bucket, _ = split_s3(missing.plan.source)
    _refuse_foreign(missing, root)
    free = _free(root)
    if missing.size * _SPARE > free:
        raise WriteError(
            f"{root} has {free / 1e9:.2f} GB free, the download needs {missing.size / 1e9:.2f} GB; free space, or "
            "fetch fewer crops, fewer classes or a coarser voxel size"
        )
    failed: list[str] = []
    done = size = 0
    progress(0, missing.number, 0, missing.size)
    with Destination(root) as destination, ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:

        def work(file: RemoteFile) -> None:
            place = _place(file, root)
            destination.put(place, _download(file, bucket, options))
            destination.record(file)

        def bring(files: Iterable[tuple[int, RemoteFile]]) -> set[int]:
            """Fetch (item number, file) pairs; return the numbers of the items with a failed file."""
            nonlocal done, size
            broken = set()
            for number, file, error in _results(pool, files, threads, work):
                if error is not None:
                    failed.append(str(error))
                    broken.add(number)
                    continue
                done, size = done + 1, size + file.size
                progress(done, missing.number, size, missing.size)
            return broken

        for place in missing.stale:
            place.unlink(missing_ok=True)
        every = [(number, file) for number, files in enumerate(missing.items) for file in files]
        broken = set[int]()
        for turn in range(3):
            broken |= bring(pair for pair in every if _turn(pair[1]) == turn and pair[0] not in broken)
    if failed:
        more = f"; and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise StoreError(
            f"{len(failed)} of {missing.number} objects failed ({'; '.join(failed[:_NAMED])}{more}); "
            "run the same command again: fetched objects are kept"
        )
    return done


def _turn(file: RemoteFile) -> int:
    """Chunks come first, and what opens an array after its attributes."""
    return int(file.is_metadata) + file.key.endswith("/.zarray")


def _refuse_foreign(missing: Missing, root: Path) -> None:
    """Raise `WriteError` if a file that was not fetched is in the place of an object.

    Files in the log were fetched, even if they are damaged now or the store has a newer version. A file that is the
    object, or has its size if there is no sum, can come from a fetch that has not written the log yet, or was killed.
    """
    known = _read_log(root)
    for file in (file for files in missing.items for file in files):
        place = _place(file, root)
        if file.key in known or not place.exists() or _is_fetched(file, root, known):
            continue
        if _is_md5(file.etag) or place.stat().st_size != file.size:
            raise not_ours(place, "fetch")


def _free(root: Path) -> int:
    """Free bytes on the disk of ``root``; the folder is created."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(root).free
    except OSError as error:
        raise WriteError(f"cannot write to {root}: {error.strerror}; choose a folder you may write to") from error


def _results(
    pool: ThreadPoolExecutor, files: Iterable[tuple[int, RemoteFile]], threads: int, work: Callable[[RemoteFile], None]
) -> Iterator[tuple[int, RemoteFile, Exception | None]]:
    """Each file when its work ends, with its error. Few are submitted ahead, so an interrupt stops the work soon."""
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


def _download(file: RemoteFile, bucket: str, options: StoreOptions) -> bytes:
    wrong = ""
    for _ in range(_ATTEMPTS):
        data = s3.get(bucket, file.key, options)
        if data is None:
            raise StoreError(f"s3://{bucket}/{file.key} was listed and is gone; run the same command again")
        if not (wrong := _mismatch(file, data)):
            return data
    raise CorruptDataError(
        f"s3://{bucket}/{file.key}: {wrong}, in {_ATTEMPTS} attempts; it is being changed in the store"
    )


def _mismatch(file: RemoteFile, data: bytes) -> str:
    """How an object's bytes differ from the listing, or ""."""
    if len(data) != file.size:
        return f"expected {file.size} bytes, got {len(data)}"
    if _is_md5(file.etag) and (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != file.etag:
        return f"expected the MD5 sum {file.etag}, got {found}"
    return ""


def _is_md5(etag: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", etag) is not None


def _place(file: RemoteFile, root: Path) -> Path:
    """The local path of an object; a key that leads out of the root is refused."""
    parts = file.path.split("/")
    if any(part in ("", ".", "..") for part in parts) or os.path.isabs(file.path) or "\\" in file.path:
        raise InputError(f"the store lists an object {file.key!r}, whose path leads out of {root}; it is not fetched")
    return root.joinpath(*parts)


def _is_fetched(file: RemoteFile, root: Path, known: dict[str, tuple[int, str]]) -> bool:
    place = _place(file, root)
    try:
        if place.stat().st_size != file.size:
            return False
    except OSError:
        return False
    logged = known.get(file.key)
    if logged is not None:
        return logged == (file.size, file.etag)
    # written by a run that was killed before it wrote the log, or copied here
    return _is_md5(file.etag) and not _mismatch(file, place.read_bytes())


def _read_log(root: Path) -> dict[str, tuple[int, str]]:
    known = {}
    path = root / LOG_FILE
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # a line without its end was truncated by a kill
            key, _, rest = line.partition("\t")
            size, _, etag = rest.partition("\t")
            if size.isdigit():
                known[key] = (int(size), etag)
    return known


class Destination:
    """A root while objects are written to it, from any thread: a folder for partial files, and the log.

    At the end the folder is removed, with those of killed fetches.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, unfinished(root, _PARTIAL)
        self._lock = threading.Lock()

    def __enter__(self) -> Destination:
        remove_abandoned(self._root, _PARTIAL)
        log = self._root / LOG_FILE
        try:
            self._folder.mkdir()
            truncated = log.exists() and not log.read_bytes().endswith(b"\n")
            if truncated:  # by a kill
                self._append("\n")
        except OSError as error:
            raise WriteError(f"cannot write to {self._root}: {error.strerror}; choose another folder") from error
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def record(self, file: RemoteFile) -> None:
        """Add an object to the log."""
        self._append(f"{file.key}\t{file.size}\t{file.etag}\n")

    def put(self, place: Path, data: bytes) -> None:
        """Write a file below the root in one step; folders are created. `WriteError`."""
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

    def _append(self, text: str) -> None:
        with self._lock, (self._root / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(text)
