"""Edits of instance segmentations: a log with one edit a line, and what it does to the IDs of a block.

The log is JSON lines, of which each names the class and, if several fit, the data set and the crop::

    {"op": "merge", "class": "mito", "ids": [3, 7, 9]}            7 and 9 become 3
    {"op": "split", "class": "mito", "id": 5, "seeds": [[z, y, x], [z, y, x]]}     nm; the second part is a new instance
    {"op": "delete", "class": "mito", "id": 4}
    {"op": "reclassify", "class": "mito", "id": 6, "to": "er"}    a new instance of er, where er has none

Edits apply in order, each to what the edits before have made. A new instance has the largest ID so far plus 1, so the
same log gives the same IDs. ``comment`` may hold any text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.config.values import STRICT_KEYS, one_of, read
from connectomics.errors import InputError, MissingError, as_write_error
from connectomics.geometry import Index, Triple, index
from connectomics.io.write import write_file

#: class -> IDs of a block, (d, h, w) uint64
Volumes = dict[str, NDArray[np.uint64]]
_PIECES = 1 << 63  # numbers from here on stand for parts that edits have made


@dataclass(frozen=True)
class Edit:
    """One line of a log.

    Attributes:
        op: what is done.
        class_name: the class of ``ids``, which are merged into the first or edited one by one.
        seeds: of a split, two points (nm, z y x).
        to: class that ``ids`` are reclassified to.
        dataset, crop: where; "" if only one fits.
        line: in the log, from 1.
    """

    __pydantic_config__ = STRICT_KEYS

    op: Annotated[str, one_of("merge", "split", "delete", "reclassify")]
    class_name: str
    ids: tuple[int, ...]
    seeds: tuple[Triple, ...] = ()
    to: str = ""
    dataset: str = ""
    crop: str = ""
    line: int = 0

    def __post_init__(self) -> None:
        ids, count = ("ids", "two or more") if self.op == "merge" else ("id", "one")
        for wrong, message in (
            ((len(self.ids) > 1) != (self.op == "merge") or not self.ids, f"expected {count} {ids}, got {self.ids}"),
            (any(i < 1 or i >= _PIECES for i in self.ids), f"expected {ids} from 1, got {self.ids}"),
            (len(set(self.ids)) != len(self.ids), f"{ids} names an instance twice: {self.ids}"),
            ((len(self.seeds) == 2) != (self.op == "split"), f"a split has two seeds, got {len(self.seeds)}"),
            (bool(self.to) != (self.op == "reclassify"), "reclassify, and nothing else, needs the class `to`"),
            (self.to == self.class_name, f"instance {self.ids} is of the class {self.to} already"),
        ):
            if wrong:
                raise InputError(f"{self.op}: {message}")

    def to_json(self) -> str:
        """Return the line of a log, without its end."""
        ids = {"ids": list(self.ids)} if self.op == "merge" else {"id": self.ids[0]}
        named = {"seeds": [list(s) for s in self.seeds], "to": self.to, "dataset": self.dataset, "crop": self.crop}
        kept = {name: value for name, value in named.items() if value}
        return json.dumps({"op": self.op, "class": self.class_name, **ids, **kept})


def read_edits(path: str | Path) -> list[Edit]:
    """Return the edits of a log; empty lines do not count.

    Raises `MissingError`, and `InputError` with the number of a line that is no edit.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingError(f"no edits at {path}; expected a file with one edit (JSON) a line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is no JSON ({error.msg}): {line[:60]}") from error
        if not isinstance(data, dict) or "class" not in data or ("id" in data) == ("ids" in data):
            raise InputError(f"{where}: expected an edit with keys op, class, and id or ids, got {line[:60]}")
        data.pop("comment", None)
        values: dict[str, Any] = {("class_name" if key == "class" else key): value for key, value in data.items()}
        if "id" in values:
            values["ids"] = [values.pop("id")]
        try:
            found.append(read(Edit, {**values, "line": number}, where, InputError))
        except InputError as error:
            raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from error
    return found


def append_edit(path: str | Path, edit: Edit) -> None:
    """Add a line to a log; it is on disk when this returns."""
    with as_write_error(f"cannot write {path}"), Path(path).open("a+b") as file:
        end = file.tell()
        file.seek(max(0, end - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"  # the end of a line that an editor left open
        file.write(begin + edit.to_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def drop_edit(path: str | Path) -> None:
    """Remove the last edit of a log, in one step."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    while lines and not lines.pop().strip():
        pass
    write_file(Path(path), "".join(lines).encode())


# -- which instances there are -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Instances:
    """What is known of the instances of one class before the edits.

    Attributes:
        largest: largest ID.
        boxes: of the instances that edits name, first voxel and end (z y x).
        semantic: whether the class has no instances: its labels are 0 and 1.
    """

    largest: int
    boxes: Mapping[int, tuple[Index, Index]] = field(hash=False)
    semantic: bool = False


@dataclass(frozen=True)
class Step:
    """An edit with what it needs: the ID of the instance that it makes (0: none), and of a split the box around it."""

    edit: Edit
    new: int = 0
    box: tuple[Index, Index] | None = None


def steps_of(edits: Sequence[Edit], there: Mapping[str, Instances]) -> list[Step]:
    """Return the steps for the edits of a crop; ``there`` by class.

    Raises `InputError` if an edit names an instance that does not exist then.
    """
    boxes = {name: dict(found.boxes) for name, found in there.items()}
    largest = {name: found.largest for name, found in there.items()}
    gone: dict[tuple[str, int], int] = {}
    steps = []
    for edit in edits:
        mine, line = boxes[edit.class_name], f"line {edit.line}"
        if there[edit.class_name].semantic:
            raise InputError(f"{line}: {edit.class_name} is semantic, and edits are of instances; leave the line out")
        for number in edit.ids:
            if number not in mine:
                since = gone.get((edit.class_name, number))
                why = "" if since is None else f" after line {since}"
                raise InputError(f"{line}: {edit.class_name} has no instance {number}{why}")
        first, *others = edit.ids
        for number in others if edit.op == "merge" else edit.ids:
            gone[edit.class_name, number] = edit.line
        step = Step(edit)
        if edit.op == "merge":
            for number in others:
                one, other = mine[first], mine.pop(number)
                mine[first] = index(map(min, one[0], other[0])), index(map(max, one[1], other[1]))
        elif edit.op == "split":
            largest[edit.class_name] += 1
            step = Step(edit, largest[edit.class_name], mine[first])
            mine[step.new] = mine[first]
        else:
            box = mine.pop(first)
            if edit.op == "reclassify":
                largest[edit.to] = 1 if there[edit.to].semantic else largest[edit.to] + 1
                step = Step(edit, largest[edit.to])
                boxes[edit.to][step.new] = box
        if step.new >= _PIECES:
            full = f"{edit.to or edit.class_name} has IDs up to {step.new - 1}"
            raise InputError(f"{line}: no ID is left for a new instance: {full}; renumber the labels")
        steps.append(step)
    return steps


# -- what they do to a block -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Division:
    """Where a split divides a box of voxels.

    Attributes:
        begin: first voxel of the box.
        stride: voxels of a cell.
        part: uint8 (d, h, w) cells, 2 for the new instance.
    """

    begin: Index
    stride: Index
    part: NDArray[np.uint8]

    def second(self, begin: Sequence[int], shape: Sequence[int]) -> tuple[tuple[slice, ...], NDArray[np.bool_]]:
        """Return where the box meets a block (slices of the block), and which voxels there are of the new instance."""
        places, inside = [], []
        for b, n, first, step, cells in zip(begin, shape, self.begin, self.stride, self.part.shape, strict=True):
            low, high = max(b, first), max(b, first, min(b + n, first + step * cells))
            inside.append(slice(low - b, max(low, high) - b))
            places.append((np.arange(low, max(low, high)) - first) // step)
        return tuple(inside), np.asarray(self.part[np.ix_(*places)] == 2)


def apply_steps(
    steps: Sequence[Step], volumes: Volumes, begin: Sequence[int], divisions: Mapping[int, Division]
) -> None:
    """Apply edits to the IDs of a block; ``volumes`` holds the result.

    Merging and deleting change a table of the IDs that edits name; only a split, and what is reclassified, touch voxels
    before the end.

    Args:
        steps: of `steps_of`.
        volumes: of every class that they name.
        begin: first voxel of the block (z y x).
        divisions: of the splits, by number of the step.
    """
    import fastremap

    named = {name: {i for s in steps for i in s.edit.ids if s.edit.class_name == name} for name in volumes}
    now: dict[str, dict[int, int]] = {}  # class -> the instance that each number of a voxel stands for
    for name, values in volumes.items():
        there = fastremap.unique(values).tolist() if named[name] else ()
        now[name] = {number: number for number in sorted(named[name].intersection(there))}
    for count, step in enumerate(steps):
        edit, mine = step.edit, now[step.edit.class_name]
        numbers = [n for n, i in mine.items() if i in edit.ids]
        if not numbers:
            continue
        values, fresh = volumes[edit.class_name], _PIECES + count
        if edit.op == "merge":
            mine.update(dict.fromkeys(numbers, edit.ids[0]))
        elif edit.op == "split":
            inside, second = divisions[count].second(begin, values.shape)
            chosen = second & np.isin(values[inside], np.array(numbers, np.uint64))
            if chosen.any():
                values[inside][chosen] = fresh
                mine[fresh] = step.new
        else:
            if edit.op == "reclassify":
                target, theirs = volumes[edit.to], now[edit.to]
                empty = np.array([0, *(n for n, i in theirs.items() if i == 0)], np.uint64)
                target[np.isin(values, np.array(numbers, np.uint64)) & np.isin(target, empty)] = fresh
                theirs[fresh] = step.new
            mine.update(dict.fromkeys(numbers, 0))
    for name, table in now.items():
        if changed := {n: i for n, i in table.items() if n != i}:
            volumes[name] = fastremap.remap(volumes[name], changed, preserve_missing_labels=True, in_place=True)


def boxes_in(
    wanted: NDArray[np.uint64], values: NDArray[np.uint64], begin: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each of the sorted numbers that occurs in a block, with its box: first voxel and end, (2, 3)."""
    from scipy import ndimage

    if not len(wanted):
        return
    places = np.searchsorted(wanted, values).clip(max=len(wanted) - 1)
    places = np.where(wanted[places] == values, places + 1, 0)
    for number, found in zip(wanted.tolist(), ndimage.find_objects(places, len(wanted)), strict=True):
        if found is not None:
            yield number, np.array([[s.start for s in found], [s.stop for s in found]]) + np.asarray(begin)


def linked(edits: Sequence[Edit], class_name: str) -> tuple[list[str], list[Edit]]:
    """Return the classes whose labels decide those of a class (its own first), and their edits in order.

    Another class matters if it gives instances to the class, or to one that matters."""
    names, before = [class_name], 0
    while len(names) > before:
        before = len(names)
        names += sorted({e.class_name for e in edits if e.to in names} - set(names))
    gives = [e for e in edits if e.class_name in names]
    # instances that leave for a class that does not matter here are deleted
    return names, [e if not e.to or e.to in names else Edit("delete", e.class_name, e.ids, line=e.line) for e in gives]


def as_dict(step: Step) -> dict[str, Any]:
    """Return a step for JSON: the line, what it does, and the ID of a new instance."""
    edit = step.edit
    found = {"line": edit.line, "op": edit.op, "class": edit.class_name, "ids": list(edit.ids)}
    return {**found, **({"to": edit.to} if edit.to else {}), **({"new": step.new} if step.new else {})}
