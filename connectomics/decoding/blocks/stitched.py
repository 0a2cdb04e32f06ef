"""The base of every segmentation that is made block by block and stitched.

The blocks of the stage ``label`` are segmented each for itself; then the leading process unites the pieces of
neighbouring blocks to objects (`StitchedTask.unite`), fills their holes where that is asked for, drops small ones, and
numbers the rest 1..n by their first voxel in z-y-x order; the blocks of the stage ``write`` get the objects' labels.
Until it is finished everything lies in a hidden folder beside the output, which takes the output's place at the end::

    .{class}.partial/task.json            the task; beside it the done-maps of the run
    .{class}.partial/.blocks/labels       labels 1..k of every block for itself, uint32 Zarr
    .{class}.partial/.blocks/{stage}/N    what block N leaves for later stages (`StoredBlocks`)
    .{class}.partial/.blocks/labels_of    the object's label of every piece, 0 where it is too small
    .{class}.partial/.blocks/objects      the table of the objects
    .{class}.partial/s0, instances.csv    the output
"""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.holes import cut, fill, leave
from connectomics.decoding.blocks.merge import gathered, number_trees, numbered, renamed, unite_touching
from connectomics.decoding.blocks.pieces import Pieces, faces_of
from connectomics.decoding.blocks.stored import StoredBlocks
from connectomics.decoding.blocks.table import TABLE_FILE, write_table
from connectomics.decoding.cellmap_postprocess import narrowest_unsigned
from connectomics.decoding.labels import BLOCK, label_attrs, partial_of, publish
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.probabilities import open_probabilities
from connectomics.errors import ConfigError, MetadataError, WriteError
from connectomics.geometry import Index, VoxelGrid
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import (
    DEFAULT_CHUNKS,
    ArrayWriter,
    create_array,
    ensure_group,
    multiscales_attrs,
    update_attrs,
)
from connectomics.tasks.done import sync
from connectomics.tasks.lattice import Lattice
from connectomics.tasks.task import TASK_FILE, BlockTask, Cost, Worker


@dataclass(frozen=True)
class Labelled:
    """One block, segmented.

    Attributes:
        labels: (d, h, w) uint32, 0 background, 1..count.
        count: the largest label that there may be.
        extra: further arrays that are stored with the block for later stages, by name (`StoredBlocks.load`).
    """

    labels: NDArray[np.uint32]
    count: int
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StitchedTask(BlockTask):
    """A segmentation of one class: see the module. A subclass gives `open_labeller`, and `unite` where its pieces do
    not simply belong together when they touch.

    Attributes:
        input: location of the multiscale group of the class's probabilities; its finest level has the output's grid.
        output: local folder of the multiscale group of the labels.
        class_name: which class it is, recorded with the output.
        parameters: how the probabilities become labels.
        block_shape: voxels of a block, z y x; fastest in whole chunks of 64, right for any.
        source: what the probabilities were made from, recorded with the output.
    """

    input: str
    output: str
    class_name: str
    parameters: DecodeParameters
    block_shape: Index = BLOCK
    source: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        z, y, x = (int(n) for n in self.block_shape)
        object.__setattr__(self, "block_shape", (z, y, x))
        object.__setattr__(self, "source", json.loads(json.dumps(dict(self.source))))  # as it comes back from the file
        object.__setattr__(self, "input", absolute(self.input))
        object.__setattr__(self, "output", absolute(self.output))
        if min(z, y, x) < 1:
            raise ConfigError(f"block_shape must be three positive numbers of voxels (z, y, x), found {(z, y, x)}")

    # -- what a subclass says ----------------------------------------------------------------------------------------
    @abstractmethod
    def open_labeller(self) -> Callable[[int], Labelled]:
        """What segments a block, by its number; made once in each process that works on the stage ``label``."""

    def unite(self, blocks: StoredBlocks) -> NDArray[np.int64]:
        """Which pieces belong together, in the leading process, from what the stages before have stored.

        Returns:
            (nodes,) a forest as `connectomics.decoding.blocks.merge.unite_touching` gives it, which is what this does
            with the connectivity of the parameters. Begin with ``np.arange(blocks.offsets[-1])`` and use `unite_pairs`.
        """
        return unite_touching(blocks, self.parameters.connectivity)

    def check_input(self) -> None:
        """Raise what is wrong with the input; by default it must hold probabilities."""
        open_probabilities(self.input)

    def open_stage(self, stage: str) -> Worker:
        """A worker for a stage of the subclass's own (named in its `stages`)."""
        raise ConfigError(f"{self.kind} has no stage {stage!r}")

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

    def stored(self, stage: str = "label") -> StoredBlocks:
        """What the blocks of a stage leave for later ones."""
        return StoredBlocks(self.lattice, self.scratch / stage)

    # -- its life ----------------------------------------------------------------------------------------------------
    @property
    def stages(self) -> tuple[str, ...]:
        return "label", "write"

    def check(self, *, overwrite: bool = False) -> bool:
        if not overwrite and not self.is_begun:
            output = Path(self.output)
            if (begun := store.read_json(self.folder / TASK_FILE)) is not None:
                raise _of_another(self.folder, self._differing(begun))
            if output.exists() and any(output.iterdir()):
                written = store.read_json(output / TASK_FILE)
                if written is None:
                    raise WriteError(
                        f"{output} is there and was not written block by block: overwrite it, or choose another place"
                    )
                if differing := [name for name in self._differing(written) if name != "block_shape"]:
                    raise _of_another(output, differing)
                return False
        self.check_input()
        return True

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite or not self.is_begun:
            shutil.rmtree(self.folder, ignore_errors=True)
            ensure_group(self.folder)
            self.save(self.folder / TASK_FILE)
        elif self._complete:
            self._remove_done_maps()

    @property
    def is_begun(self) -> bool:
        """Whether this very task was begun and not finished; it then may replace what is at its output."""
        begun = store.read_json(self.folder / TASK_FILE)
        return begun is not None and not self._differing(begun)

    def prepare(self, stage: str) -> None:
        if self._complete:
            return
        if stage == "label":
            where = self.scratch / "labels"
            if not (where / ".zarray").exists():
                create_array(where, self.grid.shape, np.uint32, chunks=self._chunks)
        if stage == "write" and not (self.folder / "s0" / ".zarray").exists():
            objects = self._united()
            sync(os.fspath(self.folder))
            # last: where it is there, so are the others
            n, grid = len(objects), self.grid
            dtype = narrowest_unsigned(n) if self.parameters.kind == "instance" else np.dtype(np.uint8)
            create_array(self.folder / "s0", grid.shape, dtype, grid=grid, chunks=self._chunks)

    def blocks(self, stage: str) -> int:
        return 0 if self._complete else len(self.lattice)

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[Worker]:
        if stage == "label":
            return nullcontext(_LabelWorker(self))
        if stage == "write":
            return nullcontext(_WriteWorker(self))
        return nullcontext(self.open_stage(stage))

    def finish(self) -> None:
        if not self._complete:
            grid, objects = self.grid, Pieces(**load_mapped(self.scratch / "objects"))
            n = len(objects)
            if self.parameters.kind == "instance":
                write_table(self.folder / TABLE_FILE, objects, grid)
            else:
                n = min(n, 1)
            sync(os.fspath(self.folder))
            about = {"decode": self.parameters.to_dict(), "source": dict(self.source), "objects": n}
            ours = label_attrs(grid, class_name=self.class_name, kind=self.parameters.kind, about=about)
            update_attrs(self.folder, {"connectomics": ours, **multiscales_attrs([grid], self.class_name)})
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._remove_done_maps()
        publish(self.folder, Path(self.output))

    def relocated(self, folder: Path) -> Self:
        output = Path(self.output)
        return replace(self, output=str(Path(folder, *output.parts[-3:])))

    def cost(self, stage: str) -> Cost:
        voxels = int(np.prod(self.block_shape))
        if stage == "write":
            return Cost(read=4 * voxels, written=4 * voxels, memory=8 * voxels)
        return Cost(read=voxels, written=4 * voxels, memory=25 * voxels)

    # -- within ------------------------------------------------------------------------------------------------------
    @property
    def _complete(self) -> bool:
        """Whether only the last renaming is missing (then there are attributes, which are written after all else)."""
        return (self.folder / ".zattrs").exists()

    @property
    def _chunks(self) -> Index:
        """Chunks that no two blocks share: the usual ones, or a whole block where it has no whole number of them."""
        z, y, x = (
            c if b % c == 0 or b >= n else b
            for b, c, n in zip(self.block_shape, DEFAULT_CHUNKS, self.grid.shape, strict=True)
        )
        return z, y, x

    def _united(self) -> Pieces:
        """Unite the pieces, fill the holes, number the objects; stores what the stage ``write`` needs."""
        blocks = self.stored()
        trees = self.unite(blocks)
        n = number_trees(trees)
        if self.parameters.fill_holes:
            parts, at = self.stored("holes"), blocks.offsets
            filled = fill(parts, lambda k: trees[at[k] : at[k + 1]], self.parameters.connectivity, n)
            objects, object_of, blocks = filled.objects, filled.object_of, parts
        else:
            objects, object_of = gathered(blocks, trees, n), trees
        kept, label = numbered(objects, self.parameters.min_voxels(self.grid.voxel_size))
        # the last entry is where the background's -1 leads
        label_of = renamed(object_of, np.concatenate((label, [0])))
        save_mapped(self.scratch / "labels_of", label_of=label_of, offsets=blocks.offsets)
        save_mapped(self.scratch / "objects", **kept.columns)
        return kept

    def _differing(self, stored: Mapping[str, Any]) -> list[str]:
        """Which fields a stored task has otherwise, those left out that decide nothing of the output."""
        mine = {"kind": self.kind, **self.to_dict()}
        return [name for name in mine | dict(stored) if name not in self.free and mine.get(name) != stored.get(name)]

    def _remove_done_maps(self) -> None:
        for path in self.folder.glob(".done-*"):
            path.unlink(missing_ok=True)


class _LabelWorker:
    """Segments blocks, each for itself."""

    def __init__(self, task: StitchedTask) -> None:
        self._label = task.open_labeller()
        self._stored, self._holes = task.stored(), task.stored("holes")
        self._labels = ArrayWriter.open(task.scratch / "labels")
        self._fill, self._connectivity = task.parameters.fill_holes, task.parameters.connectivity

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        lattice = self._stored.lattice
        for number in blocks:
            begin, _ = lattice.region(number)
            block = self._label(number)
            pieces = Pieces.measured(block.labels, block.count, begin, lattice.shape)
            if block.count:  # or the fill value, zero, says the same
                self._labels.write(begin, block.labels)
            count = {"count": np.asarray(block.count)}
            self._stored.save(number, {**count, **pieces.columns, **faces_of(block.labels), **block.extra})
            if self._fill:
                leave(self._holes, number, cut(block.labels, self._connectivity), self._connectivity)
            yield number


class _WriteWorker:
    """Gives blocks the labels of the objects."""

    def __init__(self, task: StitchedTask) -> None:
        self._lattice = task.lattice
        self._labels = ArrayWriter.open(task.scratch / "labels")
        self._writer = ArrayWriter.open(task.folder / "s0")
        self._parameters = task.parameters
        stored = load_mapped(task.scratch / "labels_of")
        self._label_of, self._offsets = stored["label_of"], stored["offsets"]

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        for number in blocks:
            begin, shape = self._lattice.region(number)
            found = self._label_of[self._offsets[number] : self._offsets[number + 1]]
            if self._parameters.kind == "semantic":
                found = found > 0
            table = np.concatenate(([0], found)).astype(self._writer.dtype)
            if table.any():
                labels = self._labels.read(begin, shape)
                if self._parameters.fill_holes:  # what holds is known of its parts
                    labels = cut(labels, self._parameters.connectivity).labels
                self._writer.write(begin, table[labels])
            else:
                self._writer.write(begin, np.zeros(shape, self._writer.dtype))
            yield number


def objects_of(task: BlockTask) -> int:
    """How many objects the finished labels of a task hold (a mask: 0 or 1)."""
    output: str = task.to_dict()["output"]
    return int(store.read_attrs(output)["connectomics"]["objects"])


def absolute(location: str) -> str:
    """A location that means the same in every process: local paths absolute, URLs as they are."""
    where = store.normalize(location)
    return where if store.is_s3(where) else os.path.abspath(where)


def save_mapped(folder: Path, **arrays: NDArray[Any]) -> None:
    """Store arrays as ``folder/{name}.npy``. `WriteError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
    except OSError as error:
        raise WriteError(f"cannot write {folder}: {error.strerror or error}; free space there") from error


def load_mapped(folder: Path) -> dict[str, NDArray[Any]]:
    """What `save_mapped` stored, mapped: only what is used is read, and all processes of a machine share it."""
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def _of_another(place: Path, differing: list[str]) -> WriteError:
    return WriteError(
        f"{place} holds labels of another task ({', '.join(differing)} differ); overwrite it, or choose another place"
    )
