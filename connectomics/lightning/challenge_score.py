"""The challenge's score on validation crops during training: decoded, compared, and pooled over crops."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.heads import heads_of
from connectomics.data.volumes import CropVolume
from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, decode_parameters
from connectomics.decoding.probabilities import above, as_bytes
from connectomics.decoding.watershed.heights import HeadValues
from connectomics.errors import ConfigError, unknown_name
from connectomics.geometry import VoxelGrid, slices_of
from connectomics.lightning.pooled_scores import Sums
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.results import Panoptic
from connectomics.metrics.challenge.rules import get_rules
from connectomics.metrics.challenge.scoring import score_instance
from connectomics.metrics.evaluate import InstanceSums

_UNKNOWN = 2  # in stored ground truth; 0 absent, 1 present
_Affinities = dict[str, tuple[int, NDArray[np.int64]]]  # by class: first channel of its head, offsets (K, 3)
_Heights = dict[str, tuple[int, float]]  # by class: channel of its head, scale in nm


class ChallengeScore(Sums):
    """Sums over crops for the score of each class by ``score.rules``.

    Probabilities are rounded to uint8, as ``predict`` stores them, and decoded with the configuration's ``decoding``. A
    class that the challenge scores as instances is compared in the crops that annotate it with ids, the others by IoU.
    Unknown voxels are background in prediction and ground truth.

    In one case this is stricter than the challenge: a crop with far too many predicted objects, which the challenge
    drops, counts as if every true object had been missed. Otherwise a network that predicts noise would score best.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raise `ConfigError` or `UnknownNameError` if the decoding parameters are invalid."""
        super().__init__(5, len(config.dataset.classes), torch.float64)  # tp, fp, fn, sum and number of distances
        self.classes = tuple(config.dataset.classes)
        self.parameters = decode_parameters(self.classes, config.decoding.default, config.decoding.classes)
        for name, chosen in self.parameters.items():
            if chosen.boundary and chosen.boundary not in self.classes:
                where = f"dataset.classes (decoding of {name} uses it as boundary)"
                raise ConfigError(str(unknown_name("class", chosen.boundary, self.classes, where)))
        self.affinities, self.heads = _heads_for(config, self.parameters)
        self.rules = get_rules(config.score.rules)
        self.instances = tuple(name for name in self.classes if self.rules.is_instance(name))

    def begin(self, crop: CropVolume, grid: VoxelGrid) -> CropScore:
        """Return the score of one crop: pass every block of ``grid`` to it, then call its ``finish``."""
        return CropScore(self, crop, grid)

    def add(self, name: str, tp: int, fp: int, fn: int, distances: tuple[float, int] = (0.0, 0)) -> None:
        """Add the counts of a class."""
        row = torch.tensor([tp, fp, fn, *distances], dtype=torch.float64)
        self.values[:, self.classes.index(name)] += row

    def scores(self, values: Tensor) -> dict[str, float]:
        """Return ``val/<class>/score`` of sums (5, C), and ``val/score`` (0 if no class could be scored).

        ``val/score`` is the geometric mean of the mean over instance classes and the mean over the others, or the only
        mean if all classes are of one kind, or with the rules ``pq``. Classes without ground truth in the validation
        crops are left out, whatever the network predicts: the set is the same at every validation.
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


def _heads_for(config: RunConfig, parameters: Mapping[str, DecodeParameters]) -> tuple[_Affinities, _Heights]:
    """Return the heads that decoding reads, by class: affinities and heights; raise `ConfigError` if one is missing."""
    affinities: _Affinities = {}
    heights: _Heights = {}
    first = config.channels
    for head in heads_of(config):
        if head.kind == "affinities":
            affinities[head.class_name] = (first, np.array(head.offsets, np.int64))
        if head.class_name in parameters and head.kind == parameters[head.class_name].height:
            heights[head.class_name] = (first, head.scale_nm)
        first += head.channels
    for name, chosen in parameters.items():
        if chosen.method in AFFINITY_METHODS and name not in affinities:
            raise ConfigError(
                f"decoding of {name} with {chosen.method} needs affinities: add {{kind: affinities, class_name: "
                f"{name}}} to model.heads, or set method cc3d or watershed"
            )
        if chosen.height and name not in heights:
            raise ConfigError(
                f"decoding of {name} with height {chosen.height} needs that head: add {{kind: {chosen.height}, "
                f"class_name: {name}}} to model.heads, or remove height"
            )
    return affinities, heights


class CropScore:
    """The score of one crop, which is predicted block by block.

    Classes that are decoded as a whole take one byte per voxel until `finish` (two if they are not scored as instances;
    one more for each channel of heads that decoding reads); for the others only counts are kept.
    """

    def __init__(self, total: ChallengeScore, crop: CropVolume, grid: VoxelGrid) -> None:
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
        """Add a block: arrays (C, d, h, w), ``probability`` with the channels of heads after those of the classes;
        ``label`` is ignored where it is not ``known``."""
        begin = np.rint(self.grid.to_index(block.translation)).astype(int)
        at = slices_of(begin, block.shape)
        for name, kept in self._affinities.items():
            first, offsets = self.total.affinities[name]
            kept[:, *at] = as_bytes(probability[first : first + len(offsets)])
        for name, values in self._heads.items():
            values[at] = as_bytes(probability[self.total.heads[name][0]])
        for channel, name in enumerate(self.total.classes):
            stored = as_bytes(probability[channel])
            if name in self._kept:
                self._kept[name][at] = stored
            if name in self._truth:
                self._truth[name][at] = np.where(known[channel], label[channel], _UNKNOWN)
            elif name not in self.total.instances:
                found = above(stored, self.total.parameters[name].threshold)
                self._count(name, found, label[channel], known[channel])

    def finish(self) -> None:
        """Decode and compare the classes that need the whole crop, one after the other."""
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
        walls = self._kept[chosen.boundary] if chosen.boundary else self._heads.get(name)
        offsets = self.total.affinities[name][1] if name in self._affinities else None
        return decode_class(
            self._kept[name],
            self.grid.voxel_size,
            chosen,
            boundary=walls if chosen.has_boundary else None,
            head=HeadValues(self._heads[name], self.total.heads[name][1]) if chosen.height == "distance" else None,
            affinities=None if offsets is None else (self._affinities[name], offsets),
        )

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
        else:
            sums = InstanceSums.of(score)
            self.total.add(name, sums.tp, sums.fp, sums.fn, (sums.distance_sum, sums.distance_n))
