"""Fine-tuning: a new run begins with the weights of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from connectomics.config.schema import InputConfig
from connectomics.errors import InputError, MissingError
from connectomics.lightning.fine_tuning import begin_with, output_names
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.network import output_axes
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.lightning.heads_run import head_config
from tests.lightning.synthetic_run import MadeUpData, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny_config(training__max_epochs=1), tmp_path_factory.mktemp("run") / "first", datamodule=MadeUpData())


def weights(module: ConnectomicsModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.network.state_dict().items()}


def test_all_weights_of_the_same_network(trained: Run) -> None:
    module = ConnectomicsModule(tiny_config())
    stored = torch.load(trained.last_checkpoint, weights_only=True)["state_dict"]
    assert begin_with(trained.last_checkpoint, module) == len(weights(module))
    assert all(torch.equal(value, stored[f"network.{name}"]) for name, value in weights(module).items())


def logits(checkpoint_or_module: ConnectomicsModule) -> torch.Tensor:
    """Of a fixed image, by channel."""
    with torch.no_grad():
        return checkpoint_or_module.eval()(torch.rand((1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0)))[
            0
        ]


@pytest.mark.parametrize("architecture", ["unet", "mednext", "segresnet"])
def test_output_channels_are_copied_by_the_name_of_their_class(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a network whose classes have another order, and one with another number of them."""
    options = {
        "unet": {"channels": [4, 8], "strides": [2], "num_res_units": 0},  # with them its last layers mix classes
        "mednext": {"init_filters": 4, "blocks_down": [1], "blocks_up": [1], "encoder_expansion_ratio": 2,
                    "decoder_expansion_ratio": 2},
        "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    }[architecture]  # fmt: skip
    model = {"model__architecture": architecture, "model__options": options, "model__deep_supervision": False}
    config = tiny_config(dataset__classes=["mito", "er", "pm"], training__max_epochs=1, **model)
    torch.manual_seed(5)
    first = ConnectomicsModule(config)
    path = tmp_path / "first.ckpt"
    content = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(content)
    torch.save(content, path)
    expected = logits(first)
    for classes in (["er", "nuc", "mito"], ["pm", "er", "mito"], ["nuc", "mito", "ld", "er", "vim"]):
        caplog.clear()
        caplog.set_level("INFO", "connectomics")
        module = ConnectomicsModule(tiny_config(dataset__classes=classes, **model))
        begin_with(path, module)
        found = logits(module)
        for channel, name in enumerate(classes):
            if name in config.dataset.classes:
                torch.testing.assert_close(
                    found[channel], expected[config.dataset.classes.index(name)], rtol=1e-5, atol=1e-6
                )
                assert (
                    f"from the checkpoint: {', '.join(n for n in classes if n in config.dataset.classes)}"
                    in caplog.text
                )
            else:
                assert not any(torch.allclose(found[channel], other, atol=1e-3) for other in expected)
                assert f"new: {', '.join(n for n in classes if n not in config.dataset.classes)}" in caplog.text


def test_a_network_without_a_common_class_keeps_all_but_the_output(trained: Run) -> None:
    module = ConnectomicsModule(tiny_config(dataset__classes=["nuc", "ld"]))
    before = weights(module)
    taken = begin_with(trained.last_checkpoint, module)
    after = weights(module)
    kept = [name for name in before if torch.equal(before[name], after[name])]
    assert 0 < taken < len(before)
    assert len(kept) >= len(before) - taken > 0


def test_heads_are_copied_by_what_they_predict(tmp_path: Path) -> None:
    first = ConnectomicsModule(head_config("distance", "boundary"))
    content = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(content)
    torch.save(content, tmp_path / "first.ckpt")
    found, wanted = (
        output_names(head_config(*kinds)) for kinds in (("distance", "boundary"), ("boundary", "distance"))
    )
    assert sorted(found) == sorted(wanted) != found
    other = head_config("boundary", "distance")
    other.model.heads[1].scale_nm = 1234.0  # another distance
    module = ConnectomicsModule(other)
    begin_with(tmp_path / "first.ckpt", module)
    axes = output_axes(module.config, module.network, 4)
    for name, value in weights(module).items():
        if axes[name] == (0,):
            old = first.network.state_dict()[name]
            assert torch.equal(value[:3], old[[0, 1, 3]])


def test_weights_of_other_voxel_sizes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A network learns sizes in voxels: of its main input, and of further ones."""
    coarse, coarser = ([InputConfig([size] * 3, [16] * 3)] for size in (16.0, 32.0))
    first = ConnectomicsModule(tiny_config(data__inputs=coarse))
    content = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(content)
    torch.save(content, tmp_path / "first.ckpt")
    begin_with(tmp_path / "first.ckpt", ConnectomicsModule(tiny_config(data__inputs=coarse)))
    assert "worse" not in caplog.text
    begin_with(tmp_path / "first.ckpt", ConnectomicsModule(tiny_config(data__inputs=coarser)))
    assert "at [8.0, 8.0, 8.0] and [16.0, 16.0, 16.0] nm, the configuration has [8.0, 8.0, 8.0] and [32" in caplog.text
    caplog.clear()
    thick = tiny_config(data__inputs=coarse, dataset__voxel_size=[40.0, 8.0, 8.0])
    begin_with(tmp_path / "first.ckpt", ConnectomicsModule(thick))
    assert "the configuration has [40.0, 8.0, 8.0] and [16.0, 16.0, 16.0] nm: expect worse results" in caplog.text


def test_a_text_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_text("base: ../lucchi.yaml\nseeds: [1]\n")
    with pytest.raises(InputError, match=r"holds no weights: it is a text file, which begins with 'base: \.\./lucchi"):
        begin_with(tmp_path / "weights.ckpt", ConnectomicsModule(tiny_config()))


def test_another_network_is_refused(trained: Run) -> None:
    wide = tiny_config(model__options={"channels": [8, 16], "strides": [2], "num_res_units": 1})
    with pytest.raises(InputError, match=r"only \d+ of \d+ weights fit"):
        begin_with(trained.last_checkpoint, ConnectomicsModule(wide))


def test_the_key_is_read_when_a_run_begins(trained: Run, tmp_path: Path) -> None:
    config = tiny_config(model__weights=str(trained.last_checkpoint), training__max_epochs=1, optimizer__lr=1e-12)
    again = train(config, tmp_path / "tuned", datamodule=MadeUpData())
    old, new = (torch.load(run.last_checkpoint, weights_only=True)["state_dict"] for run in (trained, again))
    for name in (n for n in old if n.startswith("network.") and n.endswith("weight")):
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)
    assert again.epochs == 1  # its own first one
    config.model.weights = str(tmp_path / "nothing.ckpt")
    with pytest.raises(MissingError, match="no checkpoint"):
        train(config, tmp_path / "none", datamodule=MadeUpData())
