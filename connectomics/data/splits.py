"""Which crops are for training and which are held out: decided once, written to a file that a person can edit.

Crops that overlap, or lie nearer than half a patch, must stay on one side of a split: otherwise the same tissue is used
for training and validation. They form a group (`groups_of`). Groups are held out whole; if none can be spared, they are
cut in two (`connectomics.data.holdout`), so an entry of a split is a crop or a region of one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from connectomics.cellmap.catalog import Crop
from connectomics.data.contents import Content
from connectomics.data.holdout import cut, held_out_groups
from connectomics.errors import ConfigError, InputError, require_known
from connectomics.geometry import Box, Triple, triple
from connectomics.io.replacing import write_file

log = logging.getLogger(__name__)

_LEAST_HELD, _MOST_HELD = 0.5, 2.5  # of the wanted share: what whole groups may hold out
_LARGE = 2.0  # of the wanted share: a group that is cut if whole groups do not make it


@dataclass(frozen=True)
class Split:
    """Entries of both sides: ``dataset/crop``, or ``dataset/crop:z0,y0,x0:z1,y1,x1`` for a region between two corners
    (nm).

    Attributes:
        train, val: trained on, and validated on.
        seen: what the networks were trained on with whose weights the run began.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    seen: tuple[str, ...] = ()

    @property
    def all_trained(self) -> tuple[str, ...]:
        """All that the weights were trained on, in this run and before."""
        return tuple(dict.fromkeys((*self.train, *self.seen)))

    def save(self, path: Path) -> None:
        """Write YAML with one entry per line."""
        lines = ["# Which crops are trained on and which validate. Move lines between the lists as you like."]
        if self.seen:
            lines += ["# seen: what model.weights had been trained on."]
        for name, keys in vars(self).items():
            if keys or name != "seen":
                lines += [f"{name}:" + ("" if keys else " []"), *(f"  - {key}" for key in keys)]
        write_file(path, ("\n".join(lines) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read a split file; `ConfigError` if an entry is invalid or on both lists, or a list is missing."""
        import yaml

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"the split file {path} is not valid YAML: {error}") from error
        if not isinstance(content, Mapping) or not {"train", "val"} <= set(content):
            raise ConfigError(f"the split file {path} must have the lists train and val")
        for name in ("train", "val", "seen"):
            if not isinstance(content.get(name), list | None):
                raise ConfigError(
                    f"the split file {path}: {name} must be a list of dataset/crop, found {content.get(name)!r}"
                )
        split = cls(*(tuple(map(str, content.get(name) or ())) for name in ("train", "val", "seen")))
        both = sorted(set(split.train) & set(split.val))
        if both:
            raise ConfigError(f"the split file {path} lists {both[0]} under train and under val; it can be in one only")
        for entry in (*split.train, *split.val, *split.seen):
            parse_entry(entry, f"the split file {path}")
        return split

    def within(self, keys: Collection[str]) -> Self:
        """Return the split without entries of crops other than ``keys`` (``dataset/crop``)."""
        sides = (self.train, self.val, self.seen)
        return type(self)(*(tuple(e for e in side if parse_entry(e)[0] in keys) for side in sides))

    def select(self, crops: Sequence[Crop], where: str = "the split") -> tuple[list[Crop], list[Crop]]:
        """Return the crops of each list, cut to their regions.

        Raises:
            UnknownNameError: an entry names no crop.
            ConfigError: a region lies outside of its crop.
        """
        train, val = (select_entries(entries, crops, where) for entries in (self.train, self.val))
        return train, val


def parse_entry(entry: str, where: str = "the split") -> tuple[str, Box | None]:
    """Return ``dataset/crop`` and the region of an entry (None: the whole crop); `ConfigError` if it is invalid."""
    key, *corners = entry.split(":")
    if not corners:
        return key, None
    try:
        begin, end = (triple([float(v) for v in corner.split(",")], "a corner") for corner in corners)
        region = Box(begin, end)
    except ValueError as error:
        raise ConfigError(
            f"{where}: an entry is DATASET/CROP or DATASET/CROP:z0,y0,x0:z1,y1,x1 (nm), got {entry!r} ({error})"
        ) from error
    if region.is_empty:
        raise ConfigError(f"{where}: the region of {entry!r} is empty; the second corner must lie beyond the first")
    return key, region


def entry_of(crop: Crop) -> str:
    """Return the entry of a crop, with its region."""
    if crop.region is None:
        return crop.key
    corners = (",".join(f"{v:.12g}" for v in corner) for corner in (crop.region.begin, crop.region.end))
    return ":".join((crop.key, *corners))


def select_entries(entries: Sequence[str], crops: Sequence[Crop], where: str = "the split") -> list[Crop]:
    """Return the crops of these entries, cut to their regions; raises as `Split.select`."""
    by_key = {c.key: c for c in crops}
    found = []
    for entry in entries:
        key, region = parse_entry(entry, where)
        require_known("crop", [key], by_key, where)
        crop = by_key[key] if region is None else replace(by_key[key], region=region)
        if region is not None and crop.box.is_empty:
            raise ConfigError(f"{where}: the region of {entry} lies outside of the crop, which is {by_key[key].box}")
        found.append(crop)
    return found


# -- what must stay together -------------------------------------------------------------------------------------------
def groups_of(crops: Sequence[Crop], margin: float | Triple = 0.0) -> list[list[int]]:
    """Return groups of numbers of crops that overlap or lie nearer than ``margin`` (nm, one number or z y x), directly
    or through others of their data set. Groups and their members are in the order of ``crops``."""
    group = list(range(len(crops)))
    for i, crop in enumerate(crops):
        for j in _near(crop, crops[:i], margin):
            if group[j] != group[i]:
                old, new = group[i], group[j]
                group = [new if g == old else g for g in group]
    return [[i for i, g in enumerate(group) if g == number] for number in dict.fromkeys(group)]


def leaks(train: Sequence[Crop], val: Sequence[Crop], margin: float | Triple = 0.0) -> list[tuple[Crop, Crop]]:
    """Return pairs of a training and a validation crop that overlap or lie nearer than ``margin``, see `groups_of`."""
    return [(train[number], held) for held in val for number in _near(held, train, margin)]


def _near(crop: Crop, others: Sequence[Crop], margin: float | Triple) -> list[int]:
    """Numbers of the ``others`` of the crop's data set that overlap it, or lie nearer than ``margin`` (nm)."""
    same = [number for number, other in enumerate(others) if other.dataset == crop.dataset]
    if not same:
        return []
    begin, end = np.array([(others[number].box.begin, others[number].box.end) for number in same]).swapaxes(0, 1)
    shared = np.minimum(end, crop.box.end) - np.maximum(begin, crop.box.begin) + np.asarray(margin)
    # rounding must not join crops that share a face
    return [same[n] for n in np.flatnonzero((shared > 1e-6).all(axis=1))]


def check_leaks(train: Sequence[Crop], val: Sequence[Crop], where: str, margin: Triple) -> list[str]:
    """Return warnings about validation crops that lie within ``margin`` (nm) of training crops.

    Raises:
        ConfigError: a validation crop overlaps a training crop.
    """
    overlapping = leaks(train, val)
    if overlapping:
        pairs = [f"{held.key} with {crop.key}" for crop, held in overlapping]
        more = f" and {len(pairs) - 4} more" if len(pairs) > 4 else ""
        raise ConfigError(
            f"{where} validates on crops that overlap training crops ({', '.join(pairs[:4])}{more}), so their labels "
            "would be trained on; move overlapping crops to one list, or use another split file to have a split made"
        )
    return [
        f"{where}: validation crop {held.key} lies within half a patch of training crop {crop.key}; its scores may be "
        "too good"
        for crop, held in leaks(train, val, margin)
    ]


def trained_and_kept_out(crops: Sequence[Crop], splits: Mapping[str, Split]) -> tuple[list[Crop], list[Crop]]:
    """Return the crops, or parts of them, that train in any of these splits, by what each is of, and those that
    validate in all of them, without those that overlap one that trains (logs a warning). Entries of other crops are
    ignored."""
    keys = {crop.key for crop in crops}
    kept, trained, seen = list(crops), [], []
    for where, split in splits.items():
        there = split.within(keys)
        train, val = there.select(crops, where)
        trained += train
        seen += select_entries(there.seen, crops, where)
        kept = [part for crop in kept for held in val if (part := _common_part(crop, held)) is not None]
    out = {entry_of(held) for _, held in leaks([*trained, *seen], kept)}
    if out:
        log.warning("left out because they overlap training crops: %s", ", ".join(sorted(out)))
    return trained, [crop for crop in kept if entry_of(crop) not in out]


def _common_part(first: Crop, second: Crop) -> Crop | None:
    """The part of a crop that two regions of it share; None if there is none, or if they are of different crops."""
    if first.key != second.key:
        return None
    if first.region is None or second.region is None:
        return second if first.region is None else first
    part = replace(first, region=first.region.intersect(second.region))
    return None if part.box.is_empty else part


# -- making a split ----------------------------------------------------------------------------------------------------
def split_by_crop(
    crops: Sequence[Crop],
    contents: Sequence[Content],
    classes: Sequence[str],
    train_share: float,
    seed: int,
    margin: Triple = (0.0, 0.0, 0.0),
) -> Split:
    """Hold out about ``1 - train_share`` of the annotated volume and of each class's present volume.

    Groups of crops that overlap or lie nearer than ``margin`` (nm) are held out whole (`held_out_groups`). If that is
    impossible, groups are cut in two with a gap of ``margin`` (`connectomics.data.holdout.cut`): all if none can be
    spared, the large ones if whole groups would hold out less than half, or more than 2.5 times, what is wanted.

    Args:
        contents: what each crop holds (`connectomics.data.contents.content_of`).
        seed: chooses among equally good splits.
    """
    if not crops:
        raise InputError("there are no crops to split")
    if train_share >= 1:
        return Split(tuple(entry_of(crop) for crop in crops), ())
    groups = groups_of(crops, margin)
    if len(groups) == 1:
        groups = groups_of(crops)  # nearness alone must not leave nothing to hold out
    rng = np.random.default_rng([seed, 0x5917])
    # crops of a group overlap, many wholly: the largest stands for the group
    known = np.array([max(contents[i].known for i in group) for group in groups])
    present = np.array([[max(contents[i].present[c] for i in group) for c in classes] for group in groups])
    volumes, wanted = known / (known.sum() or 1.0), 1 - train_share
    held = held_out_groups(known, present, wanted, rng)
    to_cut: list[int] = []
    if not held:
        to_cut = list(range(len(groups)))
    elif not _LEAST_HELD * wanted <= volumes[held].sum() <= _MOST_HELD * wanted:
        to_cut = np.flatnonzero(volumes > _LARGE * wanted).tolist()
        rest = [number for number in range(len(groups)) if number not in to_cut]
        if to_cut:
            held = [rest[n] for n in held_out_groups(known[rest], present[rest], wanted, rng)] if rest else []
    sides: tuple[list[Crop], list[Crop]] = ([], [])
    for number, group in enumerate(groups):
        members = [crops[i] for i in group]
        if number in to_cut:
            train, val = cut(members, classes, train_share, margin, rng)
        else:
            train, val = ([], members) if number in held else (members, [])
        sides[0].extend(train)
        sides[1].extend(val)
    order = {crop.key: number for number, crop in enumerate(crops)}
    return Split(*(tuple(entry_of(crop) for crop in sorted(side, key=lambda c: order[c.key])) for side in sides))


def split_by_dataset(crops: Sequence[Crop], held_out: Sequence[str]) -> Split:
    """Validate on all crops of the data sets ``held_out``; `InputError` if one side would be empty."""
    names = {c.dataset for c in crops}
    require_known("data set", held_out, names, "the crops of this run")
    train = tuple(entry_of(c) for c in crops if c.dataset not in held_out)
    val = tuple(entry_of(c) for c in crops if c.dataset in held_out)
    if not train or not val:
        raise InputError(
            f"holding out {', '.join(held_out) or 'nothing'} leaves {len(train)} training and {len(val)} validation "
            f"crops; set dataset.held_out to some, not all, of {', '.join(sorted(names))}"
        )
    return Split(train, val)


def leave_one_out(crops: Sequence[Crop]) -> dict[str, Split]:
    """Return one split for each data set, which validates on it and trains on all others."""
    return {name: split_by_dataset(crops, [name]) for name in sorted({c.dataset for c in crops})}
