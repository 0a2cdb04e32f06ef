"""What blockwise work is: one frozen value, saved beside its output, that any engine can run.

A task has stages, one after the other. A stage is a number of blocks that do not depend on each other and do not write
the same files. So blocks may be done in any order, by any process, twice, or on another machine, and the output is the
same to the bit. Blocks pass results to later stages in files.

The life of a task, as `connectomics.tasks.run_task` leads it::

    check()                      once: does the input exist, does the output belong to another task?
    for stage in stages:
        prepare(stage)           once, in the leading process: create arrays, combine results of the stage before
        open_worker(stage, dev)  in every working process; long-lived (a network is loaded once)
            worker.run(numbers)  any number of times, any subset of range(blocks(stage))
    finish()                     once: record that the output is complete
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from connectomics.config.values import plain, read
from connectomics.errors import InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import Box
from connectomics.io import store
from connectomics.io.artifacts import Difference, Provenance, changed_inputs
from connectomics.io.place import TASK_FILE as TASK_FILE
from connectomics.io.sharded import Storage
from connectomics.io.write import write_file
from connectomics.tasks.memory import free_unused, use_one_heap

_PROVENANCE = "artifact"


@dataclass(frozen=True)
class Cost:
    """Bytes that a block takes at most: read and written (uncompressed), and memory of a worker besides its model."""

    read: int
    written: int
    memory: int


class Worker(Protocol):
    """Does blocks of one stage in one process; keeps what is costly to make (a network, open arrays)."""

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        """Do these blocks in order and yield the number of each once its output is written.

        An error belongs to the first block that was not yielded; the worker must then be able to `run` the others.
        """
        ...


class BlockWorker(ABC):
    """A worker that does one block after the other and frees its memory before the next one."""

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        use_one_heap()
        for number in blocks:
            self.do(number)  # a separate call, so that its arrays are freed when it returns
            free_unused()
            yield number

    @abstractmethod
    def do(self, number: int) -> None:
        """Do this block; its output is written when this returns."""


class BlockTask(ABC):
    """A frozen dataclass of plain values (JSON) that says everything its output depends on.

    Each subclass has its own ``kind``, registered in `connectomics.cli.task_kinds`, so that ``pytc run-task`` can run a
    stored task.
    """

    kind: ClassVar[str]
    #: fields that change the speed, not the output: a resumed task may differ in them
    free: ClassVar[frozenset[str]] = frozenset()
    #: fields that say where inputs and output lie: a task whose files were moved is the same task. `made_from` says
    #: what an input holds.
    places: ClassVar[frozenset[str]] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON stores them, without the kind."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        """Invert `to_dict`; raises `MetadataError` naming ``where`` and the key that is unknown, missing or wrong."""
        return read(cls, data, where)

    @property
    @abstractmethod
    def name(self) -> str:
        """What is processed, for messages: ``jrc_cos7-1a/crop234``."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Folder of the unfinished output, `TASK_FILE` and the done-maps; all workers see it (a shared disk, or S3)."""

    def made_from(self) -> dict[str, str]:
        """Return role -> identity of each input (`connectomics.io.artifacts.identity`); reads the files."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what decides the output besides the inputs: all fields except those in `free` and `places`."""
        kept = {name: value for name, value in self.to_dict().items() if name not in self.free | self.places}
        if kept.get("storage") == plain(Storage()):  # as in tasks that were stored before there was a choice
            del kept["storage"]
        return dict(json.loads(json.dumps(kept)))  # as read from a file

    @property
    def key(self) -> str:
        """Hash of the `settings`, 16 hexadecimal digits."""
        text = json.dumps([self.kind, self.settings()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, file: Path) -> Difference:
        """Return how the task stored in ``file`` differs from this one; false if its output is the same.

        Raises `MetadataError` if the file holds no task, or a task of another version.
        """
        stored = read_task(file)
        if stored["kind"] != self.kind:
            return Difference([f"{stored['kind']}, not {self.kind}"])
        mine, theirs = self.settings(), type(self).from_dict(fields_of(stored), str(file)).settings()
        before = Provenance.from_dict(stored.get(_PROVENANCE, {})).made_from
        inputs = changed_inputs(before, self.made_from()) if before else []
        return Difference(_differing(mine, theirs), inputs)

    def save(self, path: Path, provenance: Provenance | None = None) -> None:
        """Store as JSON, atomically, with the provenance of the output."""
        about = {} if provenance is None else {_PROVENANCE: provenance.to_dict()}
        write_file(path, json.dumps({"kind": self.kind, **about, **self.to_dict()}, indent=2).encode())

    def begin(self) -> Provenance:
        """Store the task in its `folder`, as a new output made from the present inputs."""
        provenance = Provenance(made_from=self.made_from())
        self.save(self.folder / TASK_FILE, provenance)
        return provenance

    def go_on(self) -> None:
        """`begin` in `folder`; if this task was begun there, store what it asks for now (`free`)."""
        if not (self.folder / TASK_FILE).exists():
            self.begin()
            return
        stored, mine = read_task(self.folder / TASK_FILE), json.loads(json.dumps(self.to_dict()))
        if any(stored.get(name) != mine.get(name) for name in self.free):
            self.save(self.folder / TASK_FILE, self.provenance)

    @property
    def provenance(self) -> Provenance:
        """Provenance of the output in `folder`."""
        return Provenance.from_dict(read_task(self.folder / TASK_FILE).get(_PROVENANCE, {}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the task of this kind that is stored in a file; raises `MissingError`, `MetadataError`."""
        data = read_task(path)
        if data["kind"] != cls.kind:
            raise MetadataError(f"{path} holds no task of the kind {cls.kind}; run it with `pytc run-task {path}`")
        return cls.from_dict(fields_of(data), str(path))

    @property
    @abstractmethod
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""

    @abstractmethod
    def check(self, *, overwrite: bool = False) -> bool:
        """Return whether anything is left to do. Writes nothing.

        Raises `InputError`, `MissingError`, ... for an input that cannot be used, and `WriteError` if there is an
        output of another task. With ``overwrite``, neither that nor a finished output counts.
        """

    def starts_over(self, *, overwrite: bool, resume: bool) -> bool:
        """Return whether to overwrite. With both ``overwrite`` and ``resume`` only the output of another task is
        replaced; blocks of this task are kept, so that the same command can be rerun any number of times."""
        return starts_over(self.check, overwrite=overwrite, resume=resume)

    @abstractmethod
    def claim(self, *, overwrite: bool = False) -> None:
        """Take over `folder` by writing its `TASK_FILE`. Keep output of this task, unless ``overwrite``; remove that of
        another task (`check` has refused it without ``overwrite``)."""

    @abstractmethod
    def prepare(self, stage: str) -> None:
        """Make what the blocks of a stage need, after the earlier stages. Also called by a resumed run; must then keep
        what finished blocks have written."""

    @abstractmethod
    def blocks(self, stage: str) -> int:
        """Return how many blocks a stage has; called after `prepare`."""

    @abstractmethod
    def open_worker(self, stage: str, device: str) -> AbstractContextManager[Worker]:
        """Open a worker for a stage on a torch device (``cpu``, ``cuda:1``)."""

    @abstractmethod
    def finish(self) -> None:
        """Mark the output as complete (and move it to its place), and remove what only the stages needed."""

    def run_length(self, stage: str) -> int:
        """Return how many consecutive blocks one worker should do together because they share reads; 1 if none."""
        return 1

    def cost(self, stage: str) -> Cost | None:
        """Return what the largest block of a stage takes; None if that is unknown before the stage is prepared."""
        return None

    def block_box(self, stage: str, block: int) -> Box | None:
        """Return the box (nm) that a block writes, for messages; None if unknown."""
        return None

    def accepts(self, stage: str) -> str:
        """Return the name of this task in ``--accept-failed`` if its stage can do without a block, else ""."""
        return ""

    def accept(self, stage: str, failed: Mapping[int, str]) -> None:
        """Store failed blocks (number -> why) as empty, and record them as unknown; they then count as done."""
        raise InputError(f"{self.name}, {stage}: this stage cannot do without a block")

    def relocated(self, folder: Path) -> Self | None:
        """Return the same task with its output (and `folder`) below another ``folder``, to time a block there
        (``--dry-run``); None if the output cannot be elsewhere."""
        return None


def require_begun(begun: bool, folder: object, *, overwrite: bool, resume: bool) -> None:
    """Raise `MissingError` if ``resume`` is given (without ``overwrite``) and nothing was begun."""
    if resume and not overwrite and not begun:
        raise MissingError(f"--resume: nothing was begun below {folder}; leave it out to begin")


def starts_over(check: Callable[[], object], *, overwrite: bool, resume: bool) -> bool:
    """Return ``overwrite``; if ``resume`` is given too, whether ``check`` finds an output of something else."""
    if overwrite and resume:
        try:
            check()
        except WriteError:
            return True
        return False
    return overwrite


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the names of values that are not equal; with dots for nested values."""
    names = []
    for name in {**mine, **theirs}:
        one, other = mine.get(name), theirs.get(name)
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            names += [f"{name}.{inner}" for inner in _differing(one, other)]
        elif one != other:
            names.append(name)
    return names


def fields_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a task, from the result of `read_task`."""
    return {name: value for name, value in stored.items() if name not in ("kind", _PROVENANCE)}


def read_task(path: str | Path) -> dict[str, Any]:
    """Return the contents of a stored task, JSON or YAML, with its kind and its `Provenance`.

    Raises `MissingError`, and `MetadataError` if the file holds no task.
    """
    data: Any
    if Path(path).suffix in (".yaml", ".yml"):
        import yaml

        try:
            data = yaml.safe_load(store.read_bytes(path) or b"")
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise MetadataError(f"{path} holds no task: it is not valid YAML ({reason})") from error
    else:
        data = store.read_json(path)
    if data is None:
        raise MissingError(f"no task at {path}; expected the file {TASK_FILE} that a command writes beside its output")
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise MetadataError(f"{path} holds no task: expected keys and values, with a key 'kind'")
    return data
