"""Scores on the page: the headline, classes beside a baseline, crops from worst to best, and evaluated crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from connectomics.errors import MetadataError
from connectomics.pages import page
from connectomics.pages.report import scores as read
from connectomics.pages.report.scores import Scores, optional

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
    means = {crop: read.mean_score(results) for crop, results in (baseline.by_crop() if baseline else {}).items()}
    names = sorted({r.class_name for r in scores.results}, key=lambda n: ("combined_score" not in scores.classes[n], n))
    return page.render(
        "report/scores", problems=problems, scores=scores, baseline=baseline,
        baseline_name=baseline_name,
        tables=[table for is_instance in (True, False) if (table := _class_table(scores, baseline, is_instance))],
        intervals=read.class_intervals(scores), crops=crops, names=names, datasets=datasets, baseline_means=means,
        mean_score=read.mean_score, shown_value=read.shown_value, crop_anchor=read.crop_anchor,
    )  # fmt: skip


def _class_table(scores: Scores, baseline: Scores | None, is_instance: bool) -> dict[str, Any]:
    """Return the classes of one kind, best first: (name, score, baseline's score, entry) each."""
    chosen = {n: e for n, e in scores.classes.items() if ("combined_score" in e) == is_instance}
    if not chosen:
        return {}
    key = "score" if all("score" in e for e in chosen.values()) else "combined_score" if is_instance else "iou"
    order = sorted(chosen.items(), key=lambda item: -float(item[1][key]))
    others = baseline.classes if baseline else {}
    rows = [(name, optional(entry[key]), optional(others.get(name, {}).get(key)), entry) for name, entry in order]
    return {"is_instance": is_instance, "rows": rows}


def evaluation_section(path: Path) -> Markup:
    """Return voxel measures of ``evaluate`` by class, with intervals, and the worst crops."""
    data = read.load_json(path)
    classes, crops = data.get("classes"), data.get("crops")
    if not isinstance(classes, dict) or not isinstance(crops, list):
        raise MetadataError(f"{path}: expected the keys 'classes' and 'crops' of 'pytc evaluate'; run it again")
    rows = [
        {"name": name, "crops": entry.get("crops")}
        | {key: optional(entry.get(key)) for key in _MEASURES}
        | {key: _interval(entry, key) for key in ("score_interval", "dice_interval")}
        for name, entry in classes.items()
    ]
    return page.render(
        "report/evaluation",
        measures=[m for m in _MEASURES if any(m in entry for entry in classes.values())],
        classes=sorted(rows, key=lambda row: -(row["dice"] or 0.0)),
        worst=sorted(crops, key=lambda row: optional(row.get("dice")) or 0.0)[:_MOST_WORST],
    )  # fmt: skip


def _interval(entry: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Return a written interval; None without one, or if there is only one crop, which says nothing about spread."""
    value = entry.get(key)
    if not (isinstance(value, list) and len(value) == 2) or (optional(entry.get("crops")) or 0) < 2:
        return None
    return float(value[0]), float(value[1])
