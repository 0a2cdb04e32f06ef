"""Networks in a run: a 2-D network, compiled networks and other memory formats leave ordinary checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from connectomics.lightning.checkpoints import load_network, read_checkpoint
from connectomics.lightning.module import ConnectomicsModule
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config

TWO_D = {"model__architecture": "unet_2d", "model__options": {"features": [4, 8], "planes": 3}}

THREE_D = {"model__options": {"channels": [4, 8], "strides": [2], "num_res_units": 1}}  # no dropout: it is by layout


def weights_of(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    config = tiny_config(training__max_epochs=1, optimizer__name="SGD", **changes)  # Adam enlarges rounding
    run = train(config, folder, datamodule=MadeUpData(patches=4, crops=1))
    return read_checkpoint(run.folder / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("network", [THREE_D, TWO_D], ids=["3-D", "2.5-D"])
def test_compiling_and_memory_format_change_neither_names_nor_values(
    network: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = weights_of(tmp_path / "plain", **network)
    last = weights_of(tmp_path / "last", training__channels_last=True, **network)
    # the graph is captured as always; the code generator needs half a minute and a C++ compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = weights_of(tmp_path / "compiled", training__compile=True, **network)
    for other in (last, compiled):
        assert list(other) == list(plain)
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)
    kernels = [value for name, value in last.items() if name.endswith("weight") and value.ndim >= 4]
    assert any(value.stride(1) == 1 and value.shape[1] > 1 for value in kernels)


@pytest.mark.slow
def test_torch_compile_trains_like_the_plain_network(tmp_path: Path) -> None:
    plain, compiled = weights_of(tmp_path / "a", **TWO_D), weights_of(tmp_path / "b", training__compile=True, **TWO_D)
    assert list(plain) == list(compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_bfloat16_on_a_cpu_trains_a_network_that_predicts(tmp_path: Path) -> None:
    config = tiny_config(
        training__max_epochs=2, training__precision="bf16-mixed", model__deep_supervision=True, **TWO_D
    )
    config.model.options = {"features": [4, 8, 8, 8], "planes": 1}
    run = train(config, tmp_path / "run", datamodule=MadeUpData(patches=4, crops=1))
    network = load_network(run.folder / "checkpoints" / "last.ckpt")
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    with torch.inference_mode():
        found = network.probabilities(torch.rand(1, 1, 1, 32, 32))
    assert found.shape == (1, 2, 1, 32, 32)
    assert torch.isfinite(found).all()


def test_model_dropout_reaches_the_network(tmp_path: Path) -> None:
    config = tiny_config(model__architecture="mednext", model__dropout=0.25, model__mednext_size="S")
    config.model.options = {"init_filters": 4, "blocks_down": [1], "blocks_up": [1], "blocks_bottleneck": 1}
    config.model.options |= {"encoder_expansion_ratio": [2], "decoder_expansion_ratio": [2]}
    module = ConnectomicsModule(config)
    assert [layer.p for layer in module.modules() if isinstance(layer, torch.nn.Dropout3d)] == [0.25]
