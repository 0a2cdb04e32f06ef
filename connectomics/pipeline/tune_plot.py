"""The picture of a tuning: every class's score by trial and by threshold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from connectomics.errors import WriteError


def plot_tuning(classes: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with one row a class: score by trial with the best so far, and score by threshold.

    Args:
        classes: class -> row of ``tuning.json`` (`connectomics.pipeline.tune.TunedClass.to_dict`).
        path: the PNG; it appears whole or not at all. Raises `WriteError` where that fails.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 2, squeeze=False)
    for (left, right), (name, row) in zip(axes, sorted(classes.items()), strict=True):
        _by_trial(left, row)
        _by_threshold(right, row)
        left.set_ylabel(f"{name}: {row['measure']}")
        left.set_title(f"{name}: {row['base_score']:.4f} to {row['best_score']:.4f}", fontsize=9)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def _by_trial(axis: Any, row: Mapping[str, Any]) -> None:
    axis.set_xlabel("trial")
    axis.axhline(row["base_score"], color="grey", linestyle="--", linewidth=1, label="base")
    if not row["trials"]:
        axis.axhline(row["best_score"], color="tab:blue", linewidth=1, label="best")
        axis.text(0.5, 0.5, "all thresholds at once, no trials", ha="center", transform=axis.transAxes, fontsize=8)
    for state, marker in (("complete", "o"), ("pruned", "x")):
        there = [t for t in row["trials"] if t["state"] == state and t["score"] is not None]
        if there:
            axis.plot([t["number"] for t in there], [t["score"] for t in there], marker, markersize=3, label=state)
    complete = [t for t in row["trials"] if t["state"] == "complete"]
    if complete:
        running = list(accumulate((t["score"] for t in complete), max))
        axis.step([t["number"] for t in complete], running, where="post", linewidth=1, label="best so far")
    axis.legend(fontsize=7)


def _by_threshold(axis: Any, row: Mapping[str, Any]) -> None:
    axis.set_xlabel("threshold")
    axis.set_xlim(0, 1)
    if row["thresholds"]:
        axis.plot(*zip(*row["thresholds"], strict=True), linewidth=1)
    for method in sorted({t["parameters"]["method"] for t in row["trials"]}):
        there = [t for t in row["trials"] if t["parameters"]["method"] == method and t["state"] == "complete"]
        axis.plot(
            [t["parameters"]["threshold"] for t in there], [t["score"] for t in there], "o", markersize=3, label=method
        )
    axis.plot([row["base"]["threshold"]], [row["base_score"]], "s", color="grey", label="base")
    axis.plot([row["best"]["threshold"]], [row["best_score"]], "*", color="black", label="best")
    axis.legend(fontsize=7)
