"""Job arrays of SLURM and LSF: equal jobs that share the blocks of a command, without a process that leads them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from connectomics.errors import EngineError, InputError, require_known
from connectomics.io.replacing import contains, require_own, write_file
from connectomics.pipeline.file_templates import from_template

#: Verbs whose blocks jobs can share.
VERBS = ("predict", "decode", "measure", "mesh", "run-task")
_MARK = "# Written by pytc array."
_QUEUES = ("slurm", "lsf")


def array_script(
    words: Sequence[str], queue: str, jobs: int, *, time: str = "4:00", options: Sequence[str] = (), logs: str | Path
) -> str:
    """Return a batch script for a job array in which every job runs the same command with ``engine.share=true``.

    Each job claims blocks until the output is complete, and is put back into the queue at its time limit.

    Args:
        words: a command without ``pytc``, such as ``["decode", "predictions", "labels"]``. queue: ``slurm`` or ``lsf``.
        time: limit of a job, hours:minutes. options: further directives, such as ``--gres=gpu:1``.
        logs: folder for a log of each job.

    Raises:
        InputError, UnknownNameError: the command, the queue, the number of jobs or the time do not fit.
    """
    require_known("queue", [queue], _QUEUES)
    if not words or words[0] not in VERBS:
        raise InputError(f"expected a command of {', '.join(VERBS)} after --, got {shlex.join(words) or 'nothing'}")
    limit = re.fullmatch(r"(\d{1,4}):(\d\d)", time)
    if jobs < 1 or limit is None:
        raise InputError(f"expected at least 1 job and a time of hours:minutes, got {jobs} and {time!r}")
    return from_template(
        "job_array.sh", queue=queue, verb=words[0], jobs=jobs, hours=limit[1], minutes=limit[2], mark=_MARK,
        logs=os.path.abspath(logs), options=options, folder=shlex.quote(os.getcwd()),
        command=shlex.join([sys.executable, "-m", "connectomics", *words, "engine.share=true"]),
    )  # fmt: skip


def submit_array(script: str, queue: str, logs: str | Path) -> str:
    """Store a script of `array_script` in its folder for logs and give it to the queue; return the queue's answer.

    Raises:
        WriteError: another file is there. EngineError: the queue's program is missing, or refuses the script.
    """
    path = require_own(Path(logs, f"array.{queue}.sh"), contains(_MARK), "array")
    write_file(path, script.encode())
    command = ["sbatch", str(path)] if queue == "slurm" else ["bsub"]
    try:
        found = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise EngineError(f"{command[0]} is not installed on this machine; submit {path} on one that has it") from error
    if found.returncode:
        raise EngineError(f"{command[0]} refused {path}: {' '.join(found.stderr.split())[:300]}")
    return " ".join(found.stdout.split())
