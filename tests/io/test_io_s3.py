"""S3 that answers late, wrongly or not at all: what is read is right, or an error that names the object."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from connectomics.errors import CorruptDataError, EngineError
from connectomics.geometry import VoxelGrid
from connectomics.io import s3
from connectomics.io.array import StoredArray
from connectomics.io.fingerprint import content_identity, same_content
from connectomics.io.location import StoreError, StoreOptions
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import exists, list_groups, read_bytes, read_json
from connectomics.io.write import write_multiscale
from tests.s3_server import FAULTS, Fault, FaultyProxy, FolderServer

GRID = VoxelGrid((8.0, 8.0, 8.0), (4.0, 4.0, 4.0), (40, 40, 40))
DATA = np.random.default_rng(0).integers(1, 255, GRID.shape, dtype=np.uint8)
WHERE = "s3://public/x.zarr/em"
CHUNK = "x.zarr/em/s0/1/2/0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_multiscale(tmp_path / "x.zarr" / "em", DATA, GRID, chunks=(16, 16, 16))
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    with FolderServer(folder) as running:
        yield running


def options(proxy: FaultyProxy, retries: int = 5, timeout: float = 60.0) -> StoreOptions:
    return StoreOptions(endpoint=proxy.endpoint, cache_bytes=0, retries=retries, timeout=timeout)


def in_child(method: str, task: Callable[..., Any], *args: Any) -> Any:
    """The result or the error of ``task`` in another process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        return pool.submit(task, *args).result(timeout=120)


def read_all(how: StoreOptions) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """Values, mask, and which chunks are stored; by way of metadata, a bulk read, and a listing or single questions."""
    volume = Multiscale.open(WHERE, how)
    return *volume.read_raw(volume.grid), volume.stored_chunks(volume.grid).ravel().tolist()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_at_times_is_asked_again(server: FolderServer, fault: Fault) -> None:
    with FaultyProxy(server.endpoint, share=0.15, seed=1, faults=(fault,)) as proxy:
        values, inside, stored = read_all(options(proxy, retries=8))
        assert proxy.failed[fault] >= 3
    np.testing.assert_array_equal(values, DATA)
    assert inside.all()
    assert all(stored)


class CutOnce(FaultyProxy):
    """Cuts the first answer for every object, and calls ``then`` before the second."""

    then: Callable[[], object]

    def fault_of(self, method: str, path: str, *_: Any) -> Fault | None:
        super().fault_of(method, path, 0.0, 0, ())
        number = self.seen[f"{method} {path}"]
        if number == 2:
            self.then()
        return "truncated" if number == 1 else None


def test_a_bucket_that_is_not_there_is_asked_for_once(server: FolderServer) -> None:
    with FaultyProxy(server.endpoint) as proxy, pytest.raises(StoreError, match="NoSuchBucket"):
        s3.children("nobucket", "a", options(proxy))
    assert sum(proxy.seen.values()) == 1


@pytest.mark.parametrize("content", [None, b"y" * 5000, b"z" * 100], ids=["removed", "replaced", "shorter"])
def test_an_object_that_changes_while_it_is_read_is_read_whole_or_absent(tmp_path: Path, content: bytes | None) -> None:
    """As claims and leases do, which other processes write and remove at any time."""
    file = tmp_path / "a"
    file.write_bytes(b"x" * 5000)
    with FolderServer(tmp_path) as server, CutOnce(server.endpoint) as proxy:
        proxy.then = file.unlink if content is None else lambda: file.write_bytes(content)
        assert s3.get("public", "a", options(proxy)) == content
        assert proxy.seen["GET /public/a"] >= 3


@pytest.mark.parametrize("fault", [*FAULTS, "403"])
def test_what_fails_for_ever_is_named(server: FolderServer, fault: Fault) -> None:
    """Neither zeros nor a hole; one line, with the bucket, the level and the chunk."""
    with FaultyProxy(server.endpoint) as proxy:
        proxy.always[CHUNK] = fault
        with pytest.raises(StoreError, match=f"cannot read s3://public/{CHUNK}: ") as caught:
            read_all(options(proxy, retries=1))
        assert "\n" not in str(caught.value)
        assert ("allow listing" in str(caught.value)) == (fault == "403")
        assert proxy.failed[fault] >= (1 if fault == "403" else 2)
        proxy.always = {"s0/.zarray": fault}
        with pytest.raises(StoreError, match=r"cannot read s3://public/x\.zarr/em/s0/\.zarray"):
            Multiscale.open(WHERE, options(proxy, retries=1))


def test_only_an_absent_chunk_is_a_hole(server: FolderServer, folder: Path) -> None:
    (folder / CHUNK).unlink()
    expected = np.ones(GRID.shape, bool)
    expected[16:32, 32:, :16] = False
    with FaultyProxy(server.endpoint) as proxy:
        values, inside, stored = read_all(options(proxy))
        np.testing.assert_array_equal(inside, expected)
        np.testing.assert_array_equal(values, np.where(expected, DATA, 0))
        assert stored.count(False) == 1
        volume = Multiscale.open(WHERE, options(proxy))
        assert volume.missing_chunks(GRID) == (1, 27, f"s3://public/{CHUNK}")
        proxy.always["/public/"] = "404"  # as from a bucket that is gone, or another server behind the name
        for ask in (volume.read_raw, volume.missing_chunks):
            with pytest.raises(StoreError, match=r"s3://public/x\.zarr/em/s0 was there and is no longer"):
                ask(GRID)


@pytest.mark.parametrize("content", [b"", b"no chunk at all"], ids=["empty", "garbage"])
def test_a_chunk_that_is_there_and_broken_is_an_error(server: FolderServer, folder: Path, content: bytes) -> None:
    (folder / CHUNK).write_bytes(content)
    with pytest.raises(CorruptDataError, match=f"s3://public/{CHUNK}"):
        read_all(StoreOptions(endpoint=server.endpoint))


@pytest.mark.parametrize(
    "compressor", [None, numcodecs.Zstd(), numcodecs.Zlib(), numcodecs.LZ4()], ids=["raw", "zstd", "zlib", "lz4"]
)
def test_an_empty_chunk_of_any_codec_is_an_error(tmp_path: Path, compressor: Any) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=(8, 8), chunks=(4, 4), dtype="u1", zarr_format=2, compressors=compressor
    )
    array[:] = 7
    (tmp_path / "a" / "1.0").write_bytes(b"")
    stored = StoredArray(tmp_path / "a")
    with pytest.raises(CorruptDataError, match=r"a/1\.0"):
        stored.read((0, 0), (8, 8))


def silent(how: StoreOptions) -> float:
    """Seconds until a read ends in the error."""
    volume = Multiscale.open(WHERE, how)
    started = time.monotonic()
    with pytest.raises(StoreError, match=f"s3://public/{CHUNK}"):
        volume.read_raw(volume.grid)
    with pytest.raises(StoreError, match=f"s3://public/{CHUNK}"):
        read_bytes(f"s3://public/{CHUNK}", how)
    return time.monotonic() - started


def test_a_server_that_never_answers_is_an_error_in_time(server: FolderServer) -> None:
    # a new process: tensorstore takes the first limits that it meets in one
    with FaultyProxy(server.endpoint) as proxy:
        how = options(proxy, retries=1, timeout=3.0)
        proxy.always[CHUNK] = "silence"
        assert in_child("spawn", silent, how) < 15


def small_things(how: StoreOptions) -> list[Any]:
    return [
        s3.children("public", "many", how),
        s3.objects("public", "many", how),
        s3.objects("public", "x.zarr/em", how),
        list_groups("s3://public", how),
        list_groups("s3://public/nowhere", how),
        exists("s3://public/x.zarr", how),
        exists("s3://public/many/0001", how),
        exists("s3://public/y.zarr", how),
        read_json(f"{WHERE}/.zattrs", how),
        read_json(f"{WHERE}/none.json", how),
    ]


def test_listings_and_small_objects(server: FolderServer, folder: Path) -> None:
    (folder / "many").mkdir()
    for number in range(1203):  # more than a page of a listing
        (folder / "many" / f"{number:04d}").touch()
    how = StoreOptions(endpoint=server.endpoint)
    here = small_things(how)
    assert len(here[0][1]) == len(here[1]) == 1203
    assert here[3:8] == [["many", "x.zarr"], [], True, True, False]
    with pytest.raises(StoreError, match="cannot read s3://elsewhere"):
        exists("s3://elsewhere/x", how)


def test_a_forked_child_of_a_reader_is_told_so(server: FolderServer) -> None:
    """There tensorstore would abort the process and obstore hang."""
    how = StoreOptions(endpoint=server.endpoint)
    volume = Multiscale.open(WHERE, how)
    assert volume.read_raw(GRID.crop((0, 0, 0), (1, 1, 1)))[1].all()
    for task, args in ((exists, (WHERE, how)), (read_all, (how,))):
        with pytest.raises(EngineError, match="forkserver"):
            in_child("fork", task, *args)


def test_kept_chunks_are_not_asked_for_again(server: FolderServer) -> None:
    with FaultyProxy(server.endpoint) as proxy:
        counted = []
        for kept in (0, 64 << 20):
            proxy.reset()
            read_twice(StoreOptions(endpoint=proxy.endpoint, cache_bytes=kept))
            counted.append(sum(n for name, n in proxy.seen.items() if name.startswith(f"GET /public/{CHUNK[:12]}")))
        assert counted[1] <= counted[0] - 27


def read_twice(how: StoreOptions) -> None:
    volume = Multiscale.open(WHERE, how)
    for _ in range(2):
        np.testing.assert_array_equal(volume.read_raw(GRID)[0], DATA)


def test_kept_chunks_stay_within_their_bytes(tmp_path: Path) -> None:
    """128 MB read with 8 MB to keep: the process grows by what it keeps and works with, not by what it read."""
    write_multiscale(
        tmp_path / "big.zarr" / "em",
        np.random.default_rng(0).integers(0, 255, (512, 512, 512), dtype=np.uint8),
        VoxelGrid((8.0,) * 3, (4.0,) * 3, (512, 512, 512)),
    )
    program = """
        import resource, sys
        from connectomics.io.location import StoreOptions
        from connectomics.io.multiscale import Multiscale

        where, endpoint = sys.argv[1:]
        volume = Multiscale.open(where, StoreOptions(endpoint=endpoint, cache_bytes=8 << 20))
        sizes = []
        for z in range(0, 512, 64):
            for y in range(0, 512, 64):
                volume.read_raw(volume.grid.crop((z, y, 0), (64, 64, 512)))
            with open("/proc/self/statm") as file:
                sizes.append(int(file.read().split()[1]) * resource.getpagesize() / 2**20)
        print(max(sizes[1:]) - sizes[0])
    """
    with FolderServer(tmp_path) as server:
        args = [textwrap.dedent(program), "s3://public/big.zarr/em", server.endpoint]
        done = subprocess.run([sys.executable, "-c", *args], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 40, done.stdout


def test_the_content_of_a_volume_is_known_wherever_it_lies(server: FolderServer, folder: Path) -> None:
    def identity(place: str = "x.zarr") -> str:
        return content_identity(Multiscale.open(f"s3://public/{place}/em", StoreOptions(endpoint=server.endpoint)))

    first = identity()
    assert "...." not in first, "every sampled chunk is found"
    subprocess.run(["cp", "-a", folder / "x.zarr", folder / "copy.zarr"], check=True)
    assert identity("copy.zarr") == first
    (folder / CHUNK).unlink()
    assert same_content(first, identity()), "a chunk that is not there yet does not make another volume"
    write_multiscale(folder / "x.zarr" / "em", DATA[::-1].copy(), GRID, chunks=(16, 16, 16), overwrite=True)
    assert not same_content(first, identity())
