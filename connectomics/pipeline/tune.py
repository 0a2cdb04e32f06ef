"""Decoding parameters from validation crops: what gives each class its best score under the challenge's rules.

A class that is scored by overlap and decoded by a plain threshold needs no search: histograms of probability by truth
give its IoU at every threshold at once. Everything else is searched over a discrete space: all of it where it has no
more points than there are trials, else by Optuna's tree-structured Parzen estimator. Trials live in an SQLite file, so
that a search that was stopped goes on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.decoding.affinities.stored import StoredAffinities
from connectomics.decoding.decode import find_arrays, open_prediction, open_walls, read_block, read_on
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, default_parameters
from connectomics.decoding.probabilities import as_bytes
from connectomics.decoding.watershed.heads import StoredHead
from connectomics.errors import InputError, MissingError, WriteError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.io.artifacts import identity
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.metrics.challenge.results import Panoptic
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules, get_rules
from connectomics.pipeline.tune_results import TunedClass, write_results
from connectomics.pipeline.tune_space import SearchSpace, Volume, pooled_scores, threshold_of

#: Told after each trial: how many are done, how many there are at most, and what it was.
Progress = Callable[[int, int, str], None]
_BLOCK = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class _Place:
    """One class of one crop: the prediction, what is read beside it, and the crop that holds the truth."""

    source: Multiscale
    walls: Multiscale | None
    head: StoredHead | None
    crop: Crop

    @property
    def grid(self) -> VoxelGrid:
        return self.source.levels[0].grid


def tune(
    predictions_dir: str | Path,
    root: str,
    out: str | Path,
    *,
    classes: Collection[str] | None = None,
    trials: int = 60,
    seconds: float | None = None,
    seed: int = 0,
    base: Mapping[str, DecodeParameters] | None = None,
    rules: str | Rules = DEFAULT_RULES,
    progress: Progress | None = None,
) -> dict[str, TunedClass]:
    """Choose threshold, method, minimum size, hole filling and seeds of every class for the challenge's score.

    Crops are those of the predictions folder that have annotated truth in the data root; take crops that the network
    was not trained on. ``base`` (default: the class's kind's defaults) is always tried first, so what is chosen is
    never worse than it on these crops. A trial that is worse than the median of the others after some of the crops is
    given up. What is unknown is background in both volumes, as in ``evaluate``; but where so many objects are found in
    a crop that the challenge would not score it, all of its true objects count as missed, so that no search is drawn
    there.
    Holds one class of all its crops in memory (about 7 bytes a voxel) beside what decoding takes.

    Args:
        predictions_dir: folder that ``predict`` wrote. root: data root with the truth.
        out: folder for ``decoding.yaml`` (``decode --config`` reads it: tuned classes, and the base of the others),
            ``tuning.json``, ``tuning.png`` and ``tune.sqlite3``. Classes that were tuned into it before stay.
        classes: only these. trials: of a class, in all, those of earlier runs in this folder counted.
        rules: of the score, a version or a `Rules` object.
        seconds: stop beginning trials after this; shared evenly by the classes, each of which gets its base trial.

    Returns:
        The tuned classes by name; classes without a known present voxel in any crop are left out.

    Raises:
        MissingError: Optuna is needed but not installed; no predictions; no truth. UnknownNameError: a class that no
        prediction has. InputError: numbers that make no search, or an ``out`` whose trials are of other data.
    """
    if trials < 1 or (seconds is not None and not seconds > 0):
        raise InputError(f"tuning needs at least one trial and a positive time, found {trials} and {seconds} s")
    folder = local_path(out)
    found = list(find_arrays(predictions_dir))
    if not found:
        raise MissingError(f"no predictions in {predictions_dir}: run predict on annotated crops first")
    names = sorted({name for _, _, name in found})
    for name in sorted(classes or ()):
        if name not in names:
            raise unknown_name("class", name, names, str(predictions_dir))
    parameters = {name: (base or {}).get(name) or default_parameters(name) for name in names}
    chosen = [name for name in names if classes is None or name in classes]
    catalog = Catalog.open(root)
    begin = time.monotonic()
    result: dict[str, TunedClass] = {}
    for index, name in enumerate(chosen):
        places = _places(Path(predictions_dir), catalog, found, name, parameters[name])
        left = None if seconds is None else (begin + seconds - time.monotonic()) / (len(chosen) - index)
        before, own = index * trials, parameters[name]
        search = _Search(folder, name, own, trials, left, seed, progress, before, len(chosen), get_rules(rules))
        tuned = _tune_class(places, search)
        if tuned is not None:
            result[name] = tuned
    if not result:
        raise MissingError(
            f"{root} has no annotated voxel of {', '.join(chosen)} in the crops of {predictions_dir}; "
            "predict crops that are annotated (without --crops), and tune on those"
        )
    current = {n: _identities(_places(Path(predictions_dir), catalog, found, n, parameters[n])) for n in names}
    write_results(folder, current, parameters, result, get_rules(rules))
    return result


# -- what there is -----------------------------------------------------------------------------------------------------
def _places(
    predictions: Path, catalog: Catalog, found: list[tuple[str, str, str]], name: str, parameters: DecodeParameters
) -> list[_Place]:
    """The crops of a class that the data root annotates, in a fixed order."""
    places = []
    for dataset, crop, other in found:
        if other == name and dataset in catalog.datasets and crop in catalog.crop_names(dataset):
            source = open_prediction(predictions, dataset, crop, name)
            walls = open_walls(predictions, dataset, crop, source, parameters)
            head = StoredHead.open(source, "distance") if parameters.height == "distance" else None
            places.append(_Place(source, walls, head, catalog.crop(dataset, crop)))
    return places


def _has_ids(crop: Crop, name: str) -> bool:
    return name in crop.labels and crop.labels[name].annotation.kind == "instance"


def _blocks(place: _Place, name: str) -> Iterator[tuple[tuple[slice, ...], NDArray[np.uint8], Any, Any]]:
    """Block by block: where, probabilities to 1/255, present, known."""
    for begin, block in place.grid.blocks(_BLOCK):
        where = tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        truth = read_labels(place.crop, [name], block)
        stored = as_bytes(read_block(place.source, begin, block.shape))
        yield where, stored, truth.present_of(name), truth.known_of(name)


def _volume(place: _Place, name: str, ids: bool, base: DecodeParameters) -> Volume:
    grid = place.grid
    walls = None if place.walls is None else as_bytes(read_on(place.walls, grid))
    head = None if place.head is None else place.head.all()
    values, offsets = None, None
    if base.method in AFFINITY_METHODS:
        stored = StoredAffinities.open(place.source)
        values, offsets = stored.read((0, 0, 0), grid.shape), stored.offsets
    if ids:
        truth, known = read_instances(place.crop, name, grid)
        probability = as_bytes(read_on(place.source, grid))
        return Volume(probability, walls, truth, known, grid.voxel_size, values, offsets, head)
    probability = np.zeros(grid.shape, np.uint8)
    present, known = np.zeros(grid.shape, np.bool_), np.zeros(grid.shape, np.bool_)
    for where, block, p, k in _blocks(place, name):
        probability[where], present[where], known[where] = block, p & k, k
    return Volume(probability, walls, present, known, grid.voxel_size, values, offsets, head)


def _identities(places: list[_Place]) -> dict[str, str]:
    """Crop -> identity of its prediction."""
    return {place.crop.key: identity(place.source) for place in places}


# -- one class ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Search:
    """How one class is searched; ``before`` and ``n_classes`` only tell progress where it stands."""

    folder: Path
    name: str
    base: DecodeParameters
    trials: int
    seconds: float | None
    seed: int
    progress: Progress | None
    before: int
    n_classes: int
    rules: Rules

    def tell(self, done: int, what: str) -> None:
        if self.progress is not None:
            self.progress(self.before + done, self.n_classes * self.trials, f"{self.name} {what}")


def _tune_class(places: list[_Place], search: _Search) -> TunedClass | None:
    """None where no voxel of the class is known to be present."""
    name, base = search.name, search.base
    with_ids = [p for p in places if _has_ids(p.crop, name)] if is_instance_class(name) else []
    if with_ids:
        places = with_ids
    elif base.is_local:
        return _all_thresholds(places, search)
    volumes = {place: _volume(place, name, bool(with_ids), base) for place in places}
    volumes = {place: volume for place, volume in volumes.items() if volume.known.any()}
    if not any(volume.truth.any() for volume in volumes.values()):
        return None
    return _searched(list(volumes), list(volumes.values()), search)


def _all_thresholds(places: list[_Place], search: _Search) -> TunedClass | None:
    """IoU, pooled over crops, at each of the 256 thresholds that stored values can tell apart."""
    counts = []  # by crop: hits, true voxels and false alarms at each threshold
    crops = []
    for place in places:
        present, absent = np.zeros(256, np.int64), np.zeros(256, np.int64)
        for _, values, p, k in _blocks(place, search.name):
            present += np.bincount(values[p & k], minlength=256)
            absent += np.bincount(values[~p & k], minlength=256)
        if present.any() or absent.any():
            crops.append(place.crop.key)
        counts.append((present.sum() - np.cumsum(present), present.sum(), absent.sum() - np.cumsum(absent)))
    total = int(sum(true for _, true, _ in counts))
    if total == 0:
        return None
    iou = (
        _quality(counts)
        if search.rules.by_quality
        else sum(h for h, _, _ in counts) / (total + sum(a for _, _, a in counts))
    )
    at_base = int(np.floor(search.base.threshold * 255 + 1e-9))  # as `above` reads it
    best = min(np.flatnonzero(iou == iou.max()), key=lambda level: abs(int(level) - at_base))
    chosen = search.base if best == at_base else replace(search.base, threshold=threshold_of(int(best)))
    curve = [(threshold_of(level), float(value)) for level, value in enumerate(iou)]
    measure = "pq" if search.rules.by_quality else "iou"
    search.tell(search.trials, f"{measure} {iou[best]:.4f}")
    return TunedClass(
        search.name,
        measure,
        tuple(crops),
        _identities(places),
        search.base,
        float(iou[at_base]),
        chosen,
        float(iou[best]),
        [],
        curve,
    )


def _quality(counts: list[tuple[NDArray[np.int64], int, NDArray[np.int64]]]) -> NDArray[np.float64]:
    """The Panoptic Quality at each threshold, where each crop is one segment."""
    pooled = []
    for level in range(256):
        parts = [Panoptic.of_segment(int(h[level]), int(a[level]), int(true - h[level])) for h, true, a in counts]
        pooled.append(sum(parts, Panoptic()).quality)
    return np.array(pooled)


# -- the search --------------------------------------------------------------------------------------------------------
def _searched(places: list[_Place], volumes: list[Volume], search: _Search) -> TunedClass:
    optuna = _optuna()
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        study = _study(optuna, places, volumes, search)
        _run(study, volumes, search)
        rows = _rows(study)
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = str(error).splitlines()[0]
        raise WriteError(f"cannot keep trials in {search.folder / 'tune.sqlite3'}: {reason}") from error
    complete = [row for row in rows if row["state"] == "complete"]
    # The first of equals: the base, where nothing is better.
    best = max(complete, key=lambda row: (row["score"], row["base"], -row["number"]))
    base_score = next(row["score"] for row in complete if row["base"])
    by_voxels = "iou" if volumes[0].truth.dtype == np.bool_ else "combined"
    return TunedClass(
        search.name,
        "pq" if search.rules.by_quality else by_voxels,
        tuple(place.crop.key for place in places),
        _identities(places),
        search.base,
        base_score,
        DecodeParameters.from_dict(best["parameters"]),
        best["score"],
        rows,
    )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingError(
            "tuning needs Optuna, which is not installed; run pip install 'connectomics-cellmap[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, places: list[_Place], volumes: list[Volume], search: _Search) -> Any:
    """The class's study in ``tune.sqlite3``, new or the one that was begun with the same data and base."""
    try:
        search.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder {search.folder}: {error.strerror or error}") from error
    file = search.folder / "tune.sqlite3"
    study = optuna.create_study(
        storage=f"sqlite:///{file.resolve()}", study_name=search.name, direction="maximize", load_if_exists=True
    )
    made_from = {
        "base": search.base.to_dict(),
        "crops": {p.crop.key: p.source.attrs["connectomics"] for p in places},
        "walls": {p.crop.key: p.walls.attrs["connectomics"] for p in places if p.walls is not None},
        "known": [[int(v.known.sum()), int((v.truth != 0).sum())] for v in volumes],
    }
    if heads := {p.crop.key: p.head.source.attrs["connectomics"] for p in places if p.head is not None}:
        made_from["heads"] = heads
    if search.rules.version != DEFAULT_RULES:
        made_from["rules"] = search.rules.version
    there = study.user_attrs.get("made_from")
    if there is None:
        study.set_user_attr("made_from", made_from)
    elif there != made_from:
        raise InputError(
            f"{file} holds trials of {search.name} on other predictions, crops, base parameters or rules; "
            "give another --out, or remove that file"
        )
    n_before = len(study.trials)
    # Drawn anew where a search goes on: the same seed would draw the first points again.
    study.sampler = optuna.samplers.TPESampler(seed=search.seed + n_before)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    return study


def _run(study: Any, volumes: list[Volume], search: _Search) -> None:
    """Trials until there are enough, the time is over or no point is left; the base is the first."""
    space = SearchSpace.of(volumes, search.base)
    all_points = list(itertools.islice(space.points(), search.trials))
    grid = len(all_points) < search.trials
    end = None if search.seconds is None else time.monotonic() + search.seconds
    rows = _rows(study)
    seen = {_key(row["parameters"]): row["score"] for row in rows if row["state"] == "complete"}
    pruned = {_key(row["parameters"]) for row in rows if row["state"] == "pruned"}
    done = len(rows)
    if not any(row["base"] for row in rows):
        score = _run_trial(study, volumes, search, seen, base=True)
        done += 1
        search.tell(done, f"base {score:.4f}")
    if grid:
        todo = [p for p in all_points if _key(space.parameters(p, search.base).to_dict()) not in {*seen, *pruned}]
        all_points = todo
    while (grid and all_points) or (not grid and done < search.trials):
        if end is not None and time.monotonic() >= end:
            return
        if grid:
            study.enqueue_trial(all_points.pop(0))
        score = _run_trial(study, volumes, search, seen, space=space)
        done += 1
        search.tell(min(done, search.trials), f"{score:.4f}")


def _key(parameters: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(parameters.items()))


def _run_trial(
    study: Any,
    volumes: list[Volume],
    search: _Search,
    seen: dict[tuple[Any, ...], float],
    *,
    space: SearchSpace | None = None,
    base: bool = False,
) -> float:
    """One trial from asking to telling; what was scored before is not decoded again."""
    from optuna.trial import TrialState

    trial = study.ask()
    chosen = search.base if space is None else space.parameters(space.suggest(trial), search.base)
    trial.set_user_attr("base", base)
    trial.set_user_attr("parameters", chosen.to_dict())
    key = _key(chosen.to_dict())
    score = seen.get(key)
    if score is None:
        for step, score in enumerate(pooled_scores(volumes, chosen, search.rules)):
            trial.report(score, step)
            if not base and step + 1 < len(volumes) and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return score
        assert score is not None  # there is at least one crop
        seen[key] = score
    study.tell(trial, score)
    return score


def _rows(study: Any) -> list[dict[str, Any]]:
    """Finished trials in order; one that a killed run left open is no trial."""
    from optuna.trial import TrialState

    return [
        {
            "number": trial.number,
            "state": "complete" if trial.state == TrialState.COMPLETE else "pruned",
            "score": trial.value,
            "base": trial.user_attrs["base"],
            "parameters": trial.user_attrs["parameters"],
        }
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    ]
