"""Strides and kernels follow the voxel size, and the residual-encoder U-Net is nnU-Net's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from connectomics.config import RunConfig
from connectomics.errors import ConfigError, InputError, UnknownNameError
from connectomics.lightning.network import build_network, inference_window, model_options
from connectomics.models import build_model, required_multiple
from connectomics.models.stages import stages_for


def test_isotropic_voxels_are_halved_alike() -> None:
    strides, kernels = stages_for((8, 8, 8), (128, 128, 128))
    assert strides == [(1, 1, 1)] + [(2, 2, 2)] * 5
    assert kernels == [(3, 3, 3)] * 6


def test_thick_sections_are_first_halved_in_the_plane() -> None:
    """40 x 4 x 4 nm: z joins once the pixels have grown to more than 20 nm."""
    strides, kernels = stages_for((40, 4, 4), (16, 256, 256))
    assert strides == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert kernels == [(1, 3, 3), (1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)]


def test_a_single_plane_is_a_network_in_two_dimensions() -> None:
    strides, kernels = stages_for((30, 4, 4), (1, 64, 64))
    assert strides == [(1, 1, 1)] + [(1, 2, 2)] * 4
    assert kernels[0] == (1, 3, 3)


@pytest.mark.parametrize("voxel_size", [(8, 8, 8), (30, 4, 4), (5, 12, 7)])
@pytest.mark.parametrize("patch", [(48, 96, 160), (20, 72, 88), (16, 64, 64)])
def test_the_strides_divide_the_patch(voxel_size: tuple[float, ...], patch: tuple[int, ...]) -> None:
    strides, kernels = stages_for(voxel_size, patch)
    assert len(strides) == len(kernels)
    multiple = required_multiple("dynunet", {"strides": strides})
    assert all(n % m == 0 and n // m >= 4 for n, m in zip(patch, multiple, strict=True))


def test_a_patch_without_a_stage() -> None:
    with pytest.raises(InputError, match="even edge of at least 8 voxels"):
        stages_for((8, 8, 8), (7, 7, 7))
    with pytest.raises(InputError, match="three positive numbers"):
        stages_for((8, 8), (64, 64, 64))


@pytest.mark.parametrize("architecture", ["dynunet", "residual_unet"])
def test_strides_auto_follow_voxel_size_and_patch(architecture: str) -> None:
    config = RunConfig()
    config.dataset.voxel_size, config.data.patch_size = [40.0, 8.0, 8.0], [8, 32, 32]
    config.model.architecture, config.model.options = architecture, {"strides": "auto"}
    if architecture == "dynunet":
        config.model.options["filters"] = [4, 8, 8, 8]
    assert model_options(config)["kernel_size"][0] == (1, 3, 3)
    assert inference_window(config) == [8, 32, 32]
    network = build_network(config, 2).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 1, 8, 32, 32)).shape == (1, 2, 8, 32, 32)
    config.model.architecture = "unet"
    with pytest.raises(ConfigError, match="strides=auto is for dynunet and residual_unet, got unet"):
        model_options(config)


@pytest.mark.parametrize(("size", "millions"), [("S", 10.5), ("M", 102.3), ("L", 230.3)])
def test_sizes_of_the_residual_encoder_unet(size: str, millions: float) -> None:
    """M has as many weights as `ResidualEncoderUNet` of dynamic-network-architectures 0.4.4 with the same stages."""
    six: dict[str, Any] = {"size": size, "strides": [1, 2, 2, 2, 2, 2], "kernel_size": [3] * 6}
    with torch.device("meta"):
        network = build_model("residual_unet", 1, 1, options=six)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"strides": [1, 2]}, "as many stages, 2 to 6, got 2 strides and 5 kernels"),
            ({"strides": [2, 2, 2, 2, 2]}, "the stride of the first stage must be 1, got 2"),
        ],
    )
    def test_stages_that_do_not_fit(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            build_model("residual_unet", 1, 1, options=options)

    def test_an_unknown_size(self) -> None:
        with pytest.raises(UnknownNameError, match="size 'XL'"):
            build_model("residual_unet", 1, 1, options={"size": "XL"})
