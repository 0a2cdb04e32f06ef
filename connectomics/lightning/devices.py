"""Devices and precision of a run: what the configuration requests and what the machine has."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from connectomics.config import RunConfig
from connectomics.errors import number_of
from connectomics.machine import cpu_has_bfloat16, is_first_process, usable_cores

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """Devices and precision that a run uses.

    Attributes:
        accelerator: ``gpu`` or ``cpu``. devices: GPUs, or processes on the CPU. precision: as ``training.precision``.
        notes: how these differ from the configuration, and why.
    """

    accelerator: str
    devices: int
    precision: str
    notes: tuple[str, ...] = ()

    @property
    def strategy(self) -> str:
        """Lightning's strategy: data-parallel if there are several devices."""
        return "ddp" if self.devices > 1 else "auto"


def choose_machine(config: RunConfig, gpus: int, bf16_cpu: bool) -> Machine:
    """Return devices and precision for a run.

    If fewer GPUs are available than ``system.num_gpus``, those are used, or the CPU if there is none. On the CPU
    float16 is tens of times slower than float32, and bfloat16 about ten times without instructions for it: mixed
    precision becomes bfloat16 if the processor has them, else 32.

    Args:
        config: the run. gpus: available CUDA devices. bf16_cpu: see `connectomics.machine.cpu_has_bfloat16`.
    """
    system, precision = config.system, config.training.precision
    notes = []
    wanted = {"cpu": 0, "gpu": max(1, system.num_gpus)}.get(system.accelerator, system.num_gpus)
    used = min(wanted, gpus)
    if used < wanted:
        available = f"only {used} {'is' if used == 1 else 'are'}" if used else "none is"
        place = f"{number_of(used, 'GPU')}" if used else "the CPU"
        notes.append(f"requested {number_of(wanted, 'GPU')}, but {available} available: training on {place}")
    if used:
        return Machine("gpu", used, precision, tuple(notes))
    possible = "bf16-mixed" if bf16_cpu else "32"
    if precision not in ("32", possible):
        why = "is for GPUs" if precision == "16-mixed" else "needs instructions that this processor lacks"
        notes.append(f"precision {precision} {why}: using {possible} on the CPU")
        precision = possible
    return Machine("cpu", system.cpu_processes, precision, tuple(notes))


def this_machine(config: RunConfig) -> Machine:
    """Return `choose_machine` for this machine, and log its notes."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    machine = choose_machine(config, gpus, cpu_has_bfloat16())
    for note in machine.notes if is_first_process() else ():
        log.warning(note)
    return machine


def of_all(trainer: pl.Trainer, state: Any) -> list[Any]:
    """Return the states of all processes of a run, by their rank; each calls this."""
    gathered = [state] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(gathered, state)
    return gathered


def set_threads(config: RunConfig, processes: int) -> int:
    """Let torch use ``system.num_cpus`` threads, at most the usable cores, per ``processes``; return the number."""
    threads = max(1, min(config.system.num_cpus, usable_cores()) // processes)
    torch.set_num_threads(threads)
    return threads
