"""Segmentations that are made block by block and stitched; among them connected components.

In the stage ``label`` every block is segmented alone. In the stage ``unite`` the pieces of neighboring blocks are
united within groups of blocks (`StitchedTask.unite_group`). The leading process then unites the groups to objects
(`StitchedTask.unite`), fills their holes if asked, drops small ones, and numbers the rest 1..n by their first voxel in
z-y-x order. In the stage ``write`` the blocks get the labels of the objects. With a boundary (a class or a head) these
objects are cores, found where there is no boundary: the stage ``cores`` writes them, the stage ``grow`` grows them back
over the boundary, as `connectomics.decoding.decode.decode_class` does, and ``unite-grown`` unites what has grown.

The unfinished output::

    .{class}.partial/task.json            the task; beside it the done-maps of the run
    .{class}.partial/.blocks/labels       labels 1..k of every block, uint32 Zarr
    .{class}.partial/.blocks/label/N      what block N leaves for later stages (`StoredBlocks`); to fill holes ``holes``
    .{class}.partial/.blocks/label-groups/N   what group N leaves for the leading process (`StoredGroups`)
    .{class}.partial/.blocks/labels_of/N  the object label of every tree of group N, 0 if it is too small
    .{class}.partial/.blocks/objects_of_labels   the table of the objects
    .{class}.partial/.blocks/cores, parts, grow, grow-groups, parts_of, objects_of_parts   with a boundary: the labels
                                          of the cores, and what grows, as above
    .{class}.partial/s0, instances.csv    the output
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.groups import (
    BLOCKS_KEPT,
    GROUP,
    Group,
    GroupLabels,
    StoredGroups,
    gathered,
    groups_of,
    joined,
    number_trees,
)
from connectomics.decoding.blocks.holes import block_parts, fill, store_parts, unite_parts
from connectomics.decoding.blocks.labels_task import LabelsTask
from connectomics.decoding.blocks.pieces import Pieces, StoredBlocks, faces_of, numbered
from connectomics.decoding.cellmap_postprocess import components
from connectomics.decoding.label_artifact import unknown_parts, write_tables
from connectomics.decoding.prediction import Foreground
from connectomics.decoding.watershed.forest import NO_FLOOR
from connectomics.decoding.watershed.stitch import grown_block, grown_objects, unite_group
from connectomics.errors import as_write_error
from connectomics.io.place import S3Path
from connectomics.io.store import is_array
from connectomics.io.write import ArrayWriter
from connectomics.tasks.block_task import BlockWorker, Cost, Worker
from connectomics.tasks.blocks import BlockFiles


@dataclass(frozen=True)
class Labeled:
    """One segmented block.

    Attributes:
        labels: (d, h, w) uint32, 0 background, 1..count.
        count: the largest label that may occur.
        extra: arrays that are stored with the block for later stages, by name (`StoredBlocks.load`).
    """

    labels: NDArray[np.uint32]
    count: int
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StitchedTask(LabelsTask):
    """A segmentation of one class. A subclass defines `open_labeler`, and `unite` if touching pieces may be apart."""

    # -- what a subclass defines -------------------------------------------------------------------------------------
    #: bytes that uniting noise takes for each voxel of the faces of the blocks, and for each voxel (measured)
    noise: ClassVar[tuple[int, int]] = (80, 5)

    @abstractmethod
    def open_labeler(self) -> Callable[[int], Labeled]:
        """Return what segments a block, by its number; made once in each process of the stage ``label``."""

    def unite_group(self, group: Group, groups: StoredGroups) -> NDArray[np.int64]:
        """Unite the pieces of a group of blocks as far as nothing beyond it matters, and store the group.

        Returns:
            (group.size,) the tree of each piece.
        """
        trees, links = joined(group, self.parameters.connectivity)
        groups.store(group, trees, number_trees(trees), links)
        return trees

    def unite(self, groups: StoredGroups) -> NDArray[np.int64]:
        """Find the trees of groups that belong together, in the leading process.

        Returns:
            (nodes,) the union-find forest: the parent of each tree, whose number is at most its own.
        """
        from connectomics.decoding.blocks.component_kernels import join_pairs

        forest = np.arange(groups.offsets[-1])
        for group in groups.parts:
            join_pairs(forest, groups.links(group))
        return forest

    # -- its life ----------------------------------------------------------------------------------------------------
    def check_input(self) -> None:
        self.open_foreground()

    def open_foreground(self) -> Foreground:
        """Open what is segmented."""
        return Foreground.open(self.input, self.parameters)

    def stored(self, stage: str = "label") -> StoredBlocks:
        """Return what the blocks of a stage leave for later ones."""
        return StoredBlocks(self.scratch / stage, self.lattice)

    def groups(self, stage: str = "label") -> StoredGroups:
        """Return what the groups of the blocks of a stage leave for the leading process."""
        return StoredGroups(self.scratch / f"{stage}-groups", self.lattice)

    @property
    def label_stages(self) -> tuple[str, ...]:
        between = ("cores", "grow", "unite-grown") if self.parameters.has_boundary else ()
        return ("label", "unite", *between, "write")

    def blocks(self, stage: str) -> int:
        unites = stage.startswith("unite") and not self.is_complete
        return len(groups_of(self.lattice)) if unites else super().blocks(stage)

    def prepare_labels(self, stage: str) -> None:
        # each array is made last: if it exists, all else does
        if stage == "label":
            self._create("labels", np.dtype(np.uint32))
        if stage == "cores" and not (self._is_there("cores") and self._is_kept("labels")):
            self._create("cores", np.min_scalar_type(len(self._united())))
        if stage == "grow":
            self._create("parts", np.dtype(np.uint32))
        kept = self._is_kept("parts" if self.parameters.has_boundary else "labels")
        if stage == "write" and not (self.has_labels and kept):
            objects = len(self._grown() if self.parameters.has_boundary else self._united())
            instances = self.parameters.kind == "instance"
            self.create_labels(np.min_scalar_type(objects) if instances else np.dtype(np.uint8))

    def label_worker(self, stage: str) -> Worker:
        fills = self.parameters.fill_holes
        if stage == "label":
            return _LabelWorker(self, stage, self.open_labeler(), "labels", fills)
        if stage.startswith("unite"):
            return _UniteWorker(self, stage == "unite-grown")
        if stage == "cores":
            return _WriteWorker(self, "labels", self.scratch / "cores", fills)
        if stage == "grow":
            return _LabelWorker(self, stage, self._open_grower(), "parts", False)
        if self.parameters.has_boundary:
            return _WriteWorker(self, "parts", self.folder / "s0", False)
        return _WriteWorker(self, "labels", self.folder / "s0", fills)

    def clear_unknown(self) -> None:
        """As for all labels; only filled holes reach into what is unknown, and the objects lose these voxels."""
        for number, part in enumerate(unknown_parts(self.source, self.grid) if self.parameters.fill_holes else ()):
            begin, shape = [s.start for s in part], [s.stop - s.start for s in part]
            writer = ArrayWriter.open(self.folder / "s0")
            if not (self._cleared.folder / str(number)).exists():  # else this was begun before
                ids, labels = np.unique(writer.read(begin, shape), return_inverse=True)
                lost = Pieces.measured(labels.reshape(shape) + 1, len(ids), begin, self.grid.shape)
                self._cleared.save(number, {"ids": ids, **lost.columns})
            writer.write(begin, np.zeros(shape, writer.dtype))
        super().clear_unknown()

    def conclude(self) -> int:
        array = "parts" if self.parameters.has_boundary else "labels"
        objects = Pieces(**load_mapped(self.scratch / f"objects_of_{array}"))
        if self.parameters.kind == "semantic":
            return min(len(objects), 1)
        for path in self._cleared.folder.glob("[0-9]*"):
            lost = self._cleared.load(int(path.name))
            objects = objects.without(lost.pop("ids"), Pieces(**lost))
        write_tables(self.folder, objects, self.grid, self.table)
        return len(objects)

    def label_cost(self, stage: str) -> Cost:
        voxels = self.largest_block
        if stage.startswith("unite"):
            blocks = int(np.prod(np.minimum(GROUP, self.lattice.counts)))
            z, y, x = np.minimum(self.block_shape, self.grid.shape).tolist()
            sides = 2 * (z * y + z * x + y * x)
            faces = sides * (4 if self.parameters.method in ("cc3d", "threshold") else 8)
            on_face, inside = self.noise if stage == "unite" else StitchedTask.noise
            pieces = blocks * (on_face * sides + inside * voxels)
            return Cost(read=2 * blocks * faces, written=faces, memory=(BLOCKS_KEPT + 2) * faces + pieces)
        if stage in ("cores", "write"):
            return Cost(read=4 * voxels, written=4 * voxels, memory=8 * voxels)
        if stage == "grow":
            return Cost(read=6 * voxels, written=4 * voxels, memory=75 * voxels)  # if the boundary is all noise
        return Cost(read=voxels, written=4 * voxels, memory=25 * voxels)

    # -- within ------------------------------------------------------------------------------------------------------
    @property
    def _cleared(self) -> BlockFiles:
        """What objects lose in each unknown part."""
        return BlockFiles(self.scratch / "cleared")

    def _is_there(self, array: str) -> bool:
        return is_array(self.scratch / array)

    def _is_kept(self, array: str) -> bool:
        return (self.scratch / f"{array}_of" / "0").exists()

    def _create(self, array: str, dtype: np.dtype[Any]) -> None:
        if not self._is_there(array):
            self.create(f"{self.scratch.name}/{array}", dtype)

    def _open_grower(self) -> Callable[[int], Labeled]:
        foreground, lattice, connectivity = self.open_foreground(), self.lattice, self.parameters.connectivity
        cores = ArrayWriter.open(self.scratch / "cores")

        def grow(number: int) -> Labeled:
            found, extra = grown_block(foreground, cores, lattice, number, connectivity)
            return Labeled(found.labels, found.count, extra)

        return grow

    def _grown(self) -> Pieces:
        """Unite what has grown from each core; store what the stage ``write`` needs."""
        groups = self.groups("grow")
        cores = len(load_mapped(self.scratch / "objects_of_labels")["sizes"])
        kept, label_of = grown_objects(groups, cores)
        self._keep("parts", kept, label_of, groups)
        return kept

    def _united(self) -> Pieces:
        """Unite the trees, fill the holes, number the objects; store what the next stage needs."""
        groups = self.groups()
        object_of = self.unite(groups)
        n = number_trees(object_of)
        if self.parameters.fill_holes:
            trees, groups = groups, self.groups("holes")
            objects, object_of = fill(groups, trees, object_of, self.parameters.connectivity, n)
        else:
            objects = gathered(groups, object_of, n)
        kept, label = numbered(objects, self.parameters.min_voxels(self.grid.voxel_size))
        # the background, -1, reads the last entry
        self._keep("labels", kept, np.concatenate((label, [0]))[object_of], groups)
        return kept

    def _keep(self, array: str, objects: Pieces, label_of: NDArray[np.int64], groups: StoredGroups) -> None:
        """Store the table of the objects, and by group the label of each tree in an array of pieces."""
        save_mapped(self.scratch / f"objects_of_{array}", **objects.columns)
        files = BlockFiles(self.scratch / f"{array}_of")
        for group in reversed(groups.parts):  # the first one last: it says that all are there (`_is_kept`)
            files.save(group, {"labels": label_of[slice(*groups.offsets[group : group + 2])]})


class _LabelWorker(BlockWorker):
    """Segments blocks, each alone."""

    def __init__(
        self, task: StitchedTask, stage: str, label: Callable[[int], Labeled], array: str, fill_holes: bool
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
        if block.count:  # else the fill value, zero, says the same
            self._labels.write(begin, block.labels)
        count = {"count": np.asarray(block.count)}
        self._stored.save(number, {**count, **pieces.columns, **faces_of(block.labels), **block.extra})
        if self._fill:
            store_parts(self._holes, number, block.labels, self._connectivity)


class _UniteWorker(BlockWorker):
    """Unites groups of blocks."""

    def __init__(self, task: StitchedTask, grown: bool) -> None:
        self._task, self._grown = task, grown
        self._fill, self._connectivity = task.parameters.fill_holes, task.parameters.connectivity

    def do(self, number: int) -> None:
        stage = "grow" if self._grown else "label"
        group, groups = Group(self._task.stored(stage), number), self._task.groups(stage)
        if self._grown:
            unite_group(group, groups, self._connectivity, NO_FLOOR, cored=True)
            return
        trees = self._task.unite_group(group, groups)
        if self._fill:
            parts = Group(self._task.stored("holes"), number)
            unite_parts(parts, trees, group, self._task.groups("holes"), self._connectivity)


class _WriteWorker(BlockWorker):
    """Gives the pieces in an array of blocks the labels of their objects."""

    def __init__(self, task: StitchedTask, array: str, into: Path, fill_holes: bool) -> None:
        self._lattice = task.lattice
        self._labels = ArrayWriter.open(task.scratch / array)
        self._writer = ArrayWriter.open(into)
        self._fill, self._parameters = fill_holes, task.parameters
        groups = task.groups("grow" if array == "parts" else "holes" if fill_holes else "label")
        self._label_of = GroupLabels(groups, BlockFiles(task.scratch / f"{array}_of"))

    def do(self, number: int) -> None:
        begin, shape = self._lattice.region(number)
        found = self._label_of.of(number)
        if self._parameters.kind == "semantic":
            found = np.minimum(found, 1)
        table = np.concatenate(([0], found)).astype(self._writer.dtype)
        if table.any():
            labels = self._labels.read(begin, shape)
            if self._fill:  # the table is by parts then
                labels, _ = block_parts(labels, self._parameters.connectivity)
            self._writer.write(begin, table[labels])
        else:
            self._writer.write(begin, np.zeros(shape, self._writer.dtype))


def save_mapped(folder: Path, **arrays: NDArray[Any]) -> None:
    """Store arrays as ``folder/{name}.npy``. `WriteError`."""
    if isinstance(folder, S3Path):
        for name, values in arrays.items():
            with tempfile.TemporaryFile() as file:
                np.save(file, values)
                file.seek(0)
                folder.joinpath(f"{name}.npy").put(file)
        return
    with as_write_error(f"cannot write {folder}", "free space there"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)


def load_mapped(folder: Path) -> dict[str, NDArray[Any]]:
    """Memory-map what `save_mapped` stored: only what is used is read, and processes of a machine share it. From S3 it
    is first copied into a temporary file of this process."""
    if isinstance(folder, S3Path):
        return {path.stem: _mapped_copy(path) for path in folder.glob("*.npy")}
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def _mapped_copy(path: S3Path) -> NDArray[Any]:
    with tempfile.NamedTemporaryFile() as file:  # its name goes, the map stays
        path.download(file)
        return np.asarray(np.load(file.name, mmap_mode="r"))


@dataclass(frozen=True)
class ComponentsTask(StitchedTask):
    """Connected components of the probabilities of a class, or the mask of those kept (method ``threshold``).

    The labels are those of `connectomics.decoding.decode.decode_class` on the whole
    array, number by number, whatever the blocks.
    """

    kind: ClassVar[str] = "components"
    methods: ClassVar[tuple[str, ...]] = ("cc3d", "threshold")

    @property
    def noise(self) -> tuple[int, int]:  # type: ignore[override]
        """As of `StitchedTask`; small components within a block are dropped, unless they may hold a cavity."""
        if self.parameters.fill_holes:
            return 12, 25
        return 12, 9 if self.parameters.min_voxels(self.grid.voxel_size) < 2 else 0

    def open_labeler(self) -> Callable[[int], Labeled]:
        foreground, lattice = self.open_foreground(), self.lattice
        min_voxels = self.parameters.min_voxels(foreground.source.levels[0].grid.voxel_size)

        def label(number: int) -> Labeled:
            begin, shape = lattice.region(number)
            found = components(foreground.cores(begin, shape), self.parameters.connectivity)
            labels = found.astype(np.uint32, copy=False)
            n = int(labels.max())
            if self.parameters.fill_holes:  # small ones may hold a cavity, or lie in one
                return Labeled(labels, n)
            pieces = Pieces.measured(labels, n, begin, lattice.shape)
            small = pieces.inside(begin, shape, lattice.shape) & (pieces.sizes < min_voxels)
            if small.any():  # whole and too small: no other block can change that
                n -= int(small.sum())
                table = np.zeros(len(small) + 1, np.uint32)
                table[1:][~small] = np.arange(1, n + 1)
                for plane in labels:  # in place
                    plane[...] = table[plane]
            return Labeled(labels, n)

        return label
