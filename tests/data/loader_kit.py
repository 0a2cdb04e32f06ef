"""Data sets for tests of the loader, in a module that worker processes can import; also a script to be interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from connectomics.data.loader import PatchLoader
from connectomics.data.sampling import PatchRequest, PatchSampler, SampledCrop
from connectomics.errors import UnknownNameError

if TYPE_CHECKING:
    from connectomics.data.volumes import CropVolume


class Numbers(Dataset[dict[str, Any]]):
    """Samples that are their request; the one at position ``at`` of an epoch does ``what`` instead."""

    def __init__(self, what: str = "", at: int = -1, nap_s: float = 0.0) -> None:
        self.what, self.at, self.nap_s = what, at, nap_s

    def __getitem__(self, request: PatchRequest) -> dict[str, Any]:
        _, epoch, position, _ = request.seed
        time.sleep(self.nap_s)
        if position == self.at:
            if self.what.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[self.what])
            if self.what == "known error":
                raise UnknownNameError("unknown class 'mitt'; did you mean 'mito'?")
            if self.what == "memory":
                raise MemoryError
            if self.what == "lock":
                frame = sys._getframe()
                while "done_event" not in frame.f_locals and frame.f_back is not None:
                    frame = frame.f_back
                frame.f_locals["done_event"]._cond.acquire()
                time.sleep(600)
            if self.what == "bug":
                raise ZeroDivisionError("a bug")
        return {"epoch": epoch, "position": position, "noise": np.random.default_rng(request.seed).random()}


class Volumes(Dataset[dict[str, Any]]):
    """The middle of crops, read from Zarr."""

    def __init__(self, volumes: list[CropVolume]) -> None:
        self.volumes = volumes

    def __getitem__(self, request: PatchRequest) -> dict[str, Any]:
        _, epoch, position, _ = request.seed
        volume = self.volumes[request.index]
        raw, _ = volume.read_raw(volume.grid.crop((0, 0, 0), (8, 8, 8)))
        return {"epoch": epoch, "position": position, "noise": float(raw.sum())}


class Modules(Dataset[dict[str, Any]]):
    """What the worker is like."""

    def __getitem__(self, request: PatchRequest) -> dict[str, Any]:
        return {
            "heavy": sum(name in sys.modules for name in ("monai", "pytorch_lightning")),
            "threads": torch.get_num_threads(),
            "interrupts": int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN),
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}


def sampler(length: int = 24, crops: int = 1) -> PatchSampler:
    return PatchSampler([SampledCrop("a", 1.0) for _ in range(crops)], length, classes=["mito"], seed=1)


def loader(dataset: Dataset[Any], workers: int = 0, length: int = 24, crops: int = 1, **options: Any) -> PatchLoader:
    return PatchLoader(
        dataset, sampler(length, crops), batch_size=2, collate=collate, workers=workers, **options
    )  # fmt: skip


def main(folder: str, start: str, kind: str) -> None:
    """Iterate for a minute, slowly; says which processes it is and when it has begun."""
    from connectomics.cli import run_guarded

    warnings.filterwarnings("ignore", "This DataLoader will create")  # two workers, also on one core

    def work() -> None:
        running = loader(Numbers(nap_s=float(kind)), 2, length=10**6, start=start)
        for number, _ in enumerate(running):
            if number == 1:
                pids = running.worker_pids
                Path(folder, "pids.tmp").write_text(json.dumps(pids))
                os.replace(Path(folder, "pids.tmp"), Path(folder, "pids.json"))

    sys.exit(run_guarded(work))


if __name__ == "__main__":
    main(*sys.argv[1:])
