"""Further views: registered with the image in the world, and part of what is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from connectomics.errors import InputError, UnknownNameError
from connectomics.models.fusion import EncodedInputs, StackedInputs, channels_for, onto, with_inputs


def world(shape: tuple[int, int, int], voxel: tuple[float, float, float]) -> list[torch.Tensor]:
    """World positions along each axis, about the middle."""
    return [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * v for n, v in zip(shape, voxel, strict=True)]


def plane(shape: tuple[int, int, int], voxel: tuple[float, float, float]) -> torch.Tensor:
    """A linear function of world position: trilinear interpolation keeps it exactly."""
    z, y, x = world(shape, voxel)
    return (0.7 * z[:, None, None] - 0.2 * y[None, :, None] + 1.3 * x[None, None, :])[None, None]


@pytest.mark.parametrize(
    ("shape", "voxel", "view", "coarse"),
    [
        ((16, 16, 16), (8.0, 8.0, 8.0), (8, 8, 8), (32.0, 32.0, 32.0)),
        ((12, 16, 20), (5.24, 4.0, 4.0), (9, 10, 11), (16.0, 16.0, 18.0)),
    ],
)
def test_what_stands_at_a_voxel_is_of_the_same_place(
    shape: tuple[int, int, int], voxel: tuple[float, float, float], view: tuple[int, int, int],
    coarse: tuple[float, float, float],
) -> None:  # fmt: skip
    ratio = [c / v for c, v in zip(coarse, voxel, strict=True)]
    moved = onto(plane(view, coarse), shape, ratio)
    torch.testing.assert_close(moved, plane(shape, voxel), rtol=1e-4, atol=1e-3)


def test_places_are_as_exact_in_mixed_precision() -> None:
    ratio, voxel = (3.3, 3.3, 3.3), (8.0, 8.0, 8.0)
    given = plane((16, 16, 16), (26.4, 26.4, 26.4))
    with torch.autocast("cpu", torch.bfloat16):
        moved = onto(given, (48, 44, 36), ratio)
    torch.testing.assert_close(moved, plane((48, 44, 36), voxel), rtol=1e-4, atol=1e-3)


def test_a_view_wider_than_its_box_repeats_its_edge() -> None:
    moved = onto(plane((4, 4, 4), (1.0, 1.0, 1.0)), (16, 4, 4), (1.0, 1.0, 1.0))
    torch.testing.assert_close(moved[:, :, 0], moved[:, :, 5])


def test_encoded_views_reach_output_and_gradients() -> None:
    torch.manual_seed(0)
    network = with_inputs(nn.Conv3d(channels_for("encoder", 1, 2), 3, 1), "encoder", [(4.0,) * 3, (2.0,) * 3])
    image = torch.rand(2, 1, 8, 8, 8)
    views = [torch.rand(2, 1, 6, 6, 6), torch.rand(2, 1, 8, 4, 4)]
    out = network(image, *views)
    assert out.shape == (2, 3, 8, 8, 8)
    out.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert not torch.equal(network(image, views[0], views[1] * 0), out)
    assert isinstance(network, EncodedInputs)


def test_stacked_views_are_channels() -> None:
    inner = nn.Conv3d(channels_for("channels", 1, 1), 1, 1, bias=False)
    nn.init.constant_(inner.weight, 2.0)
    network = with_inputs(inner, "channels", [(4.0,) * 3])
    assert isinstance(network, StackedInputs)
    image, view = torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 4, 4, 4)
    torch.testing.assert_close(network(image, view), 2 * image + 2 * view)
    with pytest.raises(InputError, match="as large as the patch"):
        network(image, torch.rand(1, 1, 2, 4, 4))
    with pytest.raises(InputError, match="1 further inputs"):
        network(image)


def test_no_view_no_wrapper_and_names() -> None:
    inner = nn.Conv3d(1, 1, 1)
    assert with_inputs(inner, "encoder", []) is inner
    with pytest.raises(UnknownNameError, match=r"model\.fusion"):
        channels_for("encode", 1, 1)
