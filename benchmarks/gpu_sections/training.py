"""Section ``training``: the real loader beside a constant batch, memory, and where a step's time goes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from data_roots import AUGMENTED, FOURTEEN, one_large_crop

from connectomics.config import RunConfig
from connectomics.models.batch_labels import PackedLabels
from connectomics.models.losses import build_loss
from connectomics.phantom import PHANTOM_CLASSES
from gpu_sections.device import peak_gb, reset_peak, wait
from gpu_sections.record import LeftOutError, Section
from gpu_sections.steps import WAITING, Turns, measure

_RATIO = 0.97  # goal: of the constant batch's rate, with the real loader
_INTENSITY: dict[str, dict[str, float]] = {
    name: {"prob": 0.3} for name in ("blur", "contrast", "brightness", "gamma", "noise", "drift", "stripes")
}
_PARTS = (WAITING, "augmentation", "forward", "loss", "backward", "optimizer", "others")


def run(section: Section) -> None:
    """Rates by precision, classes and memory format, memory with gradient checkpointing, and the parts of a step."""
    with section.row("data", "synthetic crop with 48 classes") as row:
        began = time.monotonic()
        # at the voxel size of the runs: the crop cache holds the same whatever is stored
        sizes = (400.0, 300.0, 8.0) if section.tiny else (2000.0, 1320.0, 8.0)
        root = one_large_crop(section.scratch / "root", *sizes)
        row["s"] = time.monotonic() - began
    before = 30.0  # seconds of the row before
    cases = [
        ("bf16-mixed", 14, False), ("bf16-mixed", 14, True), ("bf16-mixed", 48, False), ("16-mixed", 14, False),
        ("16-mixed", 48, False),
    ]  # fmt: skip
    for precision, classes, last in cases[:: 4 if section.tiny else 1]:
        parts: dict[str, float] = {}
        name = f"{precision}, {classes} classes{', channels last' * last}"
        with section.row("training step", name, **{"real / constant": _RATIO}) as row:
            section.need(0 if section.tiny else before)
            began = time.monotonic()
            parts = _row(section, root, precision, classes, row, channels_last=last)
            before = time.monotonic() - began
        if parts:
            with section.row("where a step's time goes", name) as row:
                _shares(parts, row)
    for classes in (14, 48):
        with section.row("the loss alone", f"{classes} classes") as row:
            section.need(0 if section.tiny else 5)
            _loss_alone(section, classes, row)
    with section.row("training step", "bf16-mixed, 14 classes, gradient checkpointing") as row:
        section.need(0 if section.tiny else before)
        _row(section, root, "bf16-mixed", 14, row, checkpointing=True)
    with section.row("two devices", "one step, half of the batch each, against one device with all of it") as row:
        row |= _two_devices(section)


def _loss_alone(section: Section, classes: int, row: dict[str, Any]) -> None:
    """Milliseconds of the loss and its gradient on a batch of half-precision logits."""
    side, batch, states = (16, 2, 20) if section.tiny else (128, 2, 100)
    generator = torch.Generator(section.device).manual_seed(0)
    some = {"generator": generator, "device": section.device}
    codes = torch.randint(0, states, (batch, side, side, side), dtype=torch.uint8, **some)
    present, known = (torch.rand(batch, classes, states, **some) < share for share in (0.1, 0.9))
    labels = PackedLabels(codes, present, known)
    logits = torch.randn(batch, classes, side, side, side, **some).bfloat16().requires_grad_()
    loss = build_loss(["DiceLoss", "BCEWithLogitsLoss"])
    for name, at_once in (("one class after another", 1), ("as on this device", None)):
        loss.at_once = at_once
        seconds = []
        for _ in range(4):
            reset_peak(section.device)
            wait(section.device)
            began = time.perf_counter()
            loss(logits, labels).total.backward()
            wait(section.device)
            seconds.append(time.perf_counter() - began)
        row[f"{name}, ms"] = 1e3 * min(seconds)
        row[f"{name}, GB"] = peak_gb(section.device)


def _row(
    section: Section,
    root: Path,
    precision: str,
    classes: int,
    row: dict[str, Any],
    *,
    checkpointing: bool = False,
    channels_last: bool = False,
) -> dict[str, float]:
    """Fill in a row; return the seconds of a step by part."""
    config = configuration(section, root, precision, classes)
    config.training.channels_last = channels_last
    if checkpointing:
        config.model.options["gradient_checkpointing"] = True
    turns = Turns(2, 0.1) if section.tiny else Turns(6, 7.0)
    found = measure(config, section.folder("run"), section.device, turns)
    row["real patches/s"] = found.real
    row["constant patches/s"] = found.constant
    row["real / constant"] = found.real / found.constant
    row["device GB"] = found.memory
    row["workers"] = config.data.num_workers
    row["workers needed"] = math.ceil(found.constant * found.load)
    row["ms to make a patch"] = 1e3 * found.load
    return found.parts


def _shares(parts: dict[str, float], row: dict[str, Any]) -> None:
    whole = sum(parts.values())
    row["ms a step"] = 1e3 * whole
    for name in _PARTS:
        row[name] = f"{100 * parts.get(name, 0.0) / whole:.1f} %"


def configuration(section: Section, root: Path, precision: str, classes: int) -> RunConfig:
    """MedNeXt-B (kernel 3), 128^3, batch 2; or the same small."""
    config = RunConfig()
    config.system.accelerator = "gpu" if section.device == "cuda" else "cpu"
    config.system.num_cpus = 1 if section.device == "cpu" else 8
    config.dataset.data_root = str(root)
    config.dataset.classes = list(FOURTEEN if classes == 14 else PHANTOM_CLASSES)
    config.dataset.train_val_split = 1.0
    config.model.mednext_size, config.model.mednext_kernel_size = "B", 3
    if section.tiny:
        config.model.options = {"init_filters": 4, "blocks_down": [1, 1], "blocks_up": [1, 1], "blocks_bottleneck": 1}
        config.model.options |= {"encoder_expansion_ratio": [2, 2], "decoder_expansion_ratio": [2, 2]}
    config.data.patch_size = [16 if section.tiny else 128] * 3
    config.data.batch_size = 2
    config.data.patches_per_epoch = 20_000
    cores = len(os.sched_getaffinity(0))
    config.data.num_workers = 1 if section.tiny else max(1, min(12, cores - 2))
    config.data.cache, config.data.cache_dir = "disk", str(section.scratch / "crops")
    config.data.augmentations = dict(AUGMENTED)
    config.data.intensity = dict(_INTENSITY)
    config.training.precision = precision
    config.logging.use_tensorboard = False
    return config


def _two_devices(section: Section) -> dict[str, Any]:
    """The row of ``two_devices.py``; on the CPU its devices are two processes."""
    if section.device == "cuda" and torch.cuda.device_count() < 2:
        raise LeftOutError("skipped: one GPU is visible")
    section.need(0 if section.tiny else 45)
    script = Path(__file__).with_name("two_devices.py")
    command = [sys.executable, str(script), section.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(60.0, section.left), check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["two_devices.py failed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])
