"""Sliding-window prediction: equal to MONAI over the whole array, the same for any blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from connectomics.config import load_config
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.blending import planned_reads
from connectomics.inference.sliding import plan, predict_blocks
from connectomics.inference.symmetry import symmetries
from connectomics.inference.windows import WindowFit, WindowLattice, Windows, importance_map, overlap_per_axis
from connectomics.io.mirror import Extent


def grid_of(shape: tuple[int, int, int]) -> VoxelGrid:
    return VoxelGrid((5.24, 4, 4), (100.5, -7, 3), shape)


class Net(torch.nn.Module):
    """Two convolutions with zero padding, so that the distance to a window's face matters.

    Weights, and the values of `Volume`, have few binary digits, so sums are exact: processors add in different orders,
    which depend on the batch.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv3d(1, 4, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv3d(4, channels, 5, padding=2, dilation=1),
        )
        for weights in self.parameters():
            weights.data.mul_(32).round_().div_(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) / 4 + 0.5).clamp(0, 1)


class Volume:
    """An array of a grid, zeros beyond it; counts what is read."""

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        self.grid = grid_of(shape)
        self.array = np.random.default_rng(seed).integers(0, 64, shape).astype(np.float32) / 64
        self.reads: list[VoxelGrid] = []

    def read(self, grid: VoxelGrid) -> np.ndarray:
        self.reads.append(grid)
        begin = np.round(self.grid.to_index(grid.translation)).astype(int)
        assert grid.same_lattice(self.grid)
        out = np.zeros(grid.shape, np.float32)
        lo = [max(0, int(b)) for b in begin]
        hi = [min(int(b) + s, n) for b, s, n in zip(begin, grid.shape, self.array.shape, strict=True)]
        if all(a < b for a, b in zip(lo, hi, strict=True)):
            into = tuple(slice(a - int(b), c - int(b)) for a, b, c in zip(lo, begin, hi, strict=True))
            out[into] = self.array[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))]
        return out


def assemble(volume: Volume, network, **options) -> np.ndarray:
    out = None
    for grid, values in predict_blocks(volume.read, volume.grid, network, **options):
        if out is None:
            out = np.full((values.shape[0], *volume.grid.shape), np.nan, np.float32)
        begin = np.round(volume.grid.to_index(grid.translation)).astype(int)
        place = (slice(None), *(slice(b, b + s) for b, s in zip(begin, grid.shape, strict=True)))
        assert np.isnan(out[place]).all(), "written twice"
        out[place] = values
    assert out is not None
    return out


def monai_result(array: np.ndarray, network, window, overlap, blending, batch_size) -> np.ndarray:
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer(window, sw_batch_size=batch_size, overlap=overlap, mode=blending)
    with torch.inference_mode():
        return inferer(torch.from_numpy(array)[None, None], network)[0].numpy()


@pytest.mark.parametrize(
    ("shape", "window", "overlap", "block", "batch", "blending"),
    [
        ((40, 40, 40), (16, 16, 16), 0.25, (16, 16, 16), 1, "gaussian"),
        ((40, 33, 51), (16, 20, 12), 0.5, (40, 40, 40), 3, "gaussian"),
        ((40, 33, 51), (16, 20, 12), 0.5, (13, 64, 7), 3, "gaussian"),
        ((9, 40, 21), (16, 16, 16), 0.125, (8, 16, 16), 2, "gaussian"),  # smaller than the window along z
        ((7, 11, 13), (16, 16, 16), 0.25, (256, 256, 256), 1, "gaussian"),  # smaller on every axis, odd
        ((16, 16, 16), (16, 16, 16), 0.25, (5, 5, 5), 1, "gaussian"),  # exactly one window
        ((33, 17, 40), (16, 16, 16), 0.0, (16, 16, 20), 4, "gaussian"),
        ((33, 17, 40), (16, 16, 16), 0.7, (20, 9, 9), 4, "constant"),
    ],
)
def test_equals_monai_over_the_whole_array(shape, window, overlap, block, batch, blending):
    volume, network = Volume(shape), Net()
    ours = assemble(
        volume, network, channels=3, window=window, overlap=overlap, blending=blending,
        batch_size=batch, block_size=block, context=0,
    )  # fmt: skip
    theirs = monai_result(volume.array, network, window, overlap, blending, batch)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [(16, 16, 16), (128, 128, 128), (7, 20, 33)])
def test_importance_map_is_monais(window):
    from monai.data.utils import compute_importance_map

    theirs = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
    np.testing.assert_allclose(importance_map(window).numpy(), theirs.numpy(), rtol=1e-6)
    assert importance_map(window).min() >= 1e-3


@pytest.mark.parametrize("context", [None, 3])
def test_does_not_depend_on_the_blocks(context):
    volume, network = Volume((30, 25, 44)), Net()
    options = dict(channels=3, window=(16, 16, 16), overlap=0.3, context=context)
    whole = assemble(volume, network, block_size=256, **options)
    for block in [(16, 25, 16), (30, 13, 23)]:
        np.testing.assert_allclose(assemble(volume, network, block_size=block, **options), whole, atol=2e-6, rtol=0)


def test_any_subset_of_blocks_gives_the_same_bits():
    """What a resumed run relies on: gaps in a row, a start in the middle of it."""
    volume, network = Volume((20, 30, 90)), Net()
    options = dict(channels=3, window=(16, 16, 16), overlap=0.25, block_size=(20, 16, 14), batch_size=2)
    every = [values.copy() for _, values in predict_blocks(volume.read, volume.grid, network, **options)]
    assert len(every) == 14
    for blocks in [[3], [0, 1, 5, 6], [2, 4, 6, 8, 13], [12, 3, 3]]:
        some = [v.copy() for _, v in predict_blocks(volume.read, volume.grid, network, blocks=blocks, **options)]
        for number, values in zip(sorted(set(blocks)), some, strict=True):
            np.testing.assert_array_equal(values, every[number])


@pytest.mark.parametrize("context", [None, 0, 5])
@pytest.mark.parametrize(("grid", "low", "shape"), [
    ((30, 25, 44), (-6, 0, -40), (60, 40, 90)),  # raw goes on, not everywhere
    ((30, 25, 44), (0, 0, 0), (30, 25, 44)),  # and nowhere
    ((9, 30, 12), (0, 0, -2), (9, 30, 16)),  # thinner than a window; just as wide as one
    ((30, 25, 44), (5, 0, 0), (100, 10, 44)),  # the grid lies beyond the raw
])  # fmt: skip
def test_windows_stay_inside_the_raw(grid, low, shape, context):
    extent = Extent(low, tuple(b + n for b, n in zip(low, shape, strict=True)))
    lattice = WindowLattice.over(grid_of(grid), 16, 0.3, context, extent)
    for axis, starts in enumerate(lattice.starts):
        begin, end = min(0, extent.low[axis]), max(grid[axis], extent.high[axis])
        assert starts[0] <= 0, "the whole grid is covered"
        assert starts[-1] + 16 >= grid[axis]
        assert all(b - a <= 16 for a, b in itertools.pairwise(starts))
        if end - begin >= 16:
            assert begin <= starts[0]
            assert starts[-1] + 16 <= end
        else:
            assert len(starts) == 1, "one window holds everything"
            assert starts[0] <= begin
            assert starts[0] + 16 >= end


def test_any_blocks_give_the_same_where_raw_ends():
    """Windows at the faces are the same for every block; beyond the raw there is nothing."""
    volume, network = Volume((30, 25, 44)), Net()
    extent = Extent((0, 0, 10), (30, 25, 60))
    options = dict(channels=3, window=(16, 16, 16), overlap=0.3, extent=extent)
    whole = assemble(volume, network, block_size=256, **options)
    assert (whole[..., :9] == 0).all()
    assert (whole[..., 9:] > 0).all()
    np.testing.assert_allclose(assemble(volume, network, block_size=(30, 13, 23), **options), whole, atol=2e-6, rtol=0)
    every = [v.copy() for _, v in predict_blocks(volume.read, volume.grid, network, block_size=(30, 16, 8), **options)]
    for blocks in ([5], [0, 3, 4], [1, 2, 8, 11]):
        some = predict_blocks(volume.read, volume.grid, network, block_size=(30, 16, 8), blocks=blocks, **options)
        for number, (_, values) in zip(blocks, some, strict=True):
            np.testing.assert_array_equal(values, every[number])


def test_context_keeps_crop_faces_away_from_window_faces():
    """A part of a volume, predicted with real raw around it, agrees with the prediction of the whole at its faces."""
    volume = Volume((60, 60, 60))
    network = Net()
    part = volume.grid.crop((20, 20, 20), (20, 20, 20))
    reference = monai_result(volume.array, network, (60, 60, 60), 0.25, "gaussian", 1)[:, 20:40, 20:40, 20:40]
    errors = {}
    for context in (0, 8):
        ((_, values),) = predict_blocks(
            volume.read, part, network, channels=3, window=(20, 20, 20), overlap=0.5, context=context
        )
        errors[context] = float(np.abs(values - reference).max())
    assert errors[8] < 0.02 < errors[0]


def test_small_grid_sits_centred_in_one_window():
    lattice = WindowLattice.over(grid_of((100, 128, 125)), 128)
    assert lattice.starts == ((-14,), (-16, 16), (-16, 13))
    assert WindowLattice.over(grid_of((100, 100, 100)), 128, context=0).starts == ((-14,),) * 3
    assert WindowLattice.over(grid_of((40, 40, 40)), 32, 0.25, context=0).starts == ((0, 8),) * 3


def test_every_voxel_is_covered_by_windows():
    for n, w, overlap in itertools.product((1, 15, 16, 17, 40, 63), (8, 16), (0.0, 0.25, 0.99)):
        (starts, *_) = WindowLattice.over(grid_of((n, n, n)), w, overlap).starts
        covered = np.zeros(n, bool)
        for s in starts:
            covered[max(0, s) : max(0, s + w)] = True
        assert covered.all()
        assert list(starts) == sorted(set(starts))


def test_fitted_windows_cover_every_voxel_with_no_more_windows():
    for n, w, overlap in itertools.product((1, 15, 16, 17, 40, 63, 130), (16, 48), (0.0, 0.25, 0.6)):
        grid, fit = grid_of((n, n, 7)), WindowFit((8, 4, 1))
        fitted, whole = (WindowLattice.over(grid, w, overlap, fit=f) for f in (fit, None))
        assert all(side <= w and side % unit == 0 for side, unit in zip(fitted.window, fit.multiple, strict=True))
        for axis in range(2):
            covered = np.zeros(n, bool)
            for s in fitted.starts[axis]:
                covered[max(0, s) : max(0, s + fitted.window[axis])] = True
            assert covered.all()
            assert len(fitted.starts[axis]) <= len(whole.starts[axis])
        assert fitted.window[0] < n + 2 * 12 + 8 or len(fitted.starts[0]) > 1, "no larger than what is wanted"


def test_windows_that_are_exchanged_keep_equal_sides():
    windows = Windows((1, 64, 64), (0.0, 0.25, 0.25), WindowFit((1, 8, 8)))
    turned = windows.seen_by(symmetries(["yzx", "y-zx"]))  # the network's planes lie along z and x
    assert (turned.size, turned.overlap, turned.fit) == ((64, 1, 64), (0.25, 0.0, 0.25), WindowFit((8, 1, 8), "zyx"))
    assert turned.over(grid_of((30, 20, 100)), (0, 0, 0), None).window == (32, 1, 64)
    section = windows.seen_by(symmetries("section"))  # y and x exchanged
    sides = section.over(grid_of((20, 30, 50)), (0, 0, 0), None).window
    assert sides == (1, 56, 56)


def test_overlap_of_each_axis():
    lattice = WindowLattice.over(grid_of((40, 40, 40)), 16, (0.0, 0.5, 0.25), context=0)
    assert lattice.starts == ((0, 16, 24), (0, 8, 16, 24), (0, 12, 24))
    for wrong in ((0.0, 1.0, 0.5), (0.0, 0.1), (-0.1, 0.0, 0.0), float("nan")):
        with pytest.raises(InputError, match="overlap must be at least 0 and below 1"):
            WindowLattice.over(grid_of((8, 8, 8)), 8, wrong)
    assert overlap_per_axis(np.array([0.0, 0.5, 0.25])) == (0.0, 0.5, 0.25)


def test_windows_shrink_only_for_networks_that_see_nothing_but_the_voxels_around():
    def fit(options: str) -> WindowFit | None:
        return WindowFit.of(load_config(None, "model.architecture=unet_2d", f"model.options={options}"))

    assert fit("{planes: 1}") == WindowFit((1, 16, 16))
    assert fit("{norm: group}") is None
    assert fit("{planes: 3}") is None, "in a window of one plane its neighbors would be copies of it"


def test_reads_each_voxel_once_in_a_row_of_blocks():
    volume = Volume((16, 16, 100))
    for _ in predict_blocks(volume.read, volume.grid, Net(), channels=3, window=16, block_size=(16, 16, 20), context=0):
        pass
    assert sum(g.shape[2] for g in volume.reads) == 100
    assert max(g.shape[2] for g in volume.reads) <= 32, "a window's width or 32 voxels at a time"


@pytest.mark.parametrize("left_out", [[], [1], [0, 2, 3, 7], [4, 5, 6]])
def test_what_will_be_read_is_known_beforehand(left_out):
    volume = Volume((20, 50, 100))
    size = (16, 24, 20)
    numbers = [n for n in range(len(list(volume.grid.blocks(size)))) if n not in left_out]
    regions = [(begin, block.shape) for n, (begin, block) in enumerate(volume.grid.blocks(size)) if n in numbers]
    for _ in predict_blocks(volume.read, volume.grid, Net(), channels=3, window=16, block_size=size, blocks=numbers):
        pass
    assert volume.reads == list(planned_reads(WindowLattice.over(volume.grid, 16), regions))


def test_plan_counts_what_is_run():
    volume = Volume((50, 40, 70))
    ran = []

    def network(x: torch.Tensor) -> torch.Tensor:
        ran.append(len(x))
        return x.expand(-1, 2, -1, -1, -1)

    options = dict(channels=2, window=(16, 16, 16), overlap=0.25, block_size=(32, 32, 32), batch_size=3)
    expected = plan(volume.grid, **options)
    for _ in predict_blocks(volume.read, volume.grid, network, **options):
        pass
    assert expected.windows == sum(ran)
    assert expected.blocks == 12
    assert expected.windows > expected.distinct_windows
    whole = plan(volume.grid, **{**options, "block_size": (64, 64, 96)})
    assert whole.windows == whole.distinct_windows
    assert whole.windows == whole.distinct_windows == expected.distinct_windows
    assert whole.voxels == whole.windows * 16**3
    assert expected.bytes < whole.bytes
    rows = plan(volume.grid, **{**options, "block_size": (64, 64, 16)})
    assert rows.windows == rows.distinct_windows, "blocks along x share their windows"


def test_autocast_is_used():
    volume, seen = Volume((8, 8, 8)), []
    conv = torch.nn.Conv3d(1, 1, 1)

    def network(x: torch.Tensor) -> torch.Tensor:
        out = conv(x)
        seen.append(out.dtype)
        return out

    ((_, values),) = predict_blocks(volume.read, volume.grid, network, channels=1, window=8, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert values.dtype == np.float32


def test_not_a_number_names_the_box():
    volume = Volume((8, 8, 40))
    volume.array[0, 0, 35] = np.nan
    blocks = predict_blocks(volume.read, volume.grid, Net(1), channels=1, window=8, block_size=(8, 8, 10), context=0)
    next(blocks)
    with pytest.raises(InputError, match=r"not finite .* block \[97.88 -9 121\] to \[139.8 23 161\] nm"):
        list(blocks)


def test_refuses_what_cannot_be():
    volume, network = Volume((8, 8, 8)), Net(3)

    def run(**options):
        list(predict_blocks(volume.read, volume.grid, network, **{"channels": 3, "window": 8, **options}))

    for options, message in [
        ({"channels": 2}, "one tensor of shape"),
        ({"window": (8, 8)}, "window must be three"),
        ({"window": 0}, "window must be three"),
        ({"overlap": 1.0}, "overlap must be"),
        ({"blending": "gausian"}, "gaussian, constant"),
        ({"block_size": 0}, "block_size must be"),
        ({"context": -1}, "context must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"blocks": [7]}, "block numbers must lie in 0 to 0"),
    ]:
        with pytest.raises(InputError, match=message):
            run(**options)
    with pytest.raises(InputError, match="read must give"):
        list(predict_blocks(lambda g: np.zeros((2, 2, 2)), volume.grid, network, channels=3, window=8))
    with pytest.raises(InputError, match="empty grid"):
        WindowLattice.over(grid_of((0, 8, 8)), 8)
    with pytest.raises(InputError, match=r"tensor of shape .* got tuple"):
        list(predict_blocks(volume.read, volume.grid, lambda x: (x, x), channels=1, window=8))
