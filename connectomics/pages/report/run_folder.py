"""Reading a run folder: configuration, metrics, timing, environment, and whether the run finished."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from connectomics.errors import MetadataError
from connectomics.io.store import read_json
from connectomics.lightning.run_state import metric_rows, starts_of, state_of

PACKAGES = ("torch", "pytorch-lightning", "monai", "numpy", "zarr", "tensorstore")  #: whose versions are shown
#: Columns of ``metrics.csv``: (epoch, step, value).
Columns = Mapping[str, Sequence[tuple[float, float, float]]]


def read_config(run: Path) -> dict[str, Any] | None:
    """Return ``config.yaml`` of a run, None if there is no file; content that is no mapping is empty.

    Raises `MetadataError` if it cannot be read.
    """
    path = run / "config.yaml"
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MetadataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return found if isinstance(found, dict) else {}


def read_timing(run: Path) -> dict[str, Any]:
    """Return ``timing.json`` of a run, {} if there is none; `MetadataError` if it cannot be read."""
    return read_json(run / "timing.json") or {}


def read_metrics(run: Path) -> Columns:
    """Return every column of a run's ``metrics.csv`` as (epoch, step, value), without empty and non-finite cells.

    A row without an epoch takes that of the row before it. {} if there is no file; `MetadataError` if it cannot be
    read.
    """
    path, epoch = run / "metrics.csv", 0.0
    columns: dict[str, list[tuple[float, float, float]]] = {}
    try:
        for row in metric_rows(path):
            epoch = _cell(row.get("epoch")) if row.get("epoch") else epoch
            step = _cell(row.get("step"))
            for name, text in row.items():
                if name not in ("epoch", "step", None) and math.isfinite(value := _cell(text)):
                    columns.setdefault(name, []).append((epoch, step, value))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MetadataError(f"cannot read {path} as a table of metrics: {error}") from error
    return columns


def _cell(text: str | None) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


def numbers(timing: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of ``timing.json``."""
    return {k: float(v) for k, v in timing.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def by_epoch(timing: Mapping[str, Any], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """Return (epoch, value times ``scale``) of ``by_epoch`` in ``timing.json``, for the epochs with a value."""
    rows = timing.get("by_epoch", [])
    found = [numbers(row) for row in (rows if isinstance(rows, list) else []) if isinstance(row, dict)]
    return [(row["epoch"], row[key] * scale) for row in found if "epoch" in row and key in row]


def class_names(columns: Columns, measure: str, group: str = "val") -> list[str]:
    """Return the classes that have a column ``{group}/{class}/{measure}``."""
    found = (re.fullmatch(f"{group}/(.+)/{measure}", column) for column in columns)
    return [match[1] for match in found if match]


def unfinished_state(run: Path) -> str:
    """Return the state of a run that is not finished, in words; "" if it is finished or its state is not recorded."""
    state = state_of(run)
    if state.name in ("finished", "unknown"):
        return ""
    return f"{state.name} ({state.note})" if state.note else state.name


def training_environment(run: Path) -> dict[str, str]:
    """Return the main facts of ``environment.json``: where the run started last."""
    starts = starts_of(run)
    last = starts[-1] if starts else {}
    git, versions = (v if isinstance(v := last.get(key), dict) else {} for key in ("git", "packages"))
    gpus = last.get("gpus")
    commit = f"{str(git.get('commit', ''))[:12]}{' and changes' * bool(git.get('changed'))}" if git else ""
    facts = {
        "code": f"connectomics {last['connectomics']}" if "connectomics" in last else "",
        "commit": commit,
        "python": last.get("python") or "",
        "packages": ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions),
        "machine": f"{last.get('platform', '')}, {last.get('cores', '?')} cores" if "platform" in last else "",
        "GPUs": ", ".join(map(str, gpus)) if isinstance(gpus, list) else "",
        "job": last.get("job") or "",
        "started": f"{len(starts)} times" if len(starts) > 1 else "",
    }
    return {name: str(value) for name, value in facts.items() if value}
