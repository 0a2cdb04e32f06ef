"""Labels that are made block by block: what all such tasks share, and the task for plain masks.

Unfinished output lies in a hidden folder beside the labels, which it replaces at the end::

    .{class}.partial/task.json   the task; beside it the done-maps of the run
    .{class}.partial/.blocks     what stages leave for later ones
    .{class}.partial/s0          the labels; with a pyramid s1, s2, ... too
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from connectomics.decoding.label_artifact import (
    BLOCK,
    clear_unknown,
    existing_labels,
    has_tables,
    inputs_of,
    label_attrs,
    partial_of,
    title_of,
)
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.prediction import Foreground
from connectomics.decoding.probabilities import open_probabilities
from connectomics.errors import ConfigError, WriteError
from connectomics.geometry import Index, VoxelGrid, index
from connectomics.io import store
from connectomics.io.artifacts import Difference, about, publish
from connectomics.io.location import absolute
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import place, remove_tree
from connectomics.io.sharded import Storage
from connectomics.io.write import ArrayWriter, create_array, ensure_group, multiscales_attrs, update_attrs, write_file
from connectomics.tasks.block_task import TASK_FILE, BlockTask, BlockWorker, Cost, Worker
from connectomics.tasks.blocks import Lattice, remove_traces, sync
from connectomics.tasks.pyramid import Pyramid, PyramidStage, pyramid_grids, pyramid_stages


@dataclass(frozen=True)
class LabelsTask(BlockTask):
    """The labels of one class, from its probabilities.

    Attributes:
        input: location of the multiscale group of the probabilities; its finest level has the grid of the output.
        output: folder of the multiscale group of the labels.
        class_name: recorded with the output.
        parameters: how the probabilities become labels.
        block_shape: voxels of a block, z y x; whole chunks of 64 are fastest.
        source: what the probabilities were made from, recorded with the output.
        table: ``parquet``: the instance table is written as Parquet too.
        storage: how the labels are stored, and the arrays that stages leave; blocks are whole shards.
        pyramid: whether to write coarser levels, in further stages (`connectomics.tasks.pyramid`).
    """

    #: Methods that a subclass decodes.
    methods: ClassVar[tuple[str, ...]]
    free: ClassVar[frozenset[str]] = frozenset({"source", "pyramid"})
    places: ClassVar[frozenset[str]] = frozenset({"input", "output"})

    input: str
    output: str
    class_name: str
    parameters: DecodeParameters
    block_shape: Index = BLOCK
    source: Mapping[str, Any] = field(default_factory=dict, hash=False)
    table: str = "csv"
    storage: Storage = Storage()  # noqa: RUF009 (frozen)
    pyramid: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_shape", shape := index(self.block_shape))
        object.__setattr__(self, "source", json.loads(json.dumps(dict(self.source))))  # equal to what a file gives
        object.__setattr__(self, "input", absolute(self.input))
        object.__setattr__(self, "output", absolute(self.output))
        if min(shape) < 1:
            raise ConfigError(f"block_shape must be three positive numbers of voxels (z, y, x), got {shape}")
        if self.storage.is_sharded and self.storage.block(shape) != shape:
            raise ConfigError(
                f"blocks of {list(shape)} voxels are no multiple of {list(self.storage.unit)}, so that two of them "
                "would write one shard; choose block_shape or output.shard to fit"
            )
        if self.table not in ("csv", "parquet"):
            raise ConfigError(f"table must be csv or parquet, got {self.table!r}")
        if self.parameters.method not in self.methods:
            raise ConfigError(
                f"{self.kind} of {self.class_name}: expected method {' or '.join(self.methods)}, got "
                f"{self.parameters.method}"
            )

    # -- what a subclass defines -------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def label_stages(self) -> tuple[str, ...]:
        """Names of the stages that write the labels."""

    @abstractmethod
    def prepare_labels(self, stage: str) -> None:
        """Make what the blocks of one of these stages need; nothing is finished yet."""

    @abstractmethod
    def label_worker(self, stage: str) -> Worker:
        """Return what does the blocks of one of these stages."""

    @abstractmethod
    def label_cost(self, stage: str) -> Cost:
        """Return what the largest block of one of these stages takes."""

    @abstractmethod
    def conclude(self) -> int:
        """After the last stage, write what lies beside the labels; return the number of objects (a mask: 0 or 1)."""

    def check_input(self) -> None:
        """Raise an error if the input cannot be decoded; by default it must hold probabilities."""
        open_probabilities(self.input)

    def further_attrs(self) -> dict[str, Any]:
        """Return what else the finished labels say of themselves."""
        return {}

    # -- what it is --------------------------------------------------------------------------------------------------
    def made_from(self) -> dict[str, str]:
        return inputs_of(self.input, self.parameters)

    @property
    def name(self) -> str:
        return title_of(place(self.output))

    @property
    def folder(self) -> Path:
        return partial_of(place(self.output))

    @property
    def scratch(self) -> Path:
        """Folder for what stages leave and the output does not keep."""
        return self.folder / ".blocks"

    @property
    def grid(self) -> VoxelGrid:
        """The grid of input and output; read from the input."""
        return Multiscale.open(self.input).levels[0].grid

    @property
    def lattice(self) -> Lattice:
        """The blocks; read from the input."""
        return Lattice(self.grid.shape, self.block_shape)

    @property
    def largest_block(self) -> int:
        """Voxels of the largest block; read from the input."""
        return int(np.prod(np.minimum(self.block_shape, self.grid.shape)))

    # -- its life ----------------------------------------------------------------------------------------------------
    def check(self, *, overwrite: bool = False) -> bool:
        begun = None if overwrite else self._begun()
        if begun:
            raise WriteError(
                f"{self.folder} holds unfinished labels {begun}; overwrite them (--overwrite), or choose another "
                "output folder"
            )
        self.check_input()
        may_replace = overwrite or begun is not None  # begun by a run that was allowed to
        there = existing_labels(
            place(self.output), self.parameters, self.made_from(), self.storage, overwrite=may_replace
        )
        return there is None or not has_tables(place(self.output), there.get("kind", ""), self.table)

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite or not self.is_begun:
            (self.folder / TASK_FILE).unlink(missing_ok=True)  # killed while it is removed, it is begun no more
            remove_tree(self.folder)
            ensure_group(self.folder, zarr_format=self.storage.zarr_format)
            self.begin()
        elif self.is_complete:
            remove_traces(self.folder, maps=True)
        else:
            self.go_on()

    @property
    def is_begun(self) -> bool:
        """Whether this very task was begun and not finished; it may then replace what is at its output."""
        begun = self._begun()
        return begun is not None and not begun

    def _begun(self) -> Difference | None:
        """How the task that was begun and not finished differs from this one; None if there is none."""
        file = self.folder / TASK_FILE
        return self.difference(file) if file.exists() else None

    @property
    def is_complete(self) -> bool:
        """Whether only the last rename is missing: the attributes are written after all else."""
        return about(self.folder).get("complete") is True

    @property
    def stages(self) -> tuple[str, ...]:
        return (*self.label_stages, *pyramid_stages(self._pyramids))

    def prepare(self, stage: str) -> None:
        if self.is_complete:  # another process was killed in `finish`: no blocks are left
            (self.folder / f".done-{stage}").unlink(missing_ok=True)
            return
        if (levels := PyramidStage.of(stage, self._pyramids)) is None:
            self.prepare_labels(stage)
        else:
            self.clear_unknown()  # before other levels are made from it; the same again if this was done
            levels.prepare(self, stage)

    def blocks(self, stage: str) -> int:
        if self.is_complete:
            return 0
        levels = PyramidStage.of(stage, self._pyramids)
        return len(self.lattice) if levels is None else levels.blocks

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[Worker]:
        levels = PyramidStage.of(stage, self._pyramids)
        return nullcontext(self.label_worker(stage) if levels is None else levels)

    def cost(self, stage: str) -> Cost:
        levels = PyramidStage.of(stage, self._pyramids)
        return self.label_cost(stage) if levels is None else levels.cost

    @property
    def level_grids(self) -> list[VoxelGrid]:
        """The grids of the levels of the output, finest first; read from the input."""
        return pyramid_grids(self.grid, self.pyramid)

    @property
    def _pyramids(self) -> list[Pyramid]:
        if not self.pyramid:
            return []
        dtype = ArrayWriter.open(self.folder / "s0").dtype if self.has_labels else np.dtype(np.uint64)  # at most
        return [Pyramid(self.folder, tuple(self.level_grids), "label", dtype, self.chunks, self._shards, "zstd")]

    def clear_unknown(self) -> None:
        """Set the labels to 0 where they are unknown."""
        clear_unknown(ArrayWriter.open(self.folder / "s0"), self.source, self.grid)

    def create_labels(self, dtype: np.dtype[Any]) -> None:
        """Make the array of the labels if it is missing; all that was written before is then on the disk."""
        if not self.has_labels:
            sync(os.fspath(self.folder))
            self.create("s0", dtype, self.grid)

    def create(self, array: str, dtype: np.dtype[Any], grid: VoxelGrid | None = None) -> None:
        """Make an array of the shape of the output below `folder`."""
        # overwrite: a killed run may have left the attributes only
        create_array(
            self.folder / array, self.grid.shape, dtype, grid=grid, chunks=self.chunks, overwrite=True,
            shards=self._shards, codec="zstd",
        )  # fmt: skip

    @property
    def _shards(self) -> Index | None:
        return (self.storage.shard or self.block_shape) if self.storage.is_sharded else None

    @property
    def has_labels(self) -> bool:
        """Whether the array of the labels was made."""
        return store.is_array(self.folder / "s0")

    @property
    def chunks(self) -> Index:
        """Chunks that no two blocks share: the default ones, or a whole block if it is no multiple of them."""
        sides = zip(self.block_shape, self.storage.chunk, self.grid.shape, strict=True)
        return index(c if b % c == 0 or b >= n else b for b, c, n in sides)

    def finish(self) -> None:
        if not self.is_complete:
            self.clear_unknown()
            grids, objects = self.level_grids, self.conclude()
            for level in self.folder.glob("s*"):
                if int(level.name[1:]) < len(grids):
                    for path in () if store.is_s3(level) else level.rglob(".*.part-*"):  # of killed processes
                        path.unlink(missing_ok=True)
                else:  # from a run that wanted a pyramid
                    remove_tree(level)
            ours = label_attrs(grids[0], self.class_name, self.parameters, self.source, self.provenance, objects)
            ours |= self.further_attrs()
            sync(os.fspath(self.folder))
            levels = multiscales_attrs(grids, self.class_name, self.storage.zarr_format)
            update_attrs(self.folder, {"connectomics": ours, **levels})
        remove_tree(self.scratch)
        remove_traces(self.folder, maps=True)
        publish(self.folder, place(self.output))

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(Path(folder, *Path(self.output).parts[-3:])))


def objects_of(task: LabelsTask) -> int:
    """Return the number of objects in the finished labels of a task (a mask: 0 or 1)."""
    return int(store.read_attrs(task.output)["connectomics"]["objects"])


@dataclass(frozen=True)
class MaskTask(LabelsTask):
    """The mask of a class with local parameters: method ``threshold``, no minimum size, no hole filling."""

    kind: ClassVar[str] = "mask"
    methods: ClassVar[tuple[str, ...]] = ("threshold",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parameters.is_local:
            raise ConfigError(f"the mask of {self.class_name}: expected a threshold only, got {self.parameters}")

    @property
    def label_stages(self) -> tuple[str, ...]:
        return ("write",)

    def prepare_labels(self, stage: str) -> None:
        self.create_labels(np.dtype(np.uint8))

    def label_worker(self, stage: str) -> Worker:
        return _MaskWorker(self)

    @property
    def foreground_file(self) -> Path:
        """A file that exists once a block held any foreground."""
        return self.scratch / "present"

    def conclude(self) -> int:
        return int(self.foreground_file.exists())

    def label_cost(self, stage: str) -> Cost:
        voxels = self.largest_block
        return Cost(read=2 * voxels, written=voxels, memory=6 * voxels)


class _MaskWorker(BlockWorker):
    def __init__(self, task: MaskTask) -> None:
        self._foreground, self._lattice = Foreground.open(task.input, task.parameters), task.lattice
        self._writer, self._foreground_file = ArrayWriter.open(task.folder / "s0"), task.foreground_file

    def do(self, number: int) -> None:
        begin, shape = self._lattice.region(number)
        mask = self._foreground.mask(begin, shape)
        if mask.any() and not self._foreground_file.exists():
            write_file(self._foreground_file, b"")
        self._writer.write(begin, mask.view(np.uint8))
