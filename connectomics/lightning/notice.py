"""A run that is told to end: by SIGTERM, or by what a queue sends some time before a job's limit (``--signal=USR1@300``
of SLURM, SIGUSR2 of LSF). What it does then is in `connectomics.lightning.callbacks.LatestState`."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from types import FrameType

import pytorch_lightning as pl

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Notice:
    """Listens for the signals from `listen` on; Lightning puts back what was before when the training ends."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._listener = 0

    def listen(self) -> None:
        """From now on take note of the signals. Call it once Lightning has set its own answers, which these replace:
        they end a run at the next batch without its state, or write it in the middle of one."""
        if threading.current_thread() is threading.main_thread():
            self._listener = os.getpid()
            for number in SIGNALS:
                signal.signal(number, self._take_note)

    def reached(self, trainer: pl.Trainer) -> bool:
        """Whether any of the run's processes was told to end; all of them must ask at the same batch."""
        if trainer.world_size == 1:
            return self.received is not None
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def requeue(self, environment: Mapping[str, str] = os.environ) -> None:
        """Ask SLURM to start the job again, where SIGUSR1 came within one of its jobs."""
        job = environment.get("SLURM_JOB_ID")
        if self.received != signal.SIGUSR1 or job is None or shutil.which("scontrol") is None:
            return
        array = environment.get("SLURM_ARRAY_JOB_ID")
        name = job if array is None else f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
        if done.returncode:
            log.warning("SLURM does not take job %s back: %s", name, " ".join(done.stderr.split()))
        else:
            log.warning("job %s is in the queue again", name)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._listener:
            self.received = signal.Signals(number)
        else:  # a child that was forked from here is ended by it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
