"""Adapters of low rank: the start is the trained network, only they train, and what is written is a plain network."""

from __future__ import annotations

import io
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import connectomics
from connectomics.config.few_labels import AdaptersConfig
from connectomics.errors import ConfigError, InputError
from connectomics.lightning.adapters import LowRank, add_adapters, merged
from connectomics.lightning.checkpoints import load_module, load_network, read_checkpoint
from connectomics.lightning.fine_tuning import begin_with
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.network import stages_from_output
from connectomics.lightning.output_bias import begin_at_prevalence
from connectomics.pipeline.package import write_package
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.lightning.resume_run import run as killed_run
from tests.lightning.synthetic_run import MadeUpData, tiny_config
from tests.lightning.test_resume_epoch import assert_same

BATCH_NORM = {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH"}
#: Largest difference of a probability between a network with adapters and the merged one, float32.
CLOSE = 1e-6


def adapted_config(weights: Path | str, **changes: Any) -> Any:
    adapters = AdaptersConfig(**{"rank": 2, **changes.pop("adapters", {})})
    return tiny_config(
        **{"model__options": BATCH_NORM, "model__weights": str(weights), "model__adapters": adapters, **changes}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny_config(model__options=BATCH_NORM, training__max_epochs=1)
    return train(config, tmp_path_factory.mktemp("run") / "first", datamodule=MadeUpData())


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["plain", "ema"])
def tuned(trained: Run, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    config = adapted_config(trained.folder, training__ema=request.param, optimizer__layer_decay=0.5)
    return train(config, tmp_path_factory.mktemp("run") / "tuned", datamodule=MadeUpData())


def image(side: int = 16) -> Tensor:
    return torch.rand((1, 1, side, side, side), generator=torch.Generator().manual_seed(0))


def started(trained: Run, **changes: Any) -> ConnectomicsModule:
    module = ConnectomicsModule(adapted_config(trained.folder, **changes))
    begin_with(trained.folder, module)
    add_adapters(module)
    return module


@pytest.mark.parametrize("layer", [
    nn.Linear(6, 5), nn.Conv2d(4, 6, 3, padding=1), nn.Conv3d(4, 6, 3, stride=2), nn.Conv3d(4, 6, (1, 3, 3)),
    nn.ConvTranspose3d(4, 6, 2, stride=2),
], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_the_update_is_a_narrow_layer_and_one_of_single_voxels(layer: Any) -> None:
    """The plain reference: the update as two layers beside the frozen one."""
    torch.manual_seed(0)
    shape = {2: (3, 6), 4: (2, 4, 7, 7), 5: (2, 4, 6, 7, 8)}[layer.weight.ndim]
    given, rank, scale = torch.randn(shape), 2, 0.7
    before = layer(given)
    adapter = LowRank(layer.weight, rank, scale)
    parametrize.register_parametrization(layer, "weight", adapter)
    assert torch.equal(layer(given), before)
    nn.init.normal_(adapter.up)
    up, down = adapter.up, adapter.down.view(rank, *layer.parametrizations.weight.original.shape[1:])
    if isinstance(layer, nn.Linear):
        beside = given @ down.T @ up.T
    else:
        to_one = up.view(*up.shape, *(1,) * (up_dim := layer.weight.ndim - 2))
        convolve = {2: functional.conv2d, 3: functional.conv3d}[up_dim]
        if isinstance(layer, nn.ConvTranspose3d):
            beside = functional.conv_transpose3d(convolve(given, to_one.transpose(0, 1)), down, stride=layer.stride)
        else:
            beside = convolve(convolve(given, down, stride=layer.stride, padding=layer.padding), to_one)
    torch.testing.assert_close(layer(given), before + scale * beside, rtol=1e-4, atol=1e-5)


def test_the_start_is_the_trained_network(trained: Run) -> None:
    module, plain = started(trained), load_module(trained.best_checkpoint)
    assert any(parametrize.is_parametrized(layer) for layer in module.network.modules())
    with torch.no_grad():
        assert torch.equal(module.eval()(image()), plain(image()))


def test_only_adapters_and_the_output_change(tuned: Run, trained: Run) -> None:
    before, after = (read_checkpoint(run.last_checkpoint)["state_dict"] for run in (trained, tuned))
    parts = {name.replace(".parametrizations.weight.original", ".weight"): value for name, value in after.items()}
    changed = {name for name in before if not torch.equal(parts.pop(name), before[name])}
    output = {name for name in before if name.startswith("network.model.2.")}  # as wide as the number of classes
    assert changed <= output, changed - output
    assert len(changed) >= 2
    assert {name.rsplit(".", 1)[-1] for name in parts} == {"up", "down"}
    assert all(float(value.abs().max()) > 0 for value in parts.values())
    norms = [name for name in before if "running_mean" in name and name not in output]
    assert norms, "their statistics are among what is compared"


def test_what_predicts_is_a_plain_network_with_the_same_answer(tuned: Run, trained: Run, tmp_path: Path) -> None:
    module = started(trained)
    module.load_state_dict(read_checkpoint(tuned.last_checkpoint)["state_dict"])
    module.eval()
    with torch.no_grad():
        expected = torch.sigmoid(module(image()))
        package = write_package(tuned.last_checkpoint, tmp_path / "net.pytc")
        for found in (load_network(tuned.last_checkpoint), load_module(tuned.last_checkpoint),
                      connectomics.load_model(package.path)):  # fmt: skip
            names = {name for name in found.state_dict() if name.startswith("network.")}
            assert names == {f"network.{name}" for name in load_network(trained.last_checkpoint).network.state_dict()}
            assert float((torch.sigmoid(found(image())) - expected).abs().max()) <= CLOSE
            assert found.config.model.adapters.rank == 0
        removed = module.network
        for layer in [layer for layer in removed.modules() if parametrize.is_parametrized(layer)]:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        loaded = load_network(tuned.last_checkpoint).network.state_dict()
        for name, value in removed.state_dict().items():
            torch.testing.assert_close(loaded[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_it_is_the_start_of_another_run(tuned: Run) -> None:
    module = ConnectomicsModule(tiny_config(model__options=BATCH_NORM))
    begin_with(tuned.last_checkpoint, module)
    plain = load_network(tuned.last_checkpoint).state_dict()
    assert all(torch.equal(value, plain[f"network.{name}"]) for name, value in module.network.state_dict().items())


@pytest.mark.slow
def test_a_bioimageio_model_is_plain(tuned: Run, tmp_path: Path) -> None:
    pytest.importorskip("bioimageio.spec")
    from connectomics.pipeline.bioimageio import write_bioimageio

    content = read_checkpoint(tuned.last_checkpoint)
    gray = {"low": 0.0, "high": 255.0, "mean": 0.5, "std": 0.2, "origin": "test"}
    content["connectomics"]["config"]["data"]["normalization"] = {"cell": gray}
    torch.save(content, tmp_path / "tuned.ckpt")
    file = write_bioimageio(tmp_path / "tuned.ckpt", tmp_path / "net.zip", authors=["A. Name"], license_name="MIT")
    with zipfile.ZipFile(file) as model:
        network = torch.jit.load(io.BytesIO(model.read("weights.pt")))
    assert not any("parametrizations" in name for name in network.state_dict())


def test_the_output_bias_begins_at_prevalence(trained: Run) -> None:
    module = started(trained, model__init_bias=-2.0)
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    assert set(begin_at_prevalence(module, ())) == {"mito", "er"}
    changed = {name for name, value in module.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("model.2.") and name.endswith(".bias") for name in changed)


def test_new_classes_train_in_full(trained: Run) -> None:
    module = started(trained, dataset__classes=["er", "nuc", "ld"])
    trains = {name for name, parameter in module.network.named_parameters() if parameter.requires_grad}
    of_output = {name for name in trains if ".parametrizations." not in name}
    assert of_output, "the output has no adapter"
    assert all("model.2." in name for name in of_output)


def test_stages_are_those_of_the_plain_network() -> None:
    options = {"channels": [4, 8, 16], "strides": [2, 2], "num_res_units": 1}
    plain, module = (ConnectomicsModule(adapted_config("any", model__options=options)) for _ in range(2))
    add_adapters(module)
    expected, found = (
        {n: stages_from_output(m.config, m.network, 2)[p] for n, p in m.network.named_parameters()}
        for m in (plain, module)
    )
    adapted = {name for name in found if ".parametrizations." in name}
    assert len({found[name] for name in adapted}) >= 3
    for name, stage in found.items():
        layer, place, _ = name.partition(".parametrizations.")
        assert stage == expected[f"{layer}.weight" if place else name], name


@pytest.mark.parametrize("weights", ["frozen", "train"])
def test_frozen_layers_have_none_and_named_ones_train_in_full(trained: Run, weights: str) -> None:
    if weights == "frozen":
        module = started(trained, model__freeze=["model.0.*"])
        assert not [n for n, p in module.network.named_parameters() if n.startswith("model.0.") and p.requires_grad]
    else:
        module = started(trained, adapters={"train": ["model.0.*"]})
        of = {n: p.requires_grad for n, p in module.network.named_parameters() if n.startswith("model.0.")}
        assert all(of.values())
        assert not any("parametrizations" in name for name in of)
        modes = {n: m.training for n, m in module.network.named_modules() if isinstance(m, nn.BatchNorm3d)}
        assert {name[:8] for name, training in modes.items() if training} == {"model.0.", "model.2."}  # 2: the output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": {"layers": ["attention"]}}, r"model.adapters.layers: 'attention' matches none of \d+ parameters"),
        ({"adapters": {"train": ["norms"]}}, r"model.adapters.train: 'norms' matches none of"),
        ({"adapters": {"rank": 500}}, r"rank=500 is too large .* model\.\S+\.weight can have rank \d"),
        ({"adapters": {"layers": ["model.0.*"]}, "model__freeze": ["model.0.*"]}, "names only layers that are frozen"),
    ],
)
def test_wrong_options_are_one_line(trained: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        started(trained, **changes)
    assert "\n" not in str(caught.value)


def test_the_rank_that_the_message_names_is_possible(trained: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        started(trained, adapters={"rank": 500})
    most = int(str(caught.value).rsplit(" ", 1)[1])
    assert started(trained, adapters={"rank": most})
    with pytest.raises(ConfigError):
        started(trained, adapters={"rank": most + 1})


def test_a_network_without_such_layers_and_a_run_without_weights_are_refused(trained: Run) -> None:
    module = ConnectomicsModule(adapted_config(trained.folder))
    module.network = nn.Sequential(nn.BatchNorm3d(1))  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="unet has no linear layer and no convolution"):
        add_adapters(module)
    with pytest.raises(ConfigError, match=r"model\.adapters needs model\.weights"):
        ConnectomicsModule(tiny_config(model__adapters=AdaptersConfig(rank=2)))


def test_weights_that_the_start_lacks_are_not_frozen_at_random_values(trained: Run, tmp_path: Path) -> None:
    content = read_checkpoint(trained.last_checkpoint)
    lost = [name for name in content["state_dict"] if name.startswith("network.model.0.")]
    assert lost
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if name not in lost}
    torch.save(content, tmp_path / "part.ckpt")
    with pytest.raises(InputError, match=r"part\.ckpt has no model\.0\.\S+ that fits, .* model\.adapters\.train"):
        begin_with(tmp_path / "part.ckpt", ConnectomicsModule(adapted_config("any")))
    assert begin_with(tmp_path / "part.ckpt", ConnectomicsModule(adapted_config("any", adapters={"rank": 0})))
    module = ConnectomicsModule(adapted_config("any", adapters={"train": ["model.0.*"]}))
    assert begin_with(tmp_path / "part.ckpt", module)


def test_killed_and_resumed_it_is_the_same_bit_for_bit(trained: Run, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "training__ema": 0.9, "training__max_epochs": 2, "model__options": BATCH_NORM,
        "model__weights": str(trained.folder), "model__adapters": AdaptersConfig(rank=2),
    }  # fmt: skip
    killed_run(tmp_path / "whole", 0, **changes)
    with pytest.raises(ArithmeticError, match="killed"):
        killed_run(tmp_path / "again", 0, (1, 4), **changes)
    killed_run(tmp_path / "again", 0, **changes)
    assert_same(tmp_path / "again", tmp_path / "whole")
    found, wanted = (read_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("again", "whole"))
    for name, value in wanted["current_model_state"].items():
        assert torch.equal(found["current_model_state"][name], value), name


def test_a_run_does_not_resume_with_other_adapters(tuned: Run) -> None:
    config = adapted_config("unused", adapters={"rank": 3}, training__ema=0.5 if tuned.config["training"]["ema"] else 0)
    config.optimizer.layer_decay = 0.5
    with pytest.raises(InputError, match=r"has model.adapters=\{'rank': 2.*use the run's value"):
        train(config, tuned.folder, resume=True, datamodule=MadeUpData())


def test_weights_without_adapters_stay_as_they_are() -> None:
    weights = {"a.weight": torch.ones(2), "b.parametrizations.weight.original0": torch.ones(1)}
    assert merged(weights, AdaptersConfig()) == weights


def test_merged_weights_are_the_same_on_every_processor() -> None:
    """Predictions know a network by the bits of its weights: each operation is rounded by itself, in a fixed order."""
    rng = np.random.default_rng(0)
    base, up, down = (rng.standard_normal(n).astype(np.float32) for n in ((32, 16, 3, 3, 3), (32, 8), (8, 432)))
    place = "a.parametrizations.weight."
    parts = {"original": base, "0.up": up, "0.down": down}
    given = {f"{place}{name}": torch.from_numpy(value) for name, value in parts.items()}
    change = up[:, :1] * down[:1]
    for r in range(1, 8):
        change = change + up[:, r : r + 1] * down[r : r + 1]
    expected = base + np.float32(0.7) * change.reshape(base.shape)
    found = merged(given, AdaptersConfig(rank=8, scale=0.7))
    assert np.array_equal(found["a.weight"].numpy(), expected)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_trains_alike(
    backend: str, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    found = []
    for compiled in (False, True):
        config = adapted_config(
            trained.folder, training__compile=compiled, training__max_epochs=1, optimizer__name="SGD"
        )
        run = train(config, tmp_path / str(compiled), datamodule=MadeUpData(patches=4, crops=1))
        found.append(read_checkpoint(run.last_checkpoint)["state_dict"])
    assert list(found[0]) == list(found[1])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_attention_layers_and_bfloat16() -> None:
    """A transformer with adapters in its attention only, in mixed precision."""
    options = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
    config = adapted_config("any", adapters={"layers": ["*.attn.*"]}, model__architecture="unetr",
                            model__options=options, data__patch_size=[32, 32, 32])  # fmt: skip
    module = ConnectomicsModule(config)
    names = add_adapters(module)
    assert names
    assert all(".attn.qkv." in name or ".attn.out_proj." in name for name in names)
    with torch.autocast("cpu", torch.bfloat16):
        module(image(32)).square().mean().backward()
    trains = {name for name, p in module.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {f"{name.removesuffix('.weight')}.parametrizations.weight.0.up" for name in names} <= trains
