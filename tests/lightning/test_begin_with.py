"""Fine-tuning: a new run begins with the weights of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from connectomics.errors import InputError, MissingError
from connectomics.lightning.checkpoints import begin_with
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.train import TrainResult, train
from tests.lightning.synthetic_run import MadeUpData, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(tiny_config(training__max_epochs=1), tmp_path_factory.mktemp("run") / "first", datamodule=MadeUpData())


def weights(module: ConnectomicsModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.network.state_dict().items()}


def test_all_weights_of_the_same_network(trained: TrainResult) -> None:
    module = ConnectomicsModule(tiny_config())
    stored = torch.load(trained.last_checkpoint, weights_only=True)["state_dict"]
    assert begin_with(trained.last_checkpoint, module) == len(weights(module))
    assert all(torch.equal(value, stored[f"network.{name}"]) for name, value in weights(module).items())


def test_layers_of_another_shape_begin_anew(trained: TrainResult) -> None:
    module = ConnectomicsModule(tiny_config(dataset__classes=["mito", "er", "nuc"]))
    before = weights(module)
    taken = begin_with(trained.last_checkpoint, module)
    stored = torch.load(trained.last_checkpoint, weights_only=True)["state_dict"]
    other = [name for name, value in before.items() if stored[f"network.{name}"].shape != value.shape]
    assert 0 < len(other) == len(before) - taken
    assert all(torch.equal(weights(module)[name], before[name]) for name in other)


def test_another_network_is_refused(trained: TrainResult) -> None:
    wide = tiny_config(model__options={"channels": [8, 16], "strides": [2], "num_res_units": 1})
    with pytest.raises(InputError, match=r"only \d+ of \d+ weights fit"):
        begin_with(trained.last_checkpoint, ConnectomicsModule(wide))


def test_the_key_is_read_when_a_run_begins(trained: TrainResult, tmp_path: Path) -> None:
    config = tiny_config(model__weights=str(trained.last_checkpoint), training__max_epochs=1, optimizer__lr=1e-12)
    again = train(config, tmp_path / "tuned", datamodule=MadeUpData())
    old, new = (torch.load(run.last_checkpoint, weights_only=True)["state_dict"] for run in (trained, again))
    for name in (n for n in old if n.startswith("network.") and n.endswith("weight")):
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)
    assert again.epochs == 1  # its own first one
    config.model.weights = str(tmp_path / "nothing.ckpt")
    with pytest.raises(MissingError, match="no checkpoint"):
        train(config, tmp_path / "none", datamodule=MadeUpData())
