"""Find the runs below a folder, with their settings, progress and scores, and compare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from connectomics.config.values import flat
from connectomics.errors import InputError, MetadataError, MissingError, number_of
from connectomics.lightning.run_state import RunState, metric_rows, starts_of, state_of
from connectomics.pages.report.run_folder import read_config

_DEEP = 4  # folder levels that are searched for runs


@dataclass(frozen=True, repr=False)
class Run:
    """A trained run: its folder and the content of its files.

    Attributes:
        folder: holds ``config.yaml``, ``split.yaml``, ``environment.json``, ``state.json``, ``run.log``,
            ``metrics.csv``, ``timing.json``, ``tensorboard/``, ``checkpoints/``.
        config: content of ``config.yaml``.
        epochs, steps: trained in all, also before a resume.
        started: UTC.
        monitor: name of the metric that chose the best checkpoint.
        best: its best value.
        metrics: last value of every metric.
        environment: versions and machine of the last start; {} if they were not kept.
        state: how the last start ended.
    """

    folder: Path
    config: Mapping[str, Any]
    epochs: int
    steps: int
    started: datetime
    monitor: str
    best: float | None
    metrics: Mapping[str, float]
    environment: Mapping[str, Any]
    state: RunState

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the best score; None if nothing was validated or kept."""
        return self._kept("best.ckpt")

    @property
    def last_checkpoint(self) -> Path | None:
        """The latest state, from which training can resume; None if it was not kept."""
        return self._kept("last.ckpt")

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to predict with: the best, else the last."""
        return self.best_checkpoint or self.last_checkpoint

    @property
    def classes(self) -> list[str]:
        """Classes that the network predicts."""
        return list(self.config.get("dataset", {}).get("classes", []))

    @property
    def commit(self) -> str:
        """First digits of the code's commit, with + if files had been changed; "" if it is not known."""
        git = self.environment.get("git")
        return f"{git['commit'][:8]}{'+' * bool(git['changed'])}" if git else ""

    def _kept(self, name: str) -> Path | None:
        path = self.folder / "checkpoints" / name
        return path if path.is_file() else None

    def __repr__(self) -> str:
        best = "not validated" if self.best is None else f"{self.monitor} {self.best:.4f}"
        about = f"{number_of(self.epochs, 'epoch')}, {best}, classes {', '.join(self.classes)}"
        return f"Run({str(self.folder)!r}: {self.state.name}, {about})"


def find_runs(folder: str | Path) -> list[Run]:
    """Return all runs in a folder and below, oldest first; raise `MissingError` if the folder does not exist."""
    place = Path(folder)
    if not place.is_dir():
        raise MissingError(f"no folder {place}; runs are below output_dir of their configuration (outputs)")
    return sorted((open_run(found) for found in _folders(place, _DEEP)), key=lambda run: run.started)


def open_run(folder: str | Path) -> Run:
    """Return the run of a folder; raise `MissingError` if there is none, `MetadataError` if its files are broken."""
    place = Path(folder)
    file = place / "config.yaml"
    config = read_config(place)
    if config is None:
        raise MissingError(f"{place} is not a run folder: it has no config.yaml; `pytc runs` lists the runs")
    if not config:
        raise MetadataError(f"{file} does not hold a configuration")
    rows = metric_rows(place / "metrics.csv")
    about = config.get("checkpoint", {})
    monitor, mode = str(about.get("monitor", "val/dice")), about.get("mode", "max")
    values = [float(row[monitor]) for row in rows if row.get(monitor)]
    last = {k: float(v) for row in rows for k, v in row.items() if k not in ("epoch", "step") and v}
    epochs, steps = ([int(float(row[name])) for row in rows if row.get(name)] for name in ("epoch", "step"))
    return Run(
        folder=place, config=config, epochs=max(epochs, default=-1) + 1, steps=max(steps, default=-1) + 1,
        started=datetime.fromtimestamp(file.stat().st_mtime, UTC), monitor=monitor,
        best=(max if mode == "max" else min)(values, default=None), metrics=last,
        environment=next(reversed(starts_of(place)), {}), state=state_of(place),
    )  # fmt: skip


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the values of all runs for each configuration key (``model.architecture``) in which they differ."""
    if len(runs) < 2:
        raise InputError(f"expected at least two runs to compare, got {len(runs)}")
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def best_values(run: Run) -> dict[str, float]:
    """Return the values of all metrics in the validation with the best score, or in the last one if the weights of the
    best were not kept; {} if nothing was validated."""
    rows = [row for row in metric_rows(run.folder / "metrics.csv") if row.get(run.monitor)]
    best = [row for row in rows if float(row[run.monitor]) == run.best]
    chosen = next(iter(best if run.best_checkpoint else rows[::-1]), {})
    return {k: float(v) for k, v in chosen.items() if v}


def _folders(place: Path, deep: int) -> Iterator[Path]:
    if (place / "config.yaml").is_file():
        yield place
        return
    if deep > 0:
        for child in sorted(place.iterdir()):
            if child.is_dir() and not child.is_symlink() and not child.name.endswith(".zarr") and child.name[0] != ".":
                yield from _folders(child, deep - 1)
