"""Apply edits to the labels of a class, block by block: the original is read, and the labels are written elsewhere.

In the stage ``survey`` each block finds the largest ID and the boxes of the instances that edits name. The leading
process then makes the steps, and divides the instances that are split, one after the other: within its box, which is
sampled more coarsely if it has more than `EditTask.split_voxels`. In the stage ``write`` the blocks apply all steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.labels_task import LabelsTask
from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.edits import (
    Division,
    Edit,
    Instances,
    Step,
    Volumes,
    apply_steps,
    as_dict,
    boxes_in,
    linked,
    steps_of,
)
from connectomics.decoding.label_artifact import TABLE_FILE, write_table
from connectomics.decoding.parameters import METHODS
from connectomics.errors import InputError, MetadataError
from connectomics.geometry import Index, Triple, index, slices_of, triple
from connectomics.io.artifacts import about, identity, require_complete
from connectomics.io.fingerprint import fingerprint
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import ArrayWriter
from connectomics.tasks.block_task import BlockWorker, Cost, Worker
from connectomics.tasks.blocks import BlockFiles, Lattice


@dataclass(frozen=True)
class EditTask(LabelsTask):
    """The labels of one class after edits; without edits, a copy.

    Attributes:
        edits: of the crop, those of other classes included; `linked` says which of them matter.
        others: class -> location of the labels of the other classes that edits name, on the same grid.
        split_voxels: most cells in which an instance is divided; about 40 bytes each.
    """

    kind: ClassVar[str] = "edits"
    methods: ClassVar[tuple[str, ...]] = METHODS
    places: ClassVar[frozenset[str]] = LabelsTask.places | {"others"}

    edits: tuple[Edit, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict, hash=False)
    split_voxels: int = 1 << 23

    @property
    def classes(self) -> list[str]:
        """The classes that are read, this one first."""
        return linked(self.edits, self.class_name)[0]

    @property
    def sources(self) -> dict[str, Multiscale]:
        """The labels of `classes`, opened."""
        places = {**self.others, self.class_name: self.input}
        return {name: Multiscale.open(places[name]) for name in self.classes}

    def made_from(self) -> dict[str, str]:
        labels = {  # other programs may draw in them, and leave the ID
            f"labels of {name}": f"{identity(source)}-{fingerprint(source, with_location=False)[:16]}"
            for name, source in self.sources.items()
        }
        return {**labels, "edits": self._hash()}

    def _hash(self, before: str = "") -> str:
        edits = "\n".join(e.to_json() for e in linked(self.edits, self.class_name)[1])
        return hashlib.sha256((before + edits).encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "edits"}  # see `made_from`

    def check_input(self) -> None:
        for source in self.sources.values():
            level = source.levels[0]
            require_complete(source.location, "labels", foreign=True)
            if level.dtype.kind not in "ub":
                raise MetadataError(f"{source.location}: expected unsigned instance IDs, got {level.dtype}")
            if level.grid != self.grid:
                raise InputError(f"{source.location} is on another grid than {self.input}; reclassify needs the same")

    # -- its life ----------------------------------------------------------------------------------------------------
    @property
    def label_stages(self) -> tuple[str, ...]:
        return ("survey", "write") if self.edits else ("write",)

    def prepare_labels(self, stage: str) -> None:
        if stage == "survey" or self.has_labels:
            return
        steps = self.steps
        for number, step in enumerate(steps):
            if step.edit.op == "split" and not (self.divisions.folder / str(number)).exists():
                self._divide(steps[:number], step)
        largest = max([s.new for s in steps if (s.edit.to or s.edit.class_name) == self.class_name], default=0)
        stored = np.promote_types(Multiscale.open(self.input).levels[0].dtype, np.uint8)
        self.create_labels(np.promote_types(stored, np.min_scalar_type(largest)))

    def label_worker(self, stage: str) -> Worker:
        return _SurveyWorker(self) if stage == "survey" else _WriteWorker(self)

    def conclude(self) -> int:
        ids, found = _added(self.tables, len(self.lattice))
        if self.parameters.kind == "semantic":
            return min(len(ids), 1)
        write_table(self.folder / TABLE_FILE, found, self.grid, ids)
        if self.table == "parquet":
            write_table((self.folder / TABLE_FILE).with_suffix(".parquet"), found, self.grid, ids)
        return len(ids)

    def further_attrs(self) -> dict[str, Any]:
        before = about(self.input).get("edited", "")  # labels that were edited before stay so
        if not self.edits:
            return {"edited": before} if before else {}
        steps = [(step, as_dict(step)) for step in self.steps]
        if self.parameters.kind != "semantic":
            ids, found = _added(self.tables, len(self.lattice))
            sizes = dict(zip(ids.tolist(), found.sizes.tolist(), strict=True))
            for step, said in steps:
                if step.new and (step.edit.to or step.edit.class_name) == self.class_name:
                    said["voxels"] = sizes.get(step.new, 0)
        return {"edits": [said for _, said in steps], "edited": self._hash(before)}

    def label_cost(self, stage: str) -> Cost:
        voxels, read = self.largest_block, len(self.classes)
        return Cost(read=8 * voxels * read, written=8 * voxels, memory=(16 * read + 24) * voxels)

    # -- within ------------------------------------------------------------------------------------------------------
    @property
    def surveyed(self) -> BlockFiles:
        """What the blocks found: the largest ID of each class, and boxes."""
        return BlockFiles(self.scratch / "survey")

    @property
    def divisions(self) -> BlockFiles:
        """Where instances are split, by number of the step."""
        return BlockFiles(self.scratch / "divisions")

    @property
    def tables(self) -> BlockFiles:
        """The instances of each block that was written."""
        return BlockFiles(self.scratch / "tables")

    @property
    def steps(self) -> list[Step]:
        """The steps, after the survey. Raises `InputError` for an instance that is not there."""
        names, edits = linked(self.edits, self.class_name)
        if not edits:
            return []
        together = len(self.lattice)  # number of the file with what all blocks found
        if not (self.surveyed.folder / str(together)).exists():
            self._add_surveys(names, together)
        found, sources = self.surveyed.load(together), self.sources
        there = {}
        for place, name in enumerate(names):
            of_ids = zip(found[f"ids{place}"].tolist(), found[f"boxes{place}"], strict=True)
            boxes = {number: (index(first), index(last)) for number, (first, last) in of_ids}
            semantic = sources[name].attrs.get("connectomics", {}).get("kind") == "semantic"
            there[name] = Instances(int(found[f"largest{place}"]), boxes, semantic)
        try:
            return steps_of(edits, there)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _add_surveys(self, names: Sequence[str], together: int) -> None:
        largest, boxes = [0] * len(names), [dict[int, NDArray[np.int64]]() for _ in names]
        for number in range(together):
            found = self.surveyed.load(number)
            for place in range(len(names)):
                largest[place] = max(largest[place], int(found[f"largest{place}"]))
                for one, box in zip(found[f"ids{place}"].tolist(), found[f"boxes{place}"], strict=True):
                    before = boxes[place].get(one, box)
                    boxes[place][one] = np.stack([np.minimum(before[0], box[0]), np.maximum(before[1], box[1])])
        self.surveyed.save(together, _survey(largest, boxes))

    def _divide(self, before: Sequence[Step], step: Step) -> None:
        """Divide an instance between two seeds, and store where."""
        assert step.box is not None
        edit, grid = step.edit, self.grid
        begin, end = step.box
        stride = self._stride(np.subtract(end, begin))
        reader = _Edited(self, before)
        mask = np.zeros([-(-(e - b) // s) for b, e, s in zip(begin, end, stride, strict=True)], bool)
        whole = [max(1, b // s) * s for b, s in zip(self.block_shape, stride, strict=True)]
        for first, shape in _boxes(begin, end, whole):
            here = reader.read(first, shape)[edit.class_name] == edit.ids[0]
            place = tuple((f - b) // s for f, b, s in zip(first, begin, stride, strict=True))
            cells = here
            for axis, cell in enumerate(stride):
                cells = np.logical_or.reduceat(cells, np.arange(0, cells.shape[axis], cell), axis=axis)
            mask[slices_of(place, cells.shape)] |= cells
        seeds = []
        for seed in edit.seeds:
            voxel = np.floor(grid.to_index(seed) + 0.5).astype(int)
            there = 0
            if ((voxel >= 0) & (voxel < grid.shape)).all():
                there = int(reader.read(tuple(voxel.tolist()), (1, 1, 1))[edit.class_name][0, 0, 0])
            if there != edit.ids[0]:
                raise InputError(
                    f"{self.name}: line {edit.line}: seed {list(seed)} nm is in {there}, expected {edit.ids[0]}"
                )
            seeds.append(index((voxel - begin) // stride))
        if seeds[0] == seeds[1]:
            raise InputError(f"{self.name}: line {edit.line}: the seeds are less than {list(stride)} voxels apart")
        part = divided(mask, seeds[0], seeds[1], triple(np.multiply(grid.voxel_size, stride)))
        self.divisions.save(len(before), {"begin": np.asarray(begin), "stride": np.asarray(stride), "part": part})

    def _stride(self, shape: NDArray[np.int64]) -> Index:
        """Return the voxels of a cell, of about equal sides in nm, so that a box has at most `split_voxels` cells."""
        stride = np.ones(3, int)
        while np.prod(-(-shape // stride)) > self.split_voxels:
            stride[np.argmin(stride * np.asarray(self.grid.voxel_size))] *= 2
        return index(stride)


def divided(mask: NDArray[np.bool_], one: Index, other: Index, voxel_size: Triple) -> NDArray[np.uint8]:
    """Divide a mask between two of its voxels: a watershed of the distance to the background, so that the parts meet
    where it is narrow.

    From each seed the marker follows the steepest ascent of the distance. A part of the mask that no marker reaches
    goes to the nearer one.

    Args:
        mask: (D, H, W). one, other: the seeds (z y x). voxel_size: nm, z y x.

    Returns:
        (D, H, W) uint8: 1, 2, 0 outside the mask.
    """
    import edt
    from scipy import ndimage
    from skimage.segmentation import watershed

    depth = edt.edt(np.pad(mask, 1), anisotropy=voxel_size)[1:-1, 1:-1, 1:-1]
    paths = [_ascent(depth, seed) for seed in (one, other)]
    if set(paths[0]) & set(paths[1]):  # both lie in one lobe
        paths = [[one], [other]]
    markers = np.zeros(mask.shape, np.int32)
    for number, path in enumerate(paths, start=1):
        markers[tuple(np.transpose(path))] = number
    part = watershed(-depth, markers, connectivity=np.ones((3, 3, 3), bool), mask=mask).astype(np.uint8)
    if (mask & (part == 0)).any():
        nearest = ndimage.distance_transform_edt(part == 0, voxel_size, return_distances=False, return_indices=True)
        part = np.where(mask, part[tuple(nearest)], 0).astype(np.uint8)
    return part


def _ascent(depth: NDArray[np.float32], seed: Index) -> list[Index]:
    path = [seed]
    while True:
        low = [max(0, p - 1) for p in path[-1]]
        around = depth[tuple(slice(a, p + 2) for a, p in zip(low, path[-1], strict=True))]
        if around.max() <= depth[path[-1]]:
            return path
        path.append(index(np.add(np.unravel_index(np.argmax(around), around.shape), low)))


def _boxes(begin: Index, end: Index, block: Sequence[int]) -> Iterator[tuple[Index, Index]]:
    """Yield first voxel and shape of blocks that cover a box."""
    lattice = Lattice(index(np.subtract(end, begin)), index(block))
    for number in range(len(lattice)):
        (z, y, x), shape = lattice.region(number)
        yield (z + begin[0], y + begin[1], x + begin[2]), shape


def _added(tables: BlockFiles, count: int) -> tuple[NDArray[np.uint64], Pieces]:
    """Return the IDs (n,), ascending, and the instances of all blocks."""
    blocks = [tables.load(number) for number in range(count)]
    parts = {name: np.concatenate([block[name] for block in blocks]) for name in ("ids", *Pieces.empty(0).columns)}
    ids, row = np.unique(parts["ids"], return_inverse=True)
    found = Pieces.empty(len(ids))
    found.first[:] = np.iinfo(np.int64).max
    found.boxes[:, :3], found.boxes[:, 3:] = np.iinfo(np.int32).max, -1
    np.add.at(found.sizes, row, parts["sizes"])
    np.add.at(found.sums, row, parts["sums"])
    np.minimum.at(found.first, row, parts["first"])
    np.minimum.at(found.boxes[:, :3], row, parts["boxes"][:, :3])
    np.maximum.at(found.boxes[:, 3:], row, parts["boxes"][:, 3:])
    return ids, found


class _Edited:
    """Reads the classes of a task after some of its steps."""

    def __init__(self, task: EditTask, steps: Sequence[Step]) -> None:
        self._sources, self._steps = task.sources, steps
        self._divisions = {}
        for number, step in enumerate(steps):
            if step.edit.op != "split":
                continue
            stored = task.divisions.load(number)
            self._divisions[number] = Division(index(stored["begin"]), index(stored["stride"]), stored["part"])

    def read(self, begin: Index, shape: Index) -> Volumes:
        """Return the IDs of a block by class."""
        volumes = {
            name: source.read_level(0, begin, shape, absent_is_missing=False)[0].astype(np.uint64)
            for name, source in self._sources.items()
        }
        apply_steps(self._steps, volumes, begin, self._divisions)
        return volumes


class _SurveyWorker(BlockWorker):
    """Finds the largest IDs and the boxes of named instances."""

    def __init__(self, task: EditTask) -> None:
        self._lattice, self._stored = task.lattice, task.surveyed
        names, edits = linked(task.edits, task.class_name)
        named = [{i for e in edits if e.class_name == name for i in e.ids} for name in names]
        self._wanted = [np.array(sorted(ids), np.uint64) for ids in named]
        self._reader = _Edited(task, [])

    def do(self, number: int) -> None:
        begin, shape = self._lattice.region(number)
        volumes = list(self._reader.read(begin, shape).values())
        boxes = [dict(boxes_in(ids, values, begin)) for ids, values in zip(self._wanted, volumes, strict=True)]
        self._stored.save(number, _survey([int(values.max(initial=0)) for values in volumes], boxes))


def _survey(largest: Sequence[int], boxes: Sequence[Mapping[int, NDArray[np.int64]]]) -> dict[str, NDArray[Any]]:
    """Return what is stored of a survey: by class its largest ID, and the named instances with their boxes."""
    found: dict[str, NDArray[Any]] = {}
    for place, (most, some) in enumerate(zip(largest, boxes, strict=True)):
        found[f"largest{place}"] = np.asarray(most, np.uint64)
        found[f"ids{place}"] = np.array(list(some), np.uint64)
        found[f"boxes{place}"] = np.array(list(some.values()), np.int64).reshape(-1, 2, 3)
    return found


class _WriteWorker(BlockWorker):
    """Writes edited blocks, and the tables of their instances."""

    def __init__(self, task: EditTask) -> None:
        self._lattice, self._name, self._tables = task.lattice, task.class_name, task.tables
        self._reader, self._writer = _Edited(task, task.steps), ArrayWriter.open(task.folder / "s0")

    def do(self, number: int) -> None:
        import fastremap

        begin, shape = self._lattice.region(number)
        values = self._reader.read(begin, shape)[self._name]
        self._writer.write(begin, values.astype(self._writer.dtype))
        labels, number_of = fastremap.renumber(values, in_place=True)
        number_of.pop(0, None)
        ids = np.array(sorted(number_of, key=lambda one: number_of[one]), np.uint64)
        pieces = Pieces.measured(labels.astype(np.uint32), len(ids), begin, self._lattice.shape)
        self._tables.save(number, {"ids": ids, **pieces.columns})
