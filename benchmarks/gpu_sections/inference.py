"""Section ``inference``: `predict` from Zarr to Zarr, the bare forward passes, and MONAI's inferer, in one run."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_inference import PeakMemory
from bench_predict import CLASSES, make_raw, network_of, seconds_of_forwards, seconds_of_monai

from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.io.multiscale import Multiscale
from gpu_sections.device import Busy, Timed, peak_gb, reset_peak
from gpu_sections.record import Section

_OF_BARE, _RATE = 0.85, 10.0  # goals: of the bare rate; Mvoxel/s written by MedNeXt-S
_COMPILE_S = 60.0  # that compiling is expected to take
_BARE_S = 3.0  # for the bare forward passes, before and after the prediction


@dataclass(frozen=True)
class Setup:
    """A network and how it is run; the names are those of the options of ``bench_predict.py``."""

    network: str  # mednext (S, kernel 3) | unet
    channels_last: bool
    compile: bool
    device: str
    precision: str = "bf16"
    size: int = 512
    window: int = 128
    block: int = 256
    batch: int = 4
    overlap: float = 0.25
    features: int = 32
    backend: str = "inductor"  # of torch.compile
    options: dict[str, Any] = field(default_factory=dict)  # of MedNeXt

    @property
    def name(self) -> str:
        """For the table."""
        layout = "channels last" if self.channels_last else "contiguous"
        return f"{'MedNeXt-S' if self.network == 'mednext' else 'U-Net'}, {layout}{', compiled' * self.compile}"


def setups(device: str, tiny: bool) -> list[Setup]:
    """What is measured, the most telling first."""
    order = [
        ("mednext", True, False), ("unet", True, False), ("mednext", True, True), ("mednext", False, False),
        ("unet", True, True), ("unet", False, False), ("mednext", False, True), ("unet", False, True),
    ]  # fmt: skip
    found = [Setup(network, last, compiled, device) for network, last, compiled in order]
    if not tiny:
        return found
    # compiling for a CPU takes a minute: here it is only traced
    sizes: dict[str, Any] = {"size": 32, "window": 32, "block": 32, "batch": 2, "features": 4, "backend": "eager"}
    sizes |= {"options": {"init_filters": 4}}
    return [replace(found[n], **sizes) for n in (0, 1, 4)]


def run(section: Section) -> None:
    """A row for each setup."""
    every = setups(section.device, section.tiny)
    raw, grid = make_raw(section.folder("raw"), every[0].size)
    before: dict[str, float] = {}  # seconds of the first row of a network
    for setup in every:
        goals = {"of bare": _OF_BARE} | ({"Mvoxel/s": _RATE} if setup.network == "mednext" else {})
        with section.row("prediction", setup.name, **goals) as row:
            if not section.tiny:
                section.need(before.get(setup.network, 40.0) + _COMPILE_S * setup.compile)
            began = time.monotonic()
            _measure(section, setup, raw, grid, row)
            if setup.network not in before:
                row["MONAI's inferer"] = _monai_rate(setup, raw, grid)
            before.setdefault(setup.network, time.monotonic() - began)


def _measure(section: Section, setup: Setup, raw: str, grid: VoxelGrid, row: dict[str, Any]) -> None:
    network = Timed(network_of(setup), setup.device)
    windows = _windows(raw, grid, setup)
    out = section.folder("out")
    began = time.perf_counter()
    warm = grid.crop((0, 0, 0), tuple(min(setup.block, n) for n in grid.shape))
    run_predict_task(_task(setup, raw, warm, out / "warm"), network, setup.device)
    row["first block s"] = time.perf_counter() - began
    network.seconds()

    seconds_of_forwards(network, windows, setup.batch, setup)  # whole batches may be compiled anew
    bare = [_bare_rate(network, windows, setup)]
    network.seconds()
    task = _task(setup, raw, grid, out / "all")
    (plan,) = task.plan()
    reset_peak(setup.device)
    with PeakMemory() as memory, Busy(setup.device) as busy:
        began = time.perf_counter()
        run_predict_task(task, network, setup.device)
        seconds = time.perf_counter() - began
    through = plan.voxels / seconds
    row["Mvoxel/s"] = grid.size / seconds / 1e6
    row["through the network"] = through / 1e6
    row["device GB"] = peak_gb(setup.device)
    row["host GB"] = memory.peak / 1e9
    row["network's share"] = network.seconds() / seconds
    row["GPU busy"] = busy.share
    bare.append(_bare_rate(network, windows, setup))
    row["bare"] = sum(bare) / 2 / 1e6
    row["of bare"] = through / (sum(bare) / 2)
    shutil.rmtree(out, ignore_errors=True)


def _monai_rate(setup: Setup, raw: str, grid: VoxelGrid) -> float:
    """Mvoxel/s of MONAI's inferer, which holds the whole volume on the device and stores nothing."""
    network = network_of(setup)
    seconds_of_forwards(network, _windows(raw, grid, setup), setup.batch, setup)
    return grid.size / seconds_of_monai(network, raw, grid, setup) / 1e6


def _windows(raw: str, grid: VoxelGrid, setup: Setup) -> np.ndarray:
    """A batch of the volume's own windows, float32 (B, d, h, w) in [0, 1]."""
    source = Multiscale.open(raw)
    places = np.linspace(0, grid.shape[2] - setup.window, setup.batch).astype(int)
    return np.stack([source.read_raw(grid.crop((0, 0, x), (setup.window,) * 3))[0] / 255 for x in places])


def _bare_rate(network: Any, windows: np.ndarray, setup: Setup) -> float:
    """Voxels per second of the bare forward passes on the same windows, which are on the device already."""
    batches = 1 if setup.device == "cpu" else 2
    voxels = setup.batch * setup.window**3
    while True:  # as many batches as take long enough
        seconds = seconds_of_forwards(network, windows, batches * setup.batch, setup)
        if seconds > _BARE_S / 2 or setup.device == "cpu":
            return batches * voxels / seconds
        batches = max(batches + 1, int(batches * _BARE_S / max(seconds, 1e-3)))


def _task(setup: Setup, raw: str, grid: VoxelGrid, folder: Path) -> PredictTask:
    return PredictTask(
        raw=raw, output=str(folder / "out.zarr" / "crop1"), classes=CLASSES, targets=dict.fromkeys(CLASSES, grid),
        voxel_size=(8, 8, 8), window=(setup.window,) * 3, checkpoint="", overlap=setup.overlap,
        block_size=(setup.block,) * 3, batch_size=setup.batch, precision=setup.precision,
    )  # fmt: skip
