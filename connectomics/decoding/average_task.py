"""The mean of several predictions of one class, block by block: an ensemble, also across voxel sizes.

Every prediction is resampled to the grid of the result (`connectomics.decoding.probabilities.OnGrid`) and counts alike,
as nnU-Net averages the probabilities of its networks (Isensee et al. 2021, Nature Methods 18, 203). Grids of different
voxel sizes may end up to a voxel apart: there the mean is over the predictions that reach that far.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from connectomics import __version__
from connectomics.decoding.label_artifact import partial_of, title_of, unknown_of
from connectomics.decoding.prediction import open_prediction, trained_on
from connectomics.decoding.probabilities import OnGrid, unit_of
from connectomics.errors import InputError, WriteError
from connectomics.geometry import Box, Index, VoxelGrid
from connectomics.io.artifacts import about, changed_inputs, identity, publish
from connectomics.io.multiscale import Multiscale
from connectomics.io.replacing import not_ours
from connectomics.io.sharded import Storage
from connectomics.io.store import is_array
from connectomics.io.write import ArrayWriter, create_array, ensure_group, multiscales_attrs, update_attrs
from connectomics.tasks.block_task import TASK_FILE, BlockTask, BlockWorker, Cost, Worker
from connectomics.tasks.blocks import Lattice, remove_traces, sync


@dataclass(frozen=True)
class AverageTask(BlockTask):
    """The mean probability of one class of one crop.

    Attributes:
        inputs: local folders of the probabilities, ``{out}/{dataset}.zarr/{crop}/{class}``. output: of the mean.
        grid: the grid of the mean, nm; every input covers it to within one of its voxels.
        dtype: of the stored mean, ``uint8`` (255 p) or ``float16`` (p).
        block_shape: voxels in memory at a time, z y x; a multiple of the chunks.
        storage: how the mean is stored.
    """

    kind: ClassVar[str] = "average"
    places: ClassVar[frozenset[str]] = frozenset({"inputs", "output"})

    inputs: tuple[str, ...]
    output: str
    grid: VoxelGrid
    dtype: str = "uint8"
    block_shape: Index = (128, 128, 128)
    storage: Storage = Storage()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(map(os.path.abspath, self.inputs)))
        object.__setattr__(self, "output", os.path.abspath(self.output))
        if len(self.inputs) < 2 or self.dtype not in ("uint8", "float16"):
            raise InputError(
                f"a mean needs at least two predictions and uint8 or float16, got {len(self.inputs)} and {self.dtype}"
            )

    def sources(self) -> list[Multiscale]:
        """Open the inputs; `InputError` for one that does not cover the grid."""
        found = []
        for place in map(Path, self.inputs):
            crop = place.parent
            source = open_prediction(crop.parents[1], crop.parent.name.removesuffix(".zarr"), crop.name, place.name)
            own = source.levels[0].grid
            if not own.box.grow(own.voxel_size).contains(self.grid.box, tolerance=1e-3 * min(own.voxel_size)):
                raise InputError(
                    f"{place} covers {own.box}, which is less than {self.grid.box}: predict the same crops with every "
                    "network, or merge without averaging"
                )
            found.append(source)
        return found

    def made_from(self) -> dict[str, str]:
        found = (Multiscale.open(place) for place in self.inputs)
        return {f"probabilities-{number}": identity(source) for number, source in enumerate(found, start=1)}

    @property
    def name(self) -> str:
        return title_of(Path(self.output))

    @property
    def folder(self) -> Path:
        return partial_of(Path(self.output))

    @property
    def stages(self) -> tuple[str, ...]:
        return ("average",)

    @property
    def lattice(self) -> Lattice:
        """The blocks."""
        return Lattice(self.grid.shape, self.block_shape)

    def check(self, *, overwrite: bool = False) -> bool:
        self.sources()
        there, output = about(self.output), Path(self.output)
        if output.exists() and there.get("artefact") != "probability":
            raise not_ours(output, "merge")
        if overwrite:
            return True
        if output.exists():
            same = there.get("average") == self.key and there.get("complete") is True
            if not same or changed_inputs(there.get("made_from", {}), self.made_from()):
                raise WriteError(
                    f"{output} holds another prediction; overwrite it (--overwrite), or choose other output"
                )
            return False
        begun = self.folder / TASK_FILE
        if begun.exists() and (difference := self.difference(begun)):
            raise WriteError(f"{self.folder} holds an unfinished mean {difference}; overwrite it (--overwrite)")
        return True

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite or not (self.folder / TASK_FILE).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            for group in (self.folder.parent.parent, self.folder.parent, self.folder):
                ensure_group(group, zarr_format=self.storage.zarr_format)
            self.begin()

    def prepare(self, stage: str) -> None:
        if not is_array(self.folder / "s0"):
            create_array(
                self.folder / "s0", self.grid.shape, self.dtype, chunks=self.storage.chunk, grid=self.grid,
                overwrite=True, shards=self.block_shape if self.storage.is_sharded else None,
            )  # fmt: skip

    def blocks(self, stage: str) -> int:
        return len(self.lattice)

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[Worker]:
        return nullcontext(_AverageWorker(self))

    def finish(self) -> None:
        sources = self.sources()
        ours: Mapping[str, Any] = {
            "artefact": "probability", "class_name": Path(self.output).name, "grid": self.grid.to_dict(),
            "version": __version__, "scale": 1 / unit_of(np.dtype(self.dtype)), "average": self.key,
            "model": {"seen_in_training": any(trained_on(source.attrs["connectomics"]) for source in sources)},
            **unknown_of(*sources), **self.provenance.to_dict(), "complete": True,
        }  # fmt: skip
        remove_traces(self.folder, maps=True)
        sync(os.fspath(self.folder))
        levels = multiscales_attrs([self.grid], Path(self.output).name, self.storage.zarr_format)
        update_attrs(self.folder, {"connectomics": ours, **levels})
        publish(self.folder, Path(self.output))

    def cost(self, stage: str) -> Cost:
        voxels = int(np.prod(np.minimum(self.block_shape, self.grid.shape)))
        return Cost(read=len(self.inputs) * voxels, written=voxels, memory=24 * voxels)

    def block_box(self, stage: str, block: int) -> Box | None:
        return self.grid.crop(*self.lattice.region(block)).box

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(Path(folder, *Path(self.output).parts[-3:])))


class _AverageWorker(BlockWorker):
    def __init__(self, task: AverageTask) -> None:
        self._sources = [OnGrid(source, task.grid) for source in task.sources()]
        self._lattice, self._writer = task.lattice, ArrayWriter.open(task.folder / "s0")

    def do(self, number: int) -> None:
        begin, shape = self._lattice.region(number)
        total, count = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for source in self._sources:
            total += source.read(begin, shape).astype(np.float32) / np.float32(unit_of(source.dtype))
            z, y, x = (inside[b : b + n] for inside, b, n in zip(source.inside, begin, shape, strict=True))
            count += z[:, None, None] & y[:, None] & x
        total *= np.float32(unit_of(self._writer.dtype)) / np.maximum(count, 1)
        self._writer.write(
            begin, (np.rint(total) if self._writer.dtype == np.uint8 else total).astype(self._writer.dtype)
        )
