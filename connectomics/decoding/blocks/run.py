"""Connected components block by block: label each block, unite what touches, number the objects, write.

While it runs, everything lies in a hidden folder beside the output, which takes the output's place at the end::

    .{class}.partial/task.json          the task
    .{class}.partial/.blocks/labels     labels 1..k of every block for itself, uint32
    .{class}.partial/.blocks/pieces/N   table of block N, and faces/N the labels on its six faces
    .{class}.partial/.blocks/labelled   done-map of the first pass, and written: of the second
    .{class}.partial/s0, instances.csv  the output

A block counts as done when all of its files are there, so a killed run goes on with the blocks that are not. Uniting
is done anew each time: it takes seconds and depends on the tables only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from connectomics.decoding.blocks.merge import Faces, Objects, merge
from connectomics.decoding.blocks.pieces import Pieces, faces_of, load_arrays, save_arrays
from connectomics.decoding.blocks.table import TABLE_FILE, write_table
from connectomics.decoding.blocks.task import ComponentsTask
from connectomics.decoding.cellmap_postprocess import components, narrowest_unsigned
from connectomics.decoding.labels import label_attrs, partial_of, publish
from connectomics.decoding.probabilities import above, read_block
from connectomics.errors import InputError, WriteError
from connectomics.inference.task import TASK_FILE
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
from connectomics.tasks.done import DoneMap
from connectomics.tasks.lattice import Lattice

#: Told the numbers of finished and of all steps; every block has two.
BlockProgress = Callable[[int, int], None]


def run_components_task(task: ComponentsTask, progress: BlockProgress | None = None, *, overwrite: bool = False) -> int:
    """Write the connected components of ``task``'s input, or what is still missing of them.

    The labels are those of `connectomics.decoding.decode.decode_class` on the whole array, number by number, whatever
    the blocks: 1..n by their first voxel in z-y-x order. Beside them lies ``instances.csv`` (`write_table`). Memory:
    about 25 bytes a voxel of a block, 8 bytes a piece of all blocks and 100 bytes an object; scratch on disk: the
    labels once more.

    Args:
        progress: called at the start and after every block of both passes.
        overwrite: replace a finished output, and what another task left. What this task began is always continued.

    Returns:
        The number of objects.

    Raises:
        WriteError: the output of another task is there, or the disk is full.
        CorruptDataError: a chunk of the input is absent or cannot be decoded. InputError: it is no uint8, or empty.
    """
    output, partial = Path(task.output), partial_of(Path(task.output))
    finished = _finished(task, output, overwrite)
    if finished is not None:
        return finished
    source = Multiscale.open(task.input)
    level = source.levels[0]
    if level.dtype != np.uint8 or level.grid.size == 0:
        raise InputError(f"{task.input}: expected uint8 probabilities, found {level.dtype} of shape {level.grid.shape}")
    _claim(task, partial, overwrite)
    if store.read_attrs(str(partial)).get("connectomics") is None:
        run = _Run(task, source, partial, progress)
        run.label_blocks()
        run.write_blocks(run.merged())
    shutil.rmtree(partial / ".blocks", ignore_errors=True)
    publish(partial, output)
    return int(store.read_attrs(str(output))["connectomics"]["objects"])


class _Run:
    """One run over the blocks; its state is on disk."""

    def __init__(self, task: ComponentsTask, source: Multiscale, partial: Path, progress: BlockProgress | None) -> None:
        self.task, self.source, self.partial, self.progress = task, source, partial, progress
        self.grid = source.levels[0].grid
        self.lattice = Lattice(self.grid.shape, task.block_shape)
        self.least = task.parameters.min_voxels(self.grid.voxel_size)
        self.scratch = partial / ".blocks"
        where = self.scratch / "labels"
        if not (where / ".zarray").exists():
            chunks = [min(c, b) for c, b in zip(DEFAULT_CHUNKS, task.block_shape, strict=True)]
            create_array(where, self.grid.shape, np.uint32, chunks=chunks)
        self.labels = ArrayWriter.open(where)
        self.labelled = DoneMap(self.scratch / "labelled", len(self.lattice), "components")
        self.written = DoneMap(self.scratch / "written", len(self.lattice), "components")
        self._tell()

    def label_blocks(self) -> None:
        """First pass: every block for itself."""
        for number in self.labelled.missing.tolist():
            self._label(number)
            self.labelled.mark([number])
            self._tell()

    def merged(self) -> Objects:
        """What belongs together across blocks."""
        return merge(self.lattice, self._pieces, self._faces, self.task.parameters.connectivity, self.least)

    def write_blocks(self, objects: Objects) -> None:
        """Second pass: the labels of the objects, the table, the attributes."""
        n = len(objects.pieces)
        if not (self.partial / "s0" / ".zarray").exists():
            self.written.clear()
            create_array(self.partial / "s0", self.grid.shape, narrowest_unsigned(n), grid=self.grid)
        writer = ArrayWriter.open(self.partial / "s0")
        for number in self.written.missing.tolist():
            begin, shape = self.lattice.region(number)
            table = objects.labels(number).astype(writer.dtype)
            if table.any():
                writer.write(begin, table[self.labels.read(begin, shape)])
            else:
                writer.write(begin, np.zeros(shape, writer.dtype))
            self.written.mark([number])
            self._tell()
        write_table(self.partial / TABLE_FILE, objects.pieces, self.grid)
        about = {"decode": self.task.parameters.to_dict(), "source": dict(self.task.source), "objects": n}
        ours = label_attrs(self.grid, class_name=self.task.class_name, kind="instance", about=about)
        update_attrs(self.partial, {"connectomics": ours, **multiscales_attrs([self.grid], self.task.class_name)})

    def _label(self, number: int) -> None:
        begin, shape = self.lattice.region(number)
        mask = above(read_block(self.source, begin, shape), self.task.parameters.threshold)
        labels = components(mask, self.task.parameters.connectivity).astype(np.uint32, copy=False)
        n = int(labels.max())
        pieces = Pieces.measured(labels, n, begin, self.grid.shape)
        small = pieces.inside(begin, shape, self.grid.shape) & (pieces.sizes < self.least)
        if small.any():  # whole and too small: no other block has a say in it
            table = np.zeros(n + 1, np.uint32)
            table[1:][~small] = np.arange(1, n + 1 - int(small.sum()))
            labels, pieces = table[labels], pieces.take(~small)
        if len(pieces):  # or the fill value, zero, says the same
            self.labels.write(begin, labels)
        pieces.save(self.scratch / "pieces" / str(number))
        save_arrays(self.scratch / "faces" / str(number), faces_of(labels))

    def _pieces(self, number: int) -> Pieces:
        return Pieces.load(self.scratch / "pieces" / str(number))

    def _faces(self, number: int) -> Faces:
        return load_arrays(self.scratch / "faces" / str(number))

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.labelled.count + self.written.count, 2 * len(self.lattice))


def _finished(task: ComponentsTask, output: Path, overwrite: bool) -> int | None:
    """The number of objects where the task's output is there; `WriteError` where another's is."""
    if overwrite or not (output.exists() and any(output.iterdir())):
        return None
    if not (output / TASK_FILE).exists():
        raise WriteError(f"{output} is there and was not written block by block: overwrite it, or choose another place")
    if differing := task.differences(ComponentsTask.load(output / TASK_FILE)):
        raise _of_another(output, differing)
    return int(store.read_attrs(str(output))["connectomics"]["objects"])


def _claim(task: ComponentsTask, partial: Path, overwrite: bool) -> None:
    """Make the folder of unfinished work this task's own; what it holds of this task is kept."""
    file = partial / TASK_FILE
    if file.exists():
        begun = ComponentsTask.load(file)
        if begun == task:
            return
        if not overwrite:
            differing = task.differences(begun) or ["block_shape"]
            raise _of_another(partial, differing)
    shutil.rmtree(partial, ignore_errors=True)  # without a task: left by a decoding that held the whole array
    ensure_group(partial)
    task.save(file)


def _of_another(place: Path, differing: list[str]) -> WriteError:
    return WriteError(
        f"{place} holds labels of another task ({', '.join(differing)} differ); overwrite it, or choose another place"
    )
