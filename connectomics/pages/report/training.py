"""The run on the page: what was run, how training went, where the time went, with which configuration."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from markupsafe import Markup

from connectomics import __version__
from connectomics.config.values import flat
from connectomics.errors import MetadataError, MissingError
from connectomics.machine import usable_cores
from connectomics.pages import charts, page
from connectomics.pages.report import run_folder
from connectomics.pages.report.library import attributes_by_class, unknown_lines
from connectomics.pages.report.run_folder import Columns
from connectomics.pages.report.scores import Scores
from connectomics.pages.report.sources import ReportSources

_TIMES = {
    "step_s": "forward, backward, optimizer",
    "data_wait_s": "waiting for data",
    "validation_s": "validation",
    "other_s": "checkpoints, start-up, other",
}
#: Keys of a configuration that are shown first, by the words for them.
_MAIN_KEYS = {
    "configuration": "name", "network": "model.architecture", "classes": "dataset.classes",
    "voxel size": "dataset.voxel_size", "patch": "data.patch_size", "batch size": "data.batch_size",
    "losses": "model.loss_functions", "optimizer": "optimizer.name", "learning rate": "optimizer.lr",
    "epochs, at most": "training.max_epochs", "precision": "training.precision", "seed": "system.seed",
}  # fmt: skip


# -- what was run ------------------------------------------------------------------------------------------------------
def provenance(sources: ReportSources, table: Scores | None) -> Markup:
    """Return facts about the run, its predictions, the submission and its score, and the software."""
    problems: list[str] = []
    groups: dict[str, dict[str, Any]] = {
        "Run": _run_facts(sources, problems),
        "Training ran on": {} if sources.run is None else run_folder.training_environment(sources.run),
        "Prediction": _artifact_facts(sources, problems),
        "Submission and score": _submission_facts(sources, table, problems),
        "This page was made with": {
            "report": f"connectomics {__version__}, {page.now()}",
            **(environment() if sources.environment is None else sources.environment),
        },
    }
    labels = attributes_by_class(sources.labels)
    decoding = {name: about["decode"] for name, about in sorted(labels.items()) if "decode" in about}
    keys = list(dict.fromkeys(key for parameters in decoding.values() for key in parameters))
    return page.render("report/provenance", problems=problems, groups=groups, decoding=decoding, keys=keys)


def _run_facts(sources: ReportSources, problems: list[str]) -> dict[str, Any]:
    if sources.run is None:
        problems.append("No run folder was given, so configuration and training are not shown.")
        return {}
    if not sources.run.is_dir():
        problems.append(f"The run folder {sources.run} does not exist.")
        return {}
    config = run_folder.read_config(sources.run)
    if config is None:
        problems.append(f"There is no config.yaml in {sources.run}.")
        return {"folder": sources.run.name}
    written = datetime.fromtimestamp((sources.run / "config.yaml").stat().st_mtime).astimezone()
    if unfinished := run_folder.unfinished_state(sources.run):
        problems.append(f"This run is not complete: it is {unfinished}.")
    shown = flat(config)
    facts = {name: _plain(name, shown[key]) for name, key in _MAIN_KEYS.items() if shown.get(key) is not None}
    return {"configured": written.strftime("%Y-%m-%d %H:%M %Z"), **facts}


def _submission_facts(sources: ReportSources, table: Scores | None, problems: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if sources.submission is not None and sources.submission.is_file():
        facts["file"] = f"{sources.submission.name}, {page.size(sources.submission.stat().st_size)}"
        with sources.submission.open("rb") as stream:
            facts["SHA-256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    elif sources.submission is not None and not sources.submission.exists():
        problems.append(f"The submission {sources.submission} does not exist.")
    if table is not None:
        facts["rules"] = table.rules + ("" if table.verified else ", not verified against the official scorer")
        facts["scored"] = f"{len(table.results)} labels in {len({r.crop for r in table.results})} crops"
    if sources.baseline_scores is not None:
        facts["compared with"] = sources.baseline_name
    return facts


def environment() -> dict[str, str]:
    """Return the machine of this process and the versions of the main packages, without importing them."""
    return {
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in run_folder.PACKAGES),
        "machine": f"{platform.system()} {platform.machine()}, {usable_cores()} cores",
    }


def _plain(name: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value):
        return page.nm(value) + (" nm" if name in ("voxel size", "voxel_size") else "")
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)


def _artifact_facts(sources: ReportSources, problems: list[str]) -> dict[str, Any]:
    """Return what predictions and labels say about themselves."""
    problems += unknown_lines(sources.labels or sources.probabilities)
    labels, predictions = (
        next(iter(attributes_by_class(folder).values()), {}) for folder in (sources.labels, sources.probabilities)
    )
    made_from = labels.get("source")
    model = predictions.get("model") or (made_from.get("model") if isinstance(made_from, Mapping) else None)
    facts: dict[str, Any] = {}
    for key, value in model.items() if isinstance(model, Mapping) else ():
        short = not isinstance(value, Mapping) and (not isinstance(value, list) or len(value) <= 16)
        if short and value not in (None, "", []):
            facts[str(key).replace("_", " ")] = _plain(str(key), value)
    versions = {str(a["version"]) for a in (labels, predictions) if "version" in a}
    if versions - {__version__}:
        facts["artifacts written by"] = f"connectomics {', '.join(sorted(versions))}"
    return facts


# -- training ----------------------------------------------------------------------------------------------------------
def curves(run: Path | None) -> Markup:
    """Return curves of ``metrics.csv`` (losses, validation measures, learning rate) and of ``timing.json``."""
    if run is None:
        raise MissingError("No training curves: no run folder was given.")
    path = run / "metrics.csv"
    if not path.is_file():
        raise MissingError(f"No training curves: there is no {path}.")
    columns = run_folder.read_metrics(run)
    made = [
        _loss_chart(columns),
        _measure_chart(columns, "dice", "Validation Dice, whole crops"),
        _measure_chart(columns, "score", "Validation, the challenge's score"),
        *_resource_charts(run),
    ]
    rate = next((n for n in columns if n in ("train/lr", "lr") or n.startswith("lr-")), None)
    if rate is not None and len({v for _, _, v in columns[rate]}) > 1:  # a constant rate needs no chart
        made.insert(3, charts.line_chart(_series(columns, rate, "rate"), "Learning rate", "epoch"))
    if not any(made):
        return page.note(f"No training curves: {path} holds no losses or scores.")
    dice = columns.get("val/dice", ())
    best, last = max(dice, key=lambda point: point[2], default=None), dice[-1] if dice else None
    return page.render("report/training", best=best, last=last, charts=made)


def _series(columns: Columns, name: str, label: str, axis: int = 0, strong: bool = False) -> list[charts.Series]:
    """Return the line of a column over epochs (``axis`` 0) or steps (1), if it has points."""
    return charts.series(label, ((p[axis], p[2]) for p in columns.get(name, ())), strong)


def _loss_chart(columns: Columns) -> Markup:
    name = next((n for n in ("train/loss", "train/loss_epoch", "train/loss_step") if n in columns), None)
    if name is None:
        return Markup("")
    axis, label = (1, "step") if name == "train/loss_step" else (0, "epoch")
    series = _series(columns, name, "train", axis, strong=True) + _series(columns, "val/loss", "validation", axis)
    parts = [n for n in columns if n.startswith("train/") and n.lower().endswith("loss") and n != name]
    for part in parts[:6]:
        series += _series(columns, part, part.removeprefix("train/").removesuffix("Loss"), axis)
    return charts.line_chart(series, "Training loss", label)


def _measure_chart(columns: Columns, measure: str, title: str) -> Markup:
    """Return a validation measure over all classes and of each class."""
    series = _series(columns, f"val/{measure}", "all classes", strong=True)
    for name in run_folder.class_names(columns, measure):
        series += _series(columns, f"val/{name}/{measure}", name)
    return charts.line_chart(series, title, "epoch", (0.0, 1.0))


def _resource_charts(run: Path) -> list[Markup]:
    """Return throughput and memory by epoch, as far as the run recorded them."""
    timing = run_folder.read_timing(run)
    made = []
    for title, lines in (
        ("Patches a second, while training", (("rate", "samples_per_s", 1.0),)),
        ("Share of training spent waiting for data", (("waiting", "data_wait_share", 1.0),)),
        ("Memory, GB", (("processes", "memory_bytes", 1e-9), ("GPU", "gpu_memory_bytes", 1e-9))),
    ):
        by_epoch = [(name, run_folder.by_epoch(timing, key, scale)) for name, key, scale in lines]
        made.append(charts.curves(by_epoch, title, "epoch", (0.0, 1.0) if "Share" in title else None))
    return made


# -- time and configuration --------------------------------------------------------------------------------------------
def time(sources: ReportSources) -> Markup:
    """Return bars by stage, and of the parts of training."""
    timing = {} if sources.run is None else run_folder.read_timing(sources.run)
    numbers = run_folder.numbers(timing)
    times = {label: numbers[key] for key, label in _TIMES.items() if key in numbers}
    if not times:  # written by another program: show what looks like seconds
        times = {k.removesuffix("_s"): v for k, v in numbers.items() if k.endswith("_s") and not k.endswith("per_s")}
    names = ("epochs", "batches", "samples", "validations")
    facts = {name: page.count(numbers[name]) for name in names if name in numbers}
    if "samples_per_s" in numbers:
        facts["samples per second"] = f"{numbers['samples_per_s']:.3g}"
    return page.render(
        "report/time",
        stages=sources.stages, has_timing=bool(timing), times=times, facts=facts,
    )  # fmt: skip


def configuration(run: Path | None) -> Markup:
    """Return ``config.yaml``, word for word."""
    if run is None:
        raise MissingError("No configuration: no run folder was given.")
    path = run / "config.yaml"
    if not path.is_file():
        raise MissingError(f"no configuration: there is no {path}")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MetadataError(f"cannot read {path}: {error}") from error
    return page.render("report/configuration", name=path.name, content=content)
