"""The versions of the challenge's rules: what differs between them.

Counting, matching and distances are common to all. A new version is a small subclass of `Rules` and one entry in
`RULES`. ``score.rules`` of a configuration names one of `RULES`, or ``2026-07`` for the first of its two readings.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import unknown_name
from connectomics.geometry import Triple

DEFAULT_RULES = "2026-06"


def instance_limit(truths: int) -> float:
    """Return how many predicted instances a crop with ``truths`` true ones may have before it is dropped."""
    return truths * (10 + 50 * math.exp(-truths / 5))


class Rules:
    """What all versions share; a version states its name, whether it is verified, and what differs."""

    version: ClassVar[str]
    #: One line for tables.
    summary: ClassVar[str] = ""
    #: Whether a class's score is its Panoptic Quality, and the overall score the plain mean over classes.
    by_quality: ClassVar[bool] = False
    #: Whether our numbers equal the official scorer's for this version.
    verified: ClassVar[bool]
    #: Classes that are scored as instances; every other class is scored by voxels.
    instance_classes: ClassVar[frozenset[str]] = frozenset(
        {"nuc", "vim", "ves", "endo", "lyso", "ld", "perox", "mito", "np", "mt", "cell"}
    )
    #: With more overlapping pairs, the crop is dropped from the class.
    max_pairs: ClassVar[int] = 5_000_000
    #: The integer cost of a pair is int((1 - IoU) * cost_scale); leaving it unmatched costs cost_scale + 1.
    cost_scale: ClassVar[int] = 1_000_000
    #: Arrays with more voxels than this times the crop's are refused.
    max_size_ratio: ClassVar[int] = 16**3

    def is_instance(self, class_name: str) -> bool:
        """Return whether the class is scored as instances."""
        return class_name in self.instance_classes

    def too_many(self, n_truth: int, n_parts: int) -> bool:
        """Return whether ``n_parts`` predicted instances are too many for a largest ground-truth id ``n_truth``."""
        if n_truth == 0 or n_parts == 0:
            return False
        return n_parts / n_truth > 10.0 + 50.0 * math.exp(-n_truth / 5.0)

    def cap(self, voxel_size: Triple, shape: tuple[int, int, int]) -> float:
        """Return the largest distance that counts, nm: half the smallest extent of the crop."""
        return min(v * n / 2 for v, n in zip(voxel_size, shape, strict=True))

    def second_part(self, truth_ids: NDArray[np.int64], part_is_matched: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return a second component to compare with each ground-truth label besides its match, 0 for none, (T,).

        ``part_is_matched`` (P + 1,) says for every component number whether it was matched.
        """
        return np.zeros_like(truth_ids)

    def unmatched_distance(self, cap: float) -> float:
        """Return the distance (nm) of an unmatched prediction, or of a ground-truth label without any component."""
        raise NotImplementedError

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """Return distances (nm) mapped to [0, 1], 1 for 0 nm."""
        raise NotImplementedError


class Rules202606(Rules):
    """The public toolbox at its state of 2026-06-30. Verified against its numbers (tests/metrics)."""

    version = "2026-06"
    summary = "as the public toolbox scored on 2026-06-30"
    verified = True

    def second_part(self, truth_ids: NDArray[np.int64], part_is_matched: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the unmatched component whose number equals the label: this version compares it by mistake."""
        inside = truth_ids < part_is_matched.size
        free = inside & ~part_is_matched[np.where(inside, truth_ids, 0)]
        return np.where(free, truth_ids, 0)

    def unmatched_distance(self, cap: float) -> float:
        return cap

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """Return 1.01 ** (-d / length of the voxel's diagonal)."""
        return 1.01 ** (-distances / np.linalg.norm(np.asarray(voxel_size, dtype=np.float64)))


class Rules202607(Rules):
    """The changes of July 2026, **unverified**: known from their description only, without official numbers.

    An unmatched ground truth or prediction has an infinite distance, so it scores 0. Unmatched predictions are removed
    before distances are computed, so component numbers no longer matter. A real match is rescaled so that the cap maps
    to 0.1; the description does not say how. This reading keeps the exponential, 0.1 ** (d / cap).
    """

    version = "2026-07-exponential"
    summary = "the changes of July 2026 as described, a match mapped by 0.1 ** (d / cap)"
    verified = False

    def unmatched_distance(self, cap: float) -> float:
        return math.inf

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """Return 0.1 ** (d / cap); 0 for infinity."""
        return 0.1 ** (distances.astype(np.float64) / cap)


class Rules202607Affine(Rules202607):
    """The same changes, **unverified**; a linear rescaling of the 2026-06 map keeps 1 and moves the cap to 0.1."""

    version = "2026-07-affine"
    summary = "the changes of July 2026 as described, the map of 2026-06 stretched so that the cap maps to 0.1"

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """Return 0.1 + 0.9 (m(d) - m(cap)) / (1 - m(cap)) with m(d) = 1.01 ** (-d / voxel diagonal); 0 for infinity."""
        diagonal = np.linalg.norm(np.asarray(voxel_size, dtype=np.float64))
        lowest = 1.01 ** (-cap / diagonal)
        stretched = 0.1 + 0.9 * (1.01 ** (-distances.astype(np.float64) / diagonal) - lowest) / (1 - lowest)
        return np.where(np.isinf(distances), 0.0, stretched)


class RulesQuality(Rules202606):
    """The open proposal, **unverified**: Panoptic Quality at IoU > 1/2 for every class.

    A semantic class is one segment in each crop. A skipped crop counts all predictions as false positives
    and all ground truths as false negatives. A class pools its counts over crops; the overall score is the plain mean
    over classes. F1 and distances are those of 2026-06 and do not enter.
    """

    version = "pq"
    summary = "the open proposal: Panoptic Quality at IoU > 0.5, plain mean over classes"
    verified = False
    by_quality = True


RULES: dict[str, Rules] = {
    rules.version: rules for rules in (Rules202606(), Rules202607(), Rules202607Affine(), RulesQuality())
}
#: Other names of rules.
ALIASES = {"2026-07": Rules202607.version}


def get_rules(rules: str | Rules) -> Rules:
    """Return the rules of a version such as ``"2026-06"``; `Rules` pass through. `UnknownNameError` for others."""
    if isinstance(rules, Rules):
        return rules
    name = ALIASES.get(rules, rules)
    if name not in RULES:
        raise unknown_name("version of the rules", rules, [*RULES, *ALIASES], "score.rules")
    return RULES[name]


def trust(verified: bool) -> str:
    """Return how messages say whether rules are verified."""
    return "verified against the official scorer" if verified else "not verified against the official scorer"
