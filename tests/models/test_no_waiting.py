"""What runs in each training step does not make the host wait for a GPU; shown with tensors that have no values."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from connectomics.config.heads import Head
from connectomics.data.augmentation import IntensityAugmentor
from connectomics.models.batch_labels import DenseLabels, PackedLabels
from connectomics.models.fusion import onto
from connectomics.models.losses import LOSSES, build_loss
from connectomics.models.targets import head_labels

READS = {"_local_scalar_dense", "bincount", "equal", "nonzero", "unique", "_unique2"}


class NoNumbers(TorchFunctionMode):
    """Raises for numbers that are copied to a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, Tensor.new_tensor) and result.device.type == "meta":
            raise AssertionError("a copy of numbers waits for the device")
        return result


class NeverWait(TorchDispatchMode):
    """Raises for what reads values of a device, and for copies to it for which the host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name in READS and any(tensor.device.type == "meta" for tensor in tensors):
            raise AssertionError(f"{name} reads values")
        result = func(*args, **kwargs)
        copied = name in ("_to_copy", "copy_") and tensors[-1].device.type == "cpu"
        if copied and result.device.type == "meta" and not kwargs.get("non_blocking"):
            raise AssertionError(f"{name} waits for the device")
        return result


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values have no autocast, not even one to turn off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("name", ["blur", "charging", "drift", "resolution", "stripes"])
def test_an_augmentation(name: str) -> None:
    made = IntensityAugmentor.from_config({name: {"prob": 1}}, (8.0, 8.0, 8.0))
    assert made is not None
    codes = empty(2, 8, 12, 12, dtype=torch.uint8)
    with NoNumbers(), NeverWait():
        found, _ = made(empty(2, 1, 8, 12, 12), codes, torch.arange(2))
    assert found.shape == (2, 1, 8, 12, 12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss(name: str) -> None:
    loss = build_loss([name], options={name: {"pos_weight": 2.0}} if name == "BCEWithLogitsLoss" else None)
    logits = empty(2, 3, 8, 8, 8).requires_grad_()
    with NoNumbers(), NeverWait():
        loss(logits, DenseLabels(empty(2, 3, 8, 8, 8), empty(2, 3, 8, 8, 8, dtype=torch.bool))).total.backward()
    assert logits.grad is not None


def test_the_counts_of_a_batch() -> None:
    tables = [empty(2, 3, 5, dtype=torch.bool) for _ in range(2)]
    with NoNumbers(), NeverWait():
        assert PackedLabels(empty(2, 8, 8, 8, dtype=torch.uint8), *tables).often(5, True).shape == (2, 5)


def test_a_head_of_distances() -> None:
    with NoNumbers(), NeverWait():
        head_labels(Head("distance", "mito", (8.0, 8.0, 8.0), scale_nm=20.0), empty(1, 8, 8, 8, dtype=torch.int32))


def test_the_features_of_a_further_input() -> None:
    with NoNumbers(), NeverWait():
        onto(empty(1, 4, 8, 8, 8), (12, 12, 12), (2.0, 2.0, 2.0))
