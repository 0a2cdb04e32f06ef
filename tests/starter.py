"""Starts real processes that have the large libraries already.

Importing torch, MONAI and Lightning takes seconds. A process imports them once (``python -m tests.starter``), and each
command runs in a fork of it, as ``pytc`` or ``python`` would run it. Lines of JSON go in and numbers come back:
{"start": {"words", "cwd", "folder", "environment"}} gives the process's id, {"wait": id} its exit status (negative: the
signal that ended it), {"poll": id} the same, or 1000 while it runs.

With ``FORK_WORKERS`` in its environment, the working processes of a command (`connectomics.tasks.supervise.Child`) are
forks, too.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

ROOT = Path(__file__).resolve().parents[1]
RUNNING = 1000


class Started:
    """A command that was started.

    Attributes:
        pid: process id; it leads a process group.
        status: exit status once it has ended (negative: the signal that ended it), else None.
    """

    def __init__(self, starter: Starter, pid: int, folder: Path) -> None:
        self._starter, self.pid, self._folder = starter, pid, folder
        self.status: int | None = None

    def wait(self) -> int:
        """Wait for its end; return the exit status."""
        if self.status is None:
            self.status = self._starter.ask({"wait": self.pid})
        return self.status

    def is_running(self) -> bool:
        if self.status is None and (answer := self._starter.ask({"poll": self.pid})) != RUNNING:
            self.status = answer
        return self.status is None

    def kill(self) -> None:
        if self.status is None:  # else the id may be another process's
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait_for(self, condition: Callable[[], bool], pause_s: float = 0.005) -> bool:
        """Wait until ``condition()`` or the end of the process; return whether it still runs."""
        while self.is_running():
            if condition():
                return True
            time.sleep(pause_s)
        return False

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text(encoding="utf-8")

    @property
    def said(self) -> str:
        return self.stdout + self.stderr

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error:")]


class Starter:
    """Starts commands; a context manager. ``folder`` is their home and working directory, and gets what they print."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.starter"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def start(
        self, words: Sequence[object], environment: Mapping[str, str | None] | None = None, cwd: Path | None = None
    ) -> Started:
        """Start ``pytc ...``, or what Python is called with: ``-m module ...``, ``-c code ...``, ``script.py ...``.

        ``environment`` changes that of this process (None: removed).
        """
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        home = str(self._folder)
        ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": home, "XDG_CACHE_HOME": home}
        changed = {**os.environ, **ours, **(environment or {})}
        values = {name: value for name, value in changed.items() if value is not None}
        request = {"words": [str(word) for word in words], "cwd": str(cwd or home), "folder": str(folder)}
        return Started(self, self.ask({"start": {**request, "environment": values}}), folder)

    def run(
        self, words: Sequence[object], environment: Mapping[str, str | None] | None = None, cwd: Path | None = None
    ) -> Started:
        """Start a command and wait for its end."""
        started = self.start(words, environment, cwd)
        started.wait()
        return started


# -- in the process that forks -----------------------------------------------------------------------------------------
def _become(words: list[str], cwd: str, folder: str, environment: dict[str, str]) -> None:
    """Be the process of one command; does not return."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path[1:1] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has started with "&"
    random.seed()
    workers = _fork_workers() if "FORK_WORKERS" in environment else None
    status = _status(words)
    if workers is not None:
        workers.close()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    # without the end of the interpreter, which touches, and so copies, all that was imported
    os._exit(status)


class _WorkerStarter:
    """Forks working processes for a command, from a process that began before the command had threads."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._pid = os.fork()
            if self._pid == 0:
                self._socket.close()
                self._serve(theirs)

    def close(self) -> None:
        self._socket.close()
        os.waitpid(self._pid, 0)

    def ask(self, request: object, files: Sequence[int] = ()) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], list(files))
            return int(self._socket.recv(100))

    @staticmethod
    def _serve(requests: socket.socket) -> NoReturn:
        while True:
            data, files, *_ = socket.recv_fds(requests, 1 << 20, 1)
            if not data:
                os._exit(0)
            request = json.loads(data)
            if isinstance(request, int):
                found, status = os.waitpid(request, os.WNOHANG)
                requests.send(str(os.waitstatus_to_exitcode(status) if found else RUNNING).encode())
                continue
            if (pid := os.fork()) == 0:
                requests.close()
                os.dup2(files[0], request["file"])
                os.environ.update(request["environment"])
                try:
                    exec(request["code"], {})
                except BaseException:
                    traceback.print_exc()
                os._exit(1)
            os.close(files[0])
            requests.send(str(pid).encode())

    def start(self, command: list[str], pass_fds: Sequence[int], env: dict[str, str], **_: Any) -> _Worker:
        """As `subprocess.Popen` for ``python -c code`` and one file."""
        request = {"code": command[2], "file": pass_fds[0], "environment": env}
        return _Worker(self, self.ask(request, pass_fds))


class _Worker:
    """`subprocess.Popen`, as far as `connectomics.tasks.supervise` uses it."""

    def __init__(self, starter: _WorkerStarter, pid: int) -> None:
        self.pid, self._starter = pid, starter
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and (answer := self._starter.ask(self.pid)) != RUNNING:
            self._code = answer
        return self._code

    def wait(self, timeout: float = 60.0) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _fork_workers() -> _WorkerStarter:
    from connectomics.tasks import supervise

    starter = _WorkerStarter()
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    supervise.subprocess = types.SimpleNamespace(Popen=starter.start, **names)  # type: ignore[assignment]
    return starter


def _status(words: list[str]) -> int:
    """Run the command; return what the process ends with."""
    try:
        _run(*words)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(program: str, *arguments: str) -> None:
    if program == "pytc":
        sys.argv = [program, *arguments]
        runpy.run_module("connectomics", run_name="__main__", alter_sys=True)
    elif program == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif program == "-c":
        sys.argv = ["-c", *arguments[1:]]
        main_module: Any = types.ModuleType("__main__")
        sys.modules["__main__"] = main_module
        exec(compile(arguments[0], "<string>", "exec"), main_module.__dict__)
    else:
        sys.argv = [program, *arguments]
        sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
        runpy.run_path(program, run_name="__main__")


def main() -> None:
    import numba

    import connectomics.cellmap.fetch
    import connectomics.cellmap.ingest
    import connectomics.lightning.module
    import connectomics.lightning.trainer
    import connectomics.models.monai_networks
    import connectomics.pipeline.mesh
    import connectomics.pipeline.predict
    import connectomics.submission  # noqa: F401
    from connectomics.cli.app import command
    from connectomics.config import load_config, tutorial
    from connectomics.lightning.run_state import packages

    command(), packages(), load_config(tutorial("phantom")), numba.njit(lambda n: n)(1)  # what a process makes once

    gc.freeze()  # no collection in a fork has to go through (and so copy) what was imported here
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "start" not in request:
            ((how, pid),) = request.items()
            found, status = os.waitpid(pid, os.WNOHANG if how == "poll" else 0)
            print(os.waitstatus_to_exitcode(status) if found else RUNNING, flush=True)
            continue
        child = os.fork()
        if child == 0:
            _become(**request["start"])
        print(child, flush=True)


if __name__ == "__main__":
    main()
