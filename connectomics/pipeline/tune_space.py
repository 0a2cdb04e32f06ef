"""What a search of decoding parameters walks through, and what it measures there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.affinities.segment import decode_affinities
from connectomics.decoding.decode import above, decode_between, decode_mask
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters
from connectomics.decoding.watershed.heads import HeadValues
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.results import Panoptic
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules, get_rules
from connectomics.metrics.challenge.scoring import score_instance
from connectomics.metrics.evaluate import InstanceSums, Scored, score_of

#: Thresholds of a search: stored values 7, 15, ..., 247, of which 127 is one half.
_LEVELS = (7, 247, 8)
#: Seeds' reach of a watershed, in edges of the finest voxel.
_REACHES = (4, 8, 16, 32, 64)
#: Affinities that biases and the threshold of agglomeration are tried at.
_LIMITS = tuple(round(0.1 + 0.05 * n, 2) for n in range(17))
#: Which of them a method has, in the order of a point's ``limits``.
_LIMITED = {"mutex_watershed": ("bias_short", "bias_long"), "agglomeration": ("merge_threshold",)}


@dataclass(frozen=True)
class Volume:
    """One class of one crop in memory, (D, H, W) each; ``truth`` holds ids, or bool for a class scored by overlap;
    ``affinities`` (K, D, H, W) and their ``offsets`` (K, 3), and the ``head`` of distances, where they are read."""

    probability: NDArray[np.uint8]
    walls: NDArray[np.uint8] | None
    truth: NDArray[Any]
    known: NDArray[np.bool_]
    voxel_size: tuple[float, float, float]
    affinities: NDArray[Any] | None = None
    offsets: NDArray[np.int64] | None = None
    head: HeadValues | None = None


def threshold_of(level: int) -> float:
    """The threshold that stored values above ``level`` (0 to 255) pass: halfway to the next, safe from rounding."""
    return min(1.0, round((level + 0.5) / 255, 4))


@dataclass(frozen=True)
class SearchSpace:
    """The discrete points of a search; a point is a dictionary of whole numbers and, for ``method``, a name."""

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
        return cls(
            (0.0, *(round(voxel * 2**k, 3) for k in steps)),
            tuple(round(edge * n, 3) for n in _REACHES),
            (base.method,) if masks or base.height or base.method in AFFINITY_METHODS else ("cc3d", "watershed"),
        )

    def points(self) -> Iterator[dict[str, Any]]:
        levels = range(_LEVELS[0], _LEVELS[1] + 1, _LEVELS[2])
        for level, size, fill, method in itertools.product(levels, range(len(self.sizes)), (False, True), self.methods):
            point = {"level": level, "size": size, "fill_holes": fill, "method": method}
            if method == "watershed":
                yield from ({**point, "reach": reach} for reach in range(len(self.reaches)))
            elif method in _LIMITED:
                for limits in itertools.product(_LIMITS, repeat=len(_LIMITED[method])):
                    yield {**point, **dict(zip(_LIMITED[method], limits, strict=True))}
            else:
                yield point

    def suggest(self, trial: Any) -> dict[str, Any]:
        low, high, step = _LEVELS
        point = {
            "level": trial.suggest_int("level", low, high, step=step),
            "size": trial.suggest_int("size", 0, len(self.sizes) - 1),
            "fill_holes": trial.suggest_categorical("fill_holes", (False, True)),
            "method": trial.suggest_categorical("method", self.methods),
        }
        if point["method"] == "watershed":
            point["reach"] = trial.suggest_int("reach", 0, len(self.reaches) - 1)
        for name in _LIMITED.get(point["method"], ()):
            point[name] = trial.suggest_categorical(name, _LIMITS)
        return point

    def parameters(self, point: Mapping[str, Any], base: DecodeParameters) -> DecodeParameters:
        return replace(
            base,
            threshold=threshold_of(point["level"]),
            min_size_nm3=self.sizes[point["size"]],
            fill_holes=point["fill_holes"],
            method=point["method"],
            min_distance_nm=self.reaches[point["reach"]] if "reach" in point else base.min_distance_nm,
            **{name: point[name] for name in _LIMITED.get(point["method"], ())},
        )


def pooled_scores(
    volumes: list[Volume], parameters: DecodeParameters, rules: str | Rules = DEFAULT_RULES
) -> Iterator[float]:
    """The score pooled over the first crop, the first two, and so on."""
    rules = get_rules(rules)
    total: Any = None
    for volume in volumes:
        mask = above(volume.probability, parameters.threshold)
        if volume.affinities is not None and volume.offsets is not None:
            labels = decode_affinities(
                volume.probability, volume.affinities, volume.offsets, volume.voxel_size, parameters
            )
        elif volume.walls is not None:
            labels = decode_between(mask, volume.walls, volume.voxel_size, parameters)
        else:
            labels = decode_mask(mask, volume.voxel_size, parameters, volume.head)
        item = _scored(labels, volume, rules)
        total = item if total is None else total + item
        yield score_of(total)


def _scored(labels: NDArray[Any], volume: Volume, rules: Rules) -> Scored:
    """What pools to the class's score."""
    if volume.truth.dtype == np.bool_:
        counts = Counts.of(labels, volume.truth, volume.known)
        return Panoptic.of_segment(counts.tp, counts.fp, counts.fn) if rules.by_quality else counts
    found = np.where(volume.known, labels, 0).astype(labels.dtype)
    score = score_instance(found, volume.truth, volume.voxel_size, rules)
    if rules.by_quality and score.panoptic is not None:
        return score.panoptic
    if score.status != "scored":
        # The challenge counts nothing here; a search would be drawn to such crops, so all true objects are missed.
        missed = int(np.count_nonzero(np.unique(volume.truth)))
        return InstanceSums(fn=missed, distance_n=missed)
    return InstanceSums(score.tp, score.fp, score.fn, score.hausdorff_norm_sum, score.n_hausdorff)
