"""The tables of a study: means and intervals over seeds, differences from the base, cost; and its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from connectomics.io.replacing import contains, has_column, require_own
from connectomics.metrics.tables import write_csv
from connectomics.pages.page import GENERATOR
from connectomics.pages.study import write_study_page
from connectomics.pipeline.study_file import BASE, Arm, Row, StudyFile
from connectomics.pipeline.study_row import RowState, curve, scores_of

_COST = ("steps", "cpu_s", "device_s")


def interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the mean of values and Student's 95 % interval of it: mean +- t(0.975, n - 1) s / sqrt(n).

    None for what needs more values: two for an interval, one for a mean.
    """
    from scipy.stats import t

    if len(values) < 2:
        return (values[0] if values else None), None, None
    middle, half = mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


def row_table(rows: Sequence[Row], scores: Sequence[str], stopped: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a dictionary for each row: what it is, its state, its scores, its cost.

    Args:
        stopped: arms that halving stopped, with the steps.
    """
    found = []
    for row in rows:
        state = RowState.of(row)
        name = state.name(row)
        if row.arm in stopped and name != "failed":
            name = "stopped"
        values = scores_of(row, scores)
        found.append({
            "arm": row.arm, "seed": row.seed, "fold": row.fold, "state": name,
            **{key: values.get(key) for key in (*scores, "last")},
            "steps": state.steps or None, "cpu_s": state.cpu_s, "device_s": state.device_s,
            "error": state.error, "identity": row.identity, "folder": row.folder.name, "code": state.code,
        })  # fmt: skip
    return found


def arm_table(arms: Sequence[Arm], rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> list[dict[str, Any]]:
    """Return a dictionary for each arm: means over its complete rows, intervals over seeds, cost of a row.

    A seed counts if all of its folds are complete; its value is the mean over them. ``SCORE - base`` is the difference
    from the arm `BASE` over the seeds that both have, with an interval of these paired differences.
    """
    by_seed = {score: {arm.name: _by_seed(rows, arm.name, score) for arm in arms} for score in (*scores, "last")}
    table = []
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm.name]
        complete = [row for row in own if row["state"] == "complete"]
        states = dict.fromkeys(row["state"] for row in own if row["state"] != "complete")
        line: dict[str, Any] = {"arm": arm.name, "state": ", ".join(states) or "complete"}
        line |= {"rows": len(own), "complete": len(complete)}
        for score in scores:
            values = by_seed[score][arm.name]
            base = by_seed[score].get(BASE, {})
            apart = [value - base[seed] for seed, value in values.items() if seed in base]
            line |= dict(zip((score, f"{score} low", f"{score} high"), interval(list(values.values())), strict=True))
            if BASE in by_seed[score]:
                names = (f"{score} - base", f"{score} - base low", f"{score} - base high")
                line |= dict(zip(names, interval(apart) if arm.name != BASE else (None,) * 3, strict=True))
        line["last"] = interval(list(by_seed["last"][arm.name].values()))[0]
        for name in _COST:
            known = [row[name] for row in complete if row[name] is not None]
            line[name] = round(mean(known), 2) if known else None
        table.append(line)
    return table


def _by_seed(rows: Sequence[Mapping[str, Any]], arm: str, score: str) -> dict[int, float]:
    """The mean over folds of a score, by seed, for seeds whose folds are all complete."""
    values: dict[int, list[float | None]] = {}
    for row in rows:
        if row["arm"] == arm:
            values.setdefault(row["seed"], []).append(row[score] if row["state"] == "complete" else None)
    return {seed: mean(v for v in of if v is not None) for seed, of in values.items() if None not in of}


def write_tables(
    out: Path, file: Path, arms: Sequence[Arm], rows: Sequence[Row], of_arms: Sequence[Mapping[str, Any]],
    of_rows: Sequence[Mapping[str, Any]], content: StudyFile,
) -> None:  # fmt: skip
    """Write ``study.csv``, ``rows.csv`` and ``study.html``; `WriteError` if one of them is not ours."""
    for name, table in (("study.csv", of_arms), ("rows.csv", of_rows)):
        write_csv(require_own(out / name, has_column("arm"), "study"), table)
    score = next(
        (name for name in content.scores if not name.startswith("evaluate/")), rows[0].config.checkpoint.monitor
    )
    curves = {
        name: {arm.name: {row.name: curve(row, name) for row in rows if row.arm == arm.name} for arm in arms}
        for name in (score, "train/loss")
    }
    old = {path.name for path in (out / "rows").glob("*") if path.is_dir() and path.name[0] != "."}
    write_study_page(
        require_own(out / "study.html", contains(GENERATOR), "study"), file.stem, of_arms, of_rows,
        content.scores, curves, {arm.name: arm.changes for arm in arms}, len(old - {row.folder.name for row in rows}),
    )  # fmt: skip
