"""The base of every segmentation that is made block by block and stitched.

The blocks of the stage ``label`` are segmented each for itself; then the leading process unites the pieces of
neighbouring blocks to objects (`StitchedTask.unite`), fills their holes where that is asked for, drops small ones, and
numbers the rest 1..n by their first voxel in z-y-x order; the blocks of the stage ``write`` get the objects' labels.
With walls (a boundary class, or a head of boundaries) these are cores, found where there is no wall: the stage
``cores`` writes them, and the stage ``grow`` grows them back over the walls, as
`connectomics.decoding.decode.decode_between` does.
Until it is finished everything lies in a hidden folder beside the output, which takes the output's place at the end::

    .{class}.partial/task.json            the task; beside it the done-maps of the run
    .{class}.partial/.blocks/labels       labels 1..k of every block for itself, uint32 Zarr
    .{class}.partial/.blocks/{stage}/N    what block N leaves for later stages (`StoredBlocks`)
    .{class}.partial/.blocks/labels_of    the object's label of every piece, 0 where it is too small
    .{class}.partial/.blocks/objects_of_labels   the table of the objects
    .{class}.partial/.blocks/cores, parts, parts_of, objects_of_parts   with walls: the cores' labels, and
                                          what grows, as above
    .{class}.partial/s0, instances.csv    the output
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.foreground import Foreground
from connectomics.decoding.blocks.holes import cut, fill, leave
from connectomics.decoding.blocks.labels_task import LabelsTask
from connectomics.decoding.blocks.merge import gathered, number_trees, numbered, renamed, unite_touching
from connectomics.decoding.blocks.pieces import Pieces, faces_of
from connectomics.decoding.blocks.stored import StoredBlocks
from connectomics.decoding.blocks.table import write_tables
from connectomics.decoding.cellmap_postprocess import narrowest_unsigned
from connectomics.errors import ConfigError, WriteError
from connectomics.io.write import ArrayWriter, create_array
from connectomics.tasks.block_task import BlockWorker, Cost, Worker


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
class StitchedTask(LabelsTask):
    """A segmentation of one class: see the module. A subclass gives `open_labeller`, and `unite` where its pieces do
    not simply belong together when they touch."""

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

    def open_stage(self, stage: str) -> Worker:
        """A worker for a stage of the subclass's own (named in its `stages`)."""
        raise ConfigError(f"{self.kind} has no stage {stage!r}")

    # -- its life ----------------------------------------------------------------------------------------------------
    def check_input(self) -> None:
        self.open_foreground()

    def open_foreground(self) -> Foreground:
        """What is segmented, opened."""
        return Foreground.open(self.input, self.parameters)

    def stored(self, stage: str = "label") -> StoredBlocks:
        """What the blocks of a stage leave for later ones."""
        return StoredBlocks(self.lattice, self.scratch / stage)

    @property
    def stages(self) -> tuple[str, ...]:
        return ("label", "cores", "grow", "write") if self.parameters.has_walls else ("label", "write")

    def prepare(self, stage: str) -> None:
        if self.is_complete:
            return
        # the array comes last: where it is there, so is all else
        if stage == "label":
            self._create("labels", np.dtype(np.uint32))
        if stage == "cores" and not self._is_there("cores"):
            self._create("cores", narrowest_unsigned(len(self._united())))
        if stage == "grow":
            self._create("parts", np.dtype(np.uint32))
        if stage == "write" and not self.has_labels:
            objects = len(self._grown() if self.parameters.has_walls else self._united())
            self.create_labels(
                narrowest_unsigned(objects) if self.parameters.kind == "instance" else np.dtype(np.uint8)
            )

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[Worker]:
        if stage == "label":
            return nullcontext(_LabelWorker(self, stage, self.open_labeller(), "labels", self.parameters.fill_holes))
        if stage == "cores":
            return nullcontext(_WriteWorker(self, "labels", self.scratch / "cores", self.parameters.fill_holes))
        if stage == "grow":
            return nullcontext(_LabelWorker(self, stage, self._open_grower(), "parts", False))
        if stage == "write" and self.parameters.has_walls:
            return nullcontext(_WriteWorker(self, "parts", self.folder / "s0", False))
        if stage == "write":
            return nullcontext(_WriteWorker(self, "labels", self.folder / "s0", self.parameters.fill_holes))
        return nullcontext(self.open_stage(stage))

    def conclude(self) -> int:
        array = "parts" if self.parameters.has_walls else "labels"
        objects = Pieces(**load_mapped(self.scratch / f"objects_of_{array}"))
        if self.parameters.kind == "semantic":
            return min(len(objects), 1)
        write_tables(self.folder, objects, self.grid, self.table)
        return len(objects)

    def cost(self, stage: str) -> Cost:
        voxels = self.largest_block
        if stage in ("cores", "write"):
            return Cost(read=4 * voxels, written=4 * voxels, memory=8 * voxels)
        if stage == "grow":
            return Cost(read=6 * voxels, written=4 * voxels, memory=75 * voxels)  # of walls that are all noise
        return Cost(read=voxels, written=4 * voxels, memory=25 * voxels)

    # -- within ------------------------------------------------------------------------------------------------------
    def _is_there(self, array: str) -> bool:
        return (self.scratch / array / ".zarray").exists()

    def _create(self, array: str, dtype: np.dtype[Any]) -> None:
        if not self._is_there(array):
            create_array(self.scratch / array, self.grid.shape, dtype, chunks=self.chunks)

    def _open_grower(self) -> Callable[[int], Labelled]:
        from connectomics.decoding.watershed.grow import grown_block

        foreground, lattice, connectivity = self.open_foreground(), self.lattice, self.parameters.connectivity
        cores = ArrayWriter.open(self.scratch / "cores")

        def grow(number: int) -> Labelled:
            found, extra = grown_block(foreground, cores, lattice, number, connectivity)
            return Labelled(found.labels, found.count, extra)

        return grow

    def _grown(self) -> Pieces:
        """Give what has grown its cores' objects, and number these; stores what the stage ``write`` needs."""
        from connectomics.decoding.watershed.grow import grown_objects

        blocks = self.stored("grow")
        cores = len(load_mapped(self.scratch / "objects_of_labels")["sizes"])
        kept, label_of = grown_objects(blocks, self.parameters.connectivity, cores)
        self._keep("parts", kept, label_of, blocks)
        return kept

    def _keep(self, array: str, objects: Pieces, label_of: NDArray[np.int64], blocks: StoredBlocks) -> None:
        """Store the label of each piece in an array of pieces, and the table of the objects."""
        save_mapped(self.scratch / f"{array}_of", label_of=label_of, offsets=blocks.offsets)
        save_mapped(self.scratch / f"objects_of_{array}", **objects.columns)

    def _united(self) -> Pieces:
        """Unite the pieces, fill the holes, number the objects; stores what the next stage needs."""
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
        self._keep("labels", kept, label_of, blocks)
        return kept


class _LabelWorker(BlockWorker):
    """Segments blocks, each for itself."""

    def __init__(
        self, task: StitchedTask, stage: str, label: Callable[[int], Labelled], array: str, fill_holes: bool
    ) -> None:
        self._label = label
        self._stored, self._holes = task.stored(stage), task.stored("holes")
        self._labels = ArrayWriter.open(task.scratch / array)
        self._fill, self._connectivity = fill_holes, task.parameters.connectivity

    def do(self, number: int) -> None:
        lattice = self._stored.lattice
        begin, _ = lattice.region(number)
        block = self._label(number)
        pieces = Pieces.measured(block.labels, block.count, begin, lattice.shape)
        if block.count:  # or the fill value, zero, says the same
            self._labels.write(begin, block.labels)
        count = {"count": np.asarray(block.count)}
        self._stored.save(number, {**count, **pieces.columns, **faces_of(block.labels), **block.extra})
        if self._fill:
            leave(self._holes, number, cut(block.labels, self._connectivity), self._connectivity)


class _WriteWorker(BlockWorker):
    """Gives the pieces of an array of blocks the labels of their objects."""

    def __init__(self, task: StitchedTask, array: str, into: Path, fill_holes: bool) -> None:
        self._lattice = task.lattice
        self._labels = ArrayWriter.open(task.scratch / array)
        self._writer = ArrayWriter.open(into)
        self._fill, self._parameters = fill_holes, task.parameters
        stored = load_mapped(task.scratch / f"{array}_of")
        self._label_of, self._offsets = stored["label_of"], stored["offsets"]

    def do(self, number: int) -> None:
        begin, shape = self._lattice.region(number)
        found = self._label_of[self._offsets[number] : self._offsets[number + 1]]
        if self._parameters.kind == "semantic":
            found = found > 0
        table = np.concatenate(([0], found)).astype(self._writer.dtype)
        if table.any():
            labels = self._labels.read(begin, shape)
            if self._fill:  # what holds is known of its parts
                labels = cut(labels, self._parameters.connectivity).labels
            self._writer.write(begin, table[labels])
        else:
            self._writer.write(begin, np.zeros(shape, self._writer.dtype))


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
