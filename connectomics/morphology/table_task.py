"""Measuring as tasks: one table of one class, or of the contacts of two, over any number of crops.

The blocks of all crops are one stage; each leaves its part of every instance in a file. At the end these are summed,
some instances at a time, and the table is written. Beside the finished table ``mito.csv`` lie::

    mito.task.json       the task, as `pytc run-task` takes it
    mito.summary.json    the totals
    .mito.csv.partial/   while it is made: task.json, .done-blocks, blocks/N the part of block N
"""

from __future__ import annotations

import bisect
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from connectomics.decoding.label_artifact import BLOCK
from connectomics.errors import IncompleteError, MetadataError, WriteError
from connectomics.geometry import Index, VoxelGrid
from connectomics.io import store
from connectomics.io.fingerprint import fingerprint
from connectomics.io.multiscale import Multiscale
from connectomics.io.tables import ROWS, Column, Table, Values, check_format, remove_unfinished, table
from connectomics.io.write import write_file
from connectomics.morphology.partial import Partial, united
from connectomics.tasks import BlockTask, Cost
from connectomics.tasks.block_task import TASK_FILE, BlockWorker
from connectomics.tasks.blocks import Lattice

STAGE = "blocks"
PLACE = (Column("dataset", "text"), Column("crop", "text"))


@dataclass(frozen=True)
class Labels:
    """The labels of one class of one crop.

    Attributes:
        location: of the multiscale group; its finest level is measured. shape: of that level, voxels, z y x.
        semantic: whether everything above 0 is one instance, 1.
        stamp: changes when the labels do, by whatever program: a hash of the attributes and of sizes and times of the
            chunks (`connectomics.io.fingerprint.fingerprint`).
    """

    dataset: str
    crop: str
    location: str
    semantic: bool
    shape: Index
    stamp: str

    @classmethod
    def open(cls, dataset: str, crop: str, location: str) -> Labels:
        """Those at ``location``, checked to be whole labels.

        Raises `MissingError`, `IncompleteError` (half written), `MetadataError` (no labels).
        """
        source = Multiscale.open(location)
        attrs = store.read_attrs(source.location)
        about = attrs.get("connectomics", {})
        if about and about.get("artefact") != "labels":
            raise MetadataError(f"{source.location}: expected labels, found {about.get('artefact')}; run decode on it")
        if about and about.get("complete") is not True:
            raise IncompleteError(f"{source.location} is only half written; run decode to its end first")
        level = source.levels[0]
        if level.dtype.kind not in "uib":
            raise MetadataError(f"{source.location}: labels must be whole numbers, found {level.dtype}")
        stamp = fingerprint(source, with_location=False)[:16]
        return cls(dataset, crop, source.location, about.get("kind") == "semantic", level.grid.shape, stamp)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Labels:
        """From JSON; `KeyError` or `TypeError` where keys are unknown or absent."""
        z, y, x = data["shape"]
        return cls(**{**data, "shape": (z, y, x)})

    @property
    def name(self) -> str:
        """``{dataset}/{crop}/{class}``."""
        return f"{self.dataset}/{self.crop}/{Path(self.location).name}"

    def check_unchanged(self) -> None:
        """`MetadataError` if the labels are no longer those that the task was made for."""
        if Labels.open(self.dataset, self.crop, self.location) != self:
            raise MetadataError(f"{self.location} has changed since the task was made; run it again with --overwrite")


class Totals(ABC):
    """The sums over the rows of a table; see the subclasses."""

    @abstractmethod
    def add(self, values: Mapping[str, Any]) -> None:
        """Add some rows, by column."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """For JSON."""


@dataclass(frozen=True, kw_only=True)
class TableTask(BlockTask):
    """A table over crops; what its blocks find and its columns say a subclass.

    Attributes:
        inputs: the labels whose instances are the rows, in the order of the rows.
        output: path of the table; its ending says the format, see `connectomics.io.tables`.
        block_shape: voxels that are read at once, z y x.
    """

    #: of a block's part, and their widths
    tables: ClassVar[Mapping[str, int]]
    columns: ClassVar[tuple[Column, ...]]
    #: held by a worker, for every voxel that is read
    bytes_a_voxel: ClassVar[int]

    places: ClassVar[frozenset[str]] = frozenset({"inputs", "output"})

    inputs: tuple[Labels, ...]
    output: str
    block_shape: Index = BLOCK

    @abstractmethod
    def part(self, crop: int, sources: Sequence[Multiscale], begin: Index, shape: Index) -> Partial:
        """What one block of a crop holds; ``sources``: its volumes, as `volumes` names them."""

    @abstractmethod
    def volumes(self, crop: int) -> tuple[Labels, ...]:
        """The label volumes that are read for a crop, its own first."""

    @abstractmethod
    def values(self, grid: VoxelGrid, found: Partial) -> dict[str, Values]:
        """The columns, but for `PLACE`, of some instances of a crop."""

    @abstractmethod
    def voxels_read(self, crop: int) -> int:
        """Of the largest block of a crop, with what is read around it."""

    @abstractmethod
    def totals(self) -> Totals:
        """A fresh sum over everything that is measured."""

    # -- as a task ---------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "volumes": [labels.name for labels in self.read_labels]}

    def made_from(self) -> dict[str, str]:
        return {labels.name: labels.stamp for labels in self.read_labels}

    @property
    def read_labels(self) -> tuple[Labels, ...]:
        """All label volumes that are read."""
        return tuple(labels for crop in range(len(self.inputs)) for labels in self.volumes(crop))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        known = {field.name for field in fields(cls)}
        if wrong := sorted(set(data) ^ known):
            raise MetadataError(f"{where} must have the keys {sorted(known)}; unknown or absent: {', '.join(wrong)}")
        try:
            z, y, x = data["block_shape"]
            return cls(**{**cls.parsed(data), "block_shape": (z, y, x)})
        except (KeyError, TypeError, ValueError) as error:
            raise MetadataError(f"{where} is no task of the kind {cls.kind}: {error}") from error

    @classmethod
    def parsed(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields from JSON."""
        return {**data, "inputs": tuple(map(Labels.from_dict, data["inputs"]))}

    @property
    def path(self) -> Path:
        """The finished table."""
        return Path(self.output)

    @property
    def folder(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def summary_file(self) -> Path:
        """Where the totals of the finished table are."""
        return self.path.with_name(f"{self.path.stem}.summary.json")

    @property
    def task_file(self) -> Path:
        """Where the task of the finished table is."""
        return self.path.with_name(f"{self.path.stem}.task.json")

    @property
    def stages(self) -> tuple[str, ...]:
        return (STAGE,)

    def check(self, *, overwrite: bool = False) -> bool:
        check_format(self.path)
        begun = self.folder / TASK_FILE
        beside = (self.task_file, self.summary_file, begun)
        if self.path.exists() and not any(file.exists() for file in beside):
            raise WriteError(
                f"{self.path} was not written by measure and is left alone; choose another output folder, or move it "
                "away"
            )
        if overwrite:
            return True
        finished = all(path.exists() for path in (self.path, self.summary_file, self.task_file))
        if finished and not (difference := self.difference(self.task_file)):
            return False
        if begun.exists():
            if difference := self.difference(begun):
                raise WriteError(
                    f"{self.folder} holds an unfinished table {difference}; overwrite it (--overwrite), or choose "
                    "another output folder"
                )
            return True
        if not self.path.exists():
            return True
        how = str(difference) if finished else "that is only half written"
        raise WriteError(
            f"{self.path} holds a table {how}; overwrite it (--overwrite), or choose another output folder"
        )

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite:
            self.task_file.unlink(missing_ok=True)  # what is there is no longer finished, also if this run is killed
            shutil.rmtree(self.folder, ignore_errors=True)
        if not (self.folder / TASK_FILE).exists():
            self.begin()

    def prepare(self, stage: str) -> None:
        for labels in self.read_labels:
            labels.check_unchanged()

    def blocks(self, stage: str) -> int:
        return self._begins()[-1]

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[TableWorker]:
        return nullcontext(TableWorker(self))

    def finish(self) -> None:
        totals, begins = self.totals(), self._begins()
        with table(self.path, (*PLACE, *self.columns), json.dumps({"kind": self.kind, **self.to_dict()})) as out:
            for crop, labels in enumerate(self.inputs):
                grid = Multiscale.open(labels.location).levels[0].grid
                first, number = begins[crop], begins[crop + 1] - begins[crop]
                for found in united(number, partial(self._load, first), self.tables):
                    self._write(out, labels, grid, found, totals)
        provenance = self.provenance
        summary = {**totals.to_dict(), "crops": len(self.inputs), "file": self.path.name, **provenance.to_dict()}
        write_file(self.summary_file, json.dumps(summary, indent=1).encode())
        self.save(self.task_file, provenance)
        self.clean()

    def clean(self) -> None:
        """Remove what is only needed while the table is made; after a run that was killed as it did so, again."""
        for path in (self.path, self.summary_file, self.task_file):
            remove_unfinished(path.parent, path.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(folder / self.path.name))

    def cost(self, stage: str) -> Cost:
        voxels = max(self.voxels_read(crop) for crop in range(len(self.inputs)))
        return Cost(read=8 * voxels, written=1 << 20, memory=self.bytes_a_voxel * voxels)

    # -- within ------------------------------------------------------------------------------------------------------
    def place(self, number: int) -> tuple[int, Index, Index]:
        """The crop that a block belongs to, its first voxel there and its shape."""
        begins = self._begins()
        crop = bisect.bisect_right(begins, number) - 1
        return crop, *Lattice(self.inputs[crop].shape, self.block_shape).region(number - begins[crop])

    def part_file(self, number: int) -> Path:
        """Where a block's part is."""
        return self.folder / STAGE / str(number)

    def _load(self, first: int, number: int) -> Partial:
        return Partial.load(self.part_file(first + number))

    def _begins(self) -> list[int]:
        """Number of the first block of every crop, and of all blocks."""
        begins = [0]
        for labels in self.inputs:
            begins.append(begins[-1] + len(Lattice(labels.shape, self.block_shape)))
        return begins

    def _write(self, out: Table, labels: Labels, grid: VoxelGrid, found: Partial, totals: Totals) -> None:
        for begin in range(0, len(found.ids), ROWS):
            some = slice(begin, begin + ROWS)
            ids, pairs = found.ids[some], found.pairs
            low, high = np.searchsorted(pairs[:, 0], ids[0]), np.searchsorted(pairs[:, 0], ids[-1], side="right")
            part = Partial(ids, {name: rows[some] for name, rows in found.tables.items()}, pairs[low:high])
            values = self.values(grid, part)
            places = {"dataset": [labels.dataset] * len(ids), "crop": [labels.crop] * len(ids)}
            out.write({**places, **values})
            totals.add(values)


class TableWorker(BlockWorker):
    """Measures blocks; keeps the volumes of the last crop open."""

    def __init__(self, task: TableTask) -> None:
        self._task = task
        self._crop = -1
        self._sources: tuple[Multiscale, ...] = ()

    def do(self, number: int) -> None:
        crop, begin, shape = self._task.place(number)
        if crop != self._crop:
            self._sources = tuple(Multiscale.open(labels.location) for labels in self._task.volumes(crop))
            self._crop = crop
        self._task.part(crop, self._sources, begin, shape).save(self._task.part_file(number))
