"""The loader: one order whatever the workers, resumable, and clear ends when a process dies."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data._utils import signal_handling

from connectomics.cellmap.catalog import Catalog
from connectomics.data.loader import PatchLoader, WorkerError, _reason
from connectomics.errors import UnknownNameError
from tests.data.loader_kit import Modules, Numbers, Volumes, loader
from tests.starter import Started, Starter

ROOT = Path(__file__).resolve().parents[2]
#: a spawned process imports torch, which takes seconds; one quick test has it
STARTS = [pytest.param("spawn", marks=pytest.mark.slow), "forkserver"]


def sequence(batches: PatchLoader | Iterator[Any]) -> list[tuple[int, int, float]]:
    rows = [zip(b["epoch"].tolist(), b["position"].tolist(), b["noise"].tolist(), strict=True) for b in batches]
    return [row for batch in rows for row in batch]


def shared_memory_of(pids: list[int]) -> set[str]:
    """Files in /dev/shm that processes have mapped and that still have a name."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    paths = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
    return {path for path in paths if os.path.exists(path)}


def alive(pid: int) -> bool:
    """Whether a process still runs: a zombie, whom nobody has buried yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# -- order -------------------------------------------------------------------------------------------------------------
def test_the_order_does_not_depend_on_the_workers() -> None:
    expected = sequence(loader(Numbers()))
    assert [position for _, position, _ in expected] == list(range(24))
    for workers, start in ((2, "forkserver"), (1, "spawn")):
        assert sequence(loader(Numbers(), workers, start=start)) == expected


@pytest.mark.parametrize("start", STARTS)
def test_volumes_that_the_parent_has_read_before(phantom: Path, start: str) -> None:
    from connectomics.data.volumes import CropVolume

    volumes = [CropVolume(crop, ("mito",), (16.0,) * 3) for crop in Catalog.open(str(phantom)).crops(None)[:2]]
    expected = sequence(loader(Volumes(volumes), length=8, crops=2))
    assert all(value > 0 for _, _, value in expected)
    assert sequence(loader(Volumes(volumes), 1, length=8, crops=2, start=start)) == expected


def test_workers_persist_or_not_and_epochs_differ() -> None:
    pids = []
    for persistent in (True, False):
        running = loader(Numbers(), 2, persistent=persistent)
        epochs, workers = [], []
        for epoch in range(2):
            running.sampler.set_epoch(epoch)
            batches = iter(running)
            epochs.append(sequence(iter([next(batches)])))
            workers.append(running.worker_pids)
            epochs[-1] += sequence(batches)
        assert [row[0] for row in epochs[1]] == [1] * 24
        assert (workers[0] == workers[1]) == persistent
        pids += workers[0] + workers[1]
        running.stop()
    assert gone(pids, 10)


def test_nothing_is_drawn_from_the_random_state_of_the_main_process() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader(Numbers()))
    list(loader(Numbers(), 1))
    assert torch.rand(1) == expected


# -- state -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_going_on_in_the_middle_of_an_epoch(workers: int, persistent: bool) -> None:
    """What workers have fetched ahead is not lost, and not given twice."""
    whole = loader(Numbers())
    whole.sampler.set_epoch(3)
    expected = sequence(whole)
    first = loader(Numbers(), workers, persistent=persistent)
    first.sampler.set_epoch(3)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    state = first.state_dict()
    assert state == {"epoch": 3, "batches": 5}
    batches.close()

    second = loader(Numbers(), workers, persistent=persistent)
    second.load_state_dict(state)
    batches = iter(second)
    second.sampler.set_epoch(3)  # Lightning says so after it asked for the iterator
    assert sequence(batches) == expected[10:]
    assert second.state_dict() == {"epoch": 3, "batches": 12}
    second.sampler.set_epoch(4)
    assert [row[:2] for row in sequence(second)] == [(4, n) for n in range(24)]
    for one in (first, second):
        one.stop()


def test_the_state_at_an_epochs_end_is_the_begin_of_the_next() -> None:
    first, second = loader(Numbers()), loader(Numbers())
    list(first)
    second.load_state_dict(first.state_dict())
    assert sequence(second)[0][:2] == (1, 0)


def test_an_epoch_that_was_ended_early_stays_ended() -> None:
    again = loader(Numbers())
    again.load_state_dict({"epoch": 2, "batches": 5})
    batches = iter(again)
    again.sampler.set_epoch(3)
    assert sequence(batches)[0][:2] == (3, 0)


# -- in the workers ----------------------------------------------------------------------------------------------------
def test_workers_are_light_and_deaf_to_interrupts() -> None:
    forkserver._forkserver._stop()  # one that runs already has what earlier tests let it import
    batch = next(iter(loader(Modules(), 1, start="forkserver")))
    assert {name: values.tolist() for name, values in batch.items()} == {
        "heavy": [0, 0],
        "threads": [1, 1],
        "interrupts": [1, 1],
    }


def test_a_worker_that_ends_at_the_worst_moment_does_not_block_the_end() -> None:
    """It is ended while it holds the lock of torch's event that ends workers, which ``set`` takes."""
    batches = iter(loader(Numbers("lock", at=4), 1))
    next(batches)
    time.sleep(1)  # it has the lock by then
    ending = threading.Thread(target=batches.close, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_arrives_as_it_was_raised(workers: int) -> None:
    failing = loader(Numbers("known error", at=7), workers)
    batches = iter(failing)
    seen = [next(batches) for _ in range(3)]
    with pytest.raises(UnknownNameError) as caught:
        next(batches)
    assert str(caught.value) == "unknown class 'mitt'; did you mean 'mito'?"
    assert sequence(iter(seen))[-1][1] == 5
    with pytest.raises(WorkerError if workers else MemoryError):
        list(loader(Numbers("memory", at=7), workers))


def test_a_bug_in_a_worker_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match=r"(?s)Original Traceback.*a bug"):
        list(loader(Numbers("bug", at=3), 2))


# -- ends --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("start", "persistent"), [("forkserver", True), pytest.param("spawn", False, marks=pytest.mark.slow)]
)
def test_a_worker_that_is_killed_is_one_clear_error(start: str, persistent: bool) -> None:
    of_others = shared_memory_of([os.getpid()])  # what tests before this one still hold, which workers inherit
    dying = loader(Numbers("SIGKILL", at=13), 2, start=start, persistent=persistent)
    batches = iter(dying)
    next(batches)
    pids = dying.worker_pids
    mapped = shared_memory_of([os.getpid(), *pids]) - of_others
    assert mapped
    message = (
        r"loader worker [12] of 2 was ended by SIGKILL, .*: lower data\.num_workers.*data\.cache=disk, and resume$"
    )
    with pytest.raises(WorkerError, match=message):
        sequence(batches)
    assert gone(pids, 10)
    del batches, dying
    until = time.monotonic() + 10
    while any(os.path.exists(path) for path in mapped) and time.monotonic() < until:
        gc.collect()  # the semaphores of queues have names until the queues are gone, their threads too
        time.sleep(0.05)
    assert not any(os.path.exists(path) for path in mapped)


def test_what_is_said_of_other_ends() -> None:
    assert re.match(r"loader worker 1 of 4 was ended by SIGBUS: shared memory ran out \(\d+ MB free", _reason(0, -7, 4))
    for code, said in ((-signal.SIGSEGV, "was ended by SIGSEGV"), (3, "ended with status 3")):
        assert f"worker 1 of 4 {said}; data.num_workers=0 shows what happens in it" in _reason(0, code, 4)


def run_script(starter: Starter, folder: Path, start: str, nap_s: float) -> tuple[Started, list[int]]:
    """Start it as a terminal would, the leader of a process group; returns when its workers are at work."""
    process = starter.start(["-m", "tests.data.loader_kit", folder, start, nap_s], cwd=ROOT)
    file = folder / "pids.json"
    assert process.wait_for(file.is_file), process.said
    return process, json.loads(file.read_text())


def group(leader: int) -> list[int]:
    """All processes of a group, also those that torch and multiprocessing start for themselves."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == leader:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(("start", "nap_s"), [pytest.param("spawn", 0.02, marks=pytest.mark.slow), ("forkserver", 1.0)])
def test_an_interrupt_ends_everything_quietly(tmp_path: Path, starter: Starter, start: str, nap_s: float) -> None:
    """Ctrl-C in a terminal goes to the whole group; also while workers are in the middle of slow reads."""
    process, pids = run_script(starter, tmp_path, start, nap_s)
    members = group(process.pid)
    assert set(pids) <= set(members)
    mapped = shared_memory_of(members)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert time.monotonic() - began < 20  # one second on an idle machine
    assert process.stderr == "interrupted; rerun the same command to resume\n"
    assert gone(members, 10)
    assert not any(os.path.exists(path) for path in mapped)


@pytest.mark.parametrize("start", STARTS)
def test_workers_end_when_the_main_process_is_killed(tmp_path: Path, starter: Starter, start: str) -> None:
    process, _ = run_script(starter, tmp_path, start, 0.02)
    members = group(process.pid)
    mapped = shared_memory_of(members)
    process.kill()
    assert gone(members, 30)
    assert not any(os.path.exists(path) for path in mapped)


def test_a_way_to_start_that_is_none_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"'forkserve' in data\.worker_start; did you mean 'forkserver'"):
        loader(Numbers(), 1, start="forkserve")


def test_torch_has_the_private_names_that_the_loader_uses() -> None:
    running = loader(Numbers(), 1)
    batches = iter(running)
    next(batches)
    iterator = running._running._iterator  # type: ignore[union-attr]
    for name in ("_workers", "_worker_pids_set", "_shutdown_workers"):
        assert hasattr(iterator, name), f"this torch has no {type(iterator).__name__}.{name}: adapt _TorchWorkers"
    assert hasattr(signal_handling, "_remove_worker_pids"), "this torch has no _remove_worker_pids: adapt _TorchWorkers"
    assert hasattr(running, "_iterator"), "this torch has no DataLoader._iterator: adapt PatchLoader.stop"
    running.stop()
