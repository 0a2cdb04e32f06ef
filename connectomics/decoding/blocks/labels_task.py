"""Labels that are made block by block: what all such tasks share.

Until it is finished everything lies in a hidden folder beside the output, which takes the output's place at the end::

    .{class}.partial/task.json   the task; beside it the done-maps of the run
    .{class}.partial/.blocks     what stages leave for later ones
    .{class}.partial/s0          the labels
"""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from connectomics.decoding.blocks.table import PARQUET_FILE, TABLE_FILE
from connectomics.decoding.label_artifact import BLOCK, inputs_of, label_attrs, partial_of, standing_labels
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.probabilities import open_probabilities
from connectomics.decoding.unknown import blank_stored
from connectomics.errors import ConfigError, MetadataError, WriteError
from connectomics.geometry import Index, VoxelGrid
from connectomics.io import store
from connectomics.io.artifacts import Difference, publish
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import (
    DEFAULT_CHUNKS,
    ArrayWriter,
    create_array,
    ensure_group,
    multiscales_attrs,
    update_attrs,
)
from connectomics.tasks.block_task import TASK_FILE, BlockTask
from connectomics.tasks.blocks import Lattice, sync

TABLES = ("csv", "parquet")


def tables(table: str) -> list[str]:
    """Names of the files of the table of instances, for a value of ``decoding.table``."""
    return [TABLE_FILE, PARQUET_FILE] if table == "parquet" else [TABLE_FILE]


@dataclass(frozen=True)
class LabelsTask(BlockTask):
    """The labels of one class, from its probabilities.

    Attributes:
        input: location of the multiscale group of the class's probabilities; its finest level has the output's grid.
        output: local folder of the multiscale group of the labels.
        class_name: which class it is, recorded with the output.
        parameters: how the probabilities become labels.
        block_shape: voxels of a block, z y x; fastest in whole chunks of 64, right for any.
        source: what the probabilities were made from, recorded with the output.
        table: ``parquet``: the table of instances is written as Parquet too.
    """

    free: ClassVar[frozenset[str]] = frozenset({"source"})
    places: ClassVar[frozenset[str]] = frozenset({"input", "output"})

    input: str
    output: str
    class_name: str
    parameters: DecodeParameters
    block_shape: Index = BLOCK
    source: Mapping[str, Any] = field(default_factory=dict, hash=False)
    table: str = "csv"

    def __post_init__(self) -> None:
        z, y, x = (int(n) for n in self.block_shape)
        object.__setattr__(self, "block_shape", (z, y, x))
        object.__setattr__(self, "source", json.loads(json.dumps(dict(self.source))))  # as it comes back from the file
        object.__setattr__(self, "input", absolute(self.input))
        object.__setattr__(self, "output", absolute(self.output))
        if min(z, y, x) < 1:
            raise ConfigError(f"block_shape must be three positive numbers of voxels (z, y, x), found {(z, y, x)}")
        if self.table not in TABLES:
            raise ConfigError(f"table must be {' or '.join(TABLES)}, found {self.table!r}")

    # -- what a subclass says ----------------------------------------------------------------------------------------
    @abstractmethod
    def conclude(self) -> int:
        """After the last stage: write what lies beside the labels; how many objects there are (a mask: 0 or 1)."""

    def check_input(self) -> None:
        """Raise what is wrong with the input; by default it must hold probabilities."""
        open_probabilities(self.input)

    # -- what it is --------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps({**asdict(self), "source": dict(self.source)}))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        known = {f.name for f in fields(cls)}
        if wrong := sorted(set(data) ^ known):
            raise MetadataError(f"{where} must have the keys {sorted(known)}; unknown or absent: {', '.join(wrong)}")
        return cls(**{**data, "parameters": DecodeParameters.from_dict(data["parameters"], where)})

    def made_from(self) -> dict[str, str]:
        return inputs_of(self.input, self.parameters)

    @property
    def name(self) -> str:
        output = Path(self.output)
        return f"{output.parent.parent.name.removesuffix('.zarr')}/{output.parent.name}/{output.name}"

    @property
    def folder(self) -> Path:
        return partial_of(Path(self.output))

    @property
    def scratch(self) -> Path:
        """Where the stages leave what the output does not keep."""
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
        there = standing_labels(Path(self.output), self.parameters, self.made_from(), overwrite=may_replace)
        return there is None or not self._has_tables(there)

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite or not self.is_begun:
            shutil.rmtree(self.folder, ignore_errors=True)
            ensure_group(self.folder)
            self.begin()
        elif self.is_complete:
            self._remove_done_maps()

    @property
    def is_begun(self) -> bool:
        """Whether this very task was begun and not finished; it then may replace what is at its output."""
        begun = self._begun()
        return begun is not None and not begun

    def _begun(self) -> Difference | None:
        """How what was begun and not finished differs from this task; None if nothing was."""
        file = self.folder / TASK_FILE
        return self.difference(file) if file.exists() else None

    def _has_tables(self, there: Mapping[str, Any]) -> bool:
        """Whether the tables that are asked for lie beside the finished labels with these attributes."""
        return there.get("kind") != "instance" or all(
            (Path(self.output) / name).exists() for name in tables(self.table)
        )

    @property
    def is_complete(self) -> bool:
        """Whether only the last renaming is missing (then there are attributes, which are written after all else)."""
        return (self.folder / ".zattrs").exists()

    def blocks(self, stage: str) -> int:
        return 0 if self.is_complete else len(self.lattice)

    def create_labels(self, dtype: np.dtype[Any]) -> None:
        """Make the array of the labels, where it is not there; what was written before is on the disk then."""
        if not self.has_labels:
            sync(os.fspath(self.folder))
            grid = self.grid
            # overwrite: a run that was killed may have left its attributes and no more
            create_array(self.folder / "s0", grid.shape, dtype, grid=grid, chunks=self.chunks, overwrite=True)

    @property
    def has_labels(self) -> bool:
        """Whether the array of the labels was made."""
        return (self.folder / "s0" / ".zarray").exists()

    @property
    def chunks(self) -> Index:
        """Chunks that no two blocks share: the usual ones, or a whole block where it has no whole number of them."""
        z, y, x = (
            c if b % c == 0 or b >= n else b
            for b, c, n in zip(self.block_shape, DEFAULT_CHUNKS, self.grid.shape, strict=True)
        )
        return z, y, x

    def finish(self) -> None:
        if not self.is_complete:
            _remove_unfinished(self.folder / "s0")
            about = {
                "decode": self.parameters.to_dict(),
                "source": dict(self.source),
                **self.provenance.to_dict(),
                "objects": self.conclude(),
            }
            grid, kind = self.grid, self.parameters.kind
            if "unknown" in self.source:
                about["unknown"] = self.source["unknown"]
                blank_stored(ArrayWriter.open(self.folder / "s0"), about, grid)
            ours = label_attrs(grid, class_name=self.class_name, kind=kind, about=about)
            sync(os.fspath(self.folder))
            update_attrs(self.folder, {"connectomics": ours, **multiscales_attrs([grid], self.class_name)})
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._remove_done_maps()
        publish(self.folder, Path(self.output))

    def relocated(self, folder: Path) -> Self:
        output = Path(self.output)
        return replace(self, output=str(Path(folder, *output.parts[-3:])))

    def _remove_done_maps(self) -> None:
        for path in self.folder.glob(".done-*"):
            path.unlink(missing_ok=True)


def _remove_unfinished(array: Path) -> None:
    """Remove what processes that were killed left of chunks that they were writing (`connectomics.io.write`)."""
    for folder, _, names in os.walk(array):
        for name in names:
            if name.startswith(".") and ".part-" in name:
                Path(folder, name).unlink(missing_ok=True)


def objects_of(task: BlockTask) -> int:
    """How many objects the finished labels of a task hold (a mask: 0 or 1)."""
    output: str = task.to_dict()["output"]
    return int(store.read_attrs(output)["connectomics"]["objects"])


def absolute(location: str) -> str:
    """A location that means the same in every process: local paths absolute, URLs as they are."""
    where = store.normalize(location)
    return where if store.is_s3(where) else os.path.abspath(where)
