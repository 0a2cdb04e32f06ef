"""Whether a run trains, and how it ended: a small file in its folder, so that a failed one is not taken for whole."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from connectomics.errors import ConnectomicsError, MetadataError, WriteError
from connectomics.io.replacing import has_keys, not_ours, require_own
from connectomics.io.write import write_file

STATE_FILE = "state.json"
_RUN_FILES = ("config.yaml", "environment.json", "metrics.csv", "checkpoints")


@dataclass(frozen=True)
class RunState:
    """How the last start of a run ended.

    Attributes:
        name: ``finished``, ``running``, ``interrupted`` (Ctrl-C, killed), ``failed``, ``empty`` (a configuration and
            nothing else) or ``unknown`` (begun on another machine, or before states were kept).
        note: why, in a few words; may be "".
    """

    name: str
    note: str = ""


def require_run_folder(folder: Path) -> None:
    """`WriteError` if training in ``folder`` would replace files that no run wrote. Others, as a job's log, may lie
    there."""
    if latest_checkpoint(folder) is None:
        state = require_own(folder / STATE_FILE, has_keys("state", "pid"), "train")
        there = [folder / name for name in _RUN_FILES if (folder / name).exists()]
        if there and not state.exists():
            raise not_ours(there[0], "train")


@contextlib.contextmanager
def keep_state(folder: Path) -> Iterator[None]:
    """Write into a run's folder that it runs, and then how it ended. A process that is killed cannot say so: readers
    see that it is gone.

    Raises `WriteError` where another process of this machine trains in this folder.
    """
    about = {"host": platform.node(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}
    _refuse_two(folder)

    def write(state: str, note: str = "") -> None:
        write_file(folder / STATE_FILE, json.dumps({"state": state, "note": note, **about}, indent=1).encode())

    write("running")
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        with contextlib.suppress(WriteError):  # the disk is full: the first error is the one to know of
            write("interrupted") if stopped else write("failed", _in_a_line(error))
        raise
    write("finished")


def state_of(folder: Path) -> RunState:
    """The state of a run's folder; `MetadataError` where its file cannot be read."""
    file = folder / STATE_FILE
    if not file.is_file():
        begun = (folder / "metrics.csv").is_file() or any((folder / "checkpoints").glob("*.ckpt"))
        return RunState("unknown", "begun before states were kept") if begun else RunState("empty")
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        name, note, host = str(kept["state"]), str(kept["note"]), str(kept["host"])
        pid, started = int(kept["pid"]), float(kept["process_started"])
    except (ValueError, KeyError, TypeError) as error:
        raise MetadataError(f"{file} does not hold the state of a run ({type(error).__name__}: {error})") from error
    if name != "running":
        return RunState(name, note)
    if host != platform.node():
        return RunState("unknown", f"begun on {host}; its end was not seen")
    if _runs(pid, started):
        return RunState("running", f"process {pid}")
    return RunState("interrupted", "its process was killed")


def latest_checkpoint(folder: Path) -> Path | None:
    """What a run goes on from: ``last.ckpt``, or the newest where that is not kept; None where there is none."""
    last = folder / "checkpoints/last.ckpt"
    if last.is_file():
        return last
    return max((folder / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)


def _refuse_two(folder: Path) -> None:
    """Two processes would write over each other's checkpoints."""
    try:
        state = state_of(folder)
    except MetadataError:
        return  # nobody's; it is written anew
    if state.name == "running" and state.note != f"process {os.getpid()}":
        raise WriteError(f"{state.note} trains in {folder}; wait for it or end it, or give another --run-dir")


def _runs(pid: int, started: float) -> bool:
    """Whether that process is alive; another one may have got its number."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.Error:
        return False


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ConnectomicsError) else f"{type(error).__name__}: {text}"
