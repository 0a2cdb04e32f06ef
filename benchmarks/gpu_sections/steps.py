"""Training steps as a run takes them, measured: first with the real loader, then with one constant batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from connectomics.config import RunConfig
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.loader import PatchLoader
from connectomics.lightning.devices import set_threads, this_machine
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.network import prepare_training
from connectomics.lightning.trainer import build_trainer
from gpu_sections.device import Clock, peak_gb, reset_peak, wait

WAITING = "waiting for data"


@dataclass
class Found:
    """What `measure` found.

    Attributes:
        real, constant: patches per second with the real loader, and with one batch that stays on the device.
        parts: seconds of a step with the real loader, by part, on the device's time line.
        memory: peak memory of tensors, GB; None on the CPU.
        load: seconds that one process needs for a patch.
    """

    real: float
    constant: float
    parts: dict[str, float]
    memory: float | None
    load: float


@dataclass
class Turns:
    """Number of warm-up steps, and the seconds for which each kind of step is measured (at least two steps)."""

    warm: int
    seconds: float


class RealThenConstant:
    """The batches of a loader; once ``constant`` is set, its last batch is repeated without augmentation."""

    def __init__(self, loader: PatchLoader, device: str) -> None:
        self.loader, self.device = loader, device
        self.constant = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batch: dict[str, torch.Tensor] = {}
        for batch in self.loader:
            yield batch
            if self.constant:
                break
        self.loader.stop()
        # without its seed a batch is not augmented
        kept = {name: value.to(self.device) for name, value in batch.items() if name != "seed"}
        while True:
            yield kept


class StepData(CellMapDataModule):
    """The data of a run, with a loader that can be switched to a constant batch."""

    switch: RealThenConstant

    def __init__(self, config: RunConfig, device: str) -> None:
        super().__init__(config)
        self._device_name = device

    def train_dataloader(self) -> Any:
        """The loader of the run, to be switched."""
        self.switch = RealThenConstant(super().train_dataloader(), self._device_name)
        return self.switch


@dataclass
class Meter(pl.Callback):
    """Counts steps, switches from the real loader to the constant batch, and ends the training."""

    data: StepData
    turns: Turns
    device: str
    clock: Clock = field(init=False)
    rates: dict[str, float] = field(default_factory=dict)  # steps per second
    real_steps: int = 0

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self._phase, self._steps, self._began = "warm", 0, 0.0

    def watch(self, module: ConnectomicsModule) -> None:
        """Mark where the network, the loss and the augmentation begin and end."""
        for part, name in ((module.network, "forward"), (module.loss, "loss")):
            part.register_forward_pre_hook(lambda *_: self._mark("others"))
            part.register_forward_hook(lambda *_, name=name: self._mark(name))
        augment = module.intensity
        if augment is not None:

            def augmented(batch: Any) -> Any:
                self._mark(WAITING)
                result = augment(batch)
                self._mark("augmentation")
                return result

            module.intensity = augmented  # type: ignore[assignment]

    def _mark(self, name: str) -> None:
        if self._phase == "real":
            self.clock.mark(name)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """The batch is on the device."""
        self._mark("others" if self.clock.marks and self.clock.marks[-1][0] == "augmentation" else WAITING)

    def on_before_backward(self, *args: Any) -> None:
        """The loss is known."""
        self._mark("others")

    def on_after_backward(self, *args: Any) -> None:
        """The gradients are there."""
        self._mark("backward")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """A step is done."""
        self._mark("optimizer")
        self._steps += 1
        if self._phase in ("warm", "settle"):
            if self._steps >= (self.turns.warm if self._phase == "warm" else 2):
                self._begin("real" if self._phase == "warm" else "constant")
            return
        if self._steps < 2 or time.perf_counter() - self._began < self.turns.seconds:
            return
        wait(self.device)
        self.rates[self._phase] = self._steps / (time.perf_counter() - self._began)
        if self._phase == "real":
            self.real_steps = self._steps
            self.data.switch.constant = True
            self._begin("settle")
        else:
            trainer.should_stop = True

    def _begin(self, phase: str) -> None:
        wait(self.device)
        self._phase, self._steps, self._began = phase, 0, time.perf_counter()
        self._mark("others")


def measure(config: RunConfig, folder: Path, device: str, turns: Turns) -> Found:
    """Train as ``config`` says (it must have no validation crops) for as long as ``turns`` says; see `Found`."""
    machine = this_machine(config)
    set_threads(config, 1)
    if machine.accelerator == "gpu":
        torch.set_float32_matmul_precision("high")  # as `train` does
    pl.seed_everything(0, workers=True, verbose=False)
    module = ConnectomicsModule(config)
    data = StepData(config, device)
    data.setup("fit")
    prepare_training(module.network, config.training)
    meter = Meter(data, turns, device)
    meter.watch(module)
    reset_peak(device)
    trainer = build_trainer(config, folder, validate=False, machine=machine, callbacks=[meter])
    trainer.fit(module, datamodule=data)
    if "constant" not in meter.rates:
        raise RuntimeError("the training ended before it was measured: the epoch is too short")
    batch = config.data.batch_size
    parts = {name: seconds / meter.real_steps for name, seconds in meter.clock.seconds().items()}
    memory = peak_gb(device)
    return Found(batch * meter.rates["real"], batch * meter.rates["constant"], parts, memory, _load_seconds(data))


def _load_seconds(data: StepData) -> float:
    """Return the median time that this process needs for a patch, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sampler, dataset, found = data.sampler(), data.train_dataset, []
    for number in range(6):
        began = time.perf_counter()
        dataset[sampler.request(0, number)]
        found.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return sorted(found)[len(found) // 2]
