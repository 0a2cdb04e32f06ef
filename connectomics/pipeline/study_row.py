"""One row of a study: train it, or resume it, evaluate it, and record how it ended."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from connectomics.config.values import plain, read
from connectomics.errors import ConfigError, ConnectomicsError, InputError, MetadataError, MissingError, unknown_name
from connectomics.io.replacing import has_keys, require_own, write_json
from connectomics.lightning.run_state import latest_checkpoint, weights_file
from connectomics.pages.report.run_folder import read_metrics, read_timing
from connectomics.pipeline.runs import open_run
from connectomics.pipeline.study_file import Row

log = logging.getLogger(__name__)

_FILE, _EVALUATION = "row.json", "evaluation.json"


@dataclass(frozen=True)
class RowState:
    """How a row stands, from the file in its folder.

    Attributes:
        identity: of the row that was trained; a file of another row does not count.
        complete: trained to its end. steps: optimizer steps. error: why it failed; "" if it did not.
        cpu_s, device_s: cost, see `connectomics.pipeline.study_callback.RowCallback`.
        code: version of the package, with the commit of a checkout.
    """

    identity: str = ""
    complete: bool = False
    steps: int = 0
    error: str = ""
    cpu_s: float | None = None
    device_s: float | None = None
    code: str = ""

    @classmethod
    def of(cls, row: Row) -> RowState:
        """Return the state of a row; that of an empty folder if nothing valid is recorded."""
        try:
            content = json.loads((row.folder / _FILE).read_text(encoding="utf-8"))
            found = read(cls, content, str(row.folder / _FILE))
        except (OSError, ValueError, MetadataError):
            return cls()
        return found if found.identity == row.identity else cls()

    def name(self, row: Row) -> str:
        """Return ``complete``, ``failed``, ``started`` (it can resume) or ``missing``."""
        if self.error:
            return "failed"
        if self.complete:
            return "complete"
        return "started" if latest_checkpoint(row.folder) is not None else "missing"

    def save(self, row: Row) -> None:
        """Write the state into the row's folder."""
        row.folder.mkdir(parents=True, exist_ok=True)
        write_json(require_own(row.folder / _FILE, has_keys("identity", "complete"), "study"), plain(self))


def needs_work(row: Row, until: int | None, scores: Sequence[str]) -> bool:
    """Whether `do_row` has something to do."""
    state = RowState.of(row)
    if state.error:
        return True
    if not state.complete:
        return until is None or state.steps < until
    return any(name.startswith("evaluate/") for name in scores) and not (row.folder / _EVALUATION).is_file()


def do_row(row: Row, until: int | None, scores: Sequence[str]) -> None:
    """Train a row, or resume it, and evaluate it if a score asks for that. An error is recorded, not raised.

    Args:
        until: stop after the epoch that reaches so many optimizer steps; None: train to the end.
    """
    from connectomics.pipeline.study_callback import RowCallback
    from connectomics.pipeline.train import train
    from connectomics.tasks.lock import leading

    with leading(row.folder):
        row.folder.mkdir(exist_ok=True)
        try:
            if not RowState.of(row).complete:
                _require_weights(row)
                counted = RowCallback(until)
                run = train(row.config, row.folder, resume=True, callbacks=[counted])
                RowState(
                    row.identity, not counted.stopped, run.steps, "", round(counted.cpu_s, 2),
                    None if counted.device_s is None else round(counted.device_s, 2), _code(row.folder),
                ).save(row)  # fmt: skip
            state = replace(RowState.of(row), error="")
            monitor, every = row.config.checkpoint.monitor, row.config.training.val_every_n_epochs
            if state.complete and monitor not in read_metrics(row.folder):
                raise ConfigError(
                    f"it was never validated, so there is no {monitor}: give it a validation part and at least {every} "
                    f"epochs (training.val_every_n_epochs); it had {state.steps} steps"
                )
            state.save(row)
            if state.complete and needs_work(row, None, scores):
                _evaluate(row)
        except Exception as error:
            known = isinstance(error, ConnectomicsError)
            if not known:  # a bug: keep where it happened
                (row.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            text = " ".join(str(error).split())
            text = text if known else f"{type(error).__name__}: {text} (see error.txt in its folder)"
            replace(RowState.of(row), identity=row.identity, error=text).save(row)


def weights_identity(weights: str) -> str:
    """Return the hash of the file that a row starts from; its path if it cannot be read."""
    try:
        with weights_file(weights).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, MissingError):
        return weights


def _require_weights(row: Row) -> None:
    """Raise `InputError` if a row that begins now would start from other weights than its identity says."""
    weights = row.config.model.weights
    if weights is None or latest_checkpoint(row.folder) is not None or weights_identity(weights) == row.weights:
        return
    raise InputError(f"model.weights={weights} has changed since the study started; rerun the study to train all rows")


def _evaluate(row: Row) -> None:
    """Predict the held-out part with the selected weights, decode it, and compare; probabilities are not kept."""
    from connectomics.pipeline.decode import decode
    from connectomics.pipeline.evaluate import evaluate
    from connectomics.pipeline.predict import predict

    run, config = open_run(row.folder), row.config
    again = {"overwrite": True, "resume": True}  # keep what an interrupted evaluation finished
    found = predict(run, crops="val", out=row.folder / "probabilities", **again)  # type: ignore[arg-type]
    labels = decode(found, out=row.folder / "labels", **again)  # type: ignore[arg-type]
    file = row.folder / _EVALUATION
    evaluate(labels, config.dataset.data_root, out=file, rules=config.score.rules)
    shutil.rmtree(row.folder / "probabilities")


def _code(folder: Path) -> str:
    run = open_run(folder)
    return f"{run.environment.get('connectomics', '')} {run.commit}".rstrip()


# -- scores ----------------------------------------------------------------------------------------------------------
def curve(row: Row, name: str) -> list[tuple[float, float]]:
    """Return (optimizer steps, value) of a metric of a row; [] if it was not logged yet."""
    return [(step + 1, value) for _, step, value in read_metrics(row.folder).get(name, ())]


def scores_of(row: Row, names: Sequence[str], until: int | None = None) -> dict[str, float]:
    """Return the scores of a row by the weights that validation selected (``checkpoint.monitor``), and ``last``: the
    first score at the last validation. Scores that do not exist yet are left out.

    Args:
        until: use only what was known when the row was stopped at so many steps.

    Raises:
        UnknownNameError: a complete row has no such score.
    """
    columns, config = read_metrics(row.folder), row.config.checkpoint
    end = math.inf
    if until is not None:  # the end of the epoch that reached it
        epochs = read_timing(row.folder).get("by_epoch", [])
        end = min((epoch["step"] for epoch in epochs if epoch["step"] >= until), default=math.inf)
    columns = {name: [v for v in values if v[1] < end] for name, values in columns.items()}
    monitored = columns.get(config.monitor, [])
    if not monitored:
        return {}
    best = (max if config.mode == "max" else min)(monitored, key=lambda v: v[2])
    chosen = best if config.save_top_k != 0 else monitored[-1]
    found = {n: v for n, values in columns.items() for epoch, _, v in values if epoch == chosen[0]}
    if until is None:
        found |= _evaluated(row)
    if RowState.of(row).complete and until is None:
        for name in names:
            if name not in found and (not name.startswith("evaluate/") or (row.folder / _EVALUATION).is_file()):
                raise unknown_name("score", name, [n for n in found if not n.startswith("train/")], row.name)
    last = columns.get(names[0], [])
    return {name: found[name] for name in names if name in found} | ({"last": last[-1][2]} if last else {})


def _evaluated(row: Row) -> dict[str, float]:
    """What `evaluate` found: ``evaluate/CLASS/MEASURE`` and ``evaluate/overall``."""
    try:
        content: Mapping[str, Any] = json.loads((row.folder / _EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {f"{name}/{measure}": value for name, row_ in content["classes"].items() for measure, value in row_.items()}
    found |= {"overall": content["totals"]["overall"]}
    return {f"evaluate/{name}": float(v) for name, v in found.items() if isinstance(v, int | float)}
