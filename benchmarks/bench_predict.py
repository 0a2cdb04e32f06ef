"""Prediction from Zarr to Zarr against the bare forward passes of the same windows, already in memory, in one run.

    python benchmarks/bench_predict.py [--size 128] [--window 64] [--overlap 0.25] [--blending gaussian]
        [--block 64] [--format 0.4] [--rounds 3]
        [--device cpu] [--precision 32] [--network unet|mednext] [--features 8] [--channels-last] [--compile] [--monai]
    python benchmarks/bench_predict.py --network free --classes 14 --size 256 256 512 --window 128 --block 256
        [--voxel-size 8 8 8]

A task (`run_predict_task`: reading and scaling raw, windows, blending, blocks, compressing and storing) and a loop that
only calls the same U-Net on as many windows of the same shape take turns in one process. Printed: the median over the
rounds of (seconds of the loop) / (seconds of the task), which is 1 where everything but the network costs nothing, and
the voxels a second that go through the network and that come out. ``--monai``: the same network and raw, in memory from
the start, through MONAI's SlidingWindowInferer, all on the device.

``--network free``: a network that costs nothing; it returns probabilities that were made once: smooth objects, most
voxels near 0 or 1. What is left is reading, blending, compressing and writing; printed are the voxels written per CPU
second, and a hash of all chunks, to compare versions.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

CLASSES = ("mito", "er")  # further ones have numbers
NETWORK_NM = 8.0


def network_of(options: Any) -> Any:
    """A network with a sigmoid behind it, seeded, in evaluation mode: a U-Net of MONAI's, or MedNeXt-S."""
    import torch
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    net: Any
    if options.network == "mednext":
        from connectomics.models.registry import build_model

        chosen = {"mednext_size": "S", **options.options}
        net = build_model("mednext", 1, len(CLASSES), patch_size=[options.window] * 3, options=chosen)
    else:
        n = options.features
        widths = (n, n, 2 * n, 4 * n, 8 * n, n)
        net = BasicUNet(spatial_dims=3, in_channels=1, out_channels=len(CLASSES), features=widths)
    network = torch.nn.Sequential(net, torch.nn.Sigmoid()).eval().to(options.device)
    if options.channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
    return torch.compile(network, backend=options.backend) if options.compile else network


def block_of(options: Any) -> tuple[int, int, int] | None:
    return (options.block,) * 3 if options.block else None


def free_network(classes: int, window: int) -> Any:
    """A network that returns the same probabilities (1, classes, window...) for every window."""
    import torch

    out = torch.empty(1, classes, *(window,) * 3)
    for number, values in enumerate(out[0]):
        noise = torch.randn(1, 1, *(window // 8,) * 3, generator=torch.Generator().manual_seed(number))
        smooth = torch.nn.functional.interpolate(noise, (window,) * 3, mode="trilinear")
        values.copy_(torch.sigmoid(10 * (smooth[0, 0] - 1)))
    return lambda x: out.expand(len(x), -1, -1, -1, -1)


def run_free(options: Any) -> None:
    """Print the rate of a task whose network costs nothing."""
    import torch

    from connectomics.inference.predict_task import PredictTask, run_predict_task
    from connectomics.io.sharded import Storage

    network = free_network(options.classes, options.window)
    names = tuple(f"class{n}" for n in range(options.classes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, grid = make_raw(folder, options.size)
        target = grid.at_voxel_size(options.voxel_size)
        rates = []
        for turn in range(-1, options.rounds):  # the first one compiles
            output = folder / f"out{turn}.zarr"
            task = PredictTask(
                raw=raw, output=str(output / "crop1"), classes=names, targets=dict.fromkeys(names, target),
                voxel_size=(NETWORK_NM,) * 3, window=(options.window,) * 3, checkpoint="", overlap=options.overlap,
                block_size=block_of(options), batch_size=options.batch, blending=options.blending,
                storage=Storage(options.format),
            )  # fmt: skip
            (plan,) = task.plan()
            begin, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            run_predict_task(task, network, options.device)
            seconds = time.process_time() - begin
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            rates.append(target.size / seconds / 1e6)
            digest = hashlib.sha256()
            chunks = [f for f in sorted(output.rglob("s0/**/*")) if f.is_file() and not f.name.startswith(".")]
            for file in chunks:
                digest.update(file.read_bytes())
            stored = sum(file.stat().st_size for file in chunks)
            shutil.rmtree(output)
    print(
        f"free network, {options.classes} classes, {'x'.join(map(str, grid.shape))}, window {options.window}, "
        f"{options.blending}, overlap {options.overlap}, blocks {options.block}, {options.format}, written at "
        f"{target.voxel_size} nm "
        f"with {torch.get_num_threads()} threads: {median(rates[1:]):.2f} Mvoxel/s per CPU second "
        f"({', '.join(f'{r:.2f}' for r in rates[1:])}; "
        f"{seconds:.1f} CPU s in the last); {faults} page faults; planned memory {plan.bytes / 1e6:.0f} MB; "
        f"{stored / 1e6:.0f} MB written, SHA-256 {digest.hexdigest()[:12]}"
    )


def make_raw(folder: Path, size: int | list[int]) -> tuple[str, Any]:
    """Noise of a few grey levels around slopes, uint8, which compresses about as tissue does."""
    from connectomics.geometry import VoxelGrid
    from connectomics.io.write import write_multiscale

    z, y, x = size if isinstance(size, list) and len(size) == 3 else np.ravel([size] * 3).tolist()
    grid = VoxelGrid((NETWORK_NM,) * 3, (4, 4, 4), (z, y, x))
    noise = np.random.default_rng(0).integers(0, 16, grid.shape, dtype=np.uint8)
    values = noise + (np.arange(x, dtype=np.float32) / x * 200).astype(np.uint8)
    location = folder / "raw.zarr" / "em"
    write_multiscale(location, values, grid, kind="raw")
    return str(location), grid


def seconds_of_forwards(network: Any, windows: np.ndarray, count: int, options: Any) -> float:
    """``count`` windows through the network and nothing else."""
    import contextlib

    import torch

    on_device = torch.from_numpy(windows)[:, None].to(options.device)
    mixed: Any = contextlib.nullcontext()
    if options.precision != "32":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
        mixed = torch.autocast(torch.device(options.device).type, dtype=dtype)
    _wait(options.device)
    begin = time.perf_counter()
    with torch.inference_mode(), mixed:
        for first in range(0, count, options.batch):
            network(on_device[: min(options.batch, count - first)])
    _wait(options.device)
    return time.perf_counter() - begin


def seconds_of_monai(network: Any, raw: str, grid: Any, options: Any) -> float:
    """MONAI's inferer over the whole array, which is in memory already."""
    import contextlib

    import torch
    from monai.inferers import SlidingWindowInferer

    from connectomics.io.multiscale import Multiscale

    values = torch.from_numpy(Multiscale.open(raw).read_raw(grid)[0] / 255)[None, None].to(options.device)
    inferer = SlidingWindowInferer((options.window,) * 3, options.batch, options.overlap, mode="gaussian")
    mixed: Any = contextlib.nullcontext()
    if options.precision != "32":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
        mixed = torch.autocast(torch.device(options.device).type, dtype=dtype)
    _wait(options.device)
    begin = time.perf_counter()
    with torch.inference_mode(), mixed:
        inferer(values, network)
    _wait(options.device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[128], help="edges of the volume, voxels, z y x")
    parser.add_argument("--window", type=int, default=64, help="edge of a window, voxels")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--blending", default="gaussian", choices=("crop", "gaussian", "constant"))
    parser.add_argument("--block", type=int, default=64, help="edge of a block, voxels; 0: the default")
    parser.add_argument("--format", default="0.4", choices=("0.4", "0.5"), help="of the output of the free network")
    parser.add_argument("--batch", type=int, default=1, help="windows that go through the network together")
    parser.add_argument("--features", type=int, default=8, help="channels of the U-Net's first level")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32", choices=("32", "bf16", "fp16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", default="unet", choices=("unet", "mednext", "free"))
    parser.add_argument("--classes", type=int, default=14, help="of the free network")
    parser.add_argument("--voxel-size", type=float, nargs=3, default=[NETWORK_NM] * 3, help="of its output, nm, z y x")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--monai", action="store_true", help="MONAI's SlidingWindowInferer beside it")
    parser.set_defaults(options={})  # of MedNeXt
    options = parser.parse_args()
    if options.network == "free":
        run_free(options)
        return

    from connectomics.inference.predict_task import PredictTask, run_predict_task

    network = network_of(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, grid = make_raw(folder, options.size)
        windows = np.random.default_rng(1).random((options.batch, *(options.window,) * 3), dtype=np.float32)
        pairs, monai = [], list[float]()
        for turn in range(-1, options.rounds):  # the first one warms up
            task = PredictTask(
                raw=raw, output=str(folder / f"out{turn}.zarr" / "crop1"), classes=CLASSES,
                targets=dict.fromkeys(CLASSES, grid), voxel_size=(8, 8, 8), window=(options.window,) * 3,
                checkpoint="", overlap=options.overlap, block_size=block_of(options), batch_size=options.batch,
                precision=options.precision, blending=options.blending,
            )  # fmt: skip
            (plan,) = task.plan()
            bare = seconds_of_forwards(network, windows, plan.windows, options)
            begin = time.perf_counter()
            run_predict_task(task, network, options.device)
            ours = time.perf_counter() - begin
            if turn >= 0:
                pairs.append((bare, ours))
                if options.monai:
                    monai.append(seconds_of_monai(network, raw, grid, options))
    ratio = median(bare / ours for bare, ours in pairs)
    bare, ours = (median(values) for values in zip(*pairs, strict=True))
    changed = ", channels last" * options.channels_last + ", compiled" * options.compile
    print(
        f"{options.network}{changed}, {grid.shape[0]}^3, window {options.window}, {options.blending}, overlap "
        f"{options.overlap}, blocks {options.block} ({plan.blocks}), {options.device}, precision {options.precision}, "
        f"median of {options.rounds}\n"
        f"bare forward passes {bare:.2f} s, task {ours:.2f} s: {ratio:.3f} of the bare rate "
        f"(rounds: {', '.join(f'{b / o:.3f}' for b, o in pairs)})\n"
        f"{plan.voxels / ours / 1e6:.2f} Mvoxel/s through the network, {grid.size / ours / 1e6:.2f} Mvoxel/s written; "
        f"planned memory {plan.bytes / 1e6:.0f} MB"
    )
    if monai:
        print(
            f"MONAI's SlidingWindowInferer, raw in memory, nothing stored: {median(monai):.2f} s, "
            f"{grid.size / median(monai) / 1e6:.2f} Mvoxel/s"
        )


if __name__ == "__main__":
    main()
