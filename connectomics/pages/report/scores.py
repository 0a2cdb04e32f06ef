"""Reading ``scores.json``, as ``SubmissionScore.to_dict`` gives it: scores by class and by crop, ranked from the worst.

Per-crop scores are the challenge's own formulas applied to one crop's counts, pooled by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from connectomics.errors import MetadataError, MissingError, first_of, number_of
from connectomics.geometry import triple
from connectomics.io import store
from connectomics.io.artifacts import about
from connectomics.io.store import read_json
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.results import (
    FAILED,
    TOO_MANY,
    ClassScore,
    InstanceScore,
    LabelResult,
    Panoptic,
    SemanticScore,
    pool_class,
)
from connectomics.metrics.challenge.rules import RULES
from connectomics.metrics.evaluate import InstanceSums, Scored, bootstrap_interval, score_of
from connectomics.pages import page

DROPPED = (TOO_MANY, FAILED)  #: statuses of crops that are dropped from a class


@dataclass(frozen=True)
class Scores:
    """The content of one ``scores.json``; ``classes`` are its ``label_scores``, ``results`` every crop and class.

    Missing labels count as 0 except in ``submitted``, the overall score over the submitted labels alone.
    ``verified``: whether our numbers for these rules were compared with the official ones.
    """

    overall: float | None
    instance: float | None
    semantic: float | None
    submitted: float | None
    classes: Mapping[str, Mapping[str, Any]]
    results: tuple[LabelResult, ...]
    rules: str
    verified: bool
    warnings: tuple[str, ...]
    submission: str

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read ``scores.json``; `MissingError` if it is missing, `MetadataError` if its content is something else."""
        data = load_json(path)
        by_quality = data.get("rules") in RULES and RULES[data["rules"]].by_quality
        try:
            results = tuple(
                _result(crop, name, entry, by_quality)
                for crop, entries in data.items()
                if _is_crop(entries)
                for name, entry in entries.items()
            )
            return cls(
                overall=optional(data["overall_score"]), instance=optional(data["overall_instance_score"]),
                semantic=optional(data["overall_semantic_score"]),
                submitted=optional((data.get("submitted_only") or {}).get("overall_score")),
                classes=data["label_scores"], results=results, rules=str(data.get("rules", "unknown")),
                verified=bool(data.get("verified", False)), warnings=tuple(str(w) for w in data.get("warnings", ())),
                submission=str(data.get("submission", "")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise MetadataError(
                f"{path}: expected a scores.json of 'pytc score' ({reason}); run 'pytc score' again"
            ) from error

    def of(self, crop: str, class_name: str) -> LabelResult | None:
        """Return one result, None if there is none."""
        return next((r for r in self.results if r.crop == crop and r.class_name == class_name), None)

    def by_crop(self) -> dict[str, list[LabelResult]]:
        """Return the results by crop, worst crop first, and within a crop the worst class first."""
        crops: dict[str, list[LabelResult]] = {}
        for result in self.results:
            crops.setdefault(result.crop, []).append(result)
        ranked = sorted(crops.items(), key=lambda item: (mean_score(item[1]), item[0]))
        return {crop: sorted(found, key=lambda r: (rank_value(r), r.class_name)) for crop, found in ranked}


def load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; `MissingError` or `MetadataError` if there is none."""
    data = read_json(path)
    if data is None:
        raise MissingError(f"no file {path}; give an existing one")
    return data


def crop_class(result: LabelResult) -> ClassScore:
    """Return the class's score from this crop alone."""
    return pool_class(result.class_name, [result])


def shown_value(result: LabelResult) -> float | None:
    """Return the score of one class in one crop, None if the crop was dropped from the class."""
    return None if result.score.status in DROPPED and not result.by_quality else crop_class(result).score


def rank_value(result: LabelResult) -> float:
    """Return the same for ranking: a dropped crop counts as 0."""
    value = shown_value(result)
    return 0.0 if value is None else value


def mean_score(results: Sequence[LabelResult]) -> float:
    """Return the mean over the classes of a crop."""
    return sum(map(rank_value, results)) / len(results)


def _is_crop(entries: Any) -> bool:
    return (
        isinstance(entries, dict)
        and bool(entries)
        and all(isinstance(e, dict) and "is_missing" in e and "num_voxels" in e for e in entries.values())
    )


def _result(crop: str, name: str, entry: Mapping[str, Any], by_quality: bool) -> LabelResult:
    counts = (int(entry["tp"]), int(entry["fp"]), int(entry["fn"]))
    score: InstanceScore | SemanticScore
    if "n_hausdorff" in entry:
        distances = (float(entry["hausdorff_norm_sum"]), int(entry["n_hausdorff"]))
        status, kept = str(entry["status"]), entry.get("panoptic")
        panoptic = Panoptic(*(kept[key] for key in ("tp", "fp", "fn", "iou_sum"))) if kept else None
        score = InstanceScore(*counts, *distances, status=status, rules="", verified=False, panoptic=panoptic)
    else:
        annotated = bool(entry.get("panoptic", {}).get("fn", 1))
        score = SemanticScore(*counts, status=str(entry["status"]), annotated=annotated)
    voxels, size, missing = int(entry["num_voxels"]), triple(entry["voxel_size"]), bool(entry["is_missing"])
    made_from = dict(entry.get("made_from", {}))
    return LabelResult(crop, name, score, voxels, size, missing, by_quality=by_quality, made_from=made_from)


def optional(value: Any) -> float | None:
    """Return a number that may be missing."""
    return None if value is None else float(value)


def class_intervals(scores: Scores) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals over crops of each class's pooled score, for classes of two or more crops.

    They tell how much a score depends on which crops happened to be annotated; with few crops they are rough.
    """
    groups: dict[str, list[Scored]] = {}
    for result in scores.results:
        s = result.score
        part: Scored | None
        if result.by_quality:
            part = s.panoptic
        elif isinstance(s, InstanceScore):
            part = None if s.status in DROPPED else InstanceSums.of(s)
        else:
            part = Counts(s.tp, s.fp, s.fn)
        if part is not None:
            groups.setdefault(result.class_name, []).append(part)
    return {name: bootstrap_interval(parts, score_of) for name, parts in groups.items() if len(parts) > 1}


def plain_id(name: str) -> str:
    """Return a name with only the characters that an HTML ID may have."""
    return "".join(c if c.isalnum() else "-" for c in name)


def crop_anchor(crop: str) -> str:
    """Return the ID of a crop's part of the page."""
    return f"crop-{plain_id(crop)}"


# -- on the page -------------------------------------------------------------------------------------------------------
_MEASURES = ("score", "dice", "iou", "precision", "recall")
_MOST_WORST = 20


def headline(scores: Scores | None, baseline: Scores | None, baseline_name: str = "baseline") -> Markup:
    """Return three large numbers, the baseline's below each; empty without scores."""
    if scores is None:
        return Markup("")
    hints = ("√(instance × semantic)", "mean of √(F1 × distance score)", "mean IoU")
    if any(r.by_quality for r in scores.results):
        hints = ("mean over classes", "mean Panoptic Quality", "mean Panoptic Quality")
    return page.render("report/headline", scores=scores, baseline=baseline, baseline_name=baseline_name, hints=hints)


def section(
    scores: Scores | None,
    baseline: Scores | None,
    datasets: Mapping[str, str],
    baseline_name: str = "baseline",
    problems: Sequence[str] = (),
) -> Markup:
    """Return the tables by class and by crop; ``datasets``: data set by crop; ``problems``: lines to put first."""
    if scores is None:
        return page.note(*(problems or ["No scores: no scores.json was given."]))
    crops = scores.by_crop()
    means = {crop: mean_score(results) for crop, results in (baseline.by_crop() if baseline else {}).items()}
    names = sorted({r.class_name for r in scores.results}, key=lambda n: ("combined_score" not in scores.classes[n], n))
    return page.render(
        "report/scores", problems=problems, scores=scores, baseline=baseline,
        baseline_name=baseline_name,
        tables=[table for is_instance in (True, False) if (table := _class_table(scores, baseline, is_instance))],
        intervals=class_intervals(scores), crops=crops, names=names, datasets=datasets, baseline_means=means,
        mean_score=mean_score, shown_value=shown_value, crop_anchor=crop_anchor,
    )  # fmt: skip


def _class_table(scores: Scores, baseline: Scores | None, is_instance: bool) -> dict[str, Any]:
    """Return the classes of one kind, best first: (name, score, baseline's score, entry) each."""
    chosen = {n: e for n, e in scores.classes.items() if ("combined_score" in e) == is_instance}
    if not chosen:
        return {}
    others = baseline.classes if baseline else {}
    rows = [(name, class_score(entry), class_score(others.get(name, {})), entry) for name, entry in chosen.items()]
    return {"is_instance": is_instance, "rows": sorted(rows, key=lambda row: -(row[1] or 0.0))}


def class_score(entry: Mapping[str, Any]) -> float | None:
    """Return the score of a class in ``label_scores``, which the official scorer names by its kind."""
    return optional(entry.get("score", entry.get("combined_score", entry.get("iou"))))


def evaluation_section(path: Path, labels: Path | None = None) -> Markup:
    """Return voxel measures of ``evaluate`` by class, with intervals, and the worst crops; a note first if they are of
    other labels than the folder ``labels`` holds now."""
    data = load_json(path)
    classes, crops = data.get("classes"), data.get("crops")
    if not isinstance(classes, dict) or not isinstance(crops, list):
        raise MetadataError(f"{path}: expected the keys 'classes' and 'crops' of 'pytc evaluate'; run it again")
    rows = [
        {"name": name, "crops": entry.get("crops")}
        | {key: optional(entry.get(key)) for key in _MEASURES}
        | {key: _interval(entry, key) for key in ("score_interval", "dice_interval")}
        for name, entry in classes.items()
    ]
    body = page.render(
        "report/evaluation",
        measures=[m for m in _MEASURES if any(m in entry for entry in classes.values())],
        classes=sorted(rows, key=lambda row: -(row["dice"] or 0.0)),
        worst=sorted(crops, key=lambda row: optional(row.get("dice")) or 0.0)[:_MOST_WORST],
    )  # fmt: skip
    scored = data.get("made_from", {}) if labels is not None else {}
    others = [key for key, before in scored.items() if _label_id(labels, key) != before]
    return page.note(*_other_labels("", labels, others, len(scored), "evaluate")) + body if others else body


def other_labels(
    scores: Scores | None, place: Path | None, shown: Mapping[tuple[str, str], Mapping[str, str]]
) -> list[str]:
    """Return a line if scores are of other labels than ``place`` holds (marks by crop and class)."""
    scored = [result for result in (scores.results if scores else ()) if result.made_from]
    both = [(result, shown.get((result.crop, result.class_name), {})) for result in scored]
    others = [
        f"{result.crop}/{result.class_name}" for result, now in both
        if any(now.get(name, mark) != mark for name, mark in result.made_from.items())
    ]  # fmt: skip
    return _other_labels(f" ({scores.submission})", place, others, len(both), "score") if scores and others else []


def _other_labels(scored: str, place: Path | None, others: Sequence[str], number: int, verb: str) -> list[str]:
    return [
        f"These scores are of other labels{scored} than {place} holds now, for {len(others)} of "
        f"{number_of(number, 'array')} ({first_of(others, 3)}); run {verb} again."
    ]


def _label_id(labels: Path | None, key: str) -> str:
    dataset, crop, name = key.split("/")
    return str(about(store.join(str(labels), f"{dataset}.zarr", crop, name)).get("id", ""))


def _interval(entry: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Return a written interval; None without one, or if there is only one crop, which says nothing about spread."""
    value = entry.get(key)
    if not (isinstance(value, list) and len(value) == 2) or (optional(entry.get("crops")) or 0) < 2:
        return None
    return float(value[0]), float(value[1])
