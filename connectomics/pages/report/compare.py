"""Runs side by side: their scores, their curves in common charts, and the configuration keys that differ."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from connectomics.config.values import flat
from connectomics.errors import ConnectomicsError
from connectomics.pages import charts, page
from connectomics.pages.report import run_folder
from connectomics.pages.report.run_folder import Columns, by_epoch
from connectomics.pages.report.scores import Scores, class_score

_MOST_CLASSES = 60
_MOST_LETTERS = 200  # of a value in the table of differences
_IGNORED = ("output_dir",)  #: keys that differ between any two runs


@dataclass(frozen=True)
class Compared:
    """One run to compare, ``config`` with dotted keys; what could not be read is empty, and ``problems`` says why."""

    name: str
    config: Mapping[str, Any]
    columns: Columns
    timing: Mapping[str, Any]
    scores: Scores | None
    problems: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, run: Path, scores: Path | None) -> Compared:
        """Read a run folder."""
        problems: list[str] = []

        def read(what: Callable[[], Any], empty: Any) -> Any:
            try:
                return what()
            except ConnectomicsError as error:
                problems.append(f"{name}: {error}")
                return empty

        config = read(lambda: flat(run_folder.read_config(run) or {}), {})
        columns = read(lambda: run_folder.read_metrics(run), {})
        timing = read(lambda: run_folder.read_timing(run), {})
        if not (config or columns):
            problems.append(f"{name}: {run} is not a run folder: it has no config.yaml and no metrics.csv.")
        elif unfinished := read(lambda: run_folder.unfinished_state(run), ""):
            problems.append(f"{name} is not complete: it is {unfinished}.")
        found = None if scores is None else read(lambda: Scores.load(scores), None)
        return cls(name, config, columns, timing, found, tuple(problems))

    def values(self, column: str) -> list[float]:
        """Return the values of a column of ``metrics.csv``."""
        return [value for _, _, value in self.columns.get(column, ())]


def section(runs: Sequence[tuple[Path, Path | None]]) -> Markup:
    """Return the comparison of two or more runs, (folder, scores.json or None) each; the first is the report's own."""
    names = short_names([run for run, _ in runs])
    loaded = [Compared.load(name, run, scores) for name, (run, scores) in zip(names, runs, strict=True)]
    configured = [run for run in loaded if run.config]
    keys = list(dict.fromkeys(key for run in configured for key in run.config))
    scored = [run.scores for run in loaded if run.scores is not None]
    alike = len({(found.rules, frozenset((r.crop, r.class_name) for r in found.results)) for found in scored}) < 2
    return page.render(
        "report/compare", runs=loaded, names=names, alike=alike, summary=_summary(loaded, alike),
        charts=_charts(loaded), tables=_class_tables(loaded, alike), most_classes=_MOST_CLASSES,
        configured=configured, differences=_differences(configured, keys), n_keys=len(keys),
    )  # fmt: skip


def short_names(runs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ from each other; equal paths are numbered."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({k})" for k, name in enumerate(names, start=1)]


def _summary(runs: Sequence[Compared], alike: bool) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return rows of (name, a cell for each run): text, and whether it is the best of several values.

    ``alike``: whether the challenge's scores are of the same crops and classes by the same rules."""

    def column(name: str, pick: Callable[[list[float]], float]) -> list[float | None]:
        return [pick(values) if (values := run.values(name)) else None for run in runs]

    def timed(key: str) -> list[float | None]:
        return [run_folder.numbers(run.timing).get(key) for run in runs]

    def most(key: str) -> list[float | None]:
        return [max((v for _, v in by_epoch(run.timing, key)), default=None) for run in runs]

    last = operator.itemgetter(-1)
    rows: list[tuple[str, list[float | None], Callable[[float], str], bool]] = [
        *(
            (f"{kind} score", [getattr(run.scores, kind, None) for run in runs], page.score, alike)
            for kind in ("overall", "instance", "semantic")
        ),
        ("best validation score", column("val/score", max), page.score, True),
        ("best validation Dice", column("val/dice", max), page.score, True),
        ("last validation Dice", column("val/dice", last), page.score, True),
        ("last training loss", column("train/loss", last), "{:.4g}".format, False),
        ("epochs", timed("epochs"), page.count, False),
        ("patches", timed("samples"), page.count, False),
        ("training time", timed("total_s"), page.seconds, False),
        ("patches a second", timed("samples_per_s"), "{:.3g}".format, False),
        ("most memory", most("memory_bytes"), page.size, False),
        ("most GPU memory", most("gpu_memory_bytes"), page.size, False),
    ]
    return [
        (name, _cells(values, text, ranked))
        for name, values, text, ranked in rows
        if any(v is not None for v in values)
    ]


def _cells(values: Sequence[float | None], text: Callable[[float], str], ranked: bool) -> list[tuple[str, bool]]:
    there = {v for v in values if v is not None}
    best = max(there) if ranked and len(there) > 1 else None
    return [("–" if v is None else text(v), v is not None and v == best) for v in values]


def _charts(runs: Sequence[Compared]) -> list[Markup]:
    columns = (("train/loss", "Training loss", None), ("val/dice", "Validation Dice", (0.0, 1.0)),
               ("val/score", "Validation score", (0.0, 1.0)))  # fmt: skip
    resources = (("samples_per_s", "Patches a second", 1.0), ("memory_bytes", "Memory, GB", 1e-9),
                 ("gpu_memory_bytes", "GPU memory, GB", 1e-9))  # fmt: skip
    made = []
    for column, title, limits in columns:
        points = [(run.name, [(epoch, v) for epoch, _, v in run.columns.get(column, ())]) for run in runs]
        made.append(charts.curves(points, title, "epoch", limits))
    for key, title, scale in resources:
        made.append(charts.curves([(run.name, by_epoch(run.timing, key, scale)) for run in runs], title, "epoch"))
    return [chart for chart in made if chart]


def _class_tables(runs: Sequence[Compared], alike: bool) -> list[tuple]:
    """Return (title, classes, values of each run by class, best value by class) of measures that several runs have.

    A class whose values are all the same has no best value, nor has a score that is not ``alike`` (as in `_summary`).
    """
    dice = [
        {name: max(run.values(f"val/{name}/dice")) for name in run_folder.class_names(run.columns, "dice")}
        for run in runs
    ]
    tables = []
    for title, values, ranked in (
        ("Challenge score by class", [_challenge_scores(run) for run in runs], alike),
        ("Validation Dice by class, best of each run", dice, True),
    ):
        if sum(map(bool, values)) >= 2:
            by_class = {name: {found[name] for found in values if name in found} for name in set().union(*values)}
            best = {name: max(there) for name, there in by_class.items() if ranked and len(there) > 1}
            tables.append((title, sorted(by_class), values, best))
    return tables


def _challenge_scores(run: Compared) -> dict[str, float]:
    classes = {} if run.scores is None else run.scores.classes
    values = {name: class_score(entry) for name, entry in classes.items()}
    return {name: value for name, value in values.items() if value is not None}


def _differences(runs: Sequence[Compared], keys: Sequence[str]) -> list[tuple[str, list[str | None]]]:
    """Return (key, value in each run, None if not set) for the keys whose values differ."""
    missing = object()
    rows: list[tuple[str, list[str | None]]] = []
    for key in keys:
        values = [run.config.get(key, missing) for run in runs]
        if key in _IGNORED or all(v == values[0] for v in values[1:]):
            continue
        shown = [None if v is missing else str(v) for v in values]
        rows.append((key, [s and (s if len(s) <= _MOST_LETTERS else s[:_MOST_LETTERS] + " …") for s in shown]))
    return rows
