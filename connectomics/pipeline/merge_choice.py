"""Which of several predictions to use for each class: the best by validation score, or the mean of the best."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectomics.config.values import read
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, default_parameters
from connectomics.decoding.prediction import find_arrays
from connectomics.errors import InputError, MetadataError, MissingError, unknown_name
from connectomics.pipeline.runs import Run, best_values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassScore:
    """The validation score of one class: its measure and value, and if they are known the crops and parameters."""

    measure: str
    score: float
    crops: tuple[str, ...] = ()
    parameters: DecodeParameters | None = None


@dataclass(frozen=True)
class Candidate:
    """One prediction to merge.

    Attributes:
        folder: ``{folder}/{dataset}.zarr/{crop}/{class}``. scores: by class.
    """

    folder: Path
    scores: Mapping[str, ClassScore] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Choice:
    """What is used for one class.

    Attributes:
        ranked: folders that have the class, best first. average: how many of the first are averaged.
        scores: validation score by folder. parameters: to decode with.
    """

    class_name: str
    ranked: tuple[Path, ...]
    average: int
    scores: Mapping[str, float]
    measure: str
    parameters: DecodeParameters

    @property
    def used(self) -> tuple[Path, ...]:
        """The folders that are used where all of them have the crop."""
        return self.ranked[: self.average]


def tuned_scores(folder: Path) -> dict[str, ClassScore]:
    """Return the scores and parameters that `pytc tune` left in a folder (``tuning.json``), by class."""
    file = folder / "tuning.json"
    if not file.is_file():
        raise MissingError(f"no {file}; give the folder that pytc tune wrote (its --out)")
    try:
        rows: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))["classes"]
        return {
            name: ClassScore(
                str(row["measure"]),
                float(row["best_score"]),
                tuple(row["crops"]),
                read(DecodeParameters, row["best"], f"{file}: {name}"),
            )
            for name, row in rows.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise MetadataError(f"{file} is not what pytc tune writes ({type(error).__name__}: {error})") from error


def run_scores(run: Run) -> dict[str, ClassScore]:
    """Return the validation Dice of each class of a run, at the epoch of its best checkpoint."""
    values = best_values(run)
    return {name: ClassScore("dice", values[key]) for name in run.classes if (key := f"val/{name}/dice") in values}


def choose(
    candidates: Sequence[Candidate],
    *,
    average: int = 1,
    classes: Collection[str] | None = None,
    parameters: Mapping[str, DecodeParameters] | None = None,
) -> dict[str, Choice]:
    """Return what to use for each class.

    Args:
        average: number of predictions to average, the best by score. classes: only these.
        parameters: to decode with, by class; else those of the best prediction, else the defaults of the class.

    Raises:
        InputError: several predictions have a class and one of them has no score, or scores of different measures.
        MissingError: a folder holds no predictions. UnknownNameError: no prediction of a class.
    """
    if average < 1:
        raise InputError(f"--average must be at least 1, got {average}")
    there = {candidate: {name for _, _, name in find_arrays(candidate.folder)} for candidate in candidates}
    for candidate, names in there.items():
        if not names:
            raise MissingError(f"no predictions in {candidate.folder}; run predict first")
    known = sorted(set().union(*there.values()))
    for name in classes or ():
        if name not in known:
            raise unknown_name("class", name, known, "the predictions")
    chosen = {}
    for name in known if classes is None else sorted(classes):
        ranked = _ranked(name, [candidate for candidate in candidates if name in there[candidate]])
        best = ranked[0].scores.get(name)
        own = (parameters or {}).get(name) or (best.parameters if best else None) or default_parameters(name)
        number = min(average, len(ranked))
        if number > 1 and (own.method in AFFINITY_METHODS or own.height):
            log.warning("%s is decoded with heads of its network, which are not averaged; using the best one", name)
            number = 1
        scores = {str(c.folder): c.scores[name].score for c in ranked if name in c.scores}
        folders = tuple(candidate.folder for candidate in ranked)
        chosen[name] = Choice(name, folders, number, scores, best.measure if best else "", own)
    return chosen


def _ranked(name: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort the candidates that have a class by its score, best first; of equals the first given."""
    if len(candidates) == 1:
        return list(candidates)
    without = [str(candidate.folder) for candidate in candidates if name not in candidate.scores]
    if without:
        raise InputError(
            f"{len(candidates)} predictions have {name}, but {', '.join(without)} has no validation score of it; give "
            "--tuned FOLDER of pytc tune for every prediction, in the same order, or select classes (--class)"
        )
    scores = {candidate: candidate.scores[name] for candidate in candidates}
    measures = sorted({score.measure for score in scores.values()})
    if len(measures) > 1:
        raise InputError(
            f"the validation scores of {name} are of different measures ({', '.join(measures)}) and cannot be "
            "compared; tune every prediction with the same score.rules, and give --tuned for all or for none"
        )
    if len({frozenset(score.crops) for score in scores.values()}) > 1:
        log.warning("the validation scores of %s are of different crops; compare them with care", name)
    return sorted(candidates, key=lambda candidate: -scores[candidate].score)
