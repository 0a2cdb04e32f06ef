"""The 2-D network equals a plain loop over the planes of a patch, in any memory format, and learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from connectomics.errors import InputError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.inference.sliding import predict_blocks
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.models import build_model
from connectomics.models.batch_labels import DenseLabels
from connectomics.models.losses import build_loss
from connectomics.models.unet_2d import NORMS, PlaneUNet

SMALL = {"features": [4, 8, 8]}


def plane_by_plane(network: PlaneUNet, image: Tensor) -> Tensor:
    """One plane of one sample at a time, with its neighbors picked one by one, through the layers of the network."""
    depth, reach = image.shape[2], network.planes // 2
    samples = []
    for sample in image:
        planes = []
        for z in range(depth):
            near = [min(max(z + k, 0), depth - 1) for k in range(-reach, reach + 1)]
            picture = torch.stack([channel[n] for channel in sample for n in near])
            planes.append(network._levels(picture[None].contiguous())[0][0])
        samples.append(torch.stack(planes, 1))
    return torch.stack(samples)


@pytest.mark.parametrize("planes", [1, 3, 5])
@pytest.mark.parametrize("channels", [1, 2])
def test_equals_a_loop_over_planes(planes: int, channels: int) -> None:
    torch.manual_seed(0)
    network = PlaneUNet(channels, 3, features=(4, 8, 8), planes=planes, norm="instance", residual=planes == 3)
    image = torch.rand(2, channels, 6, 16, 24)
    with torch.no_grad():
        found = network(image)
        assert found.shape == (2, 3, 6, 16, 24)
        torch.testing.assert_close(found, plane_by_plane(network, image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(image).detach(), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_planes_are_independent_in_evaluation(norm: str) -> None:
    torch.manual_seed(0)
    network = PlaneUNet(1, 1, features=(8, 16), norm=norm).eval()
    image = torch.rand(1, 1, 4, 16, 16)
    with torch.inference_mode():
        before = network(image)
        image[:, :, 2] = 0
        after = network(image)
    assert torch.equal(before[:, :, [0, 1, 3]], after[:, :, [0, 1, 3]])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_a_stem_sees_and_returns_every_pixel() -> None:
    torch.manual_seed(0)
    network = PlaneUNet(1, 2, features=(4, 8), stem=2).eval()
    assert network.down[0].first[0].in_channels == 4
    image = torch.rand(1, 1, 2, 16, 24)
    with torch.inference_mode():
        squares = image.unfold(3, 2, 2).unfold(4, 2, 2)[0, 0].reshape(2, 8, 12, 4).movedim(3, 1)  # by hand
        inside = PlaneUNet(4, 8, features=(4, 8)).eval()
        head = network.heads[0]  # (4, 2, 2, 2): a square of two classes for each pixel
        weights = {**network.state_dict(), "heads.0.weight": head.weight.permute(1, 2, 3, 0).reshape(8, 4, 1, 1)}
        inside.load_state_dict({**weights, "heads.0.bias": head.bias.repeat_interleave(4)})
        expected = inside(squares.movedim(1, 0)[None])[0].reshape(2, 2, 2, 2, 8, 12)  # class, y, x in a square, plane
        expected = expected.permute(0, 3, 4, 1, 5, 2).reshape(2, 2, 16, 24)
        torch.testing.assert_close(network(image)[0], expected)
        image[..., 5] += 1  # the right pixel of a square
        assert (network(image)[0] != expected).any()
    with pytest.raises(InputError, match="stem"):
        PlaneUNet(1, 1, stem=0)


def test_neighbors_reach_as_far_as_planes_say() -> None:
    torch.manual_seed(0)
    network = PlaneUNet(1, 1, features=(4, 8), planes=3).eval()
    image = torch.rand(1, 1, 9, 16, 16)
    with torch.inference_mode():
        before = network(image)
        image[:, :, 4] = 0
        moved = (network(image) - before).abs().amax((0, 1, 3, 4)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_large_windows_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    network = PlaneUNet(1, 2, features=(4, 8), planes=3).eval()
    image = torch.rand(1, 1, 7, 16, 16)
    with torch.inference_mode():
        whole = network(image)
        monkeypatch.setattr("connectomics.models.unet_2d._VOXELS_AT_ONCE", 3 * 16 * 16)
        torch.testing.assert_close(network(image), whole)


@pytest.mark.parametrize("planes", [1, 3])
def test_every_convolution_sees_channels_last(planes: int) -> None:
    network = PlaneUNet(1, 1, features=(4, 8, 8), planes=planes)
    formats: list[bool] = []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda _, inputs, output: formats.append(inputs[0].stride(1) == 1 and output.stride(1) == 1)
            )
    network(torch.rand(2, 1, 3, 16, 16))
    assert formats
    assert all(formats)


def test_deep_supervision_keeps_the_planes() -> None:
    network = build_model("unet_2d", 1, 2, patch_size=(3, 32, 32), deep_supervision=True, options=SMALL | {"planes": 3})
    image = torch.rand(1, 1, 3, 32, 32)
    assert [tuple(level.shape) for level in network.train()(image)] == [(1, 2, 3, 32, 32)]
    deeper = build_model("unet_2d", 1, 2, deep_supervision=True, options={"features": [4, 8, 8, 8]})
    assert [tuple(level.shape) for level in deeper.train()(image)] == [(1, 2, 3, 32, 32), (1, 2, 3, 16, 16)]
    assert deeper.eval()(image).shape == (1, 2, 3, 32, 32)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"residual": True, "dropout": 0.1, "norm": "group"}, marks=pytest.mark.slow)]
)
def test_it_learns_a_patch(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = build_model("unet_2d", 1, 1, patch_size=(4, 32, 32), options=SMALL | options)
    label = torch.zeros(1, 1, 4, 32, 32)
    label[..., 8:20, 6:18] = 1
    image = label + 0.5 * torch.randn(label.shape)
    labels = DenseLabels(label, torch.ones_like(label, dtype=torch.bool))
    loss, optimizer = build_loss(["DiceLoss", "BCEWithLogitsLoss"]), torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss(network(image), labels).total.backward()
        optimizer.step()
    with torch.inference_mode():
        found = network.eval()(image) > 0
    both, either = (found & (label > 0)).sum(), (found | (label > 0)).sum()
    assert both / either > 0.95


@pytest.mark.parametrize("window", [(1, 32, 32), (4, 32, 32), (8, 64, 64)])
def test_windows_of_planes_equal_the_whole(window: tuple[int, int, int]) -> None:
    """Where windows do not overlap and hold what the network sees, they give what the whole volume gives."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(PlaneUNet(1, 2, features=(4, 8)), torch.nn.Sigmoid()).eval()
    grid = VoxelGrid((8.0, 8.0, 8.0), (0.0, 0.0, 0.0), (8, 64, 64))
    raw = torch.rand(8, 64, 64)
    with torch.inference_mode():
        whole = network(raw[None, None])[0].numpy()
    found = whole * 0

    def read(part: VoxelGrid):
        (z, y, x), end = grid.index_range(part.box)
        return raw[z : end[0], y : end[1], x : end[2]].numpy()

    for block, values in predict_blocks(
        read, grid, network, channels=2, window=window, overlap=0, context=0, batch_size=3, block_size=32
    ):
        (z, y, x), end = grid.index_range(block.box)
        found[:, z : end[0], y : end[1], x : end[2]] = values
    rim = 8  # the receptive field of two stages is 14 pixels
    for y in range(0, 64, window[1]):
        inner = slice(y + rim, y + window[1] - rim)
        assert abs(found[:, :, inner, inner] - whole[:, :, inner, inner]).max() < 1e-5
    assert abs(found - whole).max() < (1e-5 if window[1] == 64 else 0.5)


def test_planes_of_three_directions_in_fitted_windows_equal_the_whole(tmp_path) -> None:
    """One window a plane, smaller than asked for: the mean over the planes along z, y and x of the whole volume."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(PlaneUNet(1, 2, features=(4, 8)), torch.nn.Sigmoid()).eval()
    grid = VoxelGrid((8.0, 8.0, 8.0), (0.0, 0.0, 0.0), (12, 22, 40))
    raw = np.random.default_rng(0).integers(0, 256, grid.shape, dtype=np.uint8)
    write_multiscale(tmp_path / "raw.zarr" / "em", raw, grid, kind="raw")
    task = PredictTask(
        raw=str(tmp_path / "raw.zarr" / "em"), output=str(tmp_path / "out.zarr" / "crop1"), classes=("mito", "er"),
        targets={"er": grid}, voxel_size=(8, 8, 8), window=(4, 64, 64), checkpoint="", multiple=(1, 2, 2),
        overlap=(0.0, 0.25, 0.25), symmetries=("zyx", "yzx", "xzy"), dtype="float16",
    )  # fmt: skip
    assert task.plan()[0].voxels < 1.04 * 3 * grid.size  # 22 planes along y in windows of 4
    run_predict_task(task, network)
    volume = torch.from_numpy(raw / np.float32(255))
    with torch.inference_mode():
        turned = [network(volume.permute(axes)[None, None])[0] for axes in ((0, 1, 2), (1, 2, 0), (2, 1, 0))]
    back = [turned[0], turned[1].permute(0, 3, 1, 2), turned[2].permute(0, 3, 2, 1)]
    wanted = torch.stack(back).mean(0)[1].numpy()
    found = Multiscale.open(f"{task.output}/er").read_level(0, (0, 0, 0), grid.shape)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-3)


class TestRefusals:
    def test_planes_are_odd(self) -> None:
        with pytest.raises(InputError, match=r"planes must be an odd number \(1, 3, 5\), got 2"):
            build_model("unet_2d", 1, 1, options={"planes": 2})

    def test_an_unknown_normalization(self) -> None:
        with pytest.raises(UnknownNameError, match="normalization 'batchnorm'"):
            build_model("unet_2d", 1, 1, options={"norm": "batchnorm"})

    def test_a_single_stage(self) -> None:
        with pytest.raises(InputError, match="at least two stages"):
            build_model("unet_2d", 1, 1, options={"features": [8]})
