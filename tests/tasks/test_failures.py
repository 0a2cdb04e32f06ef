"""Failures that the next block would meet as well end a run; failures of single blocks may be accepted."""

from __future__ import annotations

import logging
import re
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from connectomics.config.schema import EngineConfig
from connectomics.errors import BlocksFailedError, ConfigError, CorruptDataError, InputError, OutOfMemoryError
from connectomics.io.store import StoreError
from connectomics.tasks import run_task
from connectomics.tasks.blocks import FAILED, DoneMap
from connectomics.tasks.failures import accepted_of, parse_accepted, spell
from tests.tasks.kit import CubeTask, CubeWorker

HERE, PROCESSES = EngineConfig(), EngineConfig(workers=2)


@pytest.mark.parametrize("engine", [HERE, PROCESSES], ids=["here", "processes"])
def test_a_run_of_which_every_block_fails_is_stopped(tmp_path: Path, engine: EngineConfig) -> None:
    task = CubeTask(str(tmp_path / "out"), accepting=True, count=2000, fail=tuple(range(2000)))
    with pytest.raises(BlocksFailedError, match=r"stopped because the first \d\d of 2000 blocks all failed") as error:
        run_task(task, engine)
    assert re.search(r"\(block (\d+) at \[\1 0 0\] to .* nm: no good data for \1\)", str(error.value))
    assert len(CubeWorker.tried(task, "first")) < 100


def test_a_run_is_not_stopped_while_some_blocks_are_done(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), accepting=True, count=60, fail=tuple(range(1, 60, 2)))
    with pytest.raises(BlocksFailedError, match="30 of 60 blocks failed"):
        run_task(task)
    assert len(CubeWorker.tried(task, "first")) == 30 + 3 * 30


def test_few_blocks_are_all_tried_again(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), accepting=True, count=5, fail=tuple(range(5)))
    with pytest.raises(BlocksFailedError, match="5 of 5 blocks failed"):
        run_task(task)
    assert len(CubeWorker.tried(task, "first")) == 15


def test_the_first_failures_are_logged_when_they_happen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task, seen = (
        CubeTask(str(tmp_path / "out"), accepting=True, count=300, fail=tuple(range(7, 20))),
        list[tuple[int, int]](),
    )

    class Look(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((len(CubeWorker.tried(task, "first")), record.levelno))

    logger = logging.getLogger("connectomics.tasks.failures")
    look = Look()
    logger.addHandler(look)
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(BlocksFailedError):
            run_task(task)
    finally:
        logger.removeHandler(look)
    assert caplog.messages[0].endswith(
        "out, first: block 7 at [7 0 0] to [8 1 1] nm failed, attempt 1 of 3: no good data for 7"
    )
    assert len(caplog.messages) == 5
    assert "further failures are named at the end" in caplog.messages[-1]
    assert seen[0][0] < 100, "not only at the end"


@pytest.mark.parametrize("engine", [HERE, PROCESSES], ids=["here", "processes"])
@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        (
            "lost",
            StoreError,
            "cannot read 5: the disk is not mounted.*block 5 at .* ended the run; what is done is kept",
        ),
        ("poor", OutOfMemoryError, "out of memory .*no memory for 5.*use fewer workers"),
    ],
)
def test_the_store_and_memory_end_a_run_at_once(
    tmp_path: Path, engine: EngineConfig, trouble: str, error: type[Exception], message: str
) -> None:
    task = CubeTask(str(tmp_path / "out"), accepting=True, count=200, **{trouble: 5})
    with pytest.raises(error, match=message):
        run_task(task, engine)
    assert CubeWorker.tried(task, "first").count(5) == 1
    assert len(CubeWorker.tried(task, "first")) < 100
    (task.folder / "mended").touch()
    assert run_task(task, engine)
    assert int((task.folder / "sum").read_text()) == sum(n**3 for n in range(200))


@pytest.mark.parametrize("engine", [HERE, PROCESSES], ids=["here", "processes"])
def test_failed_blocks_can_be_accepted_by_the_option_that_the_error_names(tmp_path: Path, engine: EngineConfig) -> None:
    task = CubeTask(str(tmp_path / "out"), accepting=True, count=40, fail=(3, 4, 5, 30), lost=17)
    with pytest.raises(StoreError, match=r"add --accept-failed set/out:17$"):
        run_task(task, engine)
    with pytest.raises(BlocksFailedError, match=r"add --accept-failed set/out:3-5,30$"):
        run_task(task, engine, accept=[17])
    assert (task.folder / "unknown-17").read_text() == "cannot read 17: the disk is not mounted"
    (accepted,) = accepted_of([task], parse_accepted(["set/out:3-5,30"]))
    assert run_task(task, engine, accept=accepted), "block 17 stays accepted"
    unknown = (3, 4, 5, 17, 30)
    assert int((task.folder / "sum").read_text()) == sum(n**3 for n in range(40) if n not in unknown)
    assert sorted(task.folder.glob("unknown-*")) == sorted(task.folder / f"unknown-{n}" for n in unknown)
    assert (task.folder / "unknown-3").read_text() == "no good data for 3"


def test_an_accepted_block_that_is_well_is_done(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), accepting=True, count=8)
    assert run_task(task, accept=[3])
    assert int((task.folder / "sum").read_text()) == sum(n**3 for n in range(8))
    assert not list(task.folder.glob("unknown-*"))


def test_accepted_blocks_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has blocks 0 to 7, got 8,12"):
        run_task(CubeTask(str(tmp_path / "out"), accepting=True, count=8), accept=[3, 8, 12])


def test_accepted_blocks_are_named_by_task() -> None:
    assert parse_accepted(["3,5-7", "crop1:2", "a/crop1:9,3"]) == {"": {3, 5, 6, 7}, "crop1": {2}, "a/crop1": {9, 3}}
    assert spell([3, 5, 6, 7, 9]) == "3,5-7,9"
    for wrong in ("crop1", "crop1:", "1;2", "-3", "3-"):
        with pytest.raises(ConfigError, match="--accept-failed takes CROP:12,40"):
            parse_accepted([wrong])
    one, other = CubeTask("/x/one", accepting=True), CubeTask("/x/other", accepting=True)
    assert accepted_of([one], {"": {1}}) == [{1}]
    assert accepted_of([one, other], {"other": {1}, "set/one": {2}}) == [{2}, {1}]
    for wanted in ("", "third"):
        with pytest.raises(InputError, match="the regions are set/one, set/other"):
            accepted_of([one, other], {wanted: {1}})
    with pytest.raises(InputError, match="fits 2 of them"):
        accepted_of([one, CubeTask("/y/one", accepting=True)], {"one": {1}})


def test_blocks_of_a_stage_that_needs_all_are_not_accepted(tmp_path: Path) -> None:
    """The second stage of a cube reads what the first has written; nothing of it may be left out."""
    task = CubeTask(str(tmp_path / "out"), accepting=True, count=8)
    (task.folder / "second" / "3.npy").mkdir(parents=True)
    with pytest.raises(BlocksFailedError) as error:
        run_task(task, accept=[3])
    assert "--accept-failed" not in str(error.value)
    assert DoneMap(task.folder / ".done-second", 8, task.key).missing.tolist() == [3]


# -- many blocks -------------------------------------------------------------------------------------------------------
@dataclass
class Flaky:
    """A worker that writes nothing: one block in 1,000 fails once, one in 10,000 always."""

    tries: Counter[int] = field(default_factory=Counter)

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        for number in blocks:
            self.tries[number] += 1
            if number % 10_000 == 13 or (number % 1000 == 7 and self.tries[number] == 1):
                raise CorruptDataError(f"no good data for {number}")
            yield number


class FlakyTask(CubeTask):
    worker = Flaky()

    @property
    def stages(self) -> tuple[str, ...]:
        return ("first",)

    def open_worker(self, stage: str, device: str) -> nullcontext[Flaky]:
        return nullcontext(self.worker)

    def finish(self) -> None:
        (self.folder / "sum").write_text("0")


@pytest.mark.slow
def test_100_000_blocks_of_which_some_fail_end_in_one_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = FlakyTask(str(tmp_path / "out"), accepting=True, count=100_000)
    always, once = set(range(13, 100_000, 10_000)), set(range(7, 100_000, 1000))
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with caplog.at_level(logging.WARNING), pytest.raises(BlocksFailedError) as error:
        run_task(task)
    cpu, held = time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{cpu:.1f} s CPU, {held / 1024:.0f} MB more")
    assert cpu < 60
    assert held < 100 * 1024
    said = str(error.value)
    assert "10 of 100000 blocks failed (block 13 at" in said
    assert "; and 5 more); the others are done." in said
    assert said.endswith(f"--accept-failed set/out:{','.join(map(str, sorted(always)))}")
    assert len(caplog.records) == 5
    assert all(task.worker.tries[n] == (3 if n in always else 2 if n in once else 1) for n in range(100_000))
    done = DoneMap(task.folder / ".done-first", 100_000, task.key)
    assert set(done.missing.tolist()) == always
    assert np.count_nonzero(np.frombuffer(done.path.read_bytes()[-100_000:], np.uint8) == FAILED) == 10
    task.worker.tries.clear()
    assert run_task(task, accept=always)
    assert set(task.worker.tries) == always
