"""Write scores: ``scores.json``, CSV per class, crop and instance. Writes are atomic."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.io.location import local_path
from connectomics.io.replacing import has_column, has_keys, require_own
from connectomics.io.write import write_file

if TYPE_CHECKING:
    from connectomics.metrics.challenge.results import SubmissionScore


_FILES = {
    "json": ("scores.json", has_keys("rules", "label_scores")),
    "classes": ("scores_per_class.csv", has_column("class")),
    "crops": ("scores_per_crop.csv", has_column("crop")),
    "instances": ("scores_per_instance.csv", has_column("crop")),
}


def scores_files(folder: str | Path) -> dict[str, Path]:
    """Return the paths that `write_scores` writes; `WriteError` if one of them is a file of another kind."""
    return {name: require_own(local_path(folder) / file, own, "score") for name, (file, own) in _FILES.items()}


def write_scores(score: SubmissionScore, folder: str | Path) -> dict[str, Path]:
    """Write ``scores.json`` and ``scores_per_{class,crop,instance}.csv`` into a folder, which is created if missing.

    Returns the paths under ``json``, ``classes``, ``crops`` and ``instances``. Raises `WriteError` if writing fails, or
    would replace a file of another kind.
    """
    paths = scores_files(folder)
    write_json(paths["json"], score.to_dict())
    write_csv(paths["classes"], class_rows(score))
    write_csv(paths["crops"], crop_rows(score))
    write_csv(paths["instances"], instance_rows(score))
    return paths


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, atomically; NaN and infinities become null."""
    write_file(local_path(path), (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode())


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically; columns are the rows' keys in order of appearance, absent values stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    write_file(local_path(path), text.getvalue().encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- rows --------------------------------------------------------------------------------------------------------------
def class_rows(score: SubmissionScore) -> list[dict[str, Any]]:
    """Return one row per class: its kind, both scores, and the counts and ratios behind them."""
    rows = []
    for name, total in score.totals.classes.items():
        submitted = score.submitted_only.classes.get(name)
        rows.append(
            {
                "class": name,
                "kind": "instance" if total.is_instance else "semantic",
                "score": total.score,
                "score_submitted_only": submitted.score if submitted else None,
                "f1": total.f1,
                "normalized_hausdorff_distance": total.hausdorff,
                "panoptic_quality": total.panoptic.quality if total.panoptic else None,
                "iou": total.iou,
                "tp": total.tp,
                "fp": total.fp,
                "fn": total.fn,
                "crops": total.n_crops,
                "missing": total.n_missing,
                "skipped": total.n_skipped,
                "rules": score.rules,
                "verified": score.verified,
            }
        )
    return rows


def crop_rows(score: SubmissionScore) -> list[dict[str, Any]]:
    """Return one row per crop and class, before pooling."""
    rows = []
    for result in score.results:
        entries = result.to_dict()
        panoptic = entries.pop("panoptic", None)
        entries["voxel_size"] = " ".join(str(v) for v in entries["voxel_size"])
        rows.append(
            {
                "crop": result.crop,
                "dataset": result.dataset,
                "class": result.class_name,
                **entries,
                "panoptic_quality": panoptic["pq"] if panoptic else None,
                "rules": score.rules,
                "verified": score.verified,
            }
        )
    return rows


def instance_rows(score: SubmissionScore) -> list[dict[str, Any]]:
    """Return one row per true instance: its match, their IoU, and the distance in nm."""
    from connectomics.metrics.challenge.results import InstanceScore

    rows = []
    for result in score.results:
        if isinstance(result.score, InstanceScore) and result.score.instances is not None:
            names = {"crop": result.crop, "class": result.class_name}
            rows += [{**names, **row} for row in result.score.instances.rows()]
    return rows
