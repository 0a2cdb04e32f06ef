"""Which of several predictions of a class to merge: the best by validation score."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, default_parameters
from connectomics.decoding.prediction import find_arrays
from connectomics.errors import InputError, MissingError, unknown_name
from connectomics.pipeline.tune_results import ClassScore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One prediction to merge.

    Attributes:
        folder: ``{folder}/{dataset}.zarr/{crop}/{class}``.
        scores: by class.
        network: run folder, checkpoint or package to predict into the folder first; None: it is predicted.
        predicts: classes of the network.
        decoding: the parameters of the run that predicts or predicted it, by class, if they are known.
    """

    folder: Path
    scores: Mapping[str, ClassScore] = field(default_factory=dict, hash=False)
    network: Path | None = None
    predicts: frozenset[str] = frozenset()
    decoding: Mapping[str, DecodeParameters] = field(default_factory=dict, hash=False)

    @property
    def classes(self) -> Collection[str]:
        """Classes of the prediction, done or not."""
        return self.predicts or {name for _, _, name in find_arrays(self.folder)}


@dataclass(frozen=True)
class Choice:
    """What is used for one class.

    Attributes:
        ranked: folders that have the class, best first.
        average: how many of the first are averaged.
        scores: validation score by folder.
        parameters: to decode with.
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


def choose(
    candidates: Sequence[Candidate],
    *,
    average: int = 1,
    classes: Collection[str] | None = None,
    parameters: Mapping[str, DecodeParameters] | None = None,
    fixed: Collection[str] = (),
) -> dict[str, Choice]:
    """Return what to use for each class.

    Args:
        average: number of predictions to average, the best by score.
        classes: only these.
        parameters: to decode with, by class, if the best prediction has no tuned ones; else those of its run, or the
            defaults of the class.
        fixed: classes for which ``parameters`` also replace tuned ones.

    Raises:
        InputError: several predictions have a class and one of them has no score, or scores of different measures.
        MissingError: a folder holds no predictions.
        UnknownNameError: no prediction of a class.
    """
    if average < 1:
        raise InputError(f"--average must be at least 1, got {average}")
    there = {candidate: candidate.classes for candidate in candidates}
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
        tuned = best.parameters if best and name not in fixed else None
        own = tuned or (parameters or {}).get(name) or ranked[0].decoding.get(name) or default_parameters(name)
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
