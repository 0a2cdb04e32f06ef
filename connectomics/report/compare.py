"""Runs side by side: their scores, their curves over each other, and the configuration in which they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.errors import ConnectomicsError
from connectomics.report import charts, page
from connectomics.report.scores import Scores
from connectomics.report.training import Columns, epoch_rows, read_config, read_metrics, timing_of, unfinished_state

_MOST_CLASSES = 60
#: What may differ between any two runs without telling anything.
_PLACES = ("output_dir",)


@dataclass(frozen=True)
class Compared:
    """One run as it is compared; what could not be read is empty, and ``problems`` says why.

    Attributes:
        name: the shortest end of the folder's path that no other run has. config: flat, ``data.patch_size``.
        columns: of ``metrics.csv``. timing: ``timing.json``. scores: of its submission, None where none was given.
    """

    name: str
    config: Mapping[str, Any]
    columns: Columns
    timing: Mapping[str, Any]
    scores: Scores | None
    problems: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, run: Path, scores: Path | None) -> Compared:
        """Read a run's folder."""
        problems: list[str] = []

        def read(what: Callable[[], Any], empty: Any) -> Any:
            try:
                return what()
            except ConnectomicsError as error:
                problems.append(f"{name}: {error}")
                return empty

        config = read(lambda: flat(read_config(run) or {}), {})
        metrics = run / "metrics.csv"
        columns = read(lambda: read_metrics(metrics) if metrics.is_file() else {}, {})
        timing = read(lambda: timing_of(run) or {}, {})
        if not (config or columns):
            problems.append(f"{name}: {run} holds no config.yaml and no metrics.csv, so it is no run of train.")
        elif unfinished := read(lambda: unfinished_state(run), ""):
            problems.append(f"{name} is not whole: it is {unfinished}.")
        found = None if scores is None else read(lambda: Scores.load(scores), None)
        return cls(name, config, columns, timing, found, tuple(problems))


def section(runs: Sequence[tuple[Path, Path | None]]) -> page.Section:
    """The comparison of two or more runs: (folder, scores.json or None) each, the first is the report's own."""
    names = short_names([run for run, _ in runs])
    loaded = [Compared.load(name, run, scores) for name, (run, scores) in zip(names, runs, strict=True)]
    notes = "".join(page.note(p) for run in loaded for p in run.problems)
    parts = [
        notes,
        _summary(loaded),
        _curves(loaded),
        _class_scores(loaded, "Challenge score by class", _challenge_score),
        _class_scores(loaded, "Validation Dice by class, best of each run", _validation_dice),
        _differences(loaded),
    ]
    return page.Section("runs", "Runs compared", "".join(parts))


def short_names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; equal paths are numbered."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({k})" for k, name in enumerate(names, start=1)]


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A configuration with one level: ``{"data": {"patch_size": 3}}`` becomes ``{"data.patch_size": 3}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


# -- the parts ---------------------------------------------------------------------------------------------------------
def _heads(runs: Sequence[Compared]) -> list[str]:
    return [f"<th scope=col class=num>{page.text(run.name)}</th>" for run in runs]


def _summary(runs: Sequence[Compared]) -> str:
    rows: list[tuple[str, list[float | None], Callable[[float], str], bool]] = [
        ("overall score", [_of(r.scores, "overall") for r in runs], page.score, True),
        ("instance score", [_of(r.scores, "instance") for r in runs], page.score, True),
        ("semantic score", [_of(r.scores, "semantic") for r in runs], page.score, True),
        ("best validation score", [_best(r, "val/score") for r in runs], page.score, True),
        ("best validation Dice", [_best(r, "val/dice") for r in runs], page.score, True),
        ("last validation Dice", [_last(r, "val/dice") for r in runs], page.score, True),
        ("last training loss", [_last(r, "train/loss") for r in runs], lambda v: f"{v:.4g}", False),
        ("epochs", [_number(r.timing.get("epochs")) for r in runs], page.count, False),
        ("patches", [_number(r.timing.get("samples")) for r in runs], page.count, False),
        ("training time", [_number(r.timing.get("total_s")) for r in runs], page.seconds, False),
        ("patches a second", [_number(r.timing.get("samples_per_s")) for r in runs], lambda v: f"{v:.3g}", False),
        ("most memory", [_most(r, "memory_bytes") for r in runs], page.size, False),
        ("most GPU memory", [_most(r, "gpu_memory_bytes") for r in runs], page.size, False),
    ]
    body = []
    for name, values, shown, highest in rows:
        there = [v for v in values if v is not None]
        if not there:
            continue
        # a best one is marked where higher is better and not all are the same
        best = max(there) if highest and len(set(there)) > 1 else None
        cells = [
            f'<td class="num{" mean" * (v is not None and v == best)}">{"–" if v is None else shown(v)}</td>'
            for v in values
        ]
        body.append([f"<th scope=row>{name}</th>", *cells])
    if not body:
        return page.note("None of the runs has scores or metrics.")
    return page.table(["", *_heads(runs)], body) + page.hint("The best of a row is bold.")


def _curves(runs: Sequence[Compared]) -> str:
    wanted: list[tuple[str, str, str, tuple[float, float] | None]] = [
        ("train/loss", "Training loss", "", None),
        ("val/dice", "Validation Dice", "", (0.0, 1.0)),
        ("val/score", "Validation score", "", (0.0, 1.0)),
    ]
    made = []
    for column, title, unit, limits in wanted:
        lines = [s for run in runs if (s := _line(run.name, [(e, v) for e, _, v in run.columns.get(column, ())]))]
        if lines:
            made.append(charts.line_chart(lines, title, "epoch", limits, y_label=unit))
    for key, title, scale in (
        ("samples_per_s", "Patches a second", 1.0),
        ("memory_bytes", "Memory, GB", 1e-9),
        ("gpu_memory_bytes", "GPU memory, GB", 1e-9),
    ):
        lines = [s for run in runs if (s := _line(run.name, epoch_rows(run.timing, key, scale)))]
        if lines:
            made.append(charts.line_chart(lines, title, "epoch"))
    return f'<div class="charts">{"".join(made)}</div>' if made else ""


def _line(name: str, points: Sequence[tuple[float, float]]) -> charts.Series | None:
    kept = np.array([p for p in points if math.isfinite(p[0])], np.float64)
    return charts.Series(name, kept[:, 0], kept[:, 1]) if len(kept) else None


def _class_scores(runs: Sequence[Compared], title: str, values_of: Callable[[Compared], Mapping[str, float]]) -> str:
    values = [values_of(run) for run in runs]
    names = sorted({name for found in values for name in found})
    if not names or sum(map(bool, values)) < 2:
        return ""
    rows = []
    for name in names[:_MOST_CLASSES]:
        bars = "".join(charts.bar(found.get(name), kind=f"s{k % 8}") for k, found in enumerate(values))
        there = [found[name] for found in values if name in found]
        cells = [
            f'<td class="num{" mean" * (name in found and found[name] == max(there) > min(there))}">'
            f"{page.score(found.get(name))}</td>"
            for found in values
        ]
        rows.append([f"<th scope=row>{page.text(name)}</th>", f'<td class="wide">{bars}</td>', *cells])
    more = page.note(f"{len(names) - _MOST_CLASSES} more classes.") if len(names) > _MOST_CLASSES else ""
    key = "".join(f'<li class="s{k % 8}"><i class="own"></i>{page.text(r.name)}</li>' for k, r in enumerate(runs))
    table = page.table(["class", "", *_heads(runs)], rows, kind="bars")
    return f'<h3>{title}</h3><ul class="legend">{key}</ul>{table}{more}'


def _challenge_score(run: Compared) -> dict[str, float]:
    if run.scores is None:
        return {}
    found = {
        name: entry.get("score", entry.get("combined_score", entry.get("iou")))
        for name, entry in run.scores.classes.items()
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _validation_dice(run: Compared) -> dict[str, float]:
    names = [n for n in run.columns if n.startswith("val/") and n.endswith("/dice") and n != "val/dice"]
    return {n.removeprefix("val/").removesuffix("/dice"): max(v for _, _, v in run.columns[n]) for n in names}


def _differences(runs: Sequence[Compared]) -> str:
    """Keys whose values are not the same in all runs that have a configuration."""
    configured = [run for run in runs if run.config]
    if len(configured) < 2:
        return page.note("Configurations are not compared: fewer than two of the runs have a config.yaml.")
    keys = dict.fromkeys(key for run in configured for key in run.config)
    missing = object()
    rows = []
    for key in keys:
        values = [run.config.get(key, missing) for run in configured]
        if key in _PLACES or all(v == values[0] for v in values[1:]):
            continue
        cells = ['<span class="none">not set</span>' if v is missing else page.text(_plain(v)) for v in values]
        rows.append([f"<th scope=row>{page.text(key)}</th>", *(f'<td class="code">{c}</td>' for c in cells)])
    title = "<h3>Configuration: what differs</h3>"
    same = f"{len(keys) - len(rows)} of {len(keys)} keys are the same."
    if not rows:
        return title + page.hint(f"Nothing differs: all {len(keys)} keys are the same.")
    heads = ["key", *(f"<th scope=col>{page.text(run.name)}</th>" for run in configured)]
    return title + page.table(heads, rows) + page.hint(same)


def _plain(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= 200 else shown[:200] + " …"


def _of(scores: Scores | None, name: str) -> float | None:
    values = {} if scores is None else {"overall": scores.overall, "instance": scores.instance}
    return scores.semantic if scores is not None and name == "semantic" else values.get(name)


def _best(run: Compared, column: str) -> float | None:
    return max((v for _, _, v in run.columns.get(column, ())), default=None)


def _last(run: Compared, column: str) -> float | None:
    points = run.columns.get(column)
    return points[-1][2] if points else None


def _most(run: Compared, key: str) -> float | None:
    return max((v for _, v in epoch_rows(run.timing, key)), default=None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
