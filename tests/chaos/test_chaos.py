"""Every verb that writes, whatever happens to it on the way.

Each case ends with the right bytes, those of a run that nothing happened to, or with a status that is not 0 and one
line; nothing that was there before is lost; and once the disturbance is gone the same command gives the right bytes.
All of them are real: processes that are killed, a disk that is full, folders that are gone.

A case or two of each disturbance runs in the quick suite, all pairs of verb and disturbance in the whole one.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.chaos.kit import (
    VERBS,
    Whole,
    everything,
    no_permission,
    results,
    small_disk,
    wait_for_files,
)
from tests.s3_server import FaultyProxy, FolderServer
from tests.starter import Started, Starter


@dataclass
class Place:
    """Where the cases of one session are.

    Attributes:
        served: a link to the data root that the S3 server shows.
    """

    folder: Path
    served: Path
    whole: Whole
    starter: Starter

    def serve(self, base: Path) -> None:
        """Let the S3 server show the data root of ``base``."""
        self.served.unlink(missing_ok=True)
        self.served.symlink_to(base / "root")


@pytest.fixture(scope="module")
def place(whole: Whole, starter: Starter) -> Iterator[Place]:
    """Not below pytest's folder: what cannot be removed there would stop it."""
    folder = Path(mkdtemp(prefix="chaos-"))
    served = folder / "served"
    served.symlink_to(whole.inputs / "root")
    try:
        with (
            FolderServer(served) as server,
            FaultyProxy(server.endpoint, share=1 / 20) as proxy,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            yield Place(folder, served, whole, starter)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Case:
    """One verb with inputs and an output folder of its own."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name, self.verb = place, name, VERBS[name]
        place.serve(place.whole.inputs)
        self.expected, self.files = place.whole.result(name)
        self.folder = Path(mkdtemp(dir=place.folder))
        self.base, self.out = self.folder / "inputs", self.folder / "out"
        shutil.copytree(place.whole.inputs, self.base, ignore=shutil.ignore_patterns("cache*"))
        self.out.mkdir()
        place.serve(self.base)
        self.chance = random.Random(name)

    @property
    def command(self) -> list[str]:
        return self.verb.command(self.base, self.out)

    def begin(self) -> Started:
        """Start, and wait until it has written something: how much is chance, the same in every run of the tests."""
        started = self.place.starter.start(self.command)
        wait_for_files(started, self.out, self.chance.randint(1, max(1, self.files - 1)))
        return started

    def ends(self, started: Started) -> bool:
        """Well, with the right bytes, or with one line; whether well."""
        status = started.wait()
        if status == 0:
            assert results(self.out) == self.expected
        else:
            assert started.status == 1, started.said
            assert len(started.errors) == 1, started.said
            assert "Traceback" not in started.said
        return status == 0

    def again(self, ended: bool, *more: str) -> None:
        """The same command; `ingest` refuses what is there, also if it has just written it."""
        if not (ended and self.name == "ingest"):
            self.succeeds(*more)

    def fails(self) -> str:
        """The line that it ends with."""
        started = self.place.starter.run(self.command)
        assert started.status == 1, started.said
        assert len(started.errors) == 1, started.said
        assert "Traceback" not in started.said
        return started.errors[0]

    def succeeds(self, *more: str) -> None:
        started = self.place.starter.run([*self.command, *more])
        assert started.status == 0, started.said
        found = results(self.out)
        assert found.keys() == self.expected.keys()
        assert [name for name in found if found[name] != self.expected[name]] == []


# -- what happens ------------------------------------------------------------------------------------------------------
def killed(case: Case) -> None:
    for _ in range(2):
        case.begin().kill()
    case.succeeds()


def disk_full(case: Case) -> None:
    need = 4096 * sum(-(-len(data) // 4096) + 1 for data in case.expected.values())
    with small_disk(case.out, max(16384, need // 3)) as resize:
        if resize is None:
            pytest.skip("no file system can be mounted here (not root, or in a container without the right)")
        (case.out / "there before.txt").write_text("notes")
        case.fails()
        assert (case.out / "there before.txt").read_text() == "notes"
        resize(1 << 28)
        case.succeeds()


def permission_revoked(case: Case) -> None:
    started = case.begin()
    with no_permission(case.out) as able:
        ended = case.ends(started)
    if not able:
        pytest.skip("root cannot be kept from writing here: no chattr, or a file system without attributes")
    case.again(ended)


def input_unmounted(case: Case) -> None:
    """What is read is gone midway, as a mount that is lost; then it is back."""
    reads, gone = case.base / case.verb.reads, case.base / "gone"
    started = case.begin()
    reads.rename(gone)
    ended = case.ends(started)
    assert not reads.exists()
    gone.rename(reads)
    case.again(ended)


def input_corrupt(case: Case) -> None:
    file = case.base / case.verb.damaged
    about, good = file.stat(), file.read_bytes()
    started = case.begin() if case.name == "fetch" else None  # which lists what there is before it reads
    file.write_bytes(good[: len(good) // 2])
    ended = case.ends(started) if started is not None else not case.fails()
    file.write_bytes(good)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    # a file that was replaced is another input: what was begun from the damaged one cannot be resumed
    case.again(ended, *(["--overwrite", "--resume"] if case.verb.is_task else []))


def moved(case: Case) -> None:
    """Inputs and the unfinished output are moved, and the same command goes on with their new names."""
    case.begin().kill()
    case.base = case.base.rename(case.folder / "inputs elsewhere".replace(" ", "-"))
    case.out = case.out.rename(case.folder / "out-elsewhere")
    case.place.serve(case.base)
    case.succeeds()


def race(case: Case) -> None:
    """Two at a time: none of them, and not both together, leave anything but the right bytes."""
    both = [case.place.starter.start(case.command) for _ in range(2)]
    statuses = [started.wait() for started in both]
    for status, started in zip(statuses, both, strict=True):
        assert status in (0, 1), started.said
        assert len(started.errors) == status, started.said
        assert "Traceback" not in started.said
    assert 0 in statuses
    found = results(case.out)
    assert found.keys() == case.expected.keys()
    assert [name for name in found if found[name] != case.expected[name]] == []


def foreign_content(case: Case) -> None:
    file = case.out / case.verb.writes
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("six months of work")
    before = everything(case.out)
    case.fails()
    assert {name: data for name, data in everything(case.out).items() if name in before} == before
    shutil.rmtree(case.out)
    case.succeeds()


DISTURBANCES: dict[str, Callable[[Case], None]] = {
    disturb.__name__: disturb
    for disturb in (
        killed, disk_full, permission_revoked, input_unmounted, input_corrupt, moved, race, foreign_content
    )
}  # fmt: skip
QUICK = {
    ("decode", "killed"), ("ingest", "disk_full"), ("ingest", "permission_revoked"), ("decode", "input_unmounted"),
    ("measure", "input_corrupt"), ("decode", "moved"), ("export", "race"), ("mesh", "foreign_content"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "disturbance"),
    [
        pytest.param(verb, name, marks=[] if (verb, name) in QUICK else pytest.mark.slow)
        for verb in VERBS
        for name in DISTURBANCES
    ],
)
def test_right_bytes_or_one_line(verb: str, disturbance: str, place: Place) -> None:
    case = Case(place, verb)
    try:
        DISTURBANCES[disturbance](case)
    finally:
        shutil.rmtree(case.folder, ignore_errors=True)
