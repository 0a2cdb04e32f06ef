"""Leases, claims and done-maps on an object store: one process at a time, whoever is killed, slow or cut off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics.decoding.blocks.pieces import SIDES, StoredBlocks
from connectomics.errors import CorruptDataError, EngineError, WriteError
from connectomics.io.location import StoreError
from connectomics.io.place import S3Path
from connectomics.tasks import DoneMap, lease
from connectomics.tasks.blocks import Lattice
from connectomics.tasks.claims import open_claims, refuse_if_shared
from connectomics.tasks.lease import HELD, MINE, UNCLEAR, Lease, change
from connectomics.tasks.lock import leading
from tests.s3_server import BUCKET, KEYS, FaultyProxy, FolderServer
from tests.tasks.kit import CubeTask

LOCK = S3Path(f"s3://{BUCKET}/a/.out.lock")
FOLDER = S3Path(f"s3://{BUCKET}/a/out")


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Before an empty bucket; a fifth of the requests fail, many after they were done."""
    (tmp_path / "bucket").mkdir()
    faults = ("500", "reset", "truncated", "truncated")
    with (
        FolderServer(tmp_path / "bucket", writable=True) as server,
        FaultyProxy(server.endpoint, share=1 / 5, faults=faults) as proxy,
    ):
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield proxy


def elsewhere(path: S3Path, beat: int = 0) -> None:
    """The lease of a process of another machine."""
    about = {"process": 7, "host": "node7", "machine": "node7 x", "started": 1.0, "token": "t", "beat": beat}
    path.put(json.dumps(about).encode())


def test_one_process_leads_at_a_time(proxy: FaultyProxy) -> None:
    for _ in range(10):  # whatever answers are lost
        with leading(FOLDER) as require:
            with pytest.raises(WriteError, match=r"process \d+ on .* is working on s3://public/a/out"), leading(FOLDER):
                pass
            require()
    assert not LOCK.exists()
    assert sum(proxy.failed.values()) > 10


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(proxy: FaultyProxy) -> None:
    code = f"""
import time
from connectomics.tasks.lease import Lease
from connectomics.io.place import S3Path
print(Lease(S3Path({str(LOCK)!r})).take(), flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline().strip() == MINE
    mine = Lease(LOCK)
    assert mine.take() == HELD
    assert f"process {other.pid} on " in mine.holder
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert mine.take() == MINE
    mine.close()


def test_a_process_of_another_machine_is_gone_once_its_lease_stays_the_same(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    elsewhere(LOCK)
    mine = Lease(LOCK)
    assert mine.take() == UNCLEAR
    elsewhere(LOCK, beat=1)
    assert mine.take() == HELD
    assert mine.holder == "process 7 on node7"
    time.sleep(1.1)
    assert mine.take() == MINE
    mine.close()


def test_a_lease_is_renewed_and_who_lost_it_knows(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    mine = Lease(LOCK)
    assert mine.take() == MINE
    time.sleep(1.5)
    assert json.loads(LOCK.read_bytes())["beat"] > 1
    mine.require()
    elsewhere(LOCK)
    time.sleep(1.5)
    with pytest.raises(WriteError, match="another process has taken over"):
        mine.require()
    mine.close()
    assert json.loads(LOCK.read_bytes())["host"] == "node7", "the other's lease stays"


def test_changes_by_several_processes_are_all_kept(proxy: FaultyProxy) -> None:
    path = S3Path(f"s3://{BUCKET}/map")
    maps = [DoneMap(path, 60, "key") for _ in range(3)]
    threads = [
        threading.Thread(target=lambda done, n: [done.mark([k]) for k in range(n, 60, 3)], args=(done, n))
        for n, done in enumerate(maps)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert DoneMap(path, 60, "key").count == 60
    assert 0 < len((path.with_name("map.rate")).read_bytes().splitlines()) <= 65
    path.unlink()
    assert change(path, lambda data: data + b"x") is None


def test_a_claimed_block_is_left_to_its_process(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FOLDER / ".done-first"
    done = DoneMap(path, 5, "key")
    mine = open_claims(FOLDER / ".done-first.claims", done)
    other = open_claims(FOLDER / ".done-first.claims", DoneMap(path, 5, "key"))
    assert mine.take([1, 2]) == [1, 2]
    assert other.take(range(5)) == [0, 3, 4]
    assert not mine.any_free([0, 3, 4])
    with pytest.raises(WriteError, match="other processes share the work"):
        refuse_if_shared(CubeTask(str(FOLDER)))
    done.mark([1])
    mine.release([1])
    other.release([0, 3, 4])
    assert other.take(range(5)) == [0, 3, 4], "1 is done, 2 is claimed"
    mine.close()
    assert other.any_free([2])
    other.close()
    assert [p.name for p in FOLDER.iterdir()] == [".done-first", ".done-first.rate"]


def test_the_claims_of_a_process_that_is_gone_are_taken_over(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    elsewhere(S3Path(f"{FOLDER}/.done-first.claims-by-other"))
    for number in (1, 2):
        S3Path(f"{FOLDER}/.done-first.claims-{number}").put(b"other")
    claims = open_claims(FOLDER / ".done-first.claims", DoneMap(FOLDER / ".done-first", 3, "key"))
    assert claims.take([0, 1, 2]) == [0]
    time.sleep(1.1)
    assert claims.any_free([1, 2])
    assert claims.take([0, 1, 2]) == [0, 1, 2]
    claims.close()


def test_a_store_that_ignores_conditions_is_noticed(proxy: FaultyProxy) -> None:
    proxy.dropped_headers = ("if-none-match", "if-match")
    with pytest.raises(EngineError, match="needs a store with conditional writes"):
        open_claims(FOLDER / ".done-first.claims", DoneMap(FOLDER / ".done-first", 3, "key"))
    with leading(FOLDER) as require:
        require()


def test_how_many_labels_a_block_has_is_read_without_the_rest_of_its_file(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = StoredBlocks(FOLDER, Lattice((64, 64, 64), (32, 32, 32)))
    faces = {side: np.random.default_rng(0).integers(0, 9, (256, 256)) for side in SIDES}
    blocks.save(3, {"count": np.asarray(41), **faces})
    blocks.save(4, {**faces, "count": np.asarray(42)})  # in another order
    proxy.reset()
    assert blocks.count(3) == 41
    assert proxy.sent_bytes < 20_000
    assert blocks.count(4) == 42
    for content in (b"no file", (FOLDER / "3").read_bytes()[:60]):
        (FOLDER / "5").put(content)
        with pytest.raises(CorruptDataError, match=r"s3://public/a/out/5: .*; start again with --overwrite"):
            blocks.count(5)
    with pytest.raises(CorruptDataError, match=r"cannot read s3://public/a/out/6: .*no such object"):
        blocks.count(6)

    def fail(*_: object) -> None:
        raise StoreError("no answer")

    monkeypatch.setattr(S3Path, "read_start", fail)
    with pytest.raises(StoreError, match="no answer"):  # not that the file is corrupt
        blocks.count(3)
