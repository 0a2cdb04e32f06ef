"""Which crops are trained on and which are held out: decided once, written to a file that a person can edit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.cellmap.catalog import Crop, informs
from connectomics.errors import ConfigError, InputError, unknown_name


@dataclass(frozen=True)
class Split:
    """Keys (``dataset/crop``) of the training and the validation crops."""

    train: tuple[str, ...]
    val: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write as YAML, one crop a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["# Which crops are trained on and which validate. Move lines between the lists as you like."]
        for name, keys in (("train", self.train), ("val", self.val)):
            lines.append(f"{name}:" + ("" if keys else " []"))
            lines += [f"  - {key}" for key in keys]
        # named after the process: several of a run may write the same split at once
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read what `save` (or a person) wrote; `ConfigError` where a crop is on both lists or a list is absent."""
        import yaml

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"the split file {path} is not valid YAML: {error}") from error
        if not isinstance(content, Mapping) or not {"train", "val"} <= set(content):
            raise ConfigError(f"the split file {path} must have the lists train and val")
        for name in ("train", "val"):
            if not isinstance(content[name], list | None):
                raise ConfigError(
                    f"the split file {path}: {name} must be a list of dataset/crop, found {content[name]!r}"
                )
        split = cls(tuple(map(str, content["train"] or ())), tuple(map(str, content["val"] or ())))
        both = sorted(set(split.train) & set(split.val))
        if both:
            raise ConfigError(f"the split file {path} lists {both[0]} under train and under val; it can be in one only")
        return split

    def select(self, crops: Sequence[Crop], where: str = "the split") -> tuple[list[Crop], list[Crop]]:
        """The crops of each list; `UnknownNameError` for a key that no crop has."""
        by_key = {c.key: c for c in crops}
        for key in (*self.train, *self.val):
            if key not in by_key:
                raise unknown_name("crop", key, by_key, where)
        return [by_key[k] for k in self.train], [by_key[k] for k in self.val]


def split_by_crop(crops: Sequence[Crop], classes: Sequence[str], train_share: float, seed: int) -> Split:
    """Hold out about ``1 - train_share`` of the crops so that each class keeps about that share too.

    Greedy and seeded: the next crop held out is the one that brings validation closest to every class's share, the
    first in random order among equals. A class with a single crop stays in training: there is nothing else to learn it
    from. At least one crop validates where there are two or more and ``train_share`` is below 1.
    """
    if not crops:
        raise InputError("there are no crops to split")
    rng = np.random.default_rng([seed, 0x5917])
    order = [int(i) for i in rng.permutation(len(crops))]
    holds = [[c for c in classes if informs(c, crop.labels)] for crop in crops]
    total = {c: sum(c in h for h in holds) for c in classes}
    rarity = {i: min((total[c] for c in holds[i]), default=len(crops)) for i in order}
    wanted = max(1, round(len(crops) * (1 - train_share))) if train_share < 1 and len(crops) > 1 else 0
    target = {c: (1 - train_share) * total[c] for c in classes}
    held: dict[str, int] = dict.fromkeys(classes, 0)
    val: set[int] = set()
    while len(val) < wanted:
        candidates = [i for i in order if i not in val and all(total[c] - held[c] > 1 for c in holds[i])]
        if not candidates:
            candidates = [i for i in order if i not in val]
            if len(candidates) <= 1:
                break
        # the crop that brings validation closest to every class's share; among equals the one with the commoner classes
        gains = {i: sum(min(1.0, target[c] - held[c]) / max(1, total[c]) for c in holds[i]) for i in candidates}
        best = max(candidates, key=lambda i: (round(gains[i], 9), rarity[i]))
        val.add(best)
        for c in holds[best]:
            held[c] += 1
    return Split(
        train=tuple(crops[i].key for i in range(len(crops)) if i not in val),
        val=tuple(crops[i].key for i in range(len(crops)) if i in val),
    )


def split_by_dataset(crops: Sequence[Crop], held_out: Sequence[str]) -> Split:
    """Validate on all crops of the data sets ``held_out``; `InputError` where one side would be empty."""
    names = {c.dataset for c in crops}
    for name in held_out:
        if name not in names:
            raise unknown_name("data set", name, names, "the crops of this run")
    train = tuple(c.key for c in crops if c.dataset not in held_out)
    val = tuple(c.key for c in crops if c.dataset in held_out)
    if not train or not val:
        raise InputError(
            f"holding out {', '.join(held_out) or 'nothing'} leaves {len(train)} training and {len(val)} validation "
            f"crops; set dataset.held_out to some, not all, of {', '.join(sorted(names))}"
        )
    return Split(train, val)


def leave_one_out(crops: Sequence[Crop]) -> dict[str, Split]:
    """One split for each data set, which validates on it and trains on all others."""
    names = sorted({c.dataset for c in crops})
    return {name: split_by_dataset(crops, [name]) for name in names}
