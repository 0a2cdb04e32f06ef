"""One data-parallel step of two devices against one device with the whole batch; prints JSON.

    python benchmarks/gpu_sections/two_devices.py cuda|cpu

On the CPU two processes stand for the devices. The loss is a mean over samples, so that the mean over processes is the
mean over the batch, also with unknown voxels. Exit status 1 if the weights differ by more than the tolerance.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from connectomics.models.batch_labels import DenseLabels
from connectomics.models.losses import build_loss
from connectomics.models.registry import build_model

TOLERANCE = 1e-4  # of the weights, against the size of the step
_SIDE = 16


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two patches, their labels, and where these are known: in the second patch at fewer voxels, of one class only."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 2, _SIDE, _SIDE, _SIDE)
    known = torch.rand(shape, generator=generator) > 0.2
    known[1, 0] = False
    known[1, 1, : _SIDE // 2] = False
    label = (torch.rand(shape, generator=generator) > 0.5).float()
    return torch.rand(2, 1, *shape[2:], generator=generator), label, known


def network() -> nn.Module:
    """A small residual U-Net with normalization within each patch."""
    torch.manual_seed(0)
    return build_model("unet", 1, 2, patch_size=(_SIDE,) * 3, options={"channels": [8, 16], "strides": [2]})


def step(model: nn.Module, image: Tensor, label: Tensor, known: Tensor) -> list[Tensor]:
    """The weights after one step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    build_loss(["DiceLoss", "BCEWithLogitsLoss"])(model(image), DenseLabels(label, known)).total.backward()
    optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def device_of(kind: str, rank: int) -> str:
    """The device of a process."""
    return "cpu" if kind == "cpu" else f"cuda:{rank}"


def process(rank: int, kind: str, port: int, out: str) -> None:
    """One of the two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo" if kind == "cpu" else "nccl", rank=rank, world_size=2)
    device = device_of(kind, rank)
    mine = [part[rank : rank + 1].to(device) for part in batch()]
    model = network().to(device)
    parallel = nn.parallel.DistributedDataParallel(model, device_ids=None if kind == "cpu" else [rank])
    weights = step(parallel, *mine)
    if rank == 0:
        torch.save(weights, out)
    torch.distributed.destroy_process_group()


def main() -> int:
    kind = sys.argv[1]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "weights.pt")
        torch.multiprocessing.spawn(process, (kind, port, file), nprocs=2)
        two = torch.load(file, weights_only=True)
    device = device_of(kind, 0)
    model = network().to(device)
    begin = [parameter.detach().cpu().clone() for parameter in model.parameters()]
    one = step(model, *(part.to(device) for part in batch()))
    moved = max(float((a - b).abs().max()) for a, b in zip(one, begin, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) / moved
    print(json.dumps({"largest difference of a weight, of the largest change": difference, "allowed": TOLERANCE}))
    if difference > TOLERANCE:
        print(f"the weights differ by {difference:.2g} of the step, allowed is {TOLERANCE:g}", file=sys.stderr)
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
