"""The run on the page: what was run, how training went, where the time went, with which configuration."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from connectomics import __version__
from connectomics.errors import MetadataError, MissingError
from connectomics.lightning.run_state import state_of
from connectomics.report import charts, page
from connectomics.report.library import attributes_by_class, unknown_lines
from connectomics.report.scores import Scores, load_json
from connectomics.report.sources import ReportSources

_PACKAGES = ("torch", "pytorch-lightning", "monai", "numpy", "zarr", "tensorstore")
#: Columns of ``metrics.csv``: (epoch, step, value).
Columns = dict[str, list[tuple[float, float, float]]]

_TIMES = {
    "step_s": "forward, backward, optimizer",
    "data_wait_s": "waiting for data",
    "validation_s": "validation",
    "other_s": "checkpoints, start-up, other",
}


# -- what was run ------------------------------------------------------------------------------------------------------
def provenance(sources: ReportSources, table: Scores | None) -> page.Section:
    """Facts about the run, its predictions, the submission and its score, and the software, in four groups."""
    lines: list[str] = []
    groups: dict[str, dict[str, Any]] = {
        "Run": _run_facts(sources, lines),
        "Training ran on": {} if sources.run is None else training_environment(sources.run),
        "Prediction": _artefact_facts(sources, lines),
        "Submission and score": _submission_facts(sources, table, lines),
        "This page was made with": {
            "report": f"connectomics {__version__}, {page.now()}",
            **(environment() if sources.environment is None else sources.environment),
        },
    }
    cards = "".join(
        f'<div class="card"><h3>{page.text(name)}</h3>{page.definitions(facts)}</div>'
        for name, facts in groups.items()
        if facts
    )
    body = "".join(page.note(line) for line in lines) + f'<div class="cards">{cards}</div>' + _decoding(sources)
    return page.Section("what", "What was run", body)


def _run_facts(sources: ReportSources, lines: list[str]) -> dict[str, Any]:
    if sources.run is None:
        lines.append("No run folder was given, so configuration and training are not shown.")
        return {}
    if not sources.run.is_dir():
        lines.append(f"The run folder {sources.run} is not there.")
        return {}
    config = read_config(sources.run)
    if config is None:
        lines.append(f"There is no config.yaml in {sources.run}.")
        return {"folder": sources.run.name}
    written = datetime.fromtimestamp((sources.run / "config.yaml").stat().st_mtime).astimezone()
    if unfinished := unfinished_state(sources.run):
        lines.append(f"This run is not whole: it is {unfinished}.")
    return {"configured": written.strftime("%Y-%m-%d %H:%M %Z"), **_config_facts(config)}


def unfinished_state(run: Path) -> str:
    """What keeps a run's folder from being a finished run, in words; "" where nothing does, as far as is known."""
    state = state_of(run)
    if state.name in ("finished", "unknown"):
        return ""
    return f"{state.name} ({state.note})" if state.note else state.name


def _submission_facts(sources: ReportSources, table: Scores | None, lines: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if sources.submission is not None and sources.submission.is_file():
        facts["file"] = f"{sources.submission.name}, {page.size(sources.submission.stat().st_size)}"
        facts["SHA-256"] = _sha256(sources.submission)
    elif sources.submission is not None and not sources.submission.exists():
        lines.append(f"The submission {sources.submission} is not there.")
    if table is not None:
        facts["rules"] = table.rules + ("" if table.verified else ", not verified against the official scorer")
        crops = {r.crop for r in table.results}
        facts["scored"] = f"{len(table.results)} labels in {len(crops)} crops"
    if sources.baseline_scores is not None:
        facts["compared with"] = sources.baseline_name
    return facts


def environment() -> dict[str, str]:
    """Versions of the packages that matter (without importing them) and the machine of this process."""
    found = [f"{name} {metadata.version(name)}" for name in _PACKAGES if _installed(name)]
    return {
        "python": platform.python_version(),
        "packages": ", ".join(found),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def training_environment(run: Path) -> dict[str, str]:
    """What ``environment.json`` of a run says of where it ran last, the few things that everyone asks for."""
    path = run / "environment.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MetadataError(f"{path} cannot be read as JSON ({error})") from error
    last = found[-1] if isinstance(found, list) and found and isinstance(found[-1], dict) else {}
    git, packages, gpus = last.get("git"), last.get("packages"), last.get("gpus")
    versions = packages if isinstance(packages, dict) else {}
    facts = {
        "code": f"connectomics {last['connectomics']}" if "connectomics" in last else "",
        "commit": f"{str(git.get('commit', ''))[:12]}{' and changes' * bool(git.get('changed'))}"
        if isinstance(git, dict)
        else "",
        "python": last.get("python") or "",
        "packages": ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions),
        "machine": f"{last.get('platform', '')}, {last.get('cores', '?')} cores" if "platform" in last else "",
        "GPUs": ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else "",
        "job": last.get("job") or "",
        "started": f"{len(found)} times" if isinstance(found, list) and len(found) > 1 else "",
    }
    return {name: str(value) for name, value in facts.items() if value}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def read_config(run: Path) -> dict[str, Any] | None:
    """``config.yaml`` of a run, None where there is none; `MetadataError` where it cannot be read."""
    path = run / "config.yaml"
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MetadataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return found if isinstance(found, dict) else {}


def _config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The few keys of a configuration that everyone asks for, as far as it has them."""
    wanted = {
        "configuration": "name",
        "network": "model.architecture",
        "classes": "dataset.classes",
        "voxel size": "dataset.voxel_size",
        "patch": "data.patch_size",
        "batch size": "data.batch_size",
        "losses": "model.loss_functions",
        "optimizer": "optimizer.name",
        "learning rate": "optimizer.lr",
        "epochs, at most": "training.max_epochs",
        "precision": "training.precision",
        "seed": "system.seed",
    }
    facts = {}
    for name, key in wanted.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            facts[name] = _plain(name, value)
    return facts


def _plain(name: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value):
        return page.nm(value) + (" nm" if name in ("voxel size", "voxel_size") else "")
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)


def _artefact_facts(sources: ReportSources, lines: list[str]) -> dict[str, Any]:
    """What predictions and labels say of themselves; what they lack goes to ``lines``."""
    facts: dict[str, Any] = {}
    lines += unknown_lines(sources.labels or sources.probabilities)
    labels, predictions = (
        next(iter(attributes_by_class(folder).values()), {}) for folder in (sources.labels, sources.probabilities)
    )
    made_from = labels.get("source")
    model = predictions.get("model") or (made_from.get("model") if isinstance(made_from, Mapping) else None)
    if isinstance(model, Mapping):
        for key, value in model.items():
            if value in (None, "", [], {}):
                continue
            if not isinstance(value, (Mapping, list)) or (isinstance(value, list) and len(value) <= 16):
                facts[str(key).replace("_", " ")] = _plain(str(key), value)
    versions = {str(a["version"]) for a in (labels, predictions) if "version" in a}
    if versions - {__version__}:
        facts["artefacts written by"] = f"connectomics {', '.join(sorted(versions))}"
    return facts


def _decoding(sources: ReportSources) -> str:
    """The parameters with which each class was decoded, folded."""
    chosen = {name: about["decode"] for name, about in attributes_by_class(sources.labels).items() if "decode" in about}
    if not chosen:
        return ""
    keys = list(dict.fromkeys(key for parameters in chosen.values() for key in parameters))
    rows = [
        [f"<th scope=row>{page.text(name)}</th>", *(page.text(parameters.get(key, "–")) for key in keys)]
        for name, parameters in sorted(chosen.items())
    ]
    table = page.table(["class", *(page.text(key.replace("_", " ")) for key in keys)], rows)
    return page.details(f"Decoding parameters of {len(rows)} classes", table)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- training ----------------------------------------------------------------------------------------------------------
def training(run: Path | None) -> page.Section:
    """Curves of ``metrics.csv`` (losses, validation Dice and score over all and by class, learning rate) and of
    ``timing.json`` (throughput, share of waiting, memory)."""
    title = "Training"
    if run is None:
        return page.Section("training", title, page.note("No training curves: no run folder was given."))
    path = run / "metrics.csv"
    if not path.is_file():
        return page.Section("training", title, page.note(f"No training curves: there is no {path}."))
    columns = read_metrics(path)
    curves = (_loss_chart(columns), _dice_chart(columns), _score_chart(columns), _rate_chart(columns))
    made = [chart for chart in (*curves, *_resource_charts(run)) if chart]
    if not made:
        return page.Section("training", title, page.note(f"No training curves: {path} holds no losses or scores."))
    return page.Section("training", title, _best(columns) + f'<div class="charts">{"".join(made)}</div>')


def read_metrics(path: Path) -> Columns:
    """Every column of ``metrics.csv`` as (epoch, step, value) in the file's order, without empty and non-finite cells.

    A row without an epoch takes that of the row before it.
    """
    columns: Columns = {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            epoch = 0.0
            for row in csv.DictReader(stream):
                epoch = _cell(row.get("epoch")) if row.get("epoch") else epoch
                step = _cell(row.get("step"))
                for name, text in row.items():
                    if name in ("epoch", "step") or not isinstance(name, str) or not text:
                        continue
                    value = _cell(text)
                    if math.isfinite(value):
                        columns.setdefault(name, []).append((epoch, step, value))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MetadataError(f"{path} cannot be read as a table of metrics: {error}") from error
    return columns


def _cell(text: str | None) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


def _series(columns: Mapping[str, Sequence[tuple[float, float, float]]], name: str, label: str, by: int, strong=False):  # type: ignore[no-untyped-def]
    points = np.array([p for p in columns.get(name, ()) if math.isfinite(p[by])], np.float64)
    return [] if len(points) == 0 else [charts.Series(label, points[:, by], points[:, 2], strong)]


def _loss_chart(columns: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    name = next((n for n in ("train/loss", "train/loss_epoch", "train/loss_step") if n in columns), None)
    if name is None:
        return ""
    by, label = (1, "step") if name == "train/loss_step" else (0, "epoch")
    series = _series(columns, name, "train", by, strong=True) + _series(columns, "val/loss", "validation", by)
    parts = [n for n in columns if n.startswith("train/") and n.lower().endswith("loss") and n != name]
    for part in parts[:6]:
        series += _series(columns, part, part.removeprefix("train/").removesuffix("Loss"), by)
    return charts.line_chart(series, "Training loss", label) if series else ""


def _dice_chart(columns: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    series = _series(columns, "val/dice", "all classes", 0, strong=True)
    for name in columns:
        if name.startswith("val/") and name.endswith("/dice") and name != "val/dice":
            series += _series(columns, name, name.removeprefix("val/").removesuffix("/dice"), 0)
    return charts.line_chart(series, "Validation Dice, whole crops", "epoch", (0.0, 1.0)) if series else ""


def _score_chart(columns: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """The challenge's score, where validation logs it (``training.val_score``)."""
    series = _series(columns, "val/score", "all classes", 0, strong=True)
    for name in columns:
        if name.startswith("val/") and name.endswith("/score") and name != "val/score":
            series += _series(columns, name, name.removeprefix("val/").removesuffix("/score"), 0)
    return charts.line_chart(series, "Validation, the challenge's score", "epoch", (0.0, 1.0)) if series else ""


def _resource_charts(run: Path) -> list[str]:
    """Throughput and memory by epoch; nothing where a run did not record them."""
    timing = timing_of(run)
    if timing is None:
        return []
    made = []
    for title, lines in (
        ("Patches a second, while training", (("rate", "samples_per_s", 1.0),)),
        ("Share of training spent waiting for data", (("waiting", "data_wait_share", 1.0),)),
        ("Memory, GB", (("processes", "memory_bytes", 1e-9), ("GPU", "gpu_memory_bytes", 1e-9))),
    ):
        series = []
        for name, key, scale in lines:
            points = np.array(epoch_rows(timing, key, scale), np.float64)
            if len(points):
                series.append(charts.Series(name, points[:, 0], points[:, 1]))
        if series:
            limits = (0.0, 1.0) if "Share" in title else None
            made.append(charts.line_chart(series, title, "epoch", limits))
    return made


def timing_of(run: Path) -> dict[str, Any] | None:
    """``timing.json`` of a run, None where there is none; `MetadataError` where it cannot be read."""
    path = run / "timing.json"
    return load_json(path) if path.is_file() else None


def epoch_rows(timing: Mapping[str, Any], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """(epoch, value times ``scale``) of ``by_epoch``, as far as it has the value."""
    rows = timing.get("by_epoch", [])
    return [
        (float(row["epoch"]), float(row[key]) * scale)
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
        and isinstance(row.get("epoch"), (int, float))
        and isinstance(row.get(key), (int, float))
    ]


def _rate_chart(columns: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    name = next((n for n in columns if n in ("train/lr", "lr") or n.startswith("lr-")), None)
    if name is None or len({v for _, _, v in columns[name]}) < 2:  # a constant rate needs no picture
        return ""
    return charts.line_chart(_series(columns, name, "rate", 0), "Learning rate", "epoch")


def _best(columns: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    dice = columns.get("val/dice")
    if not dice:
        return page.note("No validation scores were logged.")
    epoch, step, value = max(dice, key=lambda point: point[2])
    last = dice[-1]
    return (
        f'<p class="hint">Best validation Dice {page.score(value)} at epoch {epoch:g}'
        + (f" (step {step:g})" if math.isfinite(step) else "")
        + f"; last {page.score(last[2])} at epoch {last[0]:g}.</p>"
    )


# -- time --------------------------------------------------------------------------------------------------------------
def time(sources: ReportSources) -> page.Section:
    """Bars by stage, and within training by what it waited for."""
    parts = []
    if sources.stages:
        parts.append(charts.time_bars(sources.stages))
    else:
        parts.append(page.note("No times by stage were given."))
    timing = None if sources.run is None else timing_of(sources.run)
    if timing is None:
        parts.append(page.note("No timing of the training was found (timing.json of a run folder)."))
    else:
        parts.append("<h3>Within training</h3>" + _training_time(timing))
    return page.Section("time", "Where the time went", "".join(parts))


def _training_time(timing: Mapping[str, Any]) -> str:
    numbers = {k: float(v) for k, v in timing.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    times = {label: numbers[key] for key, label in _TIMES.items() if key in numbers}
    if not times:  # written by something else: show what looks like seconds
        times = {k.removesuffix("_s"): v for k, v in numbers.items() if k.endswith("_s") and not k.endswith("per_s")}
    names = ("epochs", "batches", "samples", "validations")
    facts: dict[str, str] = {name: page.count(numbers[name]) for name in names if name in numbers}
    if "samples_per_s" in numbers:
        facts["samples per second"] = f"{numbers['samples_per_s']:.3g}"
    return charts.time_bars(times) + page.definitions(facts)


# -- configuration -----------------------------------------------------------------------------------------------------
def configuration(run: Path | None) -> page.Section:
    """``config.yaml``, word for word."""
    if run is None:
        body = page.note("No configuration: no run folder was given.")
    else:
        path = run / "config.yaml"
        if not path.is_file():
            raise MissingError(f"no configuration: there is no {path}")
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MetadataError(f"{path} cannot be read: {error}") from error
        body = page.details(page.text(path.name), f"<pre>{page.text(content)}</pre>")
    return page.Section("configuration", "Configuration", body)
