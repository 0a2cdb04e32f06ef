"""Leads a stored `CubeTask` in a process of its own: ``python -m tests.tasks.lead task.json '{"workers": 2}'``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def start(file: Path, **engine: object) -> subprocess.Popen[str]:
    """The process, at the head of a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tasks.lead", str(file), json.dumps(engine)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def kill(leader: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL it, and nobody else; those that it had started, which must end now."""
    try:
        below = psutil.Process(leader.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    os.kill(leader.pid, signal.SIGKILL)
    leader.communicate()
    return below


def still_there(processes: list[psutil.Process], seconds: float = 10.0) -> list[psutil.Process]:
    """Those that have not ended after a while."""
    until = time.monotonic() + seconds
    while (left := [p for p in processes if p.is_running() and p.status() != "zombie"]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def main() -> None:
    from connectomics.config.schema import EngineConfig
    from connectomics.errors import ConnectomicsError
    from connectomics.tasks import run_task
    from tests.tasks.kit import CubeTask

    task = CubeTask.load(sys.argv[1])
    try:
        run_task(task, EngineConfig(**json.loads(sys.argv[2])))
    except ConnectomicsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
