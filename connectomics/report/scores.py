"""Scores on the page: the headline, classes beside a baseline, crops from worst to best.

What is read is ``scores.json``, as ``SubmissionScore.to_dict`` gives it, and the result of ``evaluate`` (voxel measures
over known voxels). Per-crop scores are the challenge's own formulas on one crop's counts, pooled by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectomics.errors import MetadataError, MissingError
from connectomics.geometry import triple
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
from connectomics.metrics.evaluate import InstanceSums, bootstrap_interval
from connectomics.report import charts, page

_DROPPED = (TOO_MANY, FAILED)
_INTERVALS = (
    "Whiskers and 95 %: a bootstrap over crops. As many crops as there are were drawn from them at random, with "
    "repetition, 1000 times; 95 % of the scores pooled from such a draw lie in the interval. With few crops it is wide "
    "and rough (of two it reaches from the worse to the better), and a class that is in one crop only has none."
)


@dataclass(frozen=True)
class Scores:
    """The content of one ``scores.json``.

    Attributes:
        overall, instance, semantic: missing labels counted; None where no class of the kind was asked for.
        submitted: the same three over what was submitted.
        classes: entries of ``label_scores`` by class. results: every crop and class.
        rules: their version; verified: whether our numbers for it were compared with the official ones.
        warnings: what the scorer had to say.
    """

    overall: float | None
    instance: float | None
    semantic: float | None
    submitted: tuple[float | None, float | None, float | None]
    classes: Mapping[str, Mapping[str, Any]]
    results: tuple[LabelResult, ...]
    rules: str
    verified: bool
    warnings: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read ``scores.json``. `MissingError` where there is none, `MetadataError` where it is something else."""
        data = load_json(path)
        by_quality = data.get("rules") in RULES and RULES[data["rules"]].by_quality
        try:
            results = tuple(
                _result(crop, name, entry, by_quality)
                for crop, entries in data.items()
                if _is_crop(entries)
                for name, entry in entries.items()
            )
            submitted = data.get("submitted_only") or {}
            return cls(
                overall=_number(data["overall_score"]),
                instance=_number(data["overall_instance_score"]),
                semantic=_number(data["overall_semantic_score"]),
                submitted=(
                    _number(submitted.get("overall_score")),
                    _number(submitted.get("overall_instance_score")),
                    _number(submitted.get("overall_semantic_score")),
                ),
                classes=data["label_scores"],
                results=results,
                rules=str(data.get("rules", "not said")),
                verified=bool(data.get("verified", False)),
                warnings=tuple(str(w) for w in data.get("warnings", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise MetadataError(
                f"{path} is not a scores.json as score writes it ({reason}); run score again"
            ) from error

    def of(self, crop: str, class_name: str) -> LabelResult | None:
        """One result, None where there is none."""
        return next((r for r in self.results if r.crop == crop and r.class_name == class_name), None)

    def by_crop(self) -> dict[str, list[LabelResult]]:
        """Results grouped by crop, worst crop first, and within a crop the worst class first."""
        crops: dict[str, list[LabelResult]] = {}
        for result in self.results:
            crops.setdefault(result.crop, []).append(result)
        ranked = sorted(crops.items(), key=lambda item: (mean_score(item[1]), item[0]))
        return {crop: sorted(found, key=lambda r: (rank_value(r), r.class_name)) for crop, found in ranked}


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingError(f"no file {path}") from error
    except (OSError, ValueError) as error:
        raise MetadataError(f"{path} cannot be read as JSON ({error}); write it again") from error
    if not isinstance(data, dict):
        raise MetadataError(f"{path} must hold a JSON object, found {type(data).__name__}; write it again")
    return data


def crop_class(result: LabelResult) -> ClassScore:
    """The class's score from this crop alone."""
    return pool_class(result.class_name, [result])


def shown_value(result: LabelResult) -> float | None:
    """The score of one class in one crop, None where the crop was dropped from the class."""
    return None if result.score.status in _DROPPED and not result.by_quality else crop_class(result).score


def rank_value(result: LabelResult) -> float:
    """The same for ranking: a dropped crop is as bad as 0."""
    value = shown_value(result)
    return 0.0 if value is None else value


def mean_score(results: Sequence[LabelResult]) -> float:
    """Plain mean over the classes of a crop."""
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
    return LabelResult(crop, name, score, voxels, size, missing, by_quality=by_quality)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


# -- the headline ------------------------------------------------------------------------------------------------------
def headline(scores: Scores | None, baseline: Scores | None, baseline_name: str = "baseline") -> str:
    """Three large numbers, the baseline's below each."""
    if scores is None:
        return ""
    tiles = []
    values = (scores.overall, scores.instance, scores.semantic)
    others = (None,) * 3 if baseline is None else (baseline.overall, baseline.instance, baseline.semantic)
    names = ("overall", "instance", "semantic")
    hints = ("√(instance × semantic)", "mean of √(F1 × distance score)", "mean IoU")
    if any(r.by_quality for r in scores.results):
        hints = ("mean over classes", "mean Panoptic Quality", "mean Panoptic Quality")
    for name, hint, value, other in zip(names, hints, values, others, strict=True):
        beside = f"<small>{page.text(baseline_name)} {page.score(other)}</small>" if baseline is not None else ""
        tiles.append(
            f'<div class="tile"><span>{name}</span><strong>{page.score(value)}</strong>{beside}<em>{hint}</em></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


# -- the section -------------------------------------------------------------------------------------------------------
def section(
    scores: Scores, baseline: Scores | None, datasets: Mapping[str, str], baseline_name: str = "baseline"
) -> page.Section:
    """Tables by class and by crop. ``datasets`` gives the data set of a crop where it is known."""
    verified = "" if scores.verified else " (not verified against the official scorer)"
    missing = sum(r.is_missing for r in scores.results)
    lines = [page.hint(f"Challenge rules {scores.rules}{verified}; 1 is perfect.")]
    if baseline is None:
        lines.append(page.note("No baseline was given to compare with."))
    if missing:
        overall = page.score(scores.submitted[0])
        lines.append(
            f'<p class="note">{missing} of {len(scores.results)} labels were not submitted and count as all missed; '
            f"over what was submitted the overall score is {overall}.</p>"
        )
    lines += [page.note(w) for w in scores.warnings]
    body = "".join(lines) + _class_table(scores, baseline, baseline_name)
    body += _crop_table(scores, baseline, datasets, baseline_name)
    return page.Section("scores", "Scores", body)


def class_intervals(scores: Scores) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals over crops of each class's pooled score, for classes that are in two crops or more.

    They say how much a score hangs on which crops happened to be annotated; with few crops they are rough.
    """
    groups: dict[str, list[LabelResult]] = {}
    for result in scores.results:
        groups.setdefault(result.class_name, []).append(result)
    found = {}
    for name, results in groups.items():
        if len(results) < 2:
            continue
        if results[0].by_quality:
            parts = [r.score.panoptic for r in results if r.score.panoptic is not None]
            found[name] = bootstrap_interval(parts, lambda p: p.quality)
        elif isinstance(results[0].score, InstanceScore):
            sums = [
                InstanceSums(r.score.tp, r.score.fp, r.score.fn, r.score.hausdorff_norm_sum, r.score.n_hausdorff)
                for r in results
                if isinstance(r.score, InstanceScore)
            ]
            found[name] = bootstrap_interval(sums, lambda s: s.combined)
        else:
            counts = [Counts(r.score.tp, r.score.fp, r.score.fn) for r in results]
            found[name] = bootstrap_interval(counts, lambda c: c.iou)
    return found


def _class_table(scores: Scores, baseline: Scores | None, baseline_name: str) -> str:
    parts = []
    intervals = class_intervals(scores)
    for is_instance, title in ((True, "Classes scored as instances"), (False, "Classes scored by voxels")):
        chosen = {n: e for n, e in scores.classes.items() if ("combined_score" in e) == is_instance}
        if not chosen:
            continue
        key = "score" if all("score" in e for e in chosen.values()) else "combined_score" if is_instance else "iou"
        extra = ["F1", "distance"] if is_instance else []
        spread = ["95 %"] if intervals.keys() & chosen.keys() else []
        heads = ["class", "", "score", *spread, *([baseline_name] if baseline else []), *extra, "tp", "fp", "fn"]
        rows = []
        for name, entry in sorted(chosen.items(), key=lambda item: -float(item[1][key])):
            other = _number(baseline.classes.get(name, {}).get(key)) if baseline else None
            cells = [page.score(_number(entry[key]))]
            cells += [_interval(intervals.get(name))] if spread else []
            cells += [page.score(other)] if baseline else []
            if is_instance:
                cells += [page.score(_number(entry[k])) for k in ("f1", "normalized_hausdorff_distance")]
            cells += [page.count(entry[k]) for k in ("tp", "fp", "fn")]
            rows.append(
                [
                    f"<th scope=row>{page.text(name)}</th>",
                    f'<td class="wide">{charts.bar(_number(entry[key]), other, intervals.get(name))}</td>',
                    *(f'<td class="num">{c}</td>' for c in cells),
                ]
            )
        marks = f" The mark on a bar is the {baseline_name}." if baseline else ""
        marks += f" {_INTERVALS}" if spread or len(scores.by_crop()) > 1 else ""
        unit = "tp, fp, fn count objects." if is_instance else "tp, fp, fn count voxels."
        head = [h if not h or h == "class" else f"<th scope=col class=num>{page.text(h)}</th>" for h in heads]
        parts.append(f"<h3>{title}</h3>" + page.table(head, rows, kind="bars") + page.hint(unit + marks))
    return "".join(parts)


def _crop_table(scores: Scores, baseline: Scores | None, datasets: Mapping[str, str], baseline_name: str) -> str:
    crops = scores.by_crop()
    if not crops:
        return page.note("The scores name no crop.")
    base = baseline.by_crop() if baseline else {}
    names = sorted({r.class_name for r in scores.results}, key=lambda n: ("combined_score" not in scores.classes[n], n))
    rows = []
    for crop, results in crops.items():
        found = {r.class_name: r for r in results}
        where = f"<small>{page.text(datasets[crop])}</small>" if crop in datasets else ""
        row = [
            f'<th scope=row><a href="#{page.text(crop_anchor(crop))}">{page.text(crop)}</a>{where}</th>',
            f'<td class="num mean">{page.score(mean_score(results))}</td>',
        ]
        if baseline:
            row.append(f'<td class="num">{page.score(mean_score(base[crop]) if crop in base else None)}</td>')
        row += [_cell(found.get(name)) for name in names]
        rows.append(row)
    heads = [
        "crop",
        *(f"<th scope=col class=num>{h}</th>" for h in ("mean", *([page.text(baseline_name)] if baseline else []))),
    ]
    heads += [f'<th scope=col class="num">{page.text(n)}</th>' for n in names]
    return (
        "<h3>Crops, worst first</h3>"
        + page.table(heads, rows, kind="matrix")
        + page.hint(
            "Each number is the class's score from that crop alone; the mean is over its classes. * not submitted"
        )
    )


def _cell(result: LabelResult | None) -> str:
    if result is None:
        return '<td class="none">·</td>'
    value = shown_value(result)
    if result.is_missing:
        return f'<td class="num bad" title="not submitted">{page.score(value)}*</td>'
    if value is None:
        return f'<td class="bad" title="{page.text(result.score.status)}">dropped</td>'
    return f'<td class="num heat" style="--v:{value:.3f}">{page.score(value)}</td>'


def crop_anchor(crop: str) -> str:
    """The id of a crop's part of the page."""
    return f"crop-{plain_id(crop)}"


def plain_id(name: str) -> str:
    """A name as it may stand in an id."""
    return "".join(c if c.isalnum() else "-" for c in name)


def result_text(result: LabelResult) -> str:
    """One result in words, HTML."""
    if result.is_missing:
        return "not submitted: everything counts as missed"
    if result.score.status in _DROPPED:
        return f"dropped from the class ({page.text(result.score.status)})"
    pooled = crop_class(result)
    counts = f"tp {page.count(pooled.tp)}, fp {page.count(pooled.fp)}, fn {page.count(pooled.fn)}"
    if pooled.is_instance:
        return f"F1 {page.score(pooled.f1)}, distance {page.score(pooled.hausdorff)}; objects: {counts}"
    return f"IoU {page.score(pooled.iou)}; voxels: {counts}"


# -- the evaluation over annotated crops -------------------------------------------------------------------------------
def evaluation_section(path: Path) -> page.Section:
    """Voxel measures of ``evaluate`` by class, with intervals, and the worst crops."""
    data = load_json(path)
    classes, crops = data.get("classes"), data.get("crops")
    if not isinstance(classes, dict) or not isinstance(crops, list):
        raise MetadataError(f"{path} is not what evaluate writes: expected 'classes' and 'crops'; run evaluate again")
    measures = [m for m in ("score", "dice", "iou", "precision", "recall") if any(m in e for e in classes.values())]
    rows = [
        [
            f"<th scope=row>{page.text(name)}</th>",
            f'<td class="wide">{charts.bar(_number(entry.get("dice")), None, _spread(entry, "dice_interval"))}</td>',
            *(f'<td class="num">{page.score(_number(entry.get(m)))}</td>' for m in measures),
            f'<td class="num">{_interval(_spread(entry, "score_interval"))}</td>',
            f'<td class="num">{_interval(_spread(entry, "dice_interval"))}</td>',
            f'<td class="num">{page.count(entry.get("crops"))}</td>',
        ]
        for name, entry in sorted(classes.items(), key=lambda item: -(_number(item[1].get("dice")) or 0.0))
    ]
    shown = (*measures, "score 95 %", "Dice 95 %", "crops")
    heads = ["class", "Dice", *(f"<th scope=col class=num>{m}</th>" for m in shown)]
    worst = sorted(crops, key=lambda r: _number(r.get("dice")) or 0.0)[:20]
    worst_rows = [
        [
            page.text(r.get("crop", "")),
            page.text(r.get("dataset", "")),
            page.text(r.get("class", "")),
            *(f'<td class="num">{page.score(_number(r.get(m)))}</td>' for m in measures),
        ]
        for r in worst
    ]
    worst_heads = ["crop", "data set", "class", *(f"<th scope=col class=num>{m}</th>" for m in measures)]
    body = (
        page.hint(
            "Over known voxels only, on annotated crops of the data root; counts are pooled over crops. Score: what "
            f"enters the challenge's score. {_INTERVALS}"
        )
        + page.table(heads, rows, kind="bars")
        + "<h3>Worst first</h3>"
        + page.table(worst_heads, worst_rows)
    )
    return page.Section("evaluation", "Evaluation on annotated crops", body)


def _spread(entry: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """A written interval; None where there is none, or only one crop, of which nothing can be said."""
    value = entry.get(key)
    if not (isinstance(value, list) and len(value) == 2) or (_number(entry.get("crops")) or 0) < 2:
        return None
    return float(value[0]), float(value[1])


def _interval(value: tuple[float, float] | None) -> str:
    return "–" if value is None else f"{page.score(value[0], 2)} to {page.score(value[1], 2)}"
