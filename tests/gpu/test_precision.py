"""Each network and each loss in half precision against float32 on the CPU, and in the memory format of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from connectomics.models import build_model
from connectomics.models.batch_labels import DenseLabels, PackedLabels
from connectomics.models.losses import LOSSES, build_loss
from connectomics.models.memory_format import set_channels_last
from tests.models.small_networks import TINY

#: root mean square of what a network's logits are off, as a share of their standard deviation
NETWORK = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
#: of a loss, relative; the logits themselves are rounded to the type
LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 2e-4}
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3}

ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
QUICK = ("basic_unet", "dynunet", "mednext", "segresnet", "unet")


def networks(on_cpu: tuple[torch.dtype, ...], on_gpu: tuple[torch.dtype, ...]) -> list[Any]:
    """Each network on the CPU and on a GPU, in each type."""
    found = []
    for name in sorted(TINY):
        marks = [] if name in QUICK else [pytest.mark.slow]
        found += [pytest.param(name, "cpu", dtype, marks=marks) for dtype in on_cpu]
        found += [pytest.param(name, "cuda", dtype, marks=pytest.mark.gpu) for dtype in on_gpu]
    return found


def network_of(name: str) -> tuple[torch.nn.Module, Tensor]:
    """A small network that was not trained, and an image for it."""
    torch.manual_seed(0)
    side, options = TINY[name]
    network = build_model(name, 1, 3, patch_size=[side] * 3, options=options).eval()
    image = torch.rand(1, 1, side, side, side, generator=torch.Generator().manual_seed(1))
    return network, image


def off(found: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference, as a share of the standard deviation of ``expected``."""
    return float((found.float().cpu() - expected).square().mean().sqrt() / expected.std())


# on a CPU most layers have no float16
@pytest.mark.parametrize(("name", "where", "dtype"), networks((torch.bfloat16,), ON_GPU))
def test_each_network_says_in_half_precision_what_it_says_in_float32(
    name: str, where: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if where == "cuda":
        request.getfixturevalue("gpu")
    network, image = network_of(name)
    with torch.inference_mode():
        expected = network(image)
        network.to(where)
        with torch.autocast(where, dtype, enabled=dtype != torch.float32):
            found = network(image.to(where))
    assert off(found, expected) < NETWORK[dtype]


@pytest.mark.parametrize(("name", "where", "dtype"), networks((torch.float32,), (torch.float32,)))
def test_channels_last_changes_no_value(
    name: str, where: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if where == "cuda":
        request.getfixturevalue("gpu")
    network, image = network_of(name)
    with torch.inference_mode():
        expected = network(image)
        set_channels_last(network.to(where))
        found = network(image.to(where, dtype).contiguous(memory_format=torch.channels_last_3d))
    assert off(found, expected) < NETWORK[dtype]


def a_batch(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, label and known, (2, 3, 12, 12, 12)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 12, 12, 12)
    logits = 2 * torch.randn(shape, generator=generator)
    return logits, (torch.rand(shape, generator=generator) < 0.3).float(), torch.rand(shape, generator=generator) < 0.7


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        *(("cpu", dtype) for dtype in (torch.bfloat16, torch.float16)),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ON_GPU),
    ],
)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_of_half_precision_logits_is_that_of_float32(
    name: str, where: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if where == "cuda":
        request.getfixturevalue("gpu")
    logits, label, known = a_batch()
    loss = build_loss([name])
    values, slopes = [], []
    for place, kind in (("cpu", torch.float32), (where, dtype)):
        leaf = logits.to(place, kind, copy=True).requires_grad_()
        with torch.autocast(place, dtype, enabled=kind != torch.float32):
            total = loss(leaf, DenseLabels(label, known).to(place)).total
        total.backward()
        values.append(float(total.detach()))
        assert leaf.grad is not None
        slopes.append(leaf.grad.float().cpu())
    assert values[1] == pytest.approx(values[0], rel=LOSS[dtype])
    assert off(slopes[1], slopes[0]) < GRADIENT[dtype]


@pytest.mark.parametrize("sizes", [(12,), (12, 6, 3)])
@pytest.mark.parametrize("together", [2, 5, None])
def test_classes_that_are_looked_at_together_lose_what_each_loses_alone(
    together: int | None, sizes: tuple[int, ...], device: str
) -> None:
    """Values and gradients of every loss, in float32. ``None``: as many classes as suit the device."""
    generator = torch.Generator().manual_seed(7)
    # blocks of one state, so that some coarse voxels are known
    codes = torch.randint(0, 9, (2, 3, 3, 3), generator=generator).to(torch.uint8)
    codes = codes.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    present, known = (torch.rand(2, 5, 9, generator=generator) < share for share in (0.4, 0.7))
    known[0, 1] = False
    labels = PackedLabels(codes, present, known)
    start = [torch.randn(2, 5, n, n, n, generator=generator) for n in sizes]
    found = []
    for at_once, where in ((1, "cpu"), (together, device)):
        loss = build_loss(sorted(LOSSES)).to(where)
        loss.at_once = at_once
        outputs = [output.to(where, copy=True).requires_grad_() for output in start]
        result = loss(outputs, labels.to(where))
        result.total.backward()
        slopes = [output.grad.cpu() for output in outputs if output.grad is not None]
        found.append((result.total.detach().cpu(), {k: v.cpu() for k, v in result.parts.items()}, slopes))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert len(found[0][2]) == len(sizes)


def test_packed_labels_are_the_dense_ones(device: str) -> None:
    """Label, known, counts and loss, to the bit for the labels."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 7, (2, 12, 12, 12), generator=generator).to(torch.uint8)
    present, known = (torch.rand(2, 5, 7, generator=generator) < share for share in (0.3, 0.8))
    packed = PackedLabels(codes, present, known)
    reference = packed.dense()
    there = packed.to(device)
    dense = there.dense()
    assert there.device.type == device
    assert torch.equal(dense.known.cpu(), reference.known)
    assert torch.equal(dense.label.cpu(), reference.label)
    assert torch.equal(there.tally().cpu(), reference.tally())
    logits = torch.randn(reference.shape, generator=generator)
    loss = build_loss(["DiceLoss", "BCEWithLogitsLoss"])
    assert float(loss(logits.to(device), there).total) == pytest.approx(float(loss(logits, reference).total), rel=1e-5)
