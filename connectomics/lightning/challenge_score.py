"""The challenge's score of validation crops while a run trains: decoded, compared, and pooled over crops."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.heads import heads_of
from connectomics.decoding.affinities.segment import affinities_to_instances
from connectomics.decoding.cellmap_postprocess import fill_holes, filter_by_size
from connectomics.decoding.decode import decode_between, decode_class, decode_mask
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, decode_parameters
from connectomics.decoding.probabilities import above
from connectomics.decoding.watershed.heights import HeadValues
from connectomics.errors import ConfigError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.metrics.challenge.results import TOO_MANY, Panoptic
from connectomics.metrics.challenge.rules import get_rules
from connectomics.metrics.challenge.scoring import score_instance
from connectomics.metrics.counts import Counts
from connectomics.metrics.evaluate import InstanceSums

_UNKNOWN = 2  # of the kept truth: 0 absent, 1 present
_ROWS = 5  # true positives, false positives, false negatives, sum of distances, number of distances


class InstanceTruth(Protocol):
    """What is asked of a crop: its annotated objects."""

    def read_instances(
        self, class_name: str, grid: VoxelGrid
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]] | None:
        """Ids and known, both (d, h, w); None where the class is not annotated with ids in this crop."""


class ChallengeScore:
    """Sums over crops from which each class's score is made, by ``score.rules``; they add up over processes.

    A class that the challenge scores as instances is compared in the crops that annotate it with ids, the others by
    IoU; both after decoding the probabilities, rounded to uint8 as ``predict`` stores them, with the configuration's
    ``decoding``. Only known voxels count: what is unknown is background in prediction and truth.

    In one case this is stricter than the challenge: a crop with far too many predicted objects, which the challenge
    drops, counts as if every true object had been missed. Else a network that gives noise would get the best score.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raises `ConfigError` or `UnknownNameError` where the decoding parameters cannot be."""
        self.classes = tuple(config.dataset.classes)
        self.parameters = decode_parameters(self.classes, config.decoding.default, config.decoding.classes)
        for name, chosen in self.parameters.items():
            if chosen.boundary and chosen.boundary not in self.classes:
                where = f"dataset.classes (decoding of {name} asks for it as boundary)"
                raise ConfigError(str(unknown_name("class", chosen.boundary, self.classes, where)))
        self.affinities = _affinity_channels(config)
        for name, chosen in self.parameters.items():
            if chosen.method in AFFINITY_METHODS and name not in self.affinities:
                raise ConfigError(
                    f"decoding of {name} by {chosen.method} needs its affinities: add {{kind: affinities, class_name: "
                    f"{name}}} to model.heads, or take method cc3d or watershed"
                )
        self.heads = _read_heads(config, self.parameters)
        self.rules = get_rules(config.score.rules)
        self.instances = tuple(name for name in self.classes if self.rules.is_instance(name))
        self.values = torch.zeros((_ROWS, len(self.classes)), dtype=torch.float64)

    def reset(self) -> None:
        """Forget everything."""
        self.values.zero_()

    def begin(self, crop: InstanceTruth, grid: VoxelGrid) -> CropScore:
        """The score of one crop: give it every block of ``grid``, then call its ``finish``."""
        return CropScore(self, crop, grid)

    def add(self, name: str, tp: int, fp: int, fn: int, distances: tuple[float, int] = (0.0, 0)) -> None:
        """Add what was counted of a class."""
        row = torch.tensor([tp, fp, fn, *distances], dtype=torch.float64)
        self.values[:, self.classes.index(name)] += row

    def scores(self, values: Tensor) -> dict[str, float]:
        """``val/<class>/score`` of sums (5, C), and ``val/score`` (0 where no class could be scored).

        ``val/score`` is the geometric mean of the mean over instance classes and the mean over the others, or the one
        mean if all classes are of one kind, or by rules of quality. Classes without ground truth in the
        validation crops are left out, whatever is predicted: the set is the same at every validation.
        """
        found: dict[bool, dict[str, float]] = {True: {}, False: {}}
        for name, (tp, fp, fn, distance, number) in zip(self.classes, values.cpu().T.tolist(), strict=True):
            if not tp + fn:
                continue
            if self.rules.by_quality:
                found[False][name] = Panoptic(int(tp), int(fp), int(fn), distance).quality
            elif name in self.instances:
                found[True][name] = InstanceSums(int(tp), int(fp), int(fn), distance, int(number)).combined
            else:
                found[False][name] = Counts(int(tp), int(fp), int(fn)).iou
        means = [float(np.mean(list(kind.values()))) for kind in found.values() if kind]
        result = {f"val/{name}/score": value for kind in found.values() for name, value in kind.items()}
        return result | {"val/score": float(np.prod(means) ** (1 / len(means))) if means else 0.0}


def _affinity_channels(config: RunConfig) -> dict[str, tuple[int, NDArray[np.int64]]]:
    """By class with a head of affinities: the first of its channels in the network's output, and its offsets (K, 3)."""
    found = {}
    first = config.channels
    for head in heads_of(config):
        if head.kind == "affinities":
            found[head.class_name] = (first, np.array(head.offsets, np.int64))
        first += head.channels
    return found


def _read_heads(config: RunConfig, parameters: dict[str, DecodeParameters]) -> dict[str, tuple[int, float]]:
    """By class that is decoded with a height: the channel of that head in the network's output, and its scale."""
    found = {}
    first = config.channels
    for head in heads_of(config):
        if head.class_name in parameters and head.kind == parameters[head.class_name].height:
            found[head.class_name] = (first, head.scale_nm)
        first += head.channels
    for name, chosen in parameters.items():
        if chosen.height and name not in found:
            raise ConfigError(
                f"decoding of {name} with height {chosen.height} needs that head: add {{kind: {chosen.height}, "
                f"class_name: {name}}} to model.heads, or leave height out"
            )
    return found


class CropScore:
    """One crop while it is predicted, block by block.

    Classes that are decoded as a whole keep a byte a voxel (two, where they are not scored as instances; one more for
    each channel of heads that they are decoded from) until `finish`; of the others only counts are kept.
    """

    def __init__(self, total: ChallengeScore, crop: InstanceTruth, grid: VoxelGrid) -> None:
        self.total, self.crop, self.grid = total, crop, grid
        walls = {chosen.boundary for chosen in total.parameters.values()}
        whole = {n for n, chosen in total.parameters.items() if n in total.instances or not chosen.is_local}
        self._kept = {n: np.zeros(grid.shape, np.uint8) for n in total.classes if n in whole | walls}
        self._affinities = {
            n: np.zeros((len(total.affinities[n][1]), *grid.shape), np.uint8)
            for n in whole
            if total.parameters[n].method in AFFINITY_METHODS
        }
        self._heads = {n: np.zeros(grid.shape, np.uint8) for n in whole if n in total.heads}
        self._truth = {n: np.full(grid.shape, _UNKNOWN, np.uint8) for n in whole if n not in total.instances}
        self._segments: dict[str, Counts] = {}

    def add(
        self, block: VoxelGrid, probability: NDArray[np.float32], label: NDArray[np.bool_], known: NDArray[np.bool_]
    ) -> None:
        """Take a block: three arrays (C, d, h, w), ``probability`` with the channels of heads after those of classes;
        ``label`` does not matter where not ``known``."""
        begin = np.rint(self.grid.to_index(block.translation)).astype(int)
        at = tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        for name, kept in self._affinities.items():
            first, offsets = self.total.affinities[name]
            kept[:, *at] = _stored(probability[first : first + len(offsets)])
        for name, values in self._heads.items():
            values[at] = _stored(probability[self.total.heads[name][0]])
        for channel, name in enumerate(self.total.classes):
            stored = _stored(probability[channel])
            if name in self._kept:
                self._kept[name][at] = stored
            if name in self._truth:
                self._truth[name][at] = np.where(known[channel], label[channel], _UNKNOWN)
            elif name not in self.total.instances:
                found = above(stored, self.total.parameters[name].threshold)
                self._count(name, found, label[channel], known[channel])

    def finish(self) -> None:
        """Decode and compare what needs the whole crop, one class after the other."""
        for name, truth in self._truth.items():
            self._count(name, self._decode(name) > 0, truth == 1, truth != _UNKNOWN)
        for name in self.total.instances:
            annotated = self.crop.read_instances(name, self.grid)
            if annotated is not None and annotated[1].any():
                self._compare(name, *annotated)
        for name, counts in self._segments.items():
            self._add_quality(name, Panoptic.of_segment(counts.tp, counts.fp, counts.fn))
        self._kept, self._truth, self._affinities, self._heads = {}, {}, {}, {}

    def _decode(self, name: str) -> NDArray[np.unsignedinteger]:
        chosen: DecodeParameters = self.total.parameters[name]
        if chosen.is_registered:
            return decode_class(self._kept[name], self.grid.voxel_size, chosen)
        mask = above(self._kept[name], chosen.threshold)
        if name in self._affinities:
            found = affinities_to_instances(
                self._affinities[name],
                self.total.affinities[name][1],
                mask,
                chosen.method,
                bias_short=chosen.bias_short,
                bias_long=chosen.bias_long,
                merge_threshold=chosen.merge_threshold,
            )
            found = fill_holes(found, chosen.connectivity) if chosen.fill_holes else found
            return filter_by_size(found, chosen.min_voxels(self.grid.voxel_size))
        if chosen.has_boundary:
            walls = self._kept[chosen.boundary] if chosen.boundary else self._heads[name]
            return decode_between(mask, walls, self.grid.voxel_size, chosen)
        head = HeadValues(self._heads[name], self.total.heads[name][1]) if chosen.height else None
        return decode_mask(mask, self.grid.voxel_size, chosen, head)

    def _count(self, name: str, found: NDArray[np.bool_], label: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        counts = Counts.of(found, label, known)
        if self.total.rules.by_quality:  # the whole crop is one segment
            self._segments[name] = self._segments.get(name, Counts()) + counts
        else:
            self.total.add(name, counts.tp, counts.fp, counts.fn)

    def _add_quality(self, name: str, found: Panoptic) -> None:
        self.total.add(name, found.tp, found.fp, found.fn, (found.iou_sum, 0))

    def _compare(self, name: str, ids: NDArray[np.unsignedinteger], known: NDArray[np.bool_]) -> None:
        found = self._decode(name)
        found[~known] = 0
        truth = np.where(known, ids, np.zeros((), ids.dtype))
        score = score_instance(found, truth, self.grid.voxel_size, self.total.rules, workers=torch.get_num_threads())
        if self.total.rules.by_quality and score.panoptic is not None:
            self._add_quality(name, score.panoptic)
        elif score.status == TOO_MANY:
            missed = int(np.count_nonzero(np.unique(truth)))
            self.total.add(name, 0, 0, missed, (0.0, missed))
        else:
            distances = (score.hausdorff_norm_sum, score.n_hausdorff)
            self.total.add(name, score.tp, score.fp, score.fn, distances)


def _stored(probability: NDArray[np.float32]) -> NDArray[np.uint8]:
    """As `predict` stores it."""
    return np.rint(probability * np.float32(255)).astype(np.uint8)
