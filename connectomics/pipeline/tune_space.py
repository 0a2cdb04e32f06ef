"""The search space of decoding parameters, and the score of a point in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters
from connectomics.decoding.watershed.heights import HeadValues
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.results import Panoptic
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules, get_rules
from connectomics.metrics.challenge.scoring import score_instance
from connectomics.metrics.evaluate import InstanceSums, Scored, score_of

#: Thresholds of a search as stored values: 7, 15, ..., 247; 127 is one half.
_LEVELS = range(7, 248, 8)
#: Reach of watershed seeds, in edges of the finest voxel.
_REACHES = (4, 8, 16, 32, 64)
#: Values of the biases and of the threshold of agglomeration.
_LIMITS = tuple(round(0.1 + 0.05 * n, 2) for n in range(17))
#: Which of these parameters a method has.
_LIMITED = {"mutex_watershed": ("bias_short", "bias_long"), "agglomeration": ("merge_threshold",)}


@dataclass(frozen=True)
class Volume:
    """One class of one crop in memory, (D, H, W) each.

    Attributes:
        probability: 0 to 255. boundary: probability of the boundary between objects, if the parameters read it.
        truth: ids, or bool for a class scored by overlap. known: where the ground truth is known.
        affinities: (K, D, H, W) and their offsets (K, 3), if the method reads them. head: of distances, if it is read.
    """

    probability: NDArray[np.uint8]
    boundary: NDArray[np.uint8] | None
    truth: NDArray[Any]
    known: NDArray[np.bool_]
    voxel_size: tuple[float, float, float]
    affinities: tuple[NDArray[Any], NDArray[np.int64]] | None = None
    head: HeadValues | None = None


def threshold_of(level: int) -> float:
    """Return the threshold that stored values above ``level`` (0 to 255) pass: halfway to the next value."""
    return min(1.0, round((level + 0.5) / 255, 4))


@dataclass(frozen=True)
class SearchSpace:
    """The discrete points of a search; a point maps names to integers and ``method`` to its name."""

    sizes: tuple[float, ...]
    reaches: tuple[float, ...]
    methods: tuple[str, ...]

    @classmethod
    def of(cls, volumes: list[Volume], base: DecodeParameters) -> SearchSpace:
        voxel = min(float(np.prod(v.voxel_size)) for v in volumes)
        edge = min(min(v.voxel_size) for v in volumes)
        objects: list[float] = []
        for volume in volumes:
            ids, counts = np.unique(volume.truth, return_counts=True)
            objects += [float(n) * float(np.prod(volume.voxel_size)) for n in counts[ids != 0]]
        most = max(float(np.median(objects)), 64 * voxel)
        steps = range(1, int(np.log2(most / voxel)) + 1)
        masks = volumes[0].truth.dtype == np.bool_
        fixed = masks or base.height or base.is_registered or base.method in AFFINITY_METHODS
        return cls(
            (0.0, *(round(voxel * 2**k, 3) for k in steps)),
            tuple(round(edge * n, 3) for n in _REACHES),
            (base.method,) if fixed else ("cc3d", "watershed"),
        )

    def choices(self, method: str | None = None) -> dict[str, Sequence[Any]]:
        """Return the values of each name that every point has, or of those that only points of a method have."""
        if method is None:
            sizes = range(len(self.sizes))
            return {"level": _LEVELS, "size": sizes, "fill_holes": (False, True), "method": self.methods}
        if method == "watershed":
            return {"reach": range(len(self.reaches))}
        return dict.fromkeys(_LIMITED.get(method, ()), _LIMITS)

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield all points."""
        for point in _combinations(self.choices()):
            yield from ({**point, **more} for more in _combinations(self.choices(point["method"])))

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Return the point that a trial of Optuna suggests."""
        point = _suggested(trial, self.choices())
        return {**point, **_suggested(trial, self.choices(point["method"]))}

    def parameters(self, point: Mapping[str, Any], base: DecodeParameters) -> DecodeParameters:
        return replace(
            base, threshold=threshold_of(point["level"]), min_size_nm3=self.sizes[point["size"]],
            fill_holes=point["fill_holes"], method=point["method"],
            min_distance_nm=self.reaches[point["reach"]] if "reach" in point else base.min_distance_nm,
            **{name: point[name] for name in _LIMITED.get(point["method"], ())},
        )  # fmt: skip


def _combinations(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


def _suggested(trial: Any, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {
        name: trial.suggest_int(name, values[0], values[-1], step=values.step)
        if isinstance(values, range)
        else trial.suggest_categorical(name, values)
        for name, values in choices.items()
    }


def pooled_scores(
    volumes: list[Volume], parameters: DecodeParameters, rules: str | Rules = DEFAULT_RULES
) -> Iterator[float]:
    """Yield the score pooled over the first crop, the first two, and so on."""
    rules = get_rules(rules)
    total: Any = None
    for volume in volumes:
        labels = decode_class(
            volume.probability, volume.voxel_size, parameters,
            boundary=volume.boundary, head=volume.head, affinities=volume.affinities,
        )  # fmt: skip
        item = _scored(labels, volume, rules)
        total = item if total is None else total + item
        yield score_of(total)


def _scored(labels: NDArray[Any], volume: Volume, rules: Rules) -> Scored:
    """Return what pools to the score of the class."""
    if volume.truth.dtype == np.bool_:
        counts = Counts.of(labels, volume.truth, volume.known)
        return Panoptic.of_segment(counts.tp, counts.fp, counts.fn) if rules.by_quality else counts
    found = np.where(volume.known, labels, 0).astype(labels.dtype)
    score = score_instance(found, volume.truth, volume.voxel_size, rules)
    if rules.by_quality and score.panoptic is not None:
        return score.panoptic
    return InstanceSums.of(score)
