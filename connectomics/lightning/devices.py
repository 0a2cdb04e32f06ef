"""What a run trains on: devices and precision, from what was asked for and what there is."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from connectomics.config import RunConfig
from connectomics.errors import ConfigError, nearest

log = logging.getLogger(__name__)

PRECISIONS = ("16-mixed", "bf16-mixed", "32")


@dataclass(frozen=True)
class Machine:
    """Devices, precision, and a line for each wish that was not met.

    Attributes:
        accelerator: ``gpu`` or ``cpu``.
        devices: GPUs, or processes on the CPU.
        precision: one of `PRECISIONS`.
        notes: what differs from the configuration, and why.
    """

    accelerator: str
    devices: int
    precision: str
    notes: tuple[str, ...] = ()

    @property
    def strategy(self) -> str:
        """Lightning's strategy: data-parallel where there are several devices."""
        return "ddp" if self.devices > 1 else "auto"


def choose_machine(config: RunConfig, gpus: int, bf16_cpu: bool) -> Machine:
    """Devices and precision for a run.

    Where fewer GPUs are there than ``system.num_gpus`` asks for, down to none, those are used, and a note says so.
    On the CPU float16 is tens of times slower than float32 and is never used: ``16-mixed`` becomes bfloat16 where the
    processor computes with that, float32 elsewhere.

    Args:
        config: the run.
        gpus: CUDA devices that are there.
        bf16_cpu: whether the processor has bfloat16 instructions, see `cpu_has_bfloat16`.
    """
    system, precision = config.system, config.training.precision
    if precision not in PRECISIONS:
        close = nearest(precision, PRECISIONS)
        hint = f"; did you mean {close!r}?" if close else ""
        raise ConfigError(f"training.precision is {precision!r}{hint} Allowed: {', '.join(PRECISIONS)}")
    if system.num_gpus < 0 or system.cpu_processes < 1:
        raise ConfigError(
            f"system.num_gpus must be >= 0 and system.cpu_processes >= 1, found {system.num_gpus} and "
            f"{system.cpu_processes}"
        )
    notes = []
    wanted = 0 if system.accelerator == "cpu" else system.num_gpus
    if system.accelerator == "gpu":
        wanted = max(1, wanted)
    used = min(wanted, gpus)
    if used < wanted:
        there = f"{gpus} GPU{'s' if gpus != 1 else ''}" if gpus else "no GPU"
        notes.append(
            f"{wanted} GPU{'s' if wanted != 1 else ''} asked for, {there} here: training on "
            f"{f'{used}' if used else 'the CPU'}"
        )
    if used:
        return Machine("gpu", used, precision, tuple(notes))
    if precision == "16-mixed":
        precision = "bf16-mixed" if bf16_cpu else "32"
        notes.append(f"precision 16-mixed is for GPUs: using {precision} on the CPU")
    return Machine("cpu", system.cpu_processes, precision, tuple(notes))


def this_machine(config: RunConfig) -> Machine:
    """`choose_machine` with what is here; logs its notes."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    machine = choose_machine(config, gpus, cpu_has_bfloat16())
    for note in machine.notes:
        if is_first_process():
            log.warning(note)
    return machine


def cpu_has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions; without them it is slower than float32, never faster."""
    if platform.system() != "Linux":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def set_threads(config: RunConfig, processes: int) -> int:
    """Let torch use ``system.num_cpus`` threads, at most what is there, shared by the processes; returns the number."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(config.system.num_cpus, there) // processes)
    torch.set_num_threads(threads)
    return threads


def is_first_process() -> bool:
    """Whether this is the one process, or the first of a data-parallel run (as far as the environment says)."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
