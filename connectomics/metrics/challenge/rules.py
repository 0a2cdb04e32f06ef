"""The challenge's rules as objects with a version: what changed in 2026, and nothing else.

The scorer asks a rule what differs between versions; counting, matching and distances are common to all. A new version
is one small subclass of `Rules` and one entry in `RULES`. ``score.rules`` of a configuration names one of `RULES`, or
``2026-07`` for the first of its two readings.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import unknown_name
from connectomics.geometry import Triple

DEFAULT_RULES = "2026-06"


class Rules:
    """What every version shares; a version states its name, whether it is verified, and what it does differently."""

    version: ClassVar[str]
    #: In a few words, what they are.
    summary: ClassVar[str] = ""
    #: Whether a class's score is its Panoptic Quality, and the overall score the plain mean over classes.
    by_quality: ClassVar[bool] = False
    #: Whether our numbers were compared with the official scorer's for this version.
    verified: ClassVar[bool]
    #: Classes that are scored as instances; every other class is scored by voxels.
    instance_classes: ClassVar[frozenset[str]] = frozenset(
        {"nuc", "vim", "ves", "endo", "lyso", "ld", "perox", "mito", "np", "mt", "cell"}
    )
    #: More overlapping pairs than this and the crop is dropped from the class.
    max_pairs: ClassVar[int] = 5_000_000
    #: IoU of a pair becomes the whole-numbered cost int((1 - IoU) * cost_scale); unmatched costs one more than 1.
    cost_scale: ClassVar[int] = 1_000_000
    #: Submissions with more voxels than this times the target's are refused.
    max_size_ratio: ClassVar[int] = 16**3

    def is_instance(self, class_name: str) -> bool:
        """Whether the class is scored as instances."""
        return class_name in self.instance_classes

    def too_many(self, n_truth: int, n_parts: int) -> bool:
        """Whether ``n_parts`` predicted instances are too many for a truth whose largest id is ``n_truth``."""
        if n_truth == 0 or n_parts == 0:
            return False
        return n_parts / n_truth > 10.0 + 50.0 * math.exp(-n_truth / 5.0)

    def cap(self, voxel_size: Triple, shape: tuple[int, int, int]) -> float:
        """The largest distance that counts, nm: half the smallest extent of the crop."""
        return min(v * n / 2 for v, n in zip(voxel_size, shape, strict=True))

    def second_part(self, truth_ids: NDArray[np.int64], part_is_matched: NDArray[np.bool_]) -> NDArray[np.int64]:
        """A second component that is compared with each truth besides the matched one, 0 for none, (T,).

        ``part_is_matched`` (P + 1,) tells of every component number whether it was matched.
        """
        return np.zeros_like(truth_ids)

    def unmatched_distance(self, cap: float) -> float:
        """The distance (nm) of a truth with nothing to compare it with, and of an unmatched prediction."""
        raise NotImplementedError

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """Distances (nm) mapped to [0, 1], 1 for 0 nm."""
        raise NotImplementedError


class Rules202606(Rules):
    """The public toolbox at its state of 2026-06-30. Verified against its numbers (tests/metrics)."""

    version = "2026-06"
    summary = "as the public toolbox scored on 2026-06-30"
    verified = True

    def second_part(self, truth_ids: NDArray[np.int64], part_is_matched: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The quirk of this version: an unmatched component keeps its number and passes for the truth of that id."""
        inside = truth_ids < part_is_matched.size
        free = inside & ~part_is_matched[np.where(inside, truth_ids, 0)]
        return np.where(free, truth_ids, 0)

    def unmatched_distance(self, cap: float) -> float:
        """The cap."""
        return cap

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """1.01 ** (-d / length of the voxel's diagonal)."""
        return 1.01 ** (-distances / np.linalg.norm(np.asarray(voxel_size, dtype=np.float64)))


class Rules202607(Rules):
    """The changes of July 2026, **unverified**: known from their description only, no official numbers at hand.

    An unmatched truth or prediction has distance infinity, so 0; unmatched predictions are taken away before distances
    are computed, so component numbers no longer matter; a real match is rescaled so that the cap maps to 0.1. The
    description does not say how it is rescaled. Here by another base, 0.1 ** (d / cap), which keeps the exponential;
    `Rules202607Affine` is the other reading.
    """

    version = "2026-07-exponential"
    summary = "the changes of July 2026 as described, a match mapped by 0.1 ** (d / cap)"
    verified = False

    def unmatched_distance(self, cap: float) -> float:
        """Infinity."""
        return math.inf

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """0.1 ** (d / cap); 0 for infinity."""
        return 0.1 ** (distances.astype(np.float64) / cap)


class Rules202607Affine(Rules202607):
    """The same changes, **unverified**, with the map of 2026-06 stretched by a straight line: 1 stays 1, and what the
    cap maps to becomes 0.1."""

    version = "2026-07-affine"
    summary = "the changes of July 2026 as described, the map of 2026-06 stretched so that the cap maps to 0.1"

    def mapped(self, distances: NDArray[np.float32], voxel_size: Triple, cap: float) -> NDArray[np.float64]:
        """0.1 + 0.9 (m(d) - m(cap)) / (1 - m(cap)) with m(d) = 1.01 ** (-d / length of the voxel's diagonal); 0 for
        infinity."""
        diagonal = np.linalg.norm(np.asarray(voxel_size, dtype=np.float64))
        lowest = 1.01 ** (-cap / diagonal)
        stretched = 0.1 + 0.9 * (1.01 ** (-distances.astype(np.float64) / diagonal) - lowest) / (1 - lowest)
        return np.where(np.isinf(distances), 0.0, stretched)


class RulesQuality(Rules202606):
    """The open proposal, **unverified**: Panoptic Quality at IoU > 1/2 for every class.

    A semantic class is one segment in each crop. A crop that is skipped counts all predictions as false positives and
    all truths as false negatives. A class pools its counts over crops; the overall score is the plain mean over
    classes. F1 and distances, which do not enter, are those of 2026-06.
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
    """The rules of a version such as ``"2026-06"``; `Rules` are passed through. `UnknownNameError` otherwise."""
    if isinstance(rules, Rules):
        return rules
    name = ALIASES.get(rules, rules)
    if name not in RULES:
        raise unknown_name("version of the rules", rules, [*RULES, *ALIASES], "score.rules")
    return RULES[name]


def trust(verified: bool) -> str:
    """What is said of rules beside their name."""
    return "verified against the official scorer" if verified else "not verified against the official scorer"
