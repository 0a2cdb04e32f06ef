"""Weights that other programs trained: the same numbers by other names, safe reading, and what is said of the match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from connectomics.config import RunConfig, load_config
from connectomics.errors import ConfigError, ConnectomicsError, CorruptDataError, InputError, MissingError
from connectomics.lightning.fine_tuning import begin_with
from connectomics.lightning.foreign_weights import foreign_weights
from connectomics.lightning.module import ConnectomicsModule
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
WIDTHS, BLOCKS = (16, 32, 64), (1, 2, 2)


class Layer(nn.Module):
    """Convolution, norm and activation with nnU-Net's names, each listed twice as there."""

    def __init__(self, a: int, b: int, kernel: int = 3, stride: Any = 1, bias: bool = True, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(a, b, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(b, eps=1e-5, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, *([nn.LeakyReLU(0.01)] if act else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


class Block(nn.Module):
    def __init__(self, a: int, b: int, stride: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = Layer(a, b, stride=stride), Layer(b, b, act=False)
        pool = [nn.AvgPool3d(stride, stride)] if stride != (1, 1, 1) else []
        if pool or a != b:
            self.skip = nn.Sequential(*pool, *([Layer(a, b, 1, bias=False, act=False)] if a != b else []))

    def forward(self, x: Tensor) -> Tensor:
        aside = self.skip(x) if hasattr(self, "skip") else x
        return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + aside, 0.01)


class Nested(nn.Module):
    """A module with children of given names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class NNUNet(nn.Module):
    """nnU-Net's residual-encoder U-Net with its tensor names, written plainly."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        before = (WIDTHS[0], *WIDTHS)
        stages = [
            Nested(blocks=nn.Sequential(*(Block(before[n] if k == 0 else w, w, STRIDES[n] if k == 0 else (1, 1, 1))
                                          for k in range(BLOCKS[n]))))
            for n, w in enumerate(WIDTHS)
        ]  # fmt: skip
        stem = Nested(convs=nn.Sequential(Layer(1, WIDTHS[0])))
        self.encoder = Nested(stem=stem, stages=nn.ModuleList(stages))
        pairs = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], STRIDES[:0:-1], strict=True))
        self.decoder = Nested(
            encoder=self.encoder,
            stages=nn.ModuleList(Nested(convs=nn.Sequential(Layer(2 * b, b))) for _, b, _ in pairs),
            transpconvs=nn.ModuleList(nn.ConvTranspose3d(a, b, s, s) for a, b, s in pairs),
            seg_layers=nn.ModuleList(nn.Conv3d(b, classes, 1) for _, b, _ in pairs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.encoder.stem.convs(x), []
        for stage in self.encoder.stages:
            x = stage.blocks(x)
            skips.append(x)
        parts = (self.decoder.transpconvs, self.decoder.stages, skips[-2::-1])
        for enlarge, stage, skip in zip(*parts, strict=True):
            x = stage.convs(torch.cat([enlarge(x), skip], 1))
        return self.decoder.seg_layers[-1](x)


def config_of(**changes: Any) -> RunConfig:
    options = {"strides": [list(s) for s in STRIDES], "kernel_size": [3, 3, 3], "size": "S"}
    model = {"model__architecture": "residual_unet", "model__options": options, "model__weights_format": "nnunet"}
    model["model__weights"] = "given to begin_with"
    return tiny_config(**{**model, **changes})


def saved(path: Path, network: nn.Module, **more: Any) -> Path:
    """As nnU-Net's ``checkpoint_final.pth``, with the numbers of numpy in its log."""
    logs = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "lrs": [0.01]}
    content = {"network_weights": network.state_dict(), "optimizer_state": {}, "logging": logs, "_best_ema": None,
               "init_args": {"fold": 0, "device": torch.device("cpu")}, "trainer_name": "nnUNetTrainer"}  # fmt: skip
    torch.save({**content, **more}, path)
    return path


def test_the_network_of_nnunet_gives_the_same_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "connectomics")
    torch.manual_seed(1)
    theirs = NNUNet(2)
    module = ConnectomicsModule(config_of())
    copied = begin_with(saved(tmp_path / "checkpoint_final.pth", theirs), module)
    own = module.network.state_dict()
    assert copied == len(own) - 2  # all but the output
    assert "new tensors: heads.0.bias, heads.0.weight" in caplog.text
    assert "new: mito, er; unused tensors of the file: decoder.seg_layers.0.weight" in caplog.text
    with torch.no_grad():  # the output, by hand
        for name in ("weight", "bias"):
            getattr(module.network.heads[0], name).copy_(getattr(theirs.decoder.seg_layers[-1], name))
        image = torch.rand((2, 1, 8, 16, 16))
        expected = theirs.eval()(image)
        torch.testing.assert_close(module.eval()(image), expected, rtol=1e-5, atol=1e-6)
        assert expected.std() > 0.01


def test_its_own_package_has_these_names(tmp_path: Path) -> None:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    theirs = unet.ResidualEncoderUNet(
        1, 3, WIDTHS, nn.Conv3d, 3, STRIDES, BLOCKS, 2, (1, 1), conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    plain = NNUNet(2)
    names = {name for name, _ in plain.named_parameters()} | {n for n in plain.state_dict() if "seg" in n}
    assert names <= set(theirs.state_dict())
    assert {n for n in theirs.state_dict() if "all_modules" not in n and "decoder.encoder" not in n} <= set(
        plain.state_dict()
    )
    found, _ = foreign_weights(saved(tmp_path / "real.pth", theirs), "nnunet")
    module = ConnectomicsModule(config_of())
    module.network.load_state_dict({**found}, strict=False)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(module.network.heads[0], name).copy_(getattr(theirs.decoder.seg_layers[-1], name))
        image = torch.rand((1, 1, 8, 16, 16))
        torch.testing.assert_close(module.eval()(image), theirs.eval()(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("wrapper", "prefix", "name"), [
    ("", "", "model.pt"), ("state_dict", "network.", "lightning.ckpt"), ("model", "module.", "parallel.pth"),
    ("", "", "model.safetensors"),
])  # fmt: skip
def test_tensors_by_the_same_names(tmp_path: Path, wrapper: str, prefix: str, name: str) -> None:
    """A MONAI bundle keeps the state dictionary of MONAI's network, which ours is."""
    from monai.networks.nets import UNet
    from safetensors.torch import save_file

    theirs = UNet(3, 1, 5, channels=(4, 8), strides=(2,), num_res_units=0)
    tensors = {prefix + key: value for key, value in theirs.state_dict().items()}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({wrapper: tensors} if wrapper else tensors, path)
    config = tiny_config(
        model__weights_format="state_dict",
        model__weights="given to begin_with",
        model__options={"channels": [4, 8], "strides": [2], "num_res_units": 0},
    )
    module = ConnectomicsModule(config)
    begin_with(path, module)
    own, stored = module.network.state_dict(), theirs.state_dict()
    same = [key for key in own if own[key].shape == stored[key].shape and torch.equal(own[key], stored[key])]
    assert 0 < len(own) - len(same) <= 3  # the last layer has other classes
    assert all(key.startswith("model.2") for key in set(own) - set(same))


def test_a_training_starts_with_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "connectomics")
    file = saved(tmp_path / "net.pth", NNUNet(2))
    config = config_of(model__weights=str(file), model__init_bias=-2, training__max_epochs=1)
    run = train(config, tmp_path / "run", datamodule=MadeUpData())
    assert "62 of 64 tensors copied" in (tmp_path / "run/run.log").read_text()
    assert run.epochs == 1


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('evil').touch()",)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda p: torch.save({"network_weights": {}, "x": Evil()}, p), InputError, "not unpickled for safety"),
    (lambda p: p.write_bytes(b"PK\x03\x04 no zip"), CorruptDataError, "cannot be read"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d"), InputError,
     r"holds no weights: it is a text file, which begins with 'version https://git-lfs"),
    (lambda p: torch.save({"a": 1}, p), InputError, "holds no tensors"),
    (lambda p: torch.save({"a.weight": torch.zeros(2)}, p), InputError, "no tensor of nnU-Net"),
    (lambda p: None, MissingError, "no file at"),
])  # fmt: skip
def test_other_files_are_refused(
    tmp_path: Path, make: Any, error: type[ConnectomicsError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file.pth")
    with pytest.raises(error, match=message):
        begin_with(tmp_path / "file.pth", ConnectomicsModule(config_of()))
    assert not (tmp_path / "evil").exists()


def test_another_network_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "net.pth", NNUNet(2))
    options = {"strides": [1, 2], "kernel_size": [3, 3], "size": "M"}
    with pytest.raises(InputError, match=r"network of another program \(nnunet\).*weights fit"):
        begin_with(file, ConnectomicsModule(config_of(model__options=options)))


def test_a_format_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights_format=nnunet.*model\.weights, which is not set"):
        load_config(None, "model.weights_format=nnunet")
