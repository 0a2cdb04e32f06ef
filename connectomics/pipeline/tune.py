"""Choose the decoding parameters of every class on validation crops, by its score under the challenge's rules.

A class that is scored by overlap and decoded by a plain threshold needs no search: histograms of probability by ground
truth give its IoU at every threshold at once. All else is searched in a discrete space: completely if it has no more
points than trials, else by Optuna's tree-structured Parzen estimator. Trials are stored in an SQLite file, so a search
can be resumed.
"""

from __future__ import annotations

import itertools
import sqlite3
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.classes import is_scored_by_instances
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.config.values import plain, read
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, default_parameters
from connectomics.decoding.prediction import (
    StoredAffinities,
    StoredHead,
    networks_of,
    open_boundary,
    open_prediction,
    read_on,
    trained_on,
)
from connectomics.decoding.probabilities import as_bytes, read_block
from connectomics.errors import InputError, MissingError, WriteError, as_write_error
from connectomics.geometry import slices_of
from connectomics.io.artifacts import identity
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.metrics.challenge.results import Panoptic
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules, get_rules
from connectomics.pipeline.results import chosen_arrays
from connectomics.pipeline.targets import name_trained
from connectomics.pipeline.tune_results import TunedClass, write_results
from connectomics.pipeline.tune_space import SearchSpace, Volume, pooled_scores, threshold_of
from connectomics.progress import Progress, silent

_BLOCK = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class _Prediction:
    """The prediction of one class of one crop, what is read with it, and the crop with the ground truth."""

    source: Multiscale
    boundary: Multiscale | None
    head: StoredHead | None
    crop: Crop


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
    progress: Progress = silent,
) -> dict[str, TunedClass]:
    """Choose threshold, method, minimum size, hole filling and seeds of every class for the score of the challenge.

    Crops are those of the predictions folder that have ground truth in the data root; use crops that the network was
    not trained on (a warning names the others, if the run is there). The base parameters are always tried first, so the
    result is never worse on these crops. Unknown voxels are background in both volumes, as in ``evaluate``. Holds one
    class of all crops in memory (about 7 bytes a voxel), beside what decoding takes.

    Args:
        predictions_dir: folder that ``predict`` wrote.
        root: data root with the ground truth.
        out: folder for ``decoding.yaml`` (read by ``decode --config``: the tuned classes, and the base of the others),
            ``tuning.json``, ``tuning.png`` and ``tune.sqlite3``. Classes tuned there earlier are kept.
        classes: only these.
        trials: for each class, including those of earlier runs in this folder.
        seconds: start no more trials after this; shared evenly by the classes, each of which gets its base trial.
        base: by class; None: the defaults of its kind.
        rules: of the score, a version or a `Rules` object.
        progress: called after each trial.

    Returns:
        The tuned classes by name, without those that have no known present voxel in any crop.

    Raises:
        MissingError: Optuna is needed but not installed; no predictions; no ground truth.
        UnknownNameError: no prediction of a class.
        InputError: wrong numbers, or the trials in ``out`` belong to other data, also to labels that have changed.
    """
    if trials < 1 or (seconds is not None and not seconds > 0):
        raise InputError(f"tuning needs at least one trial and a positive time, got {trials} and {seconds} s")
    folder = local_path(out)
    found = chosen_arrays(predictions_dir)
    if not found:
        raise MissingError(f"no predictions in {predictions_dir}: run predict on annotated crops first")
    names = sorted({name for _, _, name in found})
    chosen = sorted({name for _, _, name in chosen_arrays(predictions_dir, classes=classes)})
    parameters = {name: (base or {}).get(name) or default_parameters(name) for name in names}
    catalog = Catalog.open(root)
    begin = time.monotonic()
    found_in = {n: _predictions(Path(predictions_dir), catalog, found, n, parameters[n]) for n in names}
    name_trained((p.crop.key, trained_on(p.source.attrs["connectomics"])) for name in chosen for p in found_in[name])
    result: dict[str, TunedClass] = {}
    for index, name in enumerate(chosen):
        left = None if seconds is None else (begin + seconds - time.monotonic()) / (len(chosen) - index)
        done, total = index * trials, len(chosen) * trials
        search = _Search(folder, name, parameters[name], trials, left, seed, progress, done, total, get_rules(rules))
        tuned = _tune_class(found_in[name], search)
        if tuned is not None:
            result[name] = tuned
    if not result:
        raise MissingError(
            f"{root} has no annotated voxel of {', '.join(chosen)} in the crops of {predictions_dir}; "
            "predict annotated crops that the network was not trained on (--crops val), and tune on those"
        )
    current = {name: _identities(predictions) for name, predictions in found_in.items()}
    write_results(folder, current, parameters, result, get_rules(rules))
    return result


# -- predictions and ground truth --------------------------------------------------------------------------------------
def _predictions(
    root: Path, catalog: Catalog, found: list[tuple[str, str, str]], name: str, parameters: DecodeParameters
) -> list[_Prediction]:
    """Open the crops of a class that the data root annotates, in a fixed order."""
    predictions = []
    for dataset, crop, other in found:
        if other == name and dataset in catalog.datasets and crop in catalog.crop_names(dataset):
            source = open_prediction(root, dataset, crop, name)
            head = StoredHead.open(source, "distance") if parameters.height == "distance" else None
            boundary = open_boundary(source, parameters)
            predictions.append(_Prediction(source, boundary, head, catalog.crop(dataset, crop)))
    return predictions


def _blocks(prediction: _Prediction, name: str) -> Iterator[tuple[tuple[slice, ...], NDArray[np.uint8], Any, Any]]:
    """Yield block by block: position, probabilities as uint8, present, known."""
    for begin, block in prediction.source.levels[0].grid.blocks(_BLOCK):
        at = slices_of(begin, block.shape)
        truth = read_labels(prediction.crop, [name], block)
        stored = as_bytes(read_block(prediction.source, begin, block.shape))
        yield at, stored, truth.present_of(name), truth.known_of(name)


def _volume(prediction: _Prediction, name: str, ids: bool, base: DecodeParameters) -> Volume:
    source, grid = prediction.source, prediction.source.levels[0].grid
    boundary = None if prediction.boundary is None else as_bytes(read_on(prediction.boundary, grid))
    head = None if prediction.head is None else prediction.head.all()
    affinities = None
    if base.method in AFFINITY_METHODS:
        stored = StoredAffinities.open(source)
        affinities = stored.read((0, 0, 0), grid.shape), stored.offsets
    if ids:
        truth, known = read_instances(prediction.crop, name, grid)
        probability = as_bytes(read_on(source, grid))
    else:
        probability = np.zeros(grid.shape, np.uint8)
        truth, known = np.zeros(grid.shape, np.bool_), np.zeros(grid.shape, np.bool_)
        for at, block, p, k in _blocks(prediction, name):
            probability[at], truth[at], known[at] = block, p & k, k
    return Volume(probability, boundary, truth, known, grid.voxel_size, affinities, head)


def _identities(predictions: list[_Prediction]) -> dict[str, str]:
    return {prediction.crop.key: identity(prediction.source) for prediction in predictions}


def _networks(predictions: list[_Prediction]) -> tuple[str, ...]:
    return tuple(sorted(set().union(*(networks_of(p.source.attrs["connectomics"]) for p in predictions))))


# -- one class ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Search:
    """How one class is searched; ``done`` of ``total`` trials belong to earlier classes."""

    folder: Path
    name: str
    base: DecodeParameters
    trials: int
    seconds: float | None
    seed: int
    progress: Progress
    done: int
    total: int
    rules: Rules

    def report(self, trials: int, what: str) -> None:
        self.progress(self.done + trials, self.total, f"{self.name} {what}")


def _tune_class(predictions: list[_Prediction], search: _Search) -> TunedClass | None:
    """Return None if no voxel of the class is known to be present."""
    name, base = search.name, search.base
    labelled = [p for p in predictions if name in p.crop.labels] if is_scored_by_instances(name, base.kind) else []
    with_ids = [p for p in labelled if p.crop.labels[name].annotation.kind == "instance"]
    if not with_ids and base.is_local:
        return _all_thresholds(predictions, search)
    volumes = {p: _volume(p, name, bool(with_ids), base) for p in with_ids or predictions}
    volumes = {p: volume for p, volume in volumes.items() if volume.known.any()}
    if not any(volume.truth.any() for volume in volumes.values()):
        return None
    return _searched(volumes, search)


def _all_thresholds(predictions: list[_Prediction], search: _Search) -> TunedClass | None:
    """Find the best of the 256 thresholds between stored values by the IoU pooled over crops."""
    counts = []  # by crop: hits, true voxels and false alarms at each threshold
    crops = []
    for prediction in predictions:
        present, absent = np.zeros(256, np.int64), np.zeros(256, np.int64)
        for _, values, p, k in _blocks(prediction, search.name):
            present += np.bincount(values[p & k], minlength=256)
            absent += np.bincount(values[~p & k], minlength=256)
        if present.any() or absent.any():
            crops.append(prediction.crop.key)
        counts.append((present.sum() - np.cumsum(present), present.sum(), absent.sum() - np.cumsum(absent)))
    total = int(sum(true for _, true, _ in counts))
    if total == 0:
        return None
    by_quality = search.rules.by_quality
    iou = sum(h for h, _, _ in counts) / (total + sum(a for _, _, a in counts))
    if by_quality:  # each crop is one segment
        pooled = (
            sum((Panoptic.of_segment(int(h[k]), int(a[k]), int(true - h[k])) for h, true, a in counts), Panoptic())
            for k in range(256)
        )
        iou = np.array([found.quality for found in pooled])
    at_base = int(np.floor(search.base.threshold * 255 + 1e-9))  # as `above` reads it
    best = min(np.flatnonzero(iou == iou.max()), key=lambda level: abs(int(level) - at_base))
    chosen = search.base if best == at_base else replace(search.base, threshold=threshold_of(int(best)))
    curve = [(threshold_of(level), float(value)) for level, value in enumerate(iou)]
    measure = "pq" if by_quality else "iou"
    search.report(search.trials, f"{measure} {iou[best]:.4f}")
    made_from, scores = _identities(predictions), (float(iou[at_base]), float(iou[best]))
    return TunedClass(
        measure, tuple(crops), made_from, search.base, scores[0], chosen, scores[1], thresholds=curve,
        networks=_networks(predictions),
    )  # fmt: skip


# -- the search --------------------------------------------------------------------------------------------------------
def _searched(found: Mapping[_Prediction, Volume], search: _Search) -> TunedClass:
    try:
        import optuna
    except ImportError as error:
        raise MissingError("tuning needs Optuna: run pip install 'connectomics-cellmap[tune]'") from error
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    predictions, volumes = list(found), list(found.values())
    try:
        study = _study(optuna, predictions, volumes, search)
        _run(study, volumes, search)
        rows = _rows(study)
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = str(error).splitlines()[0]
        raise WriteError(f"cannot keep trials in {search.folder / 'tune.sqlite3'}: {reason}") from error
    complete = [row for row in rows if row["state"] == "complete"]
    # of equals the first; the base if nothing is better
    best = max(complete, key=lambda row: (row["score"], row["base"], -row["number"]))
    by_voxels = "iou" if volumes[0].truth.dtype == np.bool_ else "combined"
    return TunedClass(
        measure="pq" if search.rules.by_quality else by_voxels,
        crops=tuple(prediction.crop.key for prediction in predictions), made_from=_identities(predictions),
        base=search.base, base_score=next(row["score"] for row in complete if row["base"]),
        best=read(DecodeParameters, best["parameters"], f"trial {best['number']} of {search.name}"),
        best_score=best["score"], trials=rows, networks=_networks(predictions),
    )  # fmt: skip


def _study(optuna: Any, predictions: list[_Prediction], volumes: list[Volume], search: _Search) -> Any:
    """Open the study of the class in ``tune.sqlite3``: a new one, or one that was begun with the same data and base."""
    with as_write_error(f"cannot make the folder {search.folder}"):
        search.folder.mkdir(parents=True, exist_ok=True)
    file = search.folder / "tune.sqlite3"

    def connection() -> sqlite3.Connection:
        found = sqlite3.connect(file)
        found.execute("PRAGMA synchronous=OFF")  # a trial is dozens of changes; a killed process loses none of them
        return found

    storage = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}", engine_kwargs={"creator": connection})
    study = optuna.create_study(storage=storage, study_name=search.name, direction="maximize", load_if_exists=True)
    about = {p.crop.key: p for p in predictions}
    made_from = {
        "base": plain(search.base),
        "crops": {key: p.source.attrs["connectomics"] for key, p in about.items()},
        "walls": {key: p.boundary.attrs["connectomics"] for key, p in about.items() if p.boundary is not None},
        "labels": [zlib.crc32(np.ascontiguousarray(a).data) for v in volumes for a in (v.known, v.truth)],
    }
    if heads := {key: p.head.source.attrs["connectomics"] for key, p in about.items() if p.head is not None}:
        made_from["heads"] = heads
    if search.rules.version != DEFAULT_RULES:
        made_from["rules"] = search.rules.version
    there = study.user_attrs.get("made_from")
    if there is None:
        study.set_user_attr("made_from", made_from)
    elif there != made_from:
        raise InputError(
            f"{file} holds trials of {search.name} on other predictions, labels, crops, base parameters or rules; "
            "give another --out, or remove that file"
        )
    study.sampler = optuna.samplers.TPESampler(seed=search.seed + len(study.trials))  # not the first points again
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    return study


def _run(study: Any, volumes: list[Volume], search: _Search) -> None:
    """Run trials, the base first, until there are enough, the time is over, or no point is left."""
    space = SearchSpace.of(volumes, search.base)
    all_points = list(itertools.islice(space.points(), search.trials))
    grid = len(all_points) < search.trials
    end = None if search.seconds is None else time.monotonic() + search.seconds
    rows = _rows(study)
    seen = {_key(row["parameters"]): row["score"] for row in rows if row["state"] == "complete"}
    tried = {_key(row["parameters"]) for row in rows}
    done = len(rows)
    if not any(row["base"] for row in rows):
        score = _run_trial(study, volumes, search, seen, None)
        tried.update(seen)
        done += 1
        search.report(done, f"base {score:.4f}")
    if grid:
        all_points = [p for p in all_points if _key(plain(space.parameters(p, search.base))) not in tried]
    while all_points if grid else done < search.trials:
        if end is not None and time.monotonic() >= end:
            return
        if grid:
            study.enqueue_trial(all_points.pop(0))
        score = _run_trial(study, volumes, search, seen, space)
        done += 1
        search.report(min(done, search.trials), f"{score:.4f}")


def _key(parameters: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(parameters.items()))


def _run_trial(
    study: Any, volumes: list[Volume], search: _Search, seen: dict[tuple[Any, ...], float], space: SearchSpace | None
) -> float:
    """Run one trial, of the base without a space; what was scored before is not decoded again."""
    from optuna.trial import TrialState

    trial = study.ask()
    base = space is None
    chosen = search.base if space is None else space.parameters(space.suggest(trial), search.base)
    trial.set_user_attr("base", base)
    trial.set_user_attr("parameters", plain(chosen))
    key = _key(plain(chosen))
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
    """Return the finished trials in order, without one that a killed run left open."""
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
