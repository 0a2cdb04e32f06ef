"""How much of each class crops hold: from the attributes of their label arrays, or counted once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.cellmap.catalog import Crop, LabelArray
from connectomics.cellmap.classes import arrays_for
from connectomics.cellmap.labels import arrays_needed
from connectomics.cellmap.summary import label_counts
from connectomics.errors import InputError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io import s3, store
from connectomics.io.fingerprint import fingerprint
from connectomics.io.replacing import write_file

_MOST = 2**22  # voxels of a region of a crop that are counted at the finest level
_ENOUGH = 2**18  # voxels of a coarser level that say how many there are


@dataclass(frozen=True)
class Content:
    """What is annotated in one crop of the classes of a run."""

    known: float  # annotated volume, nm^3, of the array with the most known voxels
    present: Mapping[str, float]  # by class, volume annotated as present, nm^3; without an array that of its atoms
    absent: frozenset[str]  # classes known to be absent somewhere, or that may be by what other classes say


class LabelCounter:
    """Voxels of label arrays by state: from ``complement_counts`` where the file has them, else counted once."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: keeps counts for later runs; None keeps them in memory."""
        self._folder = folder
        self._found: dict[tuple[str, VoxelGrid], dict[str, int]] = {}

    def __call__(self, crop: Crop, label: LabelArray) -> dict[str, int]:
        """Return the ``present``, ``absent`` and ``unknown`` voxels of the finest level within the crop's region;
        estimated from a coarser level if the region is large."""
        part = crop.within(label.grid)
        if part == label.grid and (said := said_counts(label)) is not None:
            return said
        if part != label.grid and part.size > _MOST:
            levels = label.source.levels
            parts = [crop.within(level.grid) for level in levels]
            number = max(n for n, coarse in enumerate(parts) if n == 0 or coarse.size >= _ENOUGH)
            factor = part.size / parts[number].size
            return {state: round(n * factor) for state, n in label_counts(label, parts[number], number).items()}
        key = (label.location, part)
        if key not in self._found:
            self._found[key] = self._kept(label, part) if self._folder else label_counts(label, part)
        return self._found[key]

    def _kept(self, label: LabelArray, part: VoxelGrid) -> dict[str, int]:
        """The counts in the folder; counted and stored if there are none."""
        assert self._folder is not None
        about = json.dumps([fingerprint(label.source), repr(label.annotation), part.to_dict()], sort_keys=True)
        path = self._folder / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"
        try:
            return {state: int(n) for state, n in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            counts = label_counts(label, part)
        with suppress(WriteError):  # a folder that cannot be written only costs counting again
            write_file(path, json.dumps(counts).encode())
        return counts


def said_counts(label: LabelArray) -> dict[str, int] | None:
    """Return the counts in the array's attributes; None if they are incomplete or impossible."""
    annotation = label.annotation
    if "absent" not in annotation.counts or (annotation.unknown is not None and "unknown" not in annotation.counts):
        return None
    absent = annotation.counts["absent"]
    unknown = 0 if annotation.unknown is None else annotation.counts["unknown"]
    present = label.grid.size - absent - unknown
    return None if min(present, absent, unknown) < 0 else {"present": present, "absent": absent, "unknown": unknown}


def content_of(crop: Crop, classes: Sequence[str], counter: LabelCounter) -> Content:
    """Return what a crop holds of ``classes``. Reads the metadata of the arrays that say something about them."""
    arrays = arrays_needed(crop, classes)
    if store.is_s3(crop.raw):
        s3.in_parallel(lambda label: label.annotation, list(arrays.values()))
    counts = {name: counter(crop, label) for name, label in arrays.items()}
    volume = {name: float(np.prod(label.grid.voxel_size)) for name, label in arrays.items()}
    present, absent = {}, set()
    for name in classes:
        own = arrays_for(name, arrays)
        present[name] = sum(counts[n]["present"] * volume[n] for n in own)
        if any(counts[n]["absent"] for n in own):
            absent.add(name)
        elif name not in arrays or counts[name]["unknown"]:
            speaking = set(arrays_needed(crop, [name])) - {name}
            if any(counts[n]["present"] + counts[n]["absent"] for n in speaking if n in counts):
                absent.add(name)  # other classes exclude it, or a group that holds it is absent
    known = max(((c["present"] + c["absent"]) * volume[n] for n, c in counts.items()), default=0.0)
    return Content(known, present, frozenset(absent))


def present_shares(crops: Sequence[Crop], classes: Sequence[str], counter: LabelCounter) -> dict[str, float]:
    """Return by class the present share of the annotated volume of all crops, 0 to 1; 0 if none is annotated.

    A class without an array counts by the arrays of its atoms.
    """
    present, known = dict.fromkeys(classes, 0.0), dict.fromkeys(classes, 0.0)
    for crop in crops:
        for name in classes:
            own = arrays_for(name, crop.labels)
            counts = [(counter(crop, crop.labels[n]), float(np.prod(crop.labels[n].grid.voxel_size))) for n in own]
            present[name] += sum(c["present"] * volume for c, volume in counts)
            known[name] += max(((c["present"] + c["absent"]) * volume for c, volume in counts), default=0.0)
    return {name: min(1.0, present[name] / known[name]) if known[name] else 0.0 for name in classes}


def check_states(contents: Sequence[Content], classes: Sequence[str]) -> list[str]:
    """Return one warning for each class of which only one state is known in training crops.

    Raises:
        InputError: no class is known anywhere, all classes are only known present, or all only known absent.
    """
    states = {}
    for name in classes:
        present = any(content.present[name] > 0 for content in contents)
        states[name] = (present, any(name in content.absent for content in contents))
    names = ", ".join(classes)
    if not any(content.known for content in contents):
        raise InputError(
            f"nothing is known of {names} in the training crops: every voxel is annotated as unknown; look at them "
            "with `pytc describe`, and ingest the labels again with the sections or the mask that was annotated"
        )
    if not any(present for present, _ in states.values()):
        raise InputError(
            f"none of {names} is present in the training crops: there is nothing to learn; take other crops or classes"
        )
    if not any(absent for _, absent in states.values()):
        raise InputError(
            f"the training crops know only where {names} are, nowhere that they are not: a network would learn to say "
            "yes everywhere; accept complete sections in `pytc annotate` (key A), or ingest the labels again with 0 "
            "meaning absent where somebody looked (--slices, --known)"
        )
    said = {
        (True, False): "is known only where it is present in the training crops, never to be absent",
        (False, True): "has no positives in the training crops: nothing of it can be learned",
        (False, False): "is unknown in all of the training crops: nothing of it can be learned",
    }
    return [f"class {name} {said[state]}" for name, state in states.items() if state in said]
