"""Try a training step of a plan: how long it takes, how much memory, and which batch fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from connectomics.errors import InputError

if TYPE_CHECKING:
    from connectomics.pipeline.plan import MachineFacts, Plan

_LARGEST_BATCH = 64
_VALIDATIONS = 20  # of a training with a time limit


def try_step(plan: Plan, machine: MachineFacts) -> None:
    """Measure one training step and store its batch size, seconds and memory in the plan.

    On a GPU, the batch is the one of `choose_batch`; on the CPU, that of the plan.
    """
    if machine.gpu is None:
        plan.step_seconds, plan.step_memory = _step(plan, int(plan.settings["data.batch_size"]))
    else:
        choose_batch(plan, lambda batch: _step(plan, batch))


def choose_batch(plan: Plan, step: Callable[[int], tuple[float, int]]) -> None:
    """Choose the smallest batch that keeps the GPU busy, and how often to validate if the training has a time.

    More steps with fewer patches train better than fewer steps with more (docs/recipe.md).

    Args:
        step: returns the seconds and the bytes of a training step with so many patches; may raise torch's
            `OutOfMemoryError`.
    """
    import torch

    from connectomics.inference.predict_worker import best_batch

    tried: dict[int, tuple[float, int]] = {}

    def seconds(batch: int) -> float:
        try:
            tried[batch] = step(batch)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            if batch > 1:
                raise
            patch = plan.settings["data.patch_size"]
            raise InputError(f"{plan.name}: not even one patch of {patch} fits into the GPU's memory") from error
        return tried[batch][0]

    batch = best_batch(seconds, _LARGEST_BATCH)
    plan.step_seconds, plan.step_memory = tried[batch]
    plan.choose("data.batch_size", batch, "larger batches give hardly more patches per second, or do not fit, by trial")
    if (minutes := plan.settings.get("training.max_minutes")) is not None:
        steps = max(1, round(60 * minutes / plan.step_seconds / _VALIDATIONS))
        plan.choose("data.patches_per_epoch", steps * batch, f"about {_VALIDATIONS} validations in {minutes:g} minutes")


def _step(plan: Plan, batch: int) -> tuple[float, int]:
    """Return the seconds of a training step on random patches, and its memory: of the GPU, or of this process."""
    import psutil
    import torch

    from connectomics.lightning.module import ConnectomicsModule
    from connectomics.models.batch_labels import DenseLabels
    from connectomics.models.heads import split_channels

    config = plan.config()
    device = "cuda" if torch.cuda.is_available() and config.model.architecture != "unet_2d" else "cpu"
    module = ConnectomicsModule(config).to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), config.optimizer.lr)
    shape = (batch, len(plan.classes), *config.data.patch_size)
    image = torch.rand(batch, 1, *config.data.patch_size, device=device)
    labels = DenseLabels(torch.rand(shape, device=device).round(), torch.ones(shape, dtype=torch.bool, device=device))
    ids = torch.randint(0, 3, (batch, len(module.head_losses.classes), *config.data.patch_size), device=device).int()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = math.inf
    for _ in range(2):  # the first step allocates buffers and chooses algorithms
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=config.training.precision == "bf16-mixed"):
            logits, *of_heads = split_channels(module.network(image), module.channel_groups)
            loss = module.loss(logits, labels).total
            if of_heads:
                loss = loss + module.head_losses(of_heads, ids).total
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    return seconds, int(memory)
