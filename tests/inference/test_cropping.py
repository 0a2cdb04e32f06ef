"""Blending ``crop``: each voxel from one window, each window for one block, the same bits whatever the blocks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.config import load_config
from connectomics.geometry import VoxelGrid
from connectomics.inference.blending import Forward, planned_reads
from connectomics.inference.predict_task import PredictTask, given, run_predict_task
from connectomics.inference.probability_values import store
from connectomics.inference.sliding import plan, predict_regions
from connectomics.inference.windows import Cores, WindowFit, WindowLattice, Windows, window_for
from connectomics.io.mirror import Extent
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from tests.inference.test_sliding import Net, Volume, assemble, grid_of
from tests.trees import contents


def lattice_of(grid: VoxelGrid, window: int = 16, overlap: float = 0.25, **options) -> WindowLattice:
    return WindowLattice.over(grid, window, overlap, cores=Cores(), **options)


def plain(volume: Volume, network: torch.nn.Module, lattice: WindowLattice, channels: int = 3) -> np.ndarray:
    """All windows of a lattice, one after the other, and their cores into an array."""
    out = np.full((channels, *lattice.grid.shape), np.nan, np.float32)
    for at in itertools.product(*(range(len(starts)) for starts in lattice.starts)):
        begin = lattice.begin_of(at)
        with torch.inference_mode():
            values = network(torch.from_numpy(volume.read(lattice.grid.crop(begin, lattice.window)))[None, None])[0]
        faces = [(f[n], f[n + 1]) for f, n in zip(lattice.faces, at, strict=True)]
        part = tuple(slice(a - b, e - b) for (a, e), b in zip(faces, begin, strict=True))
        place = tuple(slice(a, e) for a, e in faces)
        assert np.isnan(out[(slice(None), *place)]).all(), "a voxel in two cores"
        out[(slice(None), *place)] = values[(slice(None), *part)]
    return out


@pytest.mark.parametrize(("shape", "window", "overlap", "block", "batch"), [
    ((40, 33, 51), (16, 20, 12), 0.5, (13, 64, 7), 1),
    ((40, 33, 51), (16, 20, 12), 0.25, (24, 24, 24), 3),
    ((9, 40, 21), (16, 16, 16), 0.125, (8, 16, 16), 2),
    ((7, 11, 13), (16, 16, 16), 0.25, (256, 256, 256), 1),
    ((33, 17, 40), (16, 16, 16), 0.0, (16, 16, 20), 4),
])  # fmt: skip
@pytest.mark.parametrize("context", [None, 0, 3])
def test_blocks_are_the_cores_of_all_windows_to_the_bit(shape, window, overlap, block, batch, context):
    volume, network = Volume(shape), Net()
    lattice = WindowLattice.over(volume.grid, window, overlap, context, cores=Cores())
    expected = plain(volume, network, lattice)
    found = assemble(
        volume, network, channels=3, window=window, overlap=overlap, block_size=block, batch_size=batch,
        context=context, blending="crop",
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected)


def test_any_regions_give_the_same_bits_and_read_what_was_planned():
    """Also regions that cut cores; one after the other in a row, and alone."""
    volume, network = Volume((30, 25, 70)), Net()
    extent = Extent((0, 0, 10), (30, 25, 90))
    lattice = lattice_of(volume.grid, extent=extent)
    expected = plain(volume, network, lattice)
    expected[..., :9] = 0  # beyond the raw, but for one voxel
    rng = np.random.default_rng(0)
    for row in (True, False):
        z, y, x = ((0, 30), (3, 20), np.sort(rng.choice(71, 9, replace=False)))
        regions = [((z[0], y[0], int(a)), (z[1], y[1], int(b - a))) for a, b in itertools.pairwise(x)]
        regions = regions if row else [regions[n] for n in rng.permutation(len(regions))]
        volume.reads.clear()
        found = list(predict_regions(volume.read, lattice, Forward(network, 3, 1, "cpu"), regions))
        assert volume.reads == list(planned_reads(lattice, regions))
        for (begin, shape), values in zip(regions, found, strict=True):
            at = tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))
            np.testing.assert_array_equal(values, expected[(slice(None), *at)])


def test_only_windows_whose_core_counts_are_run_and_read():
    """With a mask, by the core; of constant raw, by all that the window sees. Everything else is 0."""
    volume = Volume((30, 30, 70))
    volume.array[:, :, 40:] = 0.5
    network, lattice = Counting(), lattice_of(volume.grid, context=0)
    box = volume.grid.crop((0, 0, 10), (9, 9, 9)).box
    expected, ran = np.zeros((1, 30, 30, 70), np.float32), 0
    everything = plain(volume, network.net, lattice, 1)
    for at in itertools.product(*(range(len(starts)) for starts in lattice.starts)):
        core = lattice.counted(at)
        seen = volume.read(lattice.grid.crop(lattice.begin_of(at), lattice.window))
        if not core.box.intersect(box).is_empty or (core.translation[2] > 250 and seen.min() < seen.max()):
            place = (slice(None), *volume.grid.slices(core.box))
            expected[place], ran = everything[place], ran + 1

    def inside(core: VoxelGrid) -> bool:
        return not core.box.intersect(box).is_empty or core.translation[2] > 250

    regions = [((0, 0, x), (30, 30, min(20, 70 - x))) for x in range(0, 70, 20)]
    volume.reads.clear()
    for region in regions:  # each alone: a region that cuts cores runs their windows again
        forward = Forward(network, 1, 2, "cpu", skip_empty=True, inside=inside)
        (found,) = predict_regions(volume.read, lattice, forward, [region])
        np.testing.assert_allclose(found, expected[..., region[0][2] : region[0][2] + region[1][2]], atol=1e-6)
    network.windows = 0
    list(predict_regions(volume.read, lattice, replace(forward), [((0, 0, 0), (30, 30, 70))]))
    assert network.windows == ran < lattice.count


def test_a_row_of_blocks_reads_each_voxel_once():
    volume = Volume((16, 16, 100))
    lattice = lattice_of(volume.grid, context=0)
    width = lattice.faces[2][1]
    regions = [((0, 0, x), (16, 16, min(width, 100 - x))) for x in range(0, 100, width)]
    list(predict_regions(volume.read, lattice, Forward(Net(), 3, 1, "cpu"), regions))
    assert sum(g.shape[2] for g in volume.reads) == 100


def test_windows_see_the_overlap_around_their_core_but_for_the_faces():
    for n, w, overlap, context in itertools.product((1, 15, 63, 200), (16, 48), (0.0, 0.25, 0.5), (None, 0)):
        for fit in (None, WindowFit((8, 8, 8))):
            lattice = lattice_of(grid_of((n, n, n)), w, overlap, context=context, fit=fit)
            (faces, *_), (starts, *_), size = lattice.faces, lattice.starts, lattice.window[0]
            assert (faces[0], faces[-1], len(faces)) == (0, n, len(starts) + 1)
            assert size <= w
            margin = int(w * overlap) // 2
            for (low, high), start in zip(itertools.pairwise(faces), starts, strict=True):
                assert low < high
                assert start <= max(0, low - margin)
                assert start + size >= min(n, high + margin)


def test_the_plan_counts_each_window_once():
    grid = grid_of((96, 96, 96))
    options = dict(channels=2, window=16, overlap=0.25, context=0, blending="crop")
    for block in (12, 30, 96):
        found = plan(grid, block_size=block, **options)
        assert found.windows == found.distinct_windows == 8**3
    assert plan(grid, block_size=12, **options).bytes < plan(grid, block_size=96, **options).bytes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["rows", "channels last"])
def test_storing_a_core_gives_the_bits_of_plain_operations(threads, layout):
    values, before = torch.rand(3, 40, 9, 70, generator=torch.Generator().manual_seed(0)) * 1.0018 - 0.0009, None
    if layout == "channels last":
        values = values[None].to(memory_format=torch.channels_last_3d)[0]
    part, into = (slice(2, 38), slice(1, 9), slice(3, 67)), (slice(1, 37), slice(0, 8), slice(6, 70))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = np.full((3, 37, 8, 71), 7, np.uint8)
        assert store(values, part, found, into) == (0, 1)
        inner = values[(slice(None), *part)].numpy()
        expected = np.full_like(found, 7)
        expected[(slice(None), *into)] = np.rint(np.clip(inner, 0, 1) * np.float32(255)).astype(np.uint8)
        np.testing.assert_array_equal(found, expected)
        as_float = np.zeros(found.shape, np.float32)
        assert store(values, part, as_float, into) == (inner.min(), inner.max())
        np.testing.assert_array_equal(as_float[(slice(None), *into)], inner)
    finally:
        torch.set_num_threads(before)
    values = values.clone()
    values[1, 20, 4, 30] = float("nan")
    assert np.isnan(store(values, part, found, into)).all()


RAW = VoxelGrid((8, 8, 8), (4, 4, 4), (72, 72, 150))
TARGETS = {
    "same": VoxelGrid((8, 8, 8), (4, 4, 4), (72, 72, 150)),
    "finer": VoxelGrid((4, 4, 4), (2, 2, 2), (80, 80, 200)),
    "fractional": VoxelGrid((5.24, 3, 3), (2.62, 1.5, 1.5), (70, 90, 170)),
    "coarser": VoxelGrid((16, 16, 16), (8, 8, 8), (36, 36, 75)),
    "mixed": VoxelGrid((13.92, 8, 2.62), (8, 8, 8), (36, 60, 150)),
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("raw") / "a.zarr" / "em"
    values = np.random.default_rng(0).integers(1, 255, RAW.shape, dtype=np.uint8)
    write_multiscale(folder, values, RAW, kind="raw")
    return str(folder)


class Counting:
    """A network that counts the windows and voxels that it sees."""

    def __init__(self) -> None:
        self.windows = self.voxels = 0
        self.net = Net(1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += len(x)
        self.voxels += x.numel()
        return self.net(x)


def task_of(raw: str, output: Path, target: VoxelGrid, **options) -> PredictTask:
    from connectomics.io.sharded import Storage

    chosen = dict(
        window=(24, 24, 24), overlap=1 / 3, storage=Storage(chunk=(16, 16, 16)),
        blending="crop",
    )  # fmt: skip
    return PredictTask(
        raw=raw, output=str(output / "a.zarr" / "crop1"), classes=("mito",), targets={"mito": target},
        voxel_size=(8, 8, 8), checkpoint="", **{**chosen, **options},
    )  # fmt: skip


def run(task: PredictTask, network) -> np.ndarray:
    run_predict_task(task, network)
    return Multiscale.open(f"{task.output}/mito").read_level(0, (0, 0, 0), task.targets["mito"].shape)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("same", "coarser"))) for name in TARGETS]
)
def test_a_task_runs_each_window_once_and_stores_the_same_with_any_blocks(raw, tmp_path, name):
    stored = []
    for number, block in enumerate([None, (16, 16, 32), (256, 256, 256)]):
        task, network = task_of(raw, tmp_path / str(number), TARGETS[name], block_size=block), Counting()
        stored.append(run(task, network))
        ((layout, _),), (planned,) = task.layouts, task.plan()
        assert network.windows - 1 == planned.windows, "and one of noise"
        assert planned.windows == layout.lattices[0].count or block == (16, 16, 32), "which cuts cores"
    np.testing.assert_array_equal(stored[0], stored[1])
    np.testing.assert_array_equal(stored[0], stored[2])
    assert task_of(raw, tmp_path, TARGETS[name], block_size=(16, 16, 32)).blocks("predict") > 1


def test_planes_of_all_axes_are_cropped_alike(raw, tmp_path):
    stored = []
    for number, block in enumerate([None, (64, 64, 64)]):
        task = task_of(
            raw, tmp_path / str(number), TARGETS["same"], block_size=block, window=(8, 24, 24),
            overlap=(0, 1 / 3, 1 / 3), symmetries=("zyx", "yzx", "xyz"),
        )  # fmt: skip
        network = Counting()
        stored.append(run(task, network))
        (planned,) = task.plan()
        assert network.windows - 1 == planned.windows == planned.distinct_windows
    np.testing.assert_array_equal(*stored)


def test_another_blending_does_not_resume(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["same"])
    run(task, Net(1))
    assert task.key != replace(task, blending="gaussian").key


@pytest.mark.parametrize(("window", "overlap", "fit", "tta"), [
    ((208, 208, 208), 1 / 13, None, "none"),  # what `window_for` gives for patches of 128 voxels
    ((16, 512, 512), (0.0, 0.0625, 0.0625), (1, 16, 16), "none"),  # what `pytc plan` writes without a GPU
    ((16, 512, 512), (0.0, 0.0625, 0.0625), (1, 16, 16), "planes"),
])  # fmt: skip
@pytest.mark.parametrize("classes", [1, 14])
def test_a_large_volume_costs_at_most_1_4_times_its_voxels(tmp_path, window, overlap, fit, tta, classes):
    """By the plan; `test_independent_workers_run_what_was_planned` counts what is run."""
    grid = VoxelGrid((8, 8, 8), (4004, 4004, 4004), (4000, 4000, 4000))
    around = write_corner(tmp_path, grid.grow(64))
    names = tuple(f"c{n}" for n in range(classes))
    task = PredictTask(
        raw=around, output=str(tmp_path / "a.zarr" / "crop1"), classes=names, targets=dict.fromkeys(names, grid),
        voxel_size=(8, 8, 8), window=window, overlap=overlap, multiple=fit, blending="crop", checkpoint="",
        symmetries=symmetries_of(tta),
    )  # fmt: skip
    (planned,), ((layout, _),) = task.plan(), task.layouts
    assert planned.voxels <= 1.4 * grid.size * len(task.symmetries)
    for lattice in layout.lattices:  # a worker that takes a block without any neighbor runs no other windows
        alone = [np.prod([len(lattice.touching(a, b[a], b[a] + n[a])) for a in range(3)]) for b, n in layout.regions]
        assert sum(alone) == lattice.count


def test_three_dimensional_networks_get_larger_windows_over_large_volumes():
    def chosen(side: int, *overrides: str) -> tuple:
        config = load_config(None, "model.architecture=mednext", "dataset.voxel_size=[8,8,8]", *overrides)
        return window_for(config, VoxelGrid((8, 8, 8), (4, 4, 4), (side,) * 3).box)

    window, overlap = chosen(500)
    assert window == (208, 208, 208)
    assert Windows(window, overlap, None, crop=True).step == (192, 192, 192)
    assert chosen(200)[0] == (128, 128, 128)
    for override in ("data.patch_size=[64,64,64]", "inference.blending=gaussian", "inference.window=[128,128,128]",
                  "model.architecture=unetr", "data.patch_size=[1,256,256]"):  # fmt: skip
        assert chosen(500, override)[0] != (208, 208, 208), override


def write_corner(folder: Path, grid: VoxelGrid) -> str:
    """A large raw volume of which only the last chunk is stored."""
    from connectomics.io.write import create_multiscale

    (writer,) = create_multiscale(folder / "raw.zarr" / "em", [grid], np.uint8, chunks=(64, 64, 64))
    writer.write([n - 1 for n in grid.shape], np.ones((1, 1, 1), np.uint8))
    return str(folder / "raw.zarr" / "em")


def symmetries_of(name: str) -> tuple[str, ...]:
    from connectomics.inference.symmetry import symmetries

    return tuple(map(str, symmetries(name)))


def test_independent_workers_run_what_was_planned(tmp_path):
    """Blocks one by one, in any order, by a network that counts the voxels that it sees: at most 1.4 times theirs."""
    raw_grid = VoxelGrid((8, 8, 8), (4, 4, 4), (96, 96, 160))
    values = np.random.default_rng(0).integers(1, 255, raw_grid.shape, dtype=np.uint8)
    write_multiscale(tmp_path / "raw.zarr" / "em", values, raw_grid, kind="raw")
    target = raw_grid.crop((16, 16, 16), (64, 64, 128))
    task = task_of(
        str(tmp_path / "raw.zarr" / "em"), tmp_path, target, window=(34, 34, 34), overlap=1 / 17, block_size=(32,) * 3
    )
    assert task.layouts[0][0].block_shape == (32, 32, 32)
    seen, stored = [], []
    for number, order in enumerate([range(16), reversed(range(16))]):
        network = Counting()
        mine = given(replace(task, output=str(tmp_path / f"{number}.zarr" / "crop1")), [network])
        mine.claim()
        mine.prepare("predict")
        for block in order:
            with mine.open_worker("predict", "cpu") as worker:
                begin = network.voxels
                assert list(worker.run([block])) == [block]
                seen.append((network.voxels - begin) / 32**3)
        stored.append(contents(Path(mine.output) / "mito" / "s0"))
    assert min(seen) == max(seen) == (34 / 32) ** 3 <= 1.4
    assert stored[0] == stored[1]
