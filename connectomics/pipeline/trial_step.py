"""Try a training step of a plan: how long it takes, how much memory, and which batch fits."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from connectomics.errors import InputError

if TYPE_CHECKING:
    from connectomics.pipeline.plan import MachineFacts, Plan


def try_step(plan: Plan, machine: MachineFacts) -> None:
    """Measure one training step and store its batch size, seconds and memory in the plan.

    On a GPU, the batch is the largest that fits in memory (doubling, then bisection); on the CPU, that of the plan.
    """
    import torch

    batch = int(plan.settings["data.batch_size"])
    if machine.gpu is None:
        plan.step_seconds, plan.step_memory = _step(plan, batch)
        return
    fits, fails = 0, 0
    while fails - fits > 1 or (fails == 0 and batch <= 64):
        try:
            plan.step_seconds, plan.step_memory = _step(plan, batch)
            fits = batch
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fails = batch
        batch = (fits + fails) // 2 if fails else 2 * batch
    if fits == 0:
        raise InputError(
            f"{plan.name}: not even one patch of {plan.settings['data.patch_size']} fits into the GPU's memory"
        )
    plan.choose("data.batch_size", fits, "the largest batch that fits in GPU memory, by trial")


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
