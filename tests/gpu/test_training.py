"""Training: gradient scaling, precisions, resuming with the device's random state, memory that runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from connectomics.config import RunConfig
from connectomics.errors import InputError
from connectomics.models.batch_labels import DenseLabels
from connectomics.models.losses import build_loss
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config


def config_on(device: str, precision: str, **changes: Any) -> RunConfig:
    accelerator = "gpu" if device == "cuda" else "cpu"
    return tiny_config(system__accelerator=accelerator, training__precision=precision, **changes)


def half_precision_loss(weights: torch.Tensor) -> torch.Tensor:
    """Of float16 logits, as a network under autocast has them."""
    generator = torch.Generator().manual_seed(5)
    label = (torch.rand(weights.shape, generator=generator) < 0.3).float()
    labels = DenseLabels(label, torch.ones_like(label, dtype=torch.bool)).to(weights.device)
    return build_loss(["DiceLoss", "BCEWithLogitsLoss"])(weights.half(), labels).total


def weights_on(device: str) -> torch.nn.Parameter:
    values = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(6))
    return torch.nn.Parameter(values.to(device))


def test_scaled_gradients_are_the_gradients(device: str) -> None:
    plain, scaled = weights_on(device), weights_on(device)
    loss = build_loss(["DiceLoss", "BCEWithLogitsLoss"])
    generator = torch.Generator().manual_seed(5)
    label = (torch.rand(plain.shape, generator=generator) < 0.3).float()
    loss(plain, DenseLabels(label, torch.ones_like(label, dtype=torch.bool)).to(device)).total.backward()
    optimizer = torch.optim.SGD([scaled], lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**14)
    scaler.scale(half_precision_loss(scaled)).backward()
    scaler.unscale_(optimizer)
    assert plain.grad is not None
    assert scaled.grad is not None
    # without the scale these gradients (about 1e-4) would lose most of their digits in float16
    assert torch.allclose(scaled.grad, plain.grad, rtol=1e-2, atol=1e-7)


def test_a_step_whose_gradients_overflow_is_left_out(device: str) -> None:
    weights = weights_on(device)
    before = weights.detach().clone()
    optimizer = torch.optim.SGD([weights], lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    scaler.scale(half_precision_loss(weights)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights, before)
    assert scaler.get_scale() == 2.0**39


# on the CPU 16-mixed becomes bfloat16 or float32, whichever is faster there
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_run_in_mixed_precision_learns(precision: str, device: str, tmp_path: Path) -> None:
    config = config_on(device, precision, training__max_epochs=4)
    result = train(config, tmp_path / "run", datamodule=MadeUpData(patches=12))
    assert result.best is not None
    assert result.best > 0.2
    assert result.steps == 24


def random_state(result: Run) -> dict[str, Any]:
    assert result.last_checkpoint is not None
    content = torch.load(result.last_checkpoint, weights_only=True, map_location="cpu")
    (state,) = content["connectomics_random_state"]
    return state


def test_a_resumed_run_goes_on_with_the_devices_random_numbers(device: str, tmp_path: Path) -> None:
    """The network has dropout, so that each step draws from the device's generator."""
    whole = train(config_on(device, "32", training__max_epochs=2), tmp_path / "whole", datamodule=MadeUpData())
    first = train(config_on(device, "32", training__max_epochs=1), tmp_path / "part", datamodule=MadeUpData())
    torch.manual_seed(99)  # the process is another one by then
    second = train(
        config_on(device, "32", training__max_epochs=2),
        tmp_path / "part",
        checkpoint=first.last_checkpoint,
        datamodule=MadeUpData(),
    )
    expected, found = random_state(whole), random_state(second)
    assert torch.equal(found["torch"], expected["torch"])
    assert len(found["cuda"]) == len(expected["cuda"]) == torch.cuda.device_count()
    assert all(torch.equal(a, b) for a, b in zip(found["cuda"], expected["cuda"], strict=True))
    if device == "cuda":
        assert not torch.equal(found["cuda"][0], random_state(first)["cuda"][0]), "nothing was drawn"


@pytest.mark.gpu
def test_training_that_finds_no_memory_says_so_in_one_line(no_memory: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the run does not fit in GPU memory") as error:
        train(config_on("cuda", "32"), tmp_path / "run", datamodule=MadeUpData())
    assert "\n" not in str(error.value)


def test_the_cost_of_a_study_row_has_device_seconds_on_a_gpu(device: str, tmp_path: Path) -> None:
    from connectomics.pipeline.study_callback import RowCallback

    config = config_on(device, "32", training__max_epochs=2)
    counted = RowCallback(until=None)
    train(config, tmp_path / "run", datamodule=MadeUpData(), callbacks=[counted])
    assert counted.cpu_s > 0
    assert (counted.device_s is None) == (device == "cpu")
    assert not counted.stopped
    before = (counted.cpu_s, counted.device_s)
    again = RowCallback(until=None)  # a run that is resumed goes on counting
    config.training.max_epochs = 3
    train(config, tmp_path / "run", resume=True, datamodule=MadeUpData(), callbacks=[again])
    assert again.cpu_s > before[0]
    assert device == "cpu" or again.device_s > before[1]  # type: ignore[operator]


class NoWaiting(pl.Callback):
    """From the third step to the last but one, what makes the host wait for the GPU is an error."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        strict = 2 <= batch_idx < trainer.num_training_batches - 2
        torch.cuda.set_sync_debug_mode("error" if strict else "default")

    def on_exception(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_host_does_not_wait_in_a_step_of_bfloat16(gpu: str, tmp_path: Path) -> None:
    """Also between steps: for the next batch and its augmentation, for averages, and for what is logged."""
    names = ("blur", "contrast", "gamma", "noise", "drift", "stripes", "charging", "missing_sections", "cutout")
    config = config_on(
        gpu, "bf16-mixed", training__max_epochs=1, training__ema=0.9, logging__log_every_n_steps=1000,
        data__intensity={name: {"prob": 1} for name in names},
    )  # fmt: skip
    result = train(config, tmp_path / "run", datamodule=MadeUpData(patches=24), callbacks=[NoWaiting()])
    assert result.steps == 12
