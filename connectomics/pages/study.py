"""The page of a study: its table, learning curves by arm, its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from connectomics.io.replacing import write_file
from connectomics.pages import charts, page

#: score -> arm -> row -> (optimizer steps, value).
Curves = Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]]


def write_study_page(
    path: Path,
    title: str,
    arms: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[str],
    curves: Curves,
    changes: Mapping[str, Mapping[str, Any]],
    factors: Sequence[str],
    outdated: int,
) -> Path:
    """Write a self-contained page and return its path; raise `WriteError` if it cannot be written.

    Args:
        arms, rows: the tables of `connectomics.pipeline.study`. scores: those of the tables; the first decides.
        curves: metrics of each row. changes: what each arm changes in the base. factors: of a grid, which are columns
            of ``arms``; two of them get a table of one against the other.
        outdated: number of row folders that belong to no row of the study.
    """
    values: dict[str, Any] = {"arms": arms, "rows": rows, "scores": scores, "outdated": outdated, "factors": factors}
    grid: dict[str, dict[str, Any]] = {}  # two factors: one against the other
    for arm in arms if len(factors) == 2 else ():
        grid.setdefault(arm[factors[0]], {})[arm[factors[1]]] = arm
    texts = {name: [f"{k} = {json.dumps(v)}" for k, v in of.items()] for name, of in changes.items()}
    codes = sorted({row["code"] for row in rows if row["code"]})
    sections = [
        page.Section("result", "Result", page.render("study/result", changes=texts, codes=codes, grid=grid, **values)),
        page.Section("curves", "Learning curves", _curves(curves)),
        page.Section("rows", "Rows", page.render("study/rows", **values)),
    ]
    complete = sum(row["state"] == "complete" for row in rows)
    header = page.render("study/header", title=title, complete=complete, **values)
    write_file(path, page.document(title, header, sections, "This page is one file.").encode())
    return path


def _curves(curves: Curves) -> Markup:
    """A chart of the means of all arms for each metric, and one of the rows of each arm."""
    made = []
    for name, arms in curves.items():
        means = {arm: _mean(list(rows.values())) for arm, rows in arms.items()}
        made.append(charts.curves(means.items(), f"{name}, mean of each arm", "step"))
    name, arms = next(iter(curves.items()))
    made += [charts.curves(rows.items(), f"{arm}: {name}", "step") for arm, rows in arms.items()]
    charts_made = [chart for chart in made if chart]
    if not charts_made:
        return page.note("No row has been validated yet.")
    return page.render("study/curves", charts=charts_made)


def _mean(rows: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean over rows at the steps that all started rows have."""
    there = [dict(points) for points in rows if points]
    steps = sorted(set.intersection(*map(set, there))) if there else []
    return [(step, float(np.mean([points[step] for points in there]))) for step in steps]
