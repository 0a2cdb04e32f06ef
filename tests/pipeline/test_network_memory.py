"""A network that does not fit on a device is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from connectomics.errors import OutOfMemoryError
from connectomics.inference.trained_network import TrainedNetwork
from tests.pipeline.test_predict_crops import checkpoint, predict, root  # noqa: F401


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("a\nb"), RuntimeError("CUDA error: out of memory\nCompile")])
def test_a_device_without_memory_for_the_network(
    error: RuntimeError,
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(TrainedNetwork, "to", full)
    with pytest.raises(OutOfMemoryError, match="no memory for the network on cpu") as found:
        predict(root, checkpoint, tmp_path)
    assert "\n" not in str(found.value)
