"""What blockwise work is: one frozen value, saved beside its output, that any engine can run.

A task goes through stages, one after the other. A stage is a number of blocks that do not depend on each other; what
one block writes no other block of the stage writes. So blocks may be done in any order, by any process, twice, or on
another machine, and the output is the same to the bit. What blocks tell later stages they write to files.

The life of a task, as `connectomics.tasks.runner.run_task` leads it::

    check()                      once: is the input there, does the output belong to another task?
    for stage in stages:
        prepare(stage)           once, in the process that leads: make arrays, unite what the stage before has left
        open_worker(stage, dev)  in every process that works; long-lived (a network is loaded once)
            worker.run(numbers)  any number of times, any subset of range(blocks(stage))
    finish()                     once: say that the output is complete
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from connectomics.config.values import plain, read
from connectomics.errors import InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import Box
from connectomics.io import store
from connectomics.io.artifacts import Difference, Provenance, changed_inputs
from connectomics.io.write import write_file
from connectomics.tasks.heap import give_back_freed, use_one_heap

TASK_FILE = "task.json"
_PROVENANCE = "artifact"
_NO_FIELDS = frozenset({"kind", _PROVENANCE})


@dataclass(frozen=True)
class Cost:
    """What a block takes, as far as it is known beforehand; at most, in bytes.

    Attributes:
        read, written: uncompressed. memory: held by a worker beside its model.
    """

    read: int
    written: int
    memory: int


class Worker(Protocol):
    """One process's hands on one stage of a task; what is costly to make (a network, open arrays) it makes once."""

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        """Do these blocks and yield the number of each, in their order, once its output is written.

        An error belongs to the first block that was not yielded; the worker must be able to `run` the others after it.
        """
        ...


class BlockWorker(ABC):
    """A worker that does one block after the other: what a block held is gone before the next one is read."""

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        use_one_heap()
        for number in blocks:
            self.do(number)  # a call of its own, so that no array of it lives on in this one
            give_back_freed()
            yield number

    @abstractmethod
    def do(self, number: int) -> None:
        """Do this block; when it returns, its output is written."""


class BlockTask(ABC):
    """A frozen dataclass of plain values (JSON) that says everything its output depends on.

    A subclass has its own ``kind``, which `connectomics.pipeline.run_task` lists, so that ``pytc run-task`` can run a
    stored task again.
    """

    kind: ClassVar[str]
    #: fields that decide how fast it is, not what is written: a task that goes on may differ in them
    free: ClassVar[frozenset[str]] = frozenset()
    #: fields that say where inputs and output lie: a task whose files were moved is the same task. What an input holds
    #: is in `made_from`.
    places: ClassVar[frozenset[str]] = frozenset()

    # -- what it is --------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON gives them, without the kind."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        """Invert `to_dict`; raises `MetadataError` naming ``where`` and the key that is unknown, missing or wrong."""
        return read(cls, data, where)

    @property
    @abstractmethod
    def name(self) -> str:
        """For people: what is worked on, ``jrc_cos7-1a/crop234``."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the unfinished output, `TASK_FILE` and the done-maps lie; local to all workers (a shared disk)."""

    def made_from(self) -> dict[str, str]:
        """Role -> identity of what is read (`connectomics.io.artifacts.identity`); looks at the files."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What decides the output beside the inputs: all fields but those of `free` and `places`."""
        kept = {name: value for name, value in self.to_dict().items() if name not in self.free | self.places}
        plain: dict[str, Any] = json.loads(json.dumps(kept))  # as it comes back from a file
        return plain

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for the `settings`."""
        text = json.dumps([self.kind, self.settings()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, file: Path) -> Difference:
        """How the task that is stored in ``file`` differs from this one; false if its output is the same.

        Raises `MetadataError` for a file that holds no task, or one of another version.
        """
        stored = read_task(file)
        if stored["kind"] != self.kind:
            return Difference([f"{stored['kind']}, not {self.kind}"])
        mine, theirs = self.settings(), type(self).from_dict(fields_of(stored), str(file)).settings()
        before = Provenance.from_dict(stored.get(_PROVENANCE, {})).made_from
        inputs = changed_inputs(before, self.made_from()) if before else []
        return Difference(_differing(mine, theirs), inputs)

    def save(self, path: Path, provenance: Provenance | None = None) -> None:
        """Store as JSON, in one step; with what its output is and what that is made from."""
        about = {} if provenance is None else {_PROVENANCE: provenance.to_dict()}
        write_file(path, json.dumps({"kind": self.kind, **about, **self.to_dict()}, indent=2).encode())

    def begin(self) -> Provenance:
        """Store the task in its `folder`, as a new output that is made from what its inputs hold now."""
        provenance = Provenance(made_from=self.made_from())
        self.save(self.folder / TASK_FILE, provenance)
        return provenance

    @property
    def provenance(self) -> Provenance:
        """Of the output that was begun in `folder`."""
        return Provenance.from_dict(read_task(self.folder / TASK_FILE).get(_PROVENANCE, {}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The task of this kind that is stored in a file; `MissingError`, `MetadataError`."""
        data = read_task(path)
        if data["kind"] != cls.kind:
            raise MetadataError(f"{path} holds no task of the kind {cls.kind}; run it with `pytc run-task {path}`")
        return cls.from_dict(fields_of(data), str(path))

    # -- what is to be done ------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in their order."""

    @abstractmethod
    def check(self, *, overwrite: bool = False) -> bool:
        """Whether anything is left to do. Writes nothing.

        Raises `InputError`, `MissingError`, ... for an input that cannot be used, and `WriteError` where the output of
        another task is in the way (with ``overwrite`` it is not, and a finished output counts as work to do).
        """

    def begins_anew(self, *, overwrite: bool, resume: bool) -> bool:
        """Whether to overwrite what is there. With ``resume`` beside ``overwrite`` only the output of another task is
        replaced: what is there of this one is kept, so that the same command can be started any number of times."""
        if overwrite and resume:
            try:
                self.check()
            except WriteError:  # another task's output is in the way
                return True
            return False
        return overwrite

    @abstractmethod
    def claim(self, *, overwrite: bool = False) -> None:
        """Make `folder` this task's own, by its `TASK_FILE`. What is there of this task is kept, unless ``overwrite``;
        what is there of another is removed (`check` has refused it where that was not asked for)."""

    @abstractmethod
    def prepare(self, stage: str) -> None:
        """Make what the blocks of a stage need, after the stages before it and before its first block. Also called
        where a run goes on; must then leave what finished blocks have written."""

    @abstractmethod
    def blocks(self, stage: str) -> int:
        """How many blocks a stage has; asked for after `prepare`."""

    @abstractmethod
    def open_worker(self, stage: str, device: str) -> AbstractContextManager[Worker]:
        """A worker for a stage on a torch device (``cpu``, ``cuda:1``)."""

    @abstractmethod
    def finish(self) -> None:
        """Say that the output is complete (and put it in its place), and remove what only the stages needed."""

    def run_length(self, stage: str) -> int:
        """How many consecutive blocks should go to one worker at a time, since they share what they read: 1 if any."""
        return 1

    def cost(self, stage: str) -> Cost | None:
        """What the largest block of a stage takes; None where it cannot be said before the stage is prepared."""
        return None

    def block_box(self, stage: str, block: int) -> Box | None:
        """The box (nm) that a block writes, for messages; None if that cannot be said."""
        return None

    def accepts(self, stage: str) -> str:
        """How ``--accept-failed`` names this task if its stage can do without a block, else ""."""
        return ""

    def accept(self, stage: str, failed: Mapping[int, str]) -> None:
        """Store blocks that failed (number -> why) as empty, and record them as unknown; they then count as done."""
        raise InputError(f"{self.name}, {stage}: this stage cannot do without a block")

    def relocated(self, folder: Path) -> Self | None:
        """The same work on the same input with its output (and `folder`) below another ``folder``, to time a block of
        it there (``--dry-run``); None where it cannot be done elsewhere."""
        return None


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of the values that are not equal; of those within a value with dots."""
    names = []
    for name in {**mine, **theirs}:
        one, other = mine.get(name), theirs.get(name)
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            names += [f"{name}.{inner}" for inner in _differing(one, other)]
        elif one != other:
            names.append(name)
    return names


def fields_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a task, from what `read_task` gives."""
    return {name: value for name, value in stored.items() if name not in _NO_FIELDS}


def read_task(path: str | Path) -> dict[str, Any]:
    """The contents of a stored task, JSON or YAML, with its kind and its `Provenance`.

    Raises `MissingError`, and `MetadataError` for a file that holds no task.
    """
    data = _read_yaml(Path(path)) if Path(path).suffix in (".yaml", ".yml") else store.read_json(path)
    if data is None:
        raise MissingError(f"no task at {path}; a task is the file {TASK_FILE} beside the output of a verb")
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise MetadataError(f"{path} holds no task: expected keys and values, with a key 'kind'")
    return data


def _read_yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MetadataError(f"{path} holds no task: it is not valid YAML ({' '.join(str(error).split())})") from error
