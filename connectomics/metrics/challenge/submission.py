"""The score of a whole submission."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index, VoxelGrid
from connectomics.machine import usable_cores
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.align import Aligned, Readable
from connectomics.metrics.challenge.blocks import BlockPair
from connectomics.metrics.challenge.instance_distances import MemoryBudget
from connectomics.metrics.challenge.results import (
    TOO_MANY,
    InstanceScore,
    LabelResult,
    SemanticScore,
    SubmissionScore,
    pool,
)
from connectomics.metrics.challenge.rules import DEFAULT_RULES, RULES, Rules, get_rules
from connectomics.metrics.challenge.scoring import (
    InMemoryPair,
    missing_score,
    nan_count,
    nan_message,
    score_pair,
    truth_array,
)
from connectomics.metrics.challenge.sources import (
    Masked,
    Submission,
    Target,
    names_in_truth,
    open_submission,
    read_targets,
)
from connectomics.progress import Progress, silent

if TYPE_CHECKING:
    from connectomics.cellmap.crop_table import CropTable

_SLAB_VOXELS = 1 << 25


def score_submission(
    submission: str | Path,
    truth: str | Path,
    crops: CropTable | str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    crop_names: Sequence[str] | None = None,
    rules: str | Rules = DEFAULT_RULES,
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
    compare: bool = True,
) -> SubmissionScore:
    """Return the challenge's score of a submission: every crop and class, and both totals.

    Args:
        submission: a zip, the folder of a Zarr v2 group (``crop{N}/{class}`` plain arrays), or a folder of decoded
            labels (``{dataset}.zarr/{crop}/{class}/s0``). A zip is read in place, after a check of its directory.
        truth: folder of a Zarr v2 group with arrays ``crop{N}/{class}``. Where an array ``{class}_mask`` next to a
            class is 0, neither ground truth nor prediction counts.
        crops: what to score and on which grids: a `CropTable`, its path, or ``"challenge"``. By default every array of
            the ground truth, on the grid that its attributes ``voxel_size`` and ``translation`` state.
        classes, crop_names: only these (``crop7`` or ``7``).
        rules: version of the rules, or a `Rules` object.
        workers: threads (default: one per available core).
        memory_bytes: memory limit (default: half of the free memory). Larger instance volumes are scored slab by slab
            with scratch files.
        progress: called after every label; its item is ``crop/class``.
        compare: also compute the totals by all other rules, ``by_rules``, which costs more distances if they differ.

    Raises:
        MissingError, InputError, MetadataError, CorruptDataError, UnknownNameError: the submission or the ground truth
            cannot be scored. Labels that only the submission has are ignored and named in ``warnings``.
    """
    rules = get_rules(rules)
    targets, truth_crops = read_targets(truth, crops, crop_names, classes)
    source = open_submission(submission)
    try:
        folders = names_in_truth(source, truth_crops)
        others = tuple(RULES.values()) if compare else ()
        memory = memory_bytes or max(1 << 30, psutil.virtual_memory().available // 2)
        scorer = _Scorer(source, folders, rules, workers or usable_cores(), memory, others)
        results = []
        for done, result in enumerate(scorer.run(targets), start=1):
            results.append(result)
            (progress or silent)(done, len(targets), f"{result.crop}/{result.class_name}")
        warnings = [*_ignored(source, folders, targets, classes), *_remarks(results)]
    finally:
        source.close()
    kinds = [t.class_name for t in targets]
    return SubmissionScore(
        tuple(results), pool(results, rules, kinds), pool([r for r in results if not r.is_missing], rules, kinds),
        len(targets), rules.version, rules.verified, tuple(warnings),
        {r.version: pool([result.by_rules(r) for result in results], r, kinds) for r in others}, str(submission),
    )  # fmt: skip


class _Scorer:
    """Scores targets in threads, as many at once as memory allows."""

    def __init__(
        self,
        source: Submission,
        folders: dict[str, str],
        rules: Rules,
        workers: int,
        memory_bytes: int,
        others: Sequence[Rules],
    ) -> None:
        self._source, self._folders, self._rules, self._others = source, folders, rules, others
        self._classes = {crop: set(source.classes(folder)) for crop, folder in folders.items()}
        self._workers, self._memory = workers, memory_bytes
        self._budget = MemoryBudget(memory_bytes)

    def run(self, targets: list[Target]) -> Iterator[LabelResult]:
        """Yield the results in the order of the targets."""
        outer = min(self._workers, len(targets))
        self._inner = max(1, self._workers // outer)
        with ThreadPoolExecutor(outer) as threads:
            yield from threads.map(self._score, targets)

    def _score(self, target: Target) -> LabelResult:
        is_instance = self._rules.is_instance(target.class_name)
        missing = target.class_name not in self._classes.get(target.crop, ())
        truth: Readable = target.truth
        score: InstanceScore | SemanticScore
        made_from: Mapping[str, str] = {}
        if missing:
            slabs = (truth.read(*slab) for slab in _slabs(target.grid))
            ids = _count_ids(slabs) if is_instance else int(any((slab > 0).any() for slab in slabs))
            score = missing_score(self._rules, is_instance, ids, target.grid.size)
        else:
            label = self._source.label(self._folders[target.crop], target.class_name)
            made_from = label.marks
            aligned = Aligned(label, target.grid, is_instance, self._rules)
            if aligned.resample_bytes > 2 * self._memory:
                raise InputError(
                    f"{label.array.where}: resampling {label.array.shape} voxels to the crop's {target.grid.shape} "
                    f"needs {aligned.resample_bytes / 1024**3:.1f} GB, more than is free; write it on the crop's grid"
                )
            pred: Readable = aligned
            if target.mask is not None:
                pred, truth = Masked(pred, target.mask), Masked(truth, target.mask)
            score = (self._instance if is_instance else self._semantic)(pred, truth, target, aligned.resample_bytes)
        return LabelResult(
            target.crop, target.class_name, score, target.grid.size, target.grid.voxel_size, missing, target.dataset,
            self._rules.by_quality, made_from,
        )  # fmt: skip

    def _instance(self, pred: Readable, truth: Readable, target: Target, resampling: int) -> InstanceScore:
        # Both volumes, the components and cc3d's tables, and the scratch of the distances.
        need = target.grid.size * (pred.dtype.itemsize + truth.dtype.itemsize + 12)
        voxel_size = target.grid.voxel_size
        if not resampling and need > self._memory:
            with self._budget.held(self._memory), BlockPair(pred, truth, self._memory) as blocks:
                return score_pair(blocks, voxel_size, self._rules, self._workers, self._others)
        with self._budget.held(need + resampling):
            pair = InMemoryPair(pred.read(), truth.read())
            return score_pair(pair, voxel_size, self._rules, self._inner, self._others)

    def _semantic(self, pred: Readable, truth: Readable, target: Target, resampling: int) -> SemanticScore:
        counts, nan_voxels = Counts(), 0
        with self._budget.held(resampling):  # the slabs themselves need little memory
            for slab in _slabs(target.grid):
                a = pred.read(*slab)
                nan_voxels += nan_count(a)
                counts += Counts.of(a, truth.read(*slab))
        return SemanticScore(counts.tp, counts.fp, counts.fn, nan_voxels=nan_voxels)


def _slabs(grid: VoxelGrid) -> Iterator[tuple[Index, Index]]:
    """Yield the first voxel and shape of slabs along z that together cover a volume."""
    planes = max(1, _SLAB_VOXELS // (grid.shape[1] * grid.shape[2]))
    yield from ((begin, slab.shape) for begin, slab in grid.blocks((planes, *grid.shape[1:])))


def _count_ids(slabs: Iterator[NDArray[Any]]) -> int:
    """Return the number of labels other than 0."""
    import fastremap

    found: set[int] = set()
    for slab in slabs:
        found.update(fastremap.unique(truth_array(slab)).tolist())
    return len(found - {0})


def _ignored(
    source: Submission, folders: dict[str, str], targets: list[Target], classes: Sequence[str] | None
) -> Iterator[str]:
    """Name what is not scored: classes without ground truth, and what is not a plain array."""
    for crop, folder in folders.items():
        known = {t.class_name for t in targets if t.crop == crop}
        extra = sorted(set(source.classes(folder)) - known)
        if known and extra and classes is None:
            yield f"{crop}: {', '.join(extra)} not in the ground truth, ignored"
        unseen = sorted(known & set(source.unseen(folder)))
        if unseen:
            yield (
                f"{crop}: {', '.join(unseen)} are groups or not Zarr v2; only plain Zarr v2 arrays count, so these "
                f"count as missing"
            )


def _remarks(results: Sequence[LabelResult]) -> Iterator[str]:
    for result in results:
        name = f"{result.crop}/{result.class_name}"
        if result.score.nan_voxels:
            yield f"{name}: {nan_message(result.score.nan_voxels)}"
        if result.score.status == TOO_MANY:
            yield f"{name}: too many predicted instances, so the crop does not count for the class"
