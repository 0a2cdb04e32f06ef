"""Every named network builds, gives logits of the promised shape, and takes a step."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from connectomics.errors import InputError, UnknownNameError
from connectomics.inference.augmented import dropout_on
from connectomics.models import (
    build_model,
    check_patch_size,
    dropout_options,
    fixed_patch_size,
    has_deep_supervision,
    list_models,
    register_model,
    required_multiple,
)
from connectomics.models.batch_labels import DenseLabels
from connectomics.models.losses import build_loss
from tests.models.small_networks import EACH, TINY


def test_listing_names_every_network_and_imports_no_torch() -> None:
    assert set(list_models()) == set(TINY)
    code = (
        "import sys; from connectomics.models import list_models, required_multiple; list_models(); "
        "required_multiple('unet'); assert not {'torch', 'monai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_monai_is_imported_for_monai_networks_only() -> None:
    code = (
        "import sys, torch, connectomics.models.fusion, connectomics.models.heads; "
        "from connectomics.models import build_model, register_model; "
        "register_model('own', lambda in_channels, out_channels: torch.nn.Conv3d(in_channels, out_channels, 1), 'x'); "
        "build_model('own', 1, 2); assert 'monai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", EACH)
def test_each_network_takes_a_training_step(name: str) -> None:
    torch.manual_seed(0)
    side, options = TINY[name]
    deep = has_deep_supervision(name)
    network = build_model(name, 1, 3, patch_size=[side] * 3, deep_supervision=deep, options=options)
    image = torch.rand(1, 1, side, side, side)
    label = (torch.rand(1, 3, side, side, side) > 0.5).float()
    known = torch.rand(label.shape) > 0.2
    logits = network.train()(image)
    outputs = logits if isinstance(logits, list) else [logits]
    assert isinstance(logits, list) == deep
    assert outputs[0].shape == label.shape
    assert [o.shape[3] for o in outputs] == [side // 2**k for k in range(len(outputs))]
    planes = 1 if name == "unet_2d" else 2  # factor along z between levels
    assert [o.shape[2] for o in outputs] == [side // planes**k for k in range(len(outputs))]
    build_loss(["DiceLoss", "BCEWithLogitsLoss"])(logits, DenseLabels(label, known)).total.backward()
    for parameter in network.parameters():  # every one that can learn does: data-parallel training hangs otherwise
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
    with torch.inference_mode():
        assert network.eval()(image).shape == label.shape  # logits alone, also with deep supervision


@pytest.mark.parametrize(
    ("size", "kernel", "millions"),
    [
        ("S", 3, 5.55),
        ("B", 3, 10.51),
        ("M", 3, 17.53),
        ("L", 3, 61.73),
        ("S", 5, 5.98),
        ("B", 5, 10.94),
        ("M", 5, 18.25),
        ("L", 5, 62.94),
    ],
)
def test_mednext_has_the_papers_number_of_parameters(size: str, kernel: int, millions: float) -> None:
    """arXiv:2303.09975 prints 5.6, 10.5, 17.6 and 61.8 M at kernel 3, and 5.9, 11.0, 18.3 and 63.0 M at kernel 5."""
    with torch.device("meta"):
        network = build_model("mednext", 1, 2, options={"mednext_size": size, "mednext_kernel_size": kernel})
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("size", "SBML")
def test_mednext_sizes_are_monais(size: str) -> None:
    from monai.networks.nets.mednext import create_mednext

    with torch.device("meta"):
        ours = build_model("mednext", 1, 2, deep_supervision=True, options={"mednext_size": size})
        theirs = create_mednext(size, out_channels=2, kernel_size=3, deep_supervision=True)
    shapes = {name.removeprefix("net."): value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


def test_gradient_checkpointing_changes_memory_and_not_values() -> None:
    image = torch.rand(1, 1, 32, 32, 32)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        options = {"init_filters": 4, "gradient_checkpointing": checkpointing}
        network = build_model("mednext", 1, 2, patch_size=(32,) * 3, options=options)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t.numel()) or t, lambda t: t):
            logits = network(image)
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in network.parameters()], sum(saved), network.state_dict()))
    plain, lean = results
    torch.testing.assert_close(plain[0], lean[0], rtol=0, atol=0)
    for ours, theirs in zip(plain[1], lean[1], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert lean[2] < plain[2] / 2
    assert list(plain[3]) == list(lean[3])  # one checkpoint fits both


def test_dynunet_keeps_no_graph_alive_after_a_step() -> None:
    name = "dynunet"
    network = build_model(name, 1, 1, patch_size=(32,) * 3, deep_supervision=True, options=TINY[name][1])
    network(torch.rand(1, 1, 32, 32, 32))
    assert all(not head.requires_grad for head in network.net.heads)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", EACH)
def test_every_network_drops_channels_on_request(name: str) -> None:
    """Monte-Carlo dropout needs layers that can be active in evaluation, and values that differ between passes."""
    torch.manual_seed(0)
    side, options = TINY[name]
    network = build_model(name, 1, 1, patch_size=[side] * 3, options={**dropout_options(name, 0.3), **options}).eval()
    image = torch.rand(1, 1, side, side, side)
    with torch.inference_mode():
        plain = network(image)
        assert torch.equal(network(image), plain)
        with dropout_on(network):
            assert not torch.equal(network(image), network(image))
        assert torch.equal(network(image), plain)


class TestRefusals:
    def test_dropout_of_a_network_that_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("connectomics.models.registry.ARCHITECTURES", {})
        register_model("own", lambda in_channels, out_channels: torch.nn.Conv3d(in_channels, out_channels, 1), "own")
        with pytest.raises(InputError, match=r"'own' has no option dropout, which model\.dropout sets"):
            dropout_options("own", 0.1)
        register_model("own", lambda in_channels, out_channels, dropout: torch.nn.Dropout3d(dropout), "own")
        assert dropout_options("own", 0.1) == {"dropout": 0.1}

    def test_an_unknown_architecture_names_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'mednext'"):
            build_model("mednextt", 1, 1)

    def test_an_unknown_option_names_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'channels'"):
            build_model("unet", 1, 1, options={"chanels": [4, 8]})

    def test_an_unknown_mednext_size_or_kernel(self) -> None:
        with pytest.raises(UnknownNameError, match="MedNeXt size 'XL'"):
            build_model("mednext", 1, 1, options={"mednext_size": "XL"})
        with pytest.raises(InputError, match=r"mednext_kernel_size must be one of \[3, 5, 7\], got 4"):
            build_model("mednext", 1, 1, options={"mednext_kernel_size": 4})

    def test_a_value_that_the_constructor_refuses(self) -> None:
        with pytest.raises(InputError, match="'segresnet' cannot be built with options"):
            build_model("segresnet", 1, 1, options={"init_filters": 5})

    def test_deep_supervision_where_there_is_none(self) -> None:
        with pytest.raises(InputError, match="these have: mednext, unet_2d, dynunet, residual_unet"):
            build_model("unet", 1, 1, deep_supervision=True)

    @pytest.mark.parametrize("channels", [(0, 1), (1, 0)])
    def test_no_channels(self, channels: tuple[int, int]) -> None:
        with pytest.raises(InputError, match="at least one channel"):
            build_model("unet", *channels)


class TestPatchSize:
    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("mednext", {}, (16, 16, 16)),
            ("mednext", {"blocks_down": [1, 1]}, (4, 4, 4)),
            ("unet", {"strides": [[1, 2, 2], 2], "channels": [4, 8, 8]}, (2, 4, 4)),
            ("dynunet", {"strides": [1, [1, 2, 2], 2]}, (2, 4, 4)),
            ("residual_unet", {}, (16, 16, 16)),
            ("residual_unet", {"strides": [1, [1, 2, 2], 2]}, (2, 4, 4)),
            ("segresnet", {}, (8, 8, 8)),
            ("swin_unetr", {}, (32, 32, 32)),
        ],
    )
    def test_multiple(self, name: str, options: dict[str, Any], expected: tuple[int, int, int]) -> None:
        assert required_multiple(name, options) == expected

    def test_an_odd_side_is_refused_with_one_that_fits(self) -> None:
        with pytest.raises(InputError, match=r"patch_size \[128, 100, 65\].*\[16, 16, 16\].*use \[128, 96, 64\]"):
            check_patch_size("mednext", (128, 100, 65))

    def test_a_patch_that_ends_in_one_voxel_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"single voxel; use \[64, 64, 64\]"):
            check_patch_size("swin_unetr", (32, 32, 32))
        check_patch_size("swin_unetr", (32, 32, 64))

    def test_a_network_in_two_dimensions_takes_single_planes(self) -> None:
        check_patch_size("unet_2d", (1, 64, 96))
        check_patch_size("unet_2d", (7, 64, 96))
        with pytest.raises(InputError, match=r"multiple of \[1, 16, 16\] voxels \(z, y, x\); use \[1, 96, 64\]"):
            check_patch_size("unet_2d", (1, 100, 64))
        with pytest.raises(InputError, match=r"at least \[1, 32, 32\] voxels \(z, y, x\); use \[9, 32, 64\]"):
            check_patch_size("unet_2d", (9, 16, 64))
        with pytest.raises(InputError, match=r"at least \[5, 8, 8\] voxels \(z, y, x\); use \[5, 64, 64\]"):
            check_patch_size("unet_2d", (3, 64, 64), {"planes": 5, "features": [4, 8, 8]})

    def test_three_sides_are_needed(self) -> None:
        with pytest.raises(InputError, match="three positive numbers"):
            check_patch_size("unet", (64, 64))

    def test_stages_that_are_none(self) -> None:
        with pytest.raises(InputError, match="do not describe its stages"):
            required_multiple("unet", {"strides": 3})

    def test_only_unetr_is_built_for_one_size(self) -> None:
        assert [name for name in list_models() if fixed_patch_size(name)] == ["unetr"]
