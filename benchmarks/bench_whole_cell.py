"""Measure what decoding a whole cell costs besides the voxels: planning, done-maps, uniting blocks, resuming.

python benchmarks/bench_whole_cell.py [--blocks 8] [--out FOLDER] [--all-groups]

A components task of ``--blocks``^3 blocks of 250^3 voxels (8: a minute; 40: 10^12 voxels) goes through its stages in
the real runner, with its done-maps, files and instance table. Each phase runs in its own process, and resumes the one
before. Only the voxels are left out: the blocks of the stage ``label`` are links to the tables and faces of a
synthetic field of rods, and the stage ``write`` looks up the labels of each block. The field repeats after 8 blocks. So
groups of blocks that differ by whole periods are united once and then moved, unless ``--all-groups`` unites each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.config import RunConfig
from connectomics.decoding.blocks.groups import GROUP, GroupLabels, groups_of
from connectomics.decoding.blocks.pieces import SIDES, StoredBlocks
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.geometry import VoxelGrid
from connectomics.io.write import create_multiscale
from connectomics.tasks import run_task
from connectomics.tasks.block_task import BlockWorker, Worker
from connectomics.tasks.blocks import BlockFiles
from connectomics.tasks.estimate import estimate

EDGE = 250  # voxels of a block
PERIOD = 8  # blocks, after which the field repeats
CELL = (40, 25, 200)  # voxels for each rod, z y x: 5 million rods in 10^12 voxels
PHASES = ("label", "unite", "write", "resume")


def rods() -> NDArray[np.int64]:
    """Return (n, 6) the boxes of the rods in a period: first and last voxel. They are 60 to 190 voxels long along x and
    do not touch. Every hundredth row of them is a single one that crosses the volume."""
    random, period = np.random.default_rng(0), PERIOD * EDGE
    cells = np.indices([period // c for c in CELL]).reshape(3, -1).T
    size = np.stack([random.integers(*ends, len(cells)) for ends in ((8, 31), (8, 18), (60, 191))], axis=1)
    shift = random.integers(2, np.subtract(CELL, size) - 1)
    through = np.arange(len(cells)) // (period // CELL[2]) % 100 == 0
    size[through], shift[through] = (20, 12, period), (9, 6, 0)
    first = cells * CELL + shift
    return np.concatenate([first, first + size - 1], axis=1)[~through | (cells[:, 2] == 0)]


def block_of(boxes: NDArray[np.int64], place: tuple[int, ...]) -> dict[str, Any]:
    """Return what a block of the field leaves for later stages, with coordinates in the period."""
    low = np.multiply(place, EDGE)
    part = np.concatenate([np.maximum(boxes[:, :3], low), np.minimum(boxes[:, 3:], low + EDGE - 1)], axis=1)
    part = part[(part[:, :3] <= part[:, 3:]).all(axis=1)]
    part = part[np.lexsort(part[:, 2::-1].T)]
    extent = part[:, 3:] - part[:, :3] + 1
    sizes = extent.prod(axis=1)
    sums = (part[:, :3] + part[:, 3:]) * sizes[:, None] // 2
    faces = {side: np.zeros((EDGE, EDGE), np.uint32) for side in SIDES}
    for label, box in enumerate(part - np.tile(low, 2), 1):
        for side, plane in faces.items():
            axis = int(side[0])
            if box[axis] == 0 if side[1] == "-" else box[axis + 3] == EDGE - 1:
                plane[tuple(slice(box[a], box[a + 3] + 1) for a in range(3) if a != axis)] = label
    table = {"sizes": sizes, "first": np.zeros(len(part), np.int64), "boxes": part.astype(np.int32), "sums": sums}
    return {"count": np.asarray(len(part)), **table, **faces}


@dataclass(frozen=True)
class FieldBlocks(StoredBlocks):
    """Blocks whose tables are those of a block of the period, moved."""

    def load(self, number: int, *names: str) -> dict[str, NDArray[Any]]:
        found = super().load(number, *names)
        if "boxes" in found:
            _, rows, columns = self.lattice.shape
            origin = np.asarray(self.lattice.region(number)[0])
            shift = origin - origin % (PERIOD * EDGE)
            found["boxes"] = found["boxes"] + np.tile(shift, 2).astype(np.int32)
            found["sums"] = found["sums"] + found["sizes"][:, None] * shift
            found["first"] = found["boxes"][:, :3].astype(np.int64) @ [rows * columns, columns, 1]
        return found


@dataclass(frozen=True)
class FieldTask(ComponentsTask):
    """Components without voxels."""

    def stored(self, stage: str = "label") -> StoredBlocks:
        return FieldBlocks(self.scratch / stage, self.lattice)

    def label_worker(self, stage: str) -> Worker:
        kinds = {"label": LinkWorker, "write": LookupWorker}
        if stage in kinds:
            return kinds[stage](self)
        return (
            super().label_worker(stage)
            if os.environ.get("ALL_GROUPS")
            else MovedGroups(self, super().label_worker(stage))
        )


class LinkWorker(BlockWorker):
    """Leaves the files of blocks."""

    def __init__(self, task: FieldTask) -> None:
        self._lattice, self._folder = task.lattice, task.stored().folder
        self._period = BlockFiles(Path(task.input).parents[2] / "period")
        self._folder.mkdir(parents=True, exist_ok=True)

    def do(self, number: int) -> None:
        place = np.unravel_index(number, self._lattice.counts)
        source = int(np.ravel_multi_index(np.mod(place, PERIOD), (PERIOD,) * 3))
        part = self._folder / f".{number}.part"
        part.unlink(missing_ok=True)
        part.hardlink_to(self._period.folder / str(source))
        part.replace(self._folder / str(number))


class LookupWorker(BlockWorker):
    """Looks up the labels of blocks."""

    def __init__(self, task: FieldTask) -> None:
        self._labels = GroupLabels(task.groups(), BlockFiles(task.scratch / "labels_of"), kept=128)

    def do(self, number: int) -> None:
        assert self._labels.of(number).all()  # every piece belongs to an object


class MovedGroups(BlockWorker):
    """Unites one of all groups that differ by whole periods, and moves its result to the others."""

    def __init__(self, task: FieldTask, united: BlockWorker) -> None:
        self._groups, self._lattice, self._united = task.groups(), groups_of(task.lattice), united
        self._first = lru_cache(maxsize=None)(self._unite)

    def do(self, number: int) -> None:
        source = self.source(number)
        found = self._first(source)
        if source != number:
            self._groups.save(number, self.moved(found, source, number))

    def source(self, number: int) -> int:
        """Return the first group that the period moves to this one; those at the faces of the volume are others."""
        place, counts = np.asarray(np.unravel_index(number, self._lattice.counts)), np.asarray(self._lattice.counts)
        at_face = (place == 0) | (place == counts - 1)
        step = PERIOD // GROUP[0]
        return int(np.ravel_multi_index(np.where(at_face, place, 1 + (place - 1) % step), self._lattice.counts))

    def moved(self, found: dict[str, NDArray[Any]], source: int, number: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of a group as those of another one."""
        places = [np.asarray(np.unravel_index(n, self._lattice.counts)) for n in (source, number)]
        blocks = (places[1] - places[0]) * GROUP
        shift, whole, counts = blocks * EDGE, self._groups.lattice.shape, self._groups.lattice.counts
        steps = [np.asarray([n[1] * n[2], n[2], 1]) for n in (whole, counts)]
        beyond = found["beyond"] + [int(blocks @ steps[1]), 0]
        return found | {
            "first": found["first"] + shift @ steps[0],
            "boxes": found["boxes"] + np.tile(shift, 2).astype(np.int32),
            "sums": found["sums"] + found["sizes"][:, None] * shift,
            "beyond": beyond,
        }

    def check(self, number: int) -> None:
        """Compare a moved group with one that is united for itself."""
        moved = self._groups.load(number)
        self._united.do(number)
        for name, values in self._groups.load(number).items():
            np.testing.assert_array_equal(values, moved[name], err_msg=f"group {number}: {name}")

    def _unite(self, number: int) -> dict[str, NDArray[Any]]:
        self._united.do(number)
        return self._groups.load(number)


class StopPhaseError(Exception):
    """A phase has reached its end."""


def peak() -> int:
    """Return the most memory that this process held so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def task_in(folder: Path, blocks: int) -> FieldTask:
    """Return the task of a volume with ``blocks`` blocks along each axis; makes its input, without chunks."""
    location = folder / "in.zarr" / "cell" / "mito"
    if not location.exists():
        grid = VoxelGrid((8, 8, 8), (0, 0, 0), (EDGE * blocks,) * 3)
        create_multiscale(
            location, [grid], np.uint8, attrs={"connectomics": {"artefact": "probability", "complete": True}}
        )
    output = folder / "out.zarr" / "cell" / "mito"
    return FieldTask(str(location), str(output), "mito", DecodeParameters(method="cc3d"), (EDGE,) * 3)


def phase(name: str, folder: Path, blocks: int) -> None:
    """Run a task until a phase is over, and print what it took as JSON."""
    task, found, base = task_in(folder, blocks), {}, peak()
    begin, cpu = time.perf_counter(), time.process_time()

    def note(what: str) -> None:
        found[what] = {"s": time.perf_counter() - begin, "cpu": time.process_time() - cpu, "MB": peak(), "base": base}

    def progress(done: int, number: int, stage: str = "") -> None:
        if stage == "write" and "until write" not in found:
            note("until write")
        if stage == name and done >= (number // 2 if name == "write" else number):
            raise StopPhaseError

    try:
        run_task(task, progress=progress)
    except StopPhaseError:
        if name == "write":
            found["files"] = sum(len(files) for _, _, files in os.walk(task.folder))
            found["MB on disk"] = (
                sum(f.stat().st_size for f in task.scratch.rglob("*") if f.is_file() and f.parent.name != "label") >> 20
            )
    note("end")
    if name == "unite":
        worker = task.label_worker("unite")
        if isinstance(worker, MovedGroups):
            others = [n for n in range(task.blocks("unite")) if worker.source(n) != n]
            for number in np.random.default_rng(0).choice(others, min(2, len(others)), replace=False).tolist():
                worker.check(number)
        begin, cpu = time.perf_counter(), time.process_time()
        ComponentsTask.label_worker(task, "unite").do(0)
        note("a group")
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="blocks along each axis, a multiple of 8")
    parser.add_argument("--out", type=Path, help="an empty folder; default: a temporary one")
    parser.add_argument("--all-groups", action="store_true", help="unite each group for itself")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.blocks < 8 or options.blocks % 8:
        parser.error("--blocks must be a multiple of 8")
    if options.phase:
        phase(options.phase, options.out, options.blocks)
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure(options.out or Path(temporary), options.blocks, options.all_groups)


def measure(folder: Path, blocks: int, all_groups: bool) -> None:
    """Run all phases and print the table of docs/cluster.md."""
    boxes, files = rods(), BlockFiles(folder / "period")
    for number, place in enumerate(np.ndindex((PERIOD,) * 3)):
        files.save(number, block_of(boxes, place))
    begin, task = time.perf_counter(), task_in(folder, blocks)
    estimate([task], RunConfig().engine, timed=False)
    planning = time.perf_counter() - begin
    results: dict[str, Any] = {}
    for name in PHASES:
        command = [sys.executable, __file__, "--phase", name, "--out", str(folder), "--blocks", str(blocks)]
        environment = os.environ | ({"ALL_GROUPS": "1"} if all_groups else {})
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, json.dumps(results[name]), flush=True)
    report(results, planning, task)


def seconds(at: dict[str, float]) -> str:
    """Return wall and CPU time as text."""
    return f"{at['s']:.1f} s ({at['cpu']:.1f} s CPU)"


def report(results: dict[str, Any], planning: float, task: FieldTask) -> None:
    """Print the table; raise if the number of objects is wrong."""
    blocks, groups, table = len(task.lattice), len(groups_of(task.lattice)), Path(task.output) / "instances.csv"
    rows, along = PERIOD * EDGE // CELL[0] * (PERIOD * EDGE // CELL[1]), PERIOD * EDGE // CELL[2]
    n = task.lattice.counts[0] // PERIOD
    expected = n**2 * (rows // 100 + (rows - rows // 100) * along * n)
    with table.open("rb") as file:
        objects = sum(1 for _ in file) - 1
    assert objects == expected, f"{objects} objects, expected {expected}"
    until, end, group = results["write"]["until write"], results["resume"]["end"], results["unite"]["a group"]
    rest = {key: end[key] - results["resume"]["until write"][key] for key in ("s", "cpu")}
    voxels = float(np.prod(task.lattice.shape, dtype=float))
    lines = {
        "voxels; blocks; groups; objects": f"{voxels:.2g}; {blocks:,}; {groups:,}; {objects:,}",
        "planning": f"{planning:.1f} s",
        "runner and done-map, per block": f"{1e3 * results['label']['end']['cpu'] / blocks:.2f} ms CPU",
        "uniting a group, on a worker": f"{group['cpu']:.2f} s CPU, {group['MB']} MB",
        "uniting all groups, numbering the objects, in the main process": seconds(until),
        "peak memory of the main process": f"{until['MB']} MB, {until['base']} MB of them libraries",
        "files of the unfinished output": f"{results['write']['files']:,}",
        "groups, labels and tables": f"{results['write']['MB on disk']} MB",
        "resuming in the stage write": seconds(results["resume"]["until write"]),
        "half of the look-ups, the instance table, removing all files": seconds(rest),
    }
    print("\n".join(["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in lines.items())]))


if __name__ == "__main__":
    main()
