"""Files that a run keeps about itself: how it ended (``state.json``), and where it ran (``environment.json``)."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import connectomics
from connectomics.errors import ConnectomicsError, MetadataError, MissingError, WriteError
from connectomics.io.replacing import has_keys, not_ours, require_own
from connectomics.io.write import write_file

STATE_FILE = "state.json"
ENVIRONMENT_FILE = "environment.json"
_RUN_FILES = ("config.yaml", ENVIRONMENT_FILE, "metrics.csv", "checkpoints")


@dataclass(frozen=True)
class RunState:
    """How the last start of a run ended.

    Attributes:
        name: ``finished``, ``running``, ``interrupted`` (Ctrl-C, killed), ``failed``, ``empty`` (only a configuration)
            or ``unknown`` (started on another machine, or by a version that kept no states).
        note: the reason in a few words; may be "".
    """

    name: str
    note: str = ""


def require_run_folder(folder: Path) -> None:
    """Raise `WriteError` if training in ``folder`` would replace files that no run wrote; other files may be there."""
    if latest_checkpoint(folder) is None:
        state = require_own(folder / STATE_FILE, has_keys("state", "pid"), "train")
        found = [folder / name for name in _RUN_FILES if (folder / name).exists()]
        if found and not state.exists():
            raise not_ours(found[0], "train")


@contextlib.contextmanager
def keep_state(folder: Path) -> Iterator[None]:
    """Write the state of a run into its folder when it starts and when it ends; a killed process is seen to be gone.

    Raises `WriteError` if another process of this machine trains in this folder.
    """
    about = {"host": platform.node(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}
    with contextlib.suppress(MetadataError):  # a broken state file is replaced
        state = state_of(folder)
        if state.name == "running" and state.note != f"process {os.getpid()}":
            raise WriteError(f"{state.note} trains in {folder}; wait for it or end it, or give another --run-dir")

    def write(state: str, note: str = "") -> None:
        write_file(folder / STATE_FILE, json.dumps({"state": state, "note": note, **about}, indent=1).encode())

    write("running")
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        text = " ".join(str(error).split())[:300]
        note = text if isinstance(error, ConnectomicsError) else f"{type(error).__name__}: {text}"
        with contextlib.suppress(WriteError):  # on a full disk, the first error is the one to report
            write("interrupted") if stopped else write("failed", note)
        raise
    write("finished")


def state_of(folder: Path) -> RunState:
    """Return the state of a run folder; raise `MetadataError` if its file cannot be read."""
    file = folder / STATE_FILE
    if not file.is_file():
        started = (folder / "metrics.csv").is_file() or any((folder / "checkpoints").glob("*.ckpt"))
        return RunState("unknown", "the run folder has no state.json") if started else RunState("empty")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        name, note, host = str(stored["state"]), str(stored["note"]), str(stored["host"])
        pid, began = int(stored["pid"]), float(stored["process_started"])
    except (ValueError, KeyError, TypeError) as error:
        raise MetadataError(f"{file} does not hold the state of a run ({type(error).__name__}: {error})") from error
    if name != "running":
        return RunState(name, note)
    if host != platform.node():
        return RunState("unknown", f"started on {host}; its end was not seen")
    with contextlib.suppress(psutil.Error):
        if abs(psutil.Process(pid).create_time() - began) < 1:  # else another process has the same number
            return RunState("running", f"process {pid}")
    return RunState("interrupted", "its process was killed")


def weights_file(path: str | Path) -> Path:
    """Return the file of weights: of a run folder its best checkpoint, else its last one; of a file, the file."""
    given = Path(path)
    if not given.is_dir():
        return given
    best = given / "checkpoints/best.ckpt"
    found = best if best.is_file() else latest_checkpoint(given)
    if found is None:
        raise MissingError(f"{path} is a folder without checkpoints; give a trained run or a checkpoint")
    return found


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint from which a run resumes: ``last.ckpt``, else the newest; None if there is none."""
    last = folder / "checkpoints/last.ckpt"
    if last.is_file():
        return last
    return max((folder / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)


def metric_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a run's ``metrics.csv``, as text; [] if there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def environment() -> dict[str, Any]:
    """Return the versions of all installed packages, the machine with its GPUs, the command, and the git state."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "connectomics": connectomics.__version__,
        "git": git_state(Path(connectomics.__file__).parent),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID"),
        "packages": packages(),
    }


@functools.cache
def packages() -> dict[str, str]:
    """Return the version of each installed package, as they were when this process asked first."""
    found = (distribution.metadata for distribution in metadata.distributions())
    return dict(sorted((about["Name"], about["Version"]) for about in found))


def save_environment(run_dir: Path) -> None:
    """Append `environment` to the JSON list in a run folder; each start of a run adds an entry."""
    write_file(run_dir / ENVIRONMENT_FILE, json.dumps([*starts_of(run_dir), environment()], indent=1).encode())


def starts_of(run: Path) -> list[dict[str, Any]]:
    """Return ``environment.json``, an entry for each start of the run; [] if there is none."""
    path = run / ENVIRONMENT_FILE
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MetadataError(
            f"cannot read {path} as JSON: {error}; remove it, or restore it: it only records the machine and the "
            "packages of each start"
        ) from error
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a folder's checkout and whether files were changed since; None without git."""

    def ask(*words: str) -> str | None:
        command = ["git", "-C", str(folder), *words]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if not commit or ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # a package installed into an environment inside another project's checkout
    return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
