"""A training step on one core of the CPU, with and without the memory that `connectomics.train` keeps between steps.

    python benchmarks/bench_step.py

Each row is the mean of two processes that alternate with those of the other row: user and system time, page faults.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import numpy as np

STEPS = 12


def main() -> None:
    found: dict[str, list[list[float]]] = {"default": [], "kept": []}
    for _ in range(2):
        for name, values in found.items():
            done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
            values.append([float(word) for word in done.stdout.split()])
    print("| memory | user s | system s | page faults |\n| --- | --- | --- | --- |")
    for name, values in found.items():
        user, system, faults = np.mean(values, axis=0)
        print(f"| {name} | {user:.3f} | {system:.3f} | {faults:.0f} |")


def one(name: str) -> None:
    import torch

    from connectomics.config.schema import DataConfig, DatasetConfig, ModelConfig, RunConfig
    from connectomics.lightning.module import ConnectomicsModule
    from connectomics.models.batch_labels import DenseLabels
    from connectomics.tasks.memory import keep_freed_memory

    torch.set_num_threads(1)
    if name == "kept":
        keep_freed_memory()
    model = ModelConfig(architecture="unet_2d", options={"features": [16, 32, 64, 128], "stem": 2})
    data = DataConfig(patch_size=[1, 256, 256], batch_size=8)
    module = ConnectomicsModule(RunConfig(dataset=DatasetConfig(classes=["mito"]), model=model, data=data)).train()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    image, target = torch.rand(2, 8, 1, 1, 256, 256).unbind()
    labels = DenseLabels(target.round(), torch.ones(target.shape, dtype=torch.bool))
    for step in range(2 + STEPS):  # the first two allocate buffers
        if step == 2:
            begin = resource.getrusage(resource.RUSAGE_SELF)
        optimizer.zero_grad()
        module.loss(module.network(image), labels).total.backward()
        optimizer.step()
    end = resource.getrusage(resource.RUSAGE_SELF)
    print(*((getattr(end, key) - getattr(begin, key)) / STEPS for key in ("ru_utime", "ru_stime", "ru_minflt")))


if __name__ == "__main__":
    one(sys.argv[1]) if len(sys.argv) > 1 else main()
