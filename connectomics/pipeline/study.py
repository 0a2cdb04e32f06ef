"""Compare configurations: train every arm of a study file with every seed on every fold, and write one table."""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev
from typing import Any

from connectomics.config import RunConfig
from connectomics.errors import ConfigError, InputError, MissingError, WriteError
from connectomics.io.location import local_path
from connectomics.io.replacing import contains, has_column, require_own
from connectomics.lightning.run_state import state_of
from connectomics.metrics.tables import write_csv
from connectomics.pages.page import GENERATOR
from connectomics.pages.study import write_study_page
from connectomics.pipeline.study_file import BASE, Arm, Row, StudyFile, load_study, make_row
from connectomics.pipeline.study_row import RowState, curve, do_row, needs_work, scores_of, weights_identity
from connectomics.progress import Progress, silent

log = logging.getLogger(__name__)

_BUSY = 75  # exit code of a process whose row another process trains; EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True)
class StudyResult:
    """A study: what `study` returns.

    Attributes:
        folder: holds ``study.csv``, ``rows.csv``, ``study.html``, ``folds/`` and ``rows/`` (run folders).
        arms: a dictionary for each arm, the rows of ``study.csv``; in a grid with a column for each factor.
        rows: the same for ``rows.csv``.
        scores: names of the scores; the first one decides.
    """

    folder: Path
    arms: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    scores: Sequence[str]

    @property
    def unfinished(self) -> list[Mapping[str, Any]]:
        """The rows that are neither complete nor stopped by halving."""
        return [row for row in self.rows if row["state"] not in ("complete", "stopped")]


def study(
    file: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    workers: int = 1,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> StudyResult:
    """Train what is missing of a study, and write its table and page.

    A row (arm, seed, fold) is identified by its configuration, its split, its data and the weights that it starts
    from: if one of them changes, it is another row. Complete rows are kept, half-trained ones resume, failed ones are
    tried again; a row that fails does not stop the others.

    Args:
        file: the study file.
        out: folder; None: ``{output_dir}/studies/{name of the file}``.
        overrides: ``key=value`` for the configurations of all arms.
        workers: processes that train rows at the same time, each on one GPU if there are several; 1: this process.
        dry_run: only read the states; train and write nothing.
        progress: called after each row.

    Returns:
        The tables.

    Raises:
        ConfigError, InputError, MissingError: the study file, its base or its data are not valid.
        UnknownNameError: a score does not exist.
        WriteError: the folder cannot be written.
    """
    content, base, arms = load_study(file, overrides)
    place = local_path(Path(base.output_dir, "studies", Path(file).stem) if out is None else out)
    rows = _rows(content, base, arms, place, save=not dry_run)
    stopped: dict[str, int] = {}
    failed: set[Row] = set()

    def tables() -> StudyResult:
        of_rows = row_table(rows, content.scores, stopped)
        of_arms = arm_table(arms, of_rows, content.scores)
        if not dry_run:
            write_tables(place, Path(file), arms, rows, of_arms, of_rows, content)
        return StudyResult(place, of_arms, of_rows, content.scores)

    def report(row: Row, busy: str) -> None:
        state = RowState.of(row)
        if busy or state.error:
            failed.add(row)
            log.warning("%s: %s", row.name, busy or state.error)
        done = sum(not needs_work(r, None, content.scores) for r in rows)
        (progress or silent)(done, len(rows), row.name)
        tables()

    tables()  # refuses files of others, and scores that complete rows do not have, before the work
    for until in [*(content.halving.steps if content.halving else ()), None]:
        alive = [row for row in rows if row.arm not in stopped]
        todo = [row for row in alive if row not in failed and needs_work(row, until, content.scores)]
        todo.sort(key=lambda row: content.seeds.index(row.seed))  # an unfinished study has all arms with some seeds
        if not dry_run:
            _do_all(todo, until, content.scores, workers, report)
        if content.halving is None or until is None:
            continue
        if dry_run and any(needs_work(row, until, ()) for row in alive):
            break  # the decision is open
        for name in _behind(alive, content, until):
            stopped[name] = until
            log.info("%s: stopped at step %d", name, until)
    return tables()


def _rows(content: StudyFile, base: RunConfig, arms: Sequence[Arm], out: Path, *, save: bool) -> list[Row]:
    """All rows of a study, folds within seeds within arms; saves the split files if asked."""
    from connectomics.data.contents import LabelCounter
    from connectomics.data.run_split import half_patch, run_crops, run_folds, run_split

    margins = [half_patch(arm.config) for arm in arms]
    size = base.dataset.voxel_size
    # the largest patch of all arms: they share the split, and the gap between its sides must do for each of them
    patch = [math.ceil(2 * max(m[a] for m in margins) / size[a] - 1e-9) for a in range(3)]
    common = replace(base, data=replace(base.data, patch_size=patch))
    crops = run_crops(base)
    counter = LabelCounter()
    if content.folds is None:
        files = list(dict.fromkeys(arm.config.dataset.split_file for arm in arms))
        for file in files:  # a study does not write them
            if len(files) > 1 if file is None else not Path(file).is_file():
                why = f"{file}: no such file" if file else "null: arms that differ in it need one each"
                raise MissingError(f"dataset.split_file={why}; paths are relative to the working directory")
        made = {file: {"": run_split(common, crops, Path(file) if file else None, counter)[0]} for file in files}
        for file, splits in made.items():
            if set(splits[""].val) != set(made[files[0]][""].val):
                raise ConfigError(
                    f"{file} validates on other crops than {files[0]}; arms are compared on the same held-out part, so "
                    "give the split files of a study the same list val"
                )
    else:
        folds = run_folds(common, crops, counter, content.folds.by, content.folds.number)
        made = {base.dataset.split_file: folds}
    identities: dict[str | None, str] = {None: ""}
    rows = []
    for arm in arms:
        about = arm.config.dataset
        key = repr((about.classes, about.voxel_size))
        if key not in identities:
            identities[key] = _data_identity(arm.config)
        weights = arm.config.model.weights
        if weights is not None and weights not in identities:
            if save and (state := state_of(Path(weights))).name == "running":
                raise InputError(
                    f"model.weights={weights} is still training ({state.note}), and all rows of a study start from the "
                    "same weights; wait until it has finished, or give one of its checkpoints"
                )
            identities[weights] = weights_identity(weights)
        for seed in content.seeds:
            for fold, split in made[about.split_file].items():
                mark = hashlib.sha256(repr(split).encode()).hexdigest()[:8]
                path = out / "folds" / f"{fold or 'split'}-{mark}.yaml"
                if save and not path.is_file():
                    split.save(path)
                made_of = identities[key], identities[weights]
                rows.append(make_row(arm, seed, fold, (split.train, split.val, path), made_of, out))
    return rows


def _data_identity(config: RunConfig) -> str:
    """Hash of the labels and the raw around them: metadata, chunk sizes and times. Moved data are the same data."""
    from connectomics.cellmap.labels import arrays_needed
    from connectomics.data.run_split import run_crops
    from connectomics.geometry import VoxelGrid
    from connectomics.io.fingerprint import fingerprint

    data = config.dataset
    digest = hashlib.sha256()
    for crop in run_crops(config):
        raw = VoxelGrid.covering(crop.box, data.voxel_size)
        digest.update(f"{crop.key} {fingerprint(crop.raw_source, raw, with_location=False)}".encode())
        for name, label in sorted(arrays_needed(crop, data.classes).items()):
            digest.update(f"{name} {fingerprint(label.source, with_location=False)} {label.annotation!r}".encode())
    return digest.hexdigest()


def _behind(rows: Sequence[Row], content: StudyFile, until: int) -> list[str]:
    """The arms that successive halving stops at a rung: those with the worst means of the first score; never the
    base, with which the others are compared."""
    assert content.halving is not None
    name, sign = content.scores[0], 1 if content.best == "max" else -1
    values: dict[str, list[float]] = {row.arm: [] for row in rows}
    for row in rows:
        values[row.arm] += [v for n, v in scores_of(row, content.scores, until).items() if n == name]
    ranked = sorted(values, key=lambda arm: -sign * mean(values[arm]) if values[arm] else math.inf)
    kept = ranked[: max(1, math.ceil(content.halving.keep * len(ranked) - 1e-9))]
    return [arm for arm in ranked if arm not in kept and arm != BASE]


# -- running rows ----------------------------------------------------------------------------------------------------
def _do_all(
    rows: Sequence[Row], until: int | None, scores: Sequence[str], workers: int, report: Callable[[Row, str], None]
) -> None:
    """Do rows one after another, or in several processes; ``report`` gets each, and why it could not be started."""
    if workers <= 1 or len(rows) <= 1:
        for row in rows:
            log.info("%s: %s", row.name, row.folder)
            busy = ""
            try:
                do_row(row, until, scores)
            except WriteError as error:  # another process trains it
                busy = str(error)
            report(row, busy)
        return
    running: set[BaseProcess] = set()
    ended = threading.Event()
    gpus: SimpleQueue[str] = SimpleQueue()
    for number in range(workers):
        gpus.put(_gpu(number))

    def one(row: Row) -> str:
        if ended.is_set():
            return ""
        gpu = gpus.get()
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(row, until, scores, gpu))
        running.add(process)
        process.start()
        process.join()
        running.discard(process)
        gpus.put(gpu)
        if process.exitcode == _BUSY:
            return f"another process is working on {row.folder}"
        if process.exitcode and not ended.is_set():
            error = f"its process ended with code {process.exitcode}; see output.log"
            replace(RowState.of(row), identity=row.identity, error=error).save(row)
        return ""

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(one, row): row for row in rows}
        try:
            for future in as_completed(futures):
                report(futures[future], future.result())
        except BaseException:
            ended.set()
            for process in list(running):
                process.terminate()  # it writes its state first
            raise


def _child(row: Row, until: int | None, scores: Sequence[str], gpu: str) -> None:
    """The process of one row; what it prints goes to a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the leading process ends this one
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    row.folder.mkdir(parents=True, exist_ok=True)
    with (row.folder / "output.log").open("a", buffering=1, encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=file)
        try:
            do_row(row, until, scores)
        except WriteError as error:
            print(error)
            sys.exit(_BUSY)


def _gpu(number: int) -> str:
    """CUDA_VISIBLE_DEVICES of a worker, in turn; "" leaves it as it is."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = given or [str(n) for n in range(count)]
    return names[number % len(names)] if count > 1 else ""


# -- tables ------------------------------------------------------------------------------------------------------------
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
            "arm": row.arm, **row.levels, "seed": row.seed, "fold": row.fold, "state": name,
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
        line: dict[str, Any] = {"arm": arm.name, **arm.levels, "state": ", ".join(states) or "complete"}
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
        content.scores, curves, {arm.name: arm.changes for arm in arms}, list(arms[0].levels),
        len(old - {row.folder.name for row in rows}),
    )  # fmt: skip
