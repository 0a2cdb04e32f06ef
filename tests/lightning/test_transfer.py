"""What of a network trains, and how fast, when it begins with the weights of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from connectomics.config.schema import OptimizerConfig
from connectomics.errors import ConfigError, MissingError
from connectomics.lightning.fine_tuning import begin_with, update_batch_norm
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.network import stages_from_output
from connectomics.lightning.optim import build_optimizer
from connectomics.models.registry import list_models
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config

#: A network with batch normalization.
BATCH_NORM = {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH"}
FIRST = "model.0.*"  # its first stage


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny_config(model__options=BATCH_NORM, training__max_epochs=1)
    return train(config, tmp_path_factory.mktemp("run") / "first", datamodule=MadeUpData())


def state_of(run: Run) -> dict[str, torch.Tensor]:
    assert run.last_checkpoint is not None
    stored: dict[str, torch.Tensor] = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in stored.items()}


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_is_frozen_does_not_move(trained: Run, ema: float, tmp_path: Path) -> None:
    """Over validations too, which change the mode of the network: weights and statistics of norms keep their bits."""
    config = tiny_config(
        model__options=BATCH_NORM, model__weights=str(trained.folder), model__freeze=[FIRST], training__ema=ema,
        optimizer__layer_decay=0.5,
    )  # fmt: skip
    run = train(config, tmp_path / "run", datamodule=MadeUpData())
    before, after = state_of(trained), state_of(run)
    frozen = [name for name in before if name.startswith("model.0.")]
    assert any(name.endswith("running_mean") for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    others = [name for name in before if name not in frozen and "num_batches" not in name]
    assert sum(torch.equal(before[name], after[name]) for name in others) < len(others) / 4


def test_frozen_norms_are_in_evaluation_mode_while_others_train() -> None:
    module = ConnectomicsModule(tiny_config(model__options=BATCH_NORM, model__freeze=[FIRST]))
    for _ in range(2):
        modes = {n: m.training for n, m in module.network.named_modules() if isinstance(m, torch.nn.BatchNorm3d)}
        assert {n.startswith("model.0.") for n, training in modes.items() if not training} == {True}
        assert any(modes.values())
        module.eval()
        module.train()


def test_patterns_that_match_nothing_or_everything_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.freeze: 'encoder' matches none .* called .*model"):
        ConnectomicsModule(tiny_config(model__freeze=[FIRST, "encoder"]))
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        ConnectomicsModule(tiny_config(model__freeze=["*"]))


def test_a_run_does_not_resume_with_other_frozen_parameters(trained: Run) -> None:
    from connectomics.errors import InputError

    config = tiny_config(model__options=BATCH_NORM, model__freeze=[FIRST])
    with pytest.raises(InputError, match=r"has model.freeze=\[\], the configuration model.freeze"):
        train(config, trained.folder, resume=True, datamodule=MadeUpData())


# -- learning rates by depth -------------------------------------------------------------------------------------------
def stages(**changes: Any) -> dict[str, int]:
    module = ConnectomicsModule(tiny_config(**changes))
    found = stages_from_output(module.config, module.network, len(module.classes))
    return {name: found[parameter] for name, parameter in module.network.named_parameters()}


def test_stages_are_counted_from_the_output_through_the_bottleneck() -> None:
    options = {"size": "S", "strides": [1, 2, 2], "kernel_size": [3, 3, 3]}
    found = stages(model__architecture="residual_unet", model__options=options, model__deep_supervision=True)
    expected = {"heads.0": 0, "decoder.1": 1, "decoder.0": 2, "encoder.2": 3, "encoder.1": 4, "encoder.0": 5, "stem": 5}
    for part, stage in expected.items():
        assert {at for name, at in found.items() if name.startswith(f"{part}.")} == {stage}, part


@pytest.mark.parametrize("architecture", sorted(set(list_models()) - {"unetr", "swin_unetr"}))  # those are slow
def test_every_network_has_its_output_in_stage_0(architecture: str) -> None:
    patch = {"unet_2d": [1, 64, 64], "flexible_unet": [64, 64, 64]}.get(architecture, [32, 32, 32])
    options = {"unet_2d": {"features": [8, 16], "stem": 2}, "unet": {"channels": [4, 8], "strides": [2]}}.get(
        architecture, {}
    )
    found = stages(model__architecture=architecture, model__mednext_size="S", model__options=options,
                   data__patch_size=patch)  # fmt: skip
    assert min(found.values()) == 0
    assert sorted(set(found.values())) == list(range(max(found.values()) + 1))
    assert max(found.values()) >= 2


def test_groups_have_their_share_of_the_learning_rate(tmp_path: Path) -> None:
    config = tiny_config(optimizer__layer_decay=0.5, optimizer__decay_norm_and_bias=False, training__max_epochs=1)
    run = train(config, tmp_path / "run", datamodule=MadeUpData())
    groups = torch.load(run.last_checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    rates = [group["lr"] for group in groups]
    assert rates == sorted(rates, reverse=True)
    assert set(rates) == {config.optimizer.lr * 0.5**stage for stage in range(len(set(rates)))}
    assert len(set(rates)) >= 3
    assert run.metrics["train/lr"] == pytest.approx(config.optimizer.lr)
    assert {group["weight_decay"] for group in groups} == {0.0, config.optimizer.weight_decay}


def test_without_decay_all_have_one_rate() -> None:
    module = ConnectomicsModule(tiny_config())
    (group,) = build_optimizer(module.parameters(), OptimizerConfig(lr=0.5)).param_groups
    assert group["lr_scale"] == 1
    assert len(group["params"]) == len(list(module.parameters()))


# -- what model.weights takes ------------------------------------------------------------------------------------------
def test_a_run_folder_gives_its_best_checkpoint_and_one_line(trained: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "connectomics")
    module = ConnectomicsModule(tiny_config(model__options=BATCH_NORM, dataset__classes=["er", "nuc"]))
    begin_with(trained.folder, module)
    (line,) = [record.getMessage() for record in caplog.records if "fine_tuning" in record.name]
    assert str(trained.best_checkpoint) in line
    assert "output channels from the checkpoint: er; new: nuc; unused channels of the checkpoint: mito" in line


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is a folder without checkpoints"):
        begin_with(tmp_path, ConnectomicsModule(tiny_config()))


def test_statistics_of_batch_normalization_are_those_of_the_new_data() -> None:
    module = ConnectomicsModule(tiny_config(model__options=BATCH_NORM, model__freeze=[FIRST]))
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    images = [torch.randn((2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(n)) + 5 for n in range(3)]
    update_batch_norm(module, [{"image": image} for image in images])
    after = module.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name, _ in module.network.named_parameters())
    # its first convolution, and its norm, see the images themselves
    unit = module.network.get_submodule("model.0.conv.unit0")
    first = unit.get_submodule("conv")
    with torch.no_grad():
        means = torch.stack([first(image).mean(dim=(0, 2, 3, 4)) for image in images]).mean(0)
    torch.testing.assert_close(after["model.0.conv.unit0.adn.N.running_mean"], means)
    assert not unit.get_submodule("adn.N").training


def test_a_run_measures_the_statistics_once_before_it_trains(trained: Run, phantom: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 and all of the first stage frozen, only its statistics can differ from the weights."""
    config = tiny_config(
        model__options=BATCH_NORM, model__weights=str(trained.folder), model__freeze=[FIRST],
        model__update_batch_norm=True, optimizer__lr=0.0, dataset__data_root=str(phantom), data__batch_size=1,
        data__patches_per_epoch=1, data__num_workers=0, training__max_epochs=1, data__validation_windows=1,
        dataset__datasets=["phantom-iso"],
    )  # fmt: skip
    before, after = state_of(trained), state_of(train(config, tmp_path / "run"))
    name = "model.0.conv.unit0.adn.N.running_mean"
    assert not torch.allclose(before[name], after[name], atol=1e-3)
    assert torch.equal(before["model.0.conv.unit0.conv.weight"], after["model.0.conv.unit0.conv.weight"])
