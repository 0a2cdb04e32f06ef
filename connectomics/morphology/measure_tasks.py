"""The two tasks of measuring: the instances of a class, and their contacts with another class, over any crops.

The blocks of all crops are one stage; each stores its sums in a file. At the end these are added, some instances at a
time, and the table is written. Next to the finished table ``mito.csv`` lie::

    mito.task.json       the task, as `pytc run-task` reads it
    mito.summary.json    the totals
    .mito.csv.partial/   while it is made: task.json, .done-blocks, blocks/N the sums of block N
"""

from __future__ import annotations

import bisect
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, WriteError
from connectomics.geometry import Index, VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import place, remove_tree
from connectomics.io.tables import ROWS, Column, Ragged, Table, Values, check_format, remove_unfinished, table
from connectomics.io.write import write_file
from connectomics.morphology import contacts, instances
from connectomics.morphology.block_sums import BLOCK, BlockSums, sum_blocks
from connectomics.morphology.contacts import Contacts, ContactSpec, contacts_of_block, halo_of
from connectomics.morphology.instances import Instances, instances_of_block
from connectomics.morphology.label_volume import LabelVolume
from connectomics.tasks import BlockTask, Cost
from connectomics.tasks.block_task import TASK_FILE, BlockWorker
from connectomics.tasks.blocks import BlockFiles, Lattice

STAGE = "blocks"


_PLACE = (Column("dataset", "text"), Column("crop", "text"))
_POSITIONS = tuple(f"{what}_{axis}_nm" for what in ("centroid", "begin", "end") for axis in "zyx")


@dataclass(frozen=True, kw_only=True)
class TableTask(BlockTask):
    """A table over crops; subclasses say what a block measures and which columns that gives.

    Attributes:
        inputs: the labels whose instances are the rows, in the order of the rows.
        output: path of the table; its suffix is the format, see `connectomics.io.tables`.
        block_shape: voxels to read at once, z y x.
    """

    #: tables of `measure_block` and their widths
    tables: ClassVar[Mapping[str, int]]
    #: columns after data set and crop
    columns: ClassVar[tuple[Column, ...]]
    #: memory of a worker for every voxel that is read
    bytes_per_voxel: ClassVar[int]
    places: ClassVar[frozenset[str]] = frozenset({"inputs", "output"})

    inputs: tuple[LabelVolume, ...]
    output: str
    block_shape: Index = BLOCK

    @abstractmethod
    def volumes(self, crop: int) -> tuple[LabelVolume, ...]:
        """Return the label volumes that are read for a crop, its own first."""

    @abstractmethod
    def halo(self, crop: int) -> Sequence[int] | NDArray[np.int64]:
        """Return the voxels (3,) that are read around a block of a crop."""

    @abstractmethod
    def measure_block(self, crop: int, sources: Sequence[Multiscale], begin: Index, shape: Index) -> BlockSums:
        """Measure one block of a crop; ``sources`` are its `volumes`, opened."""

    @abstractmethod
    def values(self, grid: VoxelGrid, found: BlockSums) -> dict[str, Any]:
        """Return the columns of some instances of a crop."""

    @abstractmethod
    def totals(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Return what some rows add to the totals."""

    @abstractmethod
    def summary(self, totals: Mapping[str, float], volumes: NDArray[np.float64]) -> dict[str, Any]:
        """Return the summary, for JSON, from the totals and the column ``volume_nm3`` (if there is one)."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "volumes": [labels.name for labels in self.read_labels]}

    def made_from(self) -> dict[str, str]:
        return {labels.name: labels.stamp for labels in self.read_labels}

    @property
    def read_labels(self) -> tuple[LabelVolume, ...]:
        """All label volumes that are read."""
        return tuple(labels for crop in range(len(self.inputs)) for labels in self.volumes(crop))

    @property
    def path(self) -> Path:
        """The finished table."""
        return place(self.output)

    @property
    def folder(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def summary_file(self) -> Path:
        """The totals of the finished table."""
        return self.path.with_name(f"{self.path.stem}.summary.json")

    @property
    def task_file(self) -> Path:
        """The task of the finished table."""
        return self.path.with_name(f"{self.path.stem}.task.json")

    @property
    def stages(self) -> tuple[str, ...]:
        return (STAGE,)

    def check(self, *, overwrite: bool = False) -> bool:
        check_format(self.path)
        begun = self.folder / TASK_FILE
        if self.path.exists() and not any(file.exists() for file in (self.task_file, self.summary_file, begun)):
            raise WriteError(
                f"{self.path} was not written by measure and is left alone; choose another output folder, or move it "
                "away"
            )
        if overwrite:
            return True
        finished = all(path.exists() for path in (self.path, self.summary_file, self.task_file))
        if finished and not (difference := self.difference(self.task_file)):
            return False
        if begun.exists() and not (difference := self.difference(begun)):
            return True
        if begun.exists():
            found = f"{self.folder} holds an unfinished table {difference}"
        elif self.path.exists():
            found = f"{self.path} holds a table {difference if finished else 'that is only half written'}"
        else:
            return True
        raise WriteError(f"{found}; overwrite it (--overwrite), or choose another output folder")

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite:
            self.task_file.unlink(missing_ok=True)  # the old table no longer counts as finished, even if we are killed
            remove_tree(self.folder)
        self.go_on()

    def prepare(self, stage: str) -> None:
        for labels in self.read_labels:
            labels.check_unchanged()

    def blocks(self, stage: str) -> int:
        return self._begins()[-1]

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[TableWorker]:
        return nullcontext(TableWorker(self))

    def finish(self) -> None:
        totals: Counter[str] = Counter()
        volumes, begins = list[NDArray[Any]]([np.zeros(0)]), self._begins()
        columns = (*_PLACE, *self.columns)
        with table(self.path, columns, json.dumps({"kind": self.kind, **self.to_dict()})) as out:
            for crop, labels in enumerate(self.inputs):
                grid, first = labels.grid, begins[crop]
                load = partial(self._sums_of, first)
                for found in sum_blocks(begins[crop + 1] - first, load, self.tables):
                    for begin in range(0, len(found.ids), ROWS):
                        values = self._write(out, labels, grid, found, slice(begin, begin + ROWS))
                        totals.update(self.totals(values))
                        volumes += [np.asarray(values["volume_nm3"])] if "volume_nm3" in values else []
        provenance, made = self.provenance, self.summary(totals, np.concatenate(volumes))
        summary = {**made, "crops": len(self.inputs), "file": self.path.name, **provenance.to_dict()}
        write_file(self.summary_file, json.dumps(summary, indent=1).encode())
        self.save(self.task_file, provenance)
        self.clean()

    def _write(
        self, out: Table, labels: LabelVolume, grid: VoxelGrid, found: BlockSums, rows: slice
    ) -> dict[str, Values]:
        some = found.select(rows)
        low = np.searchsorted(found.pairs[:, 0], some.ids[0])
        high = np.searchsorted(found.pairs[:, 0], some.ids[-1], side="right")
        values = self.values(grid, replace(some, pairs=found.pairs[low:high]))
        n = len(some.ids)
        out.write({"dataset": [labels.dataset] * n, "crop": [labels.crop] * n, **values})
        return values

    def clean(self) -> None:
        """Remove what is only needed while the table is made; safe to repeat after a run was killed."""
        for path in (self.path, self.summary_file, self.task_file):
            remove_unfinished(path.parent, path.name)
        remove_tree(self.folder)

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(folder / self.path.name))

    def cost(self, stage: str) -> Cost:
        voxels = 0
        for crop, labels in enumerate(self.inputs):
            edges = zip(labels.shape, self.block_shape, self.halo(crop), strict=True)
            voxels = max(voxels, int(np.prod([min(n, b) + 2 * int(h) for n, b, h in edges])))
        return Cost(read=8 * voxels, written=1 << 20, memory=self.bytes_per_voxel * voxels)

    def region(self, number: int) -> tuple[int, Index, Index]:
        """Return the crop that a block belongs to, its first voxel there, and its shape."""
        begins = self._begins()
        crop = bisect.bisect_right(begins, number) - 1
        return crop, *Lattice(self.inputs[crop].shape, self.block_shape).region(number - begins[crop])

    @property
    def sums(self) -> BlockFiles:
        """What the blocks store: their `BlockSums`."""
        return BlockFiles(self.folder / STAGE)

    def _sums_of(self, first: int, number: int) -> BlockSums:
        return BlockSums.of(self.sums.load(first + number))

    def _begins(self) -> list[int]:
        """Number of the first block of every crop, and of all blocks."""
        begins = [0]
        for labels in self.inputs:
            begins.append(begins[-1] + len(Lattice(labels.shape, self.block_shape)))
        return begins


class TableWorker(BlockWorker):
    """Measures blocks; keeps the volumes of the last crop open."""

    def __init__(self, task: TableTask) -> None:
        self._task = task
        self._crop = -1
        self._sources: tuple[Multiscale, ...] = ()

    def do(self, number: int) -> None:
        crop, begin, shape = self._task.region(number)
        if crop != self._crop:
            self._sources = tuple(Multiscale.open(labels.location) for labels in self._task.volumes(crop))
            self._crop = crop
        self._task.sums.save(number, self._task.measure_block(crop, self._sources, begin, shape).arrays)


@dataclass(frozen=True, kw_only=True)
class MeasureTask(TableTask):
    """The instance table of one class: one row per instance, by crop and ID."""

    kind: ClassVar[str] = "measure"
    tables: ClassVar[Mapping[str, int]] = instances.TABLES
    bytes_per_voxel: ClassVar[int] = 20
    columns: ClassVar[tuple[Column, ...]] = (
        Column("id", "id"),
        Column("voxels", "count", "voxels"),
        Column("volume_nm3", "number", "nm3"),
        Column("surface_nm2", "number", "nm2"),
        Column("sphericity", "number", digits=5),
        *(Column(name, "number", "nm") for name in _POSITIONS),
        Column("touches_border", "flag"),
    )

    class_name: str

    @property
    def name(self) -> str:
        return self.class_name

    def volumes(self, crop: int) -> tuple[LabelVolume, ...]:
        return (self.inputs[crop],)

    def halo(self, crop: int) -> Sequence[int]:
        return (1, 1, 1)

    def measure_block(self, crop: int, sources: Sequence[Multiscale], begin: Index, shape: Index) -> BlockSums:
        return instances_of_block(sources[0], begin, shape, semantic=self.inputs[crop].semantic)

    def values(self, grid: VoxelGrid, found: BlockSums) -> dict[str, Any]:
        made = Instances.of(grid, found)
        return {
            "id": made.ids,
            "voxels": made.sizes,
            "volume_nm3": made.volume,
            "surface_nm2": made.surface,
            "sphericity": made.sphericity,
            **dict(zip(_POSITIONS, np.hstack([made.centroid, made.box]).T, strict=True)),
            "touches_border": made.touches_border,
        }

    def totals(self, values: Mapping[str, Any]) -> dict[str, float]:
        names = {"touch_border": "touches_border", "voxels": "voxels", "surface_nm2": "surface_nm2"}
        return {total: values[column].sum().item() for total, column in names.items()}

    def summary(self, totals: Mapping[str, float], volumes: NDArray[np.float64]) -> dict[str, Any]:
        return {
            "class": self.class_name,
            "kind": "semantic" if all(labels.semantic for labels in self.inputs) else "instance",
            "instances": len(volumes),
            "touch_border": totals["touch_border"],
            "voxels": totals["voxels"],
            "volume_nm3": float(volumes.sum()),
            "median_volume_nm3": float(np.median(volumes)) if len(volumes) else None,
            "surface_nm2": float(totals["surface_nm2"]),
        }


@dataclass(frozen=True, kw_only=True)
class ContactsTask(TableTask):
    """The contact table of one class with another: one row per instance, with or without contact.

    Attributes:
        of, to, nm: see `ContactSpec`.
        others: the labels of the class ``to``, for each of ``inputs``.
    """

    kind: ClassVar[str] = "contacts"
    places: ClassVar[frozenset[str]] = TableTask.places | {"others"}
    tables: ClassVar[Mapping[str, int]] = contacts.TABLES
    bytes_per_voxel: ClassVar[int] = 30
    columns: ClassVar[tuple[Column, ...]] = (
        Column("id", "id"),
        Column("surface_nm2", "number", "nm2"),
        Column("contact_nm2", "number", "nm2"),
        Column("partners", "count"),
        Column("partner_ids", "ids"),
    )

    of: str
    to: str
    nm: float
    others: tuple[LabelVolume, ...]

    @property
    def name(self) -> str:
        return str(ContactSpec(self.of, self.to, self.nm))

    def check(self, *, overwrite: bool = False) -> bool:
        if len(self.others) != len(self.inputs):
            raise InputError(
                f"contacts {self.name}: expected as many crops of {self.to} as of {self.of}, got "
                f"{len(self.others)} and {len(self.inputs)}"
            )
        for crop in range(len(self.inputs)):
            self.halo(crop)  # raises if the distance is too far
        return super().check(overwrite=overwrite)

    def volumes(self, crop: int) -> tuple[LabelVolume, ...]:
        return self.inputs[crop], self.others[crop]

    def halo(self, crop: int) -> NDArray[np.int64]:
        return halo_of(self.inputs[crop].grid, self.nm)

    def measure_block(self, crop: int, sources: Sequence[Multiscale], begin: Index, shape: Index) -> BlockSums:
        semantic = self.inputs[crop].semantic, self.others[crop].semantic
        return contacts_of_block(sources[0], sources[1], self.nm, begin, shape, semantic=semantic)

    def values(self, grid: VoxelGrid, found: BlockSums) -> dict[str, Any]:
        made = Contacts.of(grid, found)
        return {
            "id": made.ids,
            "surface_nm2": made.surface,
            "contact_nm2": made.area,
            "partners": np.diff(made.offsets),
            "partner_ids": Ragged(made.pairs[:, 1], made.offsets),
        }

    def totals(self, values: Mapping[str, Any]) -> dict[str, float]:
        return {
            "instances": len(values["id"]),
            "with_contact": int(np.count_nonzero(values["partners"])),
            "pairs": int(values["partners"].sum()),
            "contact_nm2": float(values["contact_nm2"].sum()),
            "surface_nm2": float(values["surface_nm2"].sum()),
        }

    def summary(self, totals: Mapping[str, float], volumes: NDArray[np.float64]) -> dict[str, Any]:
        names = ("instances", "with_contact", "pairs", "contact_nm2", "surface_nm2")
        return {"of": self.of, "to": self.to, "nm": self.nm, **{name: totals[name] for name in names}}
