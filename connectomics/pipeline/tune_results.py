"""What tuning found for a class, and the files it leaves: decoding.yaml, tuning.json and tuning.png."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from connectomics.config.values import plain, read
from connectomics.data.splits import Split
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import MetadataError, MissingError
from connectomics.io.write import write_file
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules
from connectomics.metrics.tables import write_json
from connectomics.pipeline.runs import Run, best_values


@dataclass(frozen=True)
class TunedClass:
    """What tuning found for one class; a row of ``tuning.json``.

    Attributes:
        measure: ``combined`` (instances), ``iou``, or ``pq`` by rules of quality; pooled over ``crops``
            (``dataset/crop``), known voxels only.
        made_from: crop -> identity of its prediction.
        base, best: parameters before and after; ``best`` is ``base`` if nothing scored higher.
        trials: of a search, in order: ``number``, ``state`` (``complete`` or ``pruned``), ``score``, ``parameters``.
        thresholds: (threshold, IoU) of every stored value, if no search was needed.
        networks: hash of the network, or of the ensemble, that predicted the crops, if the predictions have it.
    """

    measure: str
    crops: tuple[str, ...]
    made_from: dict[str, str]
    base: DecodeParameters
    base_score: float
    best: DecodeParameters
    best_score: float
    trials: list[dict[str, Any]] = field(default_factory=list)
    thresholds: list[tuple[float, float]] = field(default_factory=list)
    networks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassScore:
    """The validation score of one class: its measure and value, and if they are known the crops, the parameters and the
    hashes of the networks."""

    measure: str
    score: float
    crops: tuple[str, ...] = ()
    parameters: DecodeParameters | None = None
    networks: tuple[str, ...] = ()


def tuned_scores(folder: Path) -> dict[str, ClassScore]:
    """Return the scores and parameters that `pytc tune` left in a folder (``tuning.json``), by class."""
    file = folder / "tuning.json"
    if not file.is_file():
        raise MissingError(f"no {file}; give the folder that pytc tune wrote (its --out)")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        rows: Mapping[str, Any] = stored["classes"]
        by = "" if (rules := stored.get("rules", DEFAULT_RULES)) == DEFAULT_RULES else f" by {rules}"
        return {
            name: ClassScore(
                f"{row['measure']}{by if row['measure'] == 'combined' else ''}",
                float(row["best_score"]),
                tuple(row["crops"]),
                read(DecodeParameters, row["best"], f"{file}: {name}"),
                tuple(row.get("networks", ())),
            )
            for name, row in rows.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise MetadataError(f"{file} is not what pytc tune writes ({type(error).__name__}: {error})") from error


def run_scores(run: Run) -> dict[str, ClassScore]:
    """Return the validation Dice of each class of a run, with the weights that `Run.checkpoint` is."""
    values, split = best_values(run), run.folder / "split.yaml"
    crops = Split.load(split).val if split.is_file() else ()
    return {
        name: ClassScore("dice", values[key], crops) for name in run.classes if (key := f"val/{name}/dice") in values
    }


def write_results(
    folder: Path,
    current: Mapping[str, Mapping[str, str]],
    base: Mapping[str, DecodeParameters],
    result: Mapping[str, TunedClass],
    rules: Rules,
) -> None:
    """Write the tuned classes, and those that an earlier run tuned on the same predictions by the same rules.

    ``current``: class -> crop -> identity of its prediction now. ``base``: parameters of classes that were not tuned.
    """
    import yaml

    summary = folder / "tuning.json"
    rows: dict[str, Any] = {}
    if summary.is_file():
        stored = json.loads(summary.read_text(encoding="utf-8"))
        for name, row in stored["classes"].items() if stored.get("rules", DEFAULT_RULES) == rules.version else ():
            if row.get("made_from", {"": ""}).items() <= current.get(name, {}).items():
                rows[name] = row
    rows |= {name: plain(tuned) for name, tuned in result.items()}
    best = {name: plain(parameters) for name, parameters in base.items()}
    best |= {name: row["best"] for name, row in rows.items()}
    write_json(summary, {"rules": rules.version, "verified": rules.verified, "classes": rows})
    plot_tuning(rows, folder / "tuning.png")
    text = "# What tuning chose (tuning.json has the trials); pytc decode --config reads it.\n"
    text += yaml.safe_dump({"decoding": {"classes": best}}, sort_keys=True)
    write_file(folder / "decoding.yaml", text.encode())


def plot_tuning(classes: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with one row for each class (its row of ``tuning.json``): score by trial, and score by threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 2, squeeze=False)
    for (left, right), (name, row) in zip(axes, sorted(classes.items()), strict=True):
        _by_trial(left, row)
        _by_threshold(right, row)
        left.set_ylabel(f"{name}: {row['measure']}")
        left.set_title(f"{name}: {row['base_score']:.4f} to {row['best_score']:.4f}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())


def _by_trial(axis: Any, row: Mapping[str, Any]) -> None:
    axis.set_xlabel("trial")
    axis.axhline(row["base_score"], color="gray", linestyle="--", linewidth=1, label="base")
    if not row["trials"]:
        axis.axhline(row["best_score"], color="tab:blue", linewidth=1, label="best")
        axis.text(0.5, 0.5, "all thresholds at once, no trials", ha="center", transform=axis.transAxes, fontsize=8)
    for state, marker in (("complete", "o"), ("pruned", "x")):
        there = [t for t in row["trials"] if t["state"] == state and t["score"] is not None]
        if there:
            axis.plot([t["number"] for t in there], [t["score"] for t in there], marker, markersize=3, label=state)
        if there and state == "complete":
            running = list(accumulate((t["score"] for t in there), max))
            axis.step([t["number"] for t in there], running, where="post", linewidth=1, label="best so far")
    axis.legend(fontsize=7)


def _by_threshold(axis: Any, row: Mapping[str, Any]) -> None:
    axis.set_xlabel("threshold")
    axis.set_xlim(0, 1)
    if row["thresholds"]:
        axis.plot(*zip(*row["thresholds"], strict=True), linewidth=1)
    for method in sorted({t["parameters"]["method"] for t in row["trials"]}):
        there = [t for t in row["trials"] if t["parameters"]["method"] == method and t["state"] == "complete"]
        thresholds = [t["parameters"]["threshold"] for t in there]
        axis.plot(thresholds, [t["score"] for t in there], "o", markersize=3, label=method)
    axis.plot([row["base"]["threshold"]], [row["base_score"]], "s", color="gray", label="base")
    axis.plot([row["best"]["threshold"]], [row["best_score"]], "*", color="black", label="best")
    axis.legend(fontsize=7)
