"""Symmetries, ensembles and dropout: the mean and the variance over passes, in memory that does not grow with them."""

from __future__ import annotations

import signal
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.decoding.prediction import find_arrays
from connectomics.errors import InputError, UnknownNameError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.inference.augmented import (
    Averaged,
    OrientedAverages,
    dropout_on,
    entropy,
)
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.inference.raw import RawSource
from connectomics.inference.sliding import predict_blocks
from connectomics.inference.symmetry import IDENTITY, SYMMETRY_SETS, Symmetry, symmetries, windows_seen
from connectomics.io import store
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale
from tests.cellmap.roots import grid_of, write_raw
from tests.trees import contents

ALL = SYMMETRY_SETS["all"]


# -- the symmetries ----------------------------------------------------------------------------------------------------
def test_the_named_sets():
    assert {name: len(chosen) for name, chosen in SYMMETRY_SETS.items()} == {
        "none": 1, "flips": 8, "section": 16, "planes": 12, "all": 48
    }  # fmt: skip
    for name, chosen in SYMMETRY_SETS.items():
        assert chosen[0] == IDENTITY, name
        assert len(set(chosen)) == len(chosen), name
        assert symmetries(name) == chosen == symmetries([str(s) for s in chosen]), name
    assert {s.axes for s in SYMMETRY_SETS["flips"]} == {(0, 1, 2)}
    assert {s.axes[0] for s in SYMMETRY_SETS["section"]} == {0}, "z stays z in the section plane's set"
    planes = SYMMETRY_SETS["planes"]
    assert sorted(s.axes[0] for s in planes) == [0] * 4 + [1] * 4 + [2] * 4
    assert not any(s.backwards[0] for s in planes), "to a plane, its own side does not matter"
    values = torch.arange(27).reshape(3, 3, 3)
    assert len({tuple(s.apply(values).flatten().tolist()) for s in ALL}) == 48


@pytest.mark.parametrize("symmetry", ALL, ids=str)
def test_the_inverse_undoes(symmetry):
    values = torch.rand(2, 3, 4, 5, 6)
    assert torch.equal(symmetry.inverse.apply(symmetry.apply(values)), values)
    assert torch.equal(symmetry.apply(symmetry.inverse.apply(values)), values)
    assert symmetry.inverse.inverse == symmetry
    assert Symmetry.parse(str(symmetry)) == symmetry


def test_what_the_text_says():
    values = torch.rand(1, 1, 4, 5, 6)
    expected = values.numpy().transpose(0, 1, 4, 3, 2)[:, :, :, ::-1]
    assert np.array_equal(Symmetry.parse("x-yz").apply(values).numpy(), expected)
    assert Symmetry.parse("x-yz").apply(values).is_contiguous()


def test_what_is_no_symmetry():
    for text in ("", "zy", "zzx", "zyxx", "+zyx", "--zyx", "zyx-", "012"):
        with pytest.raises(InputError, match="a symmetry is written as"):
            Symmetry.parse(text)
    with pytest.raises(UnknownNameError, match="did you mean 'flips'"):
        symmetries("flip")
    for chosen in ([], ["zyx", "-zyx", "zyx"]):
        with pytest.raises(InputError, match="at least one, and none twice"):
            symmetries(chosen)


# -- the mean and the variance -----------------------------------------------------------------------------------------
def lopsided(seed: int) -> torch.nn.Module:
    """Probabilities of two classes from a convolution with random weights: no symmetry leaves it as it is."""
    generator = torch.Generator().manual_seed(seed)
    conv = torch.nn.Conv3d(1, 2, 3, padding=1)
    for parameter in conv.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return torch.nn.Sequential(conv, torch.nn.Sigmoid()).eval().requires_grad_(False)


def test_an_equivariant_network_gives_the_same():
    image = torch.rand(2, 1, 8, 8, 8)

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(x, 3, 1, 1, count_include_pad=False) ** 2

    both = Averaged([network], ALL, variance=True)(image)
    assert both.shape == (2, 2, 8, 8, 8)
    torch.testing.assert_close(both[:, :1], network(image), rtol=0, atol=1e-6)
    assert both[:, 1:].max() < 1e-12


@pytest.mark.parametrize("name", ["flips", "section", "all"])
def test_equals_the_explicit_mean_and_variance(name):
    image, networks = torch.rand(2, 1, 6, 6, 6), [lopsided(0), lopsided(1), lopsided(2)]
    single = [s.inverse.apply(n(s.apply(image))).double().numpy() for s in SYMMETRY_SETS[name] for n in networks]
    assert np.var(single, axis=0).max() > 0.01
    both = Averaged(networks, SYMMETRY_SETS[name], variance=True)(image).numpy()
    np.testing.assert_allclose(both[:, :2], np.mean(single, axis=0), atol=1e-6)
    np.testing.assert_allclose(both[:, 2:], np.var(single, axis=0), atol=1e-6)
    only = Averaged(networks, SYMMETRY_SETS[name])(image).numpy()
    np.testing.assert_array_equal(only, both[:, :2])


def test_an_ensemble_of_two_is_their_mean():
    image, first, second = torch.rand(1, 1, 6, 6, 6), lopsided(0), lopsided(1)
    found = Averaged([first, second])(image)
    torch.testing.assert_close(found, (first(image) + second(image)) / 2, rtol=0, atol=1e-7)
    assert torch.equal(Averaged([first])(image), first(image)), "a single pass is untouched"


@pytest.mark.parametrize("samples", [0, 2])
def test_merged_means_and_variances_are_those_of_all_passes(samples):
    rng = np.random.default_rng(0)
    passes = rng.random((1 + 2 + 4, 3, 2, 2, 2)).astype(np.float32)
    seen = {(1, 4, 4): ALL[:1], (4, 1, 4): ALL[:2], (4, 4, 1): ALL[:4]}
    averages = OrientedAverages([lopsided(0)], seen, samples=samples, variance=True)
    groups = [passes[:1], passes[1:3], passes[3:]]
    merged = averages.merged([np.concatenate([group.mean(0), group.var(0)]) for group in groups])
    np.testing.assert_allclose(merged, np.concatenate([passes.mean(0), passes.var(0)]), atol=1e-6)
    only = OrientedAverages([lopsided(0)], seen, samples=samples).merged([group.mean(0) for group in groups])
    np.testing.assert_allclose(only, passes.mean(0), atol=1e-6)


def test_windows_seen_are_the_window_with_its_axes_exchanged():
    chosen = symmetries(["zyx", "yzx", "-zyx", "xyz", "xzy"])
    assert {window: [str(s) for s in found] for window, found in windows_seen(chosen, (1, 8, 16)).items()} == {
        (1, 8, 16): ["zyx", "-zyx"],
        (8, 1, 16): ["yzx"],
        (16, 8, 1): ["xyz"],
        (8, 16, 1): ["xzy"],
    }
    for window, found in windows_seen(ALL, (1, 8, 16)).items():
        for symmetry in found:
            assert symmetry.apply(torch.zeros(window)).shape == (1, 8, 16)


def test_further_inputs_are_turned_too():
    image, view = torch.rand(1, 1, 6, 6, 6), torch.rand(1, 1, 4, 4, 4)
    ramp = torch.linspace(0, 1, 4)

    def network(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * (y * ramp).sum()

    expected = [s.inverse.apply(network(s.apply(image), s.apply(view))) for s in ALL]
    torch.testing.assert_close(Averaged([network], ALL)(image, view), torch.stack(expected).mean(0))
    with pytest.raises(InputError, match=r"a further input of voxels \(4, 4, 2\)"):
        Averaged([network], ALL)(image, view[..., :2])


def test_a_network_that_gives_back_its_input_does_not_have_it_changed():
    image = torch.rand(1, 1, 4, 4, 4)
    before = image.clone()
    Averaged([lambda x: x, lambda x: 1 - x], variance=True)(image)
    assert torch.equal(image, before)


def test_windows_that_a_symmetry_does_not_fit():
    image = torch.rand(1, 1, 4, 6, 6)
    assert Averaged([lopsided(0)], SYMMETRY_SETS["section"])(image).shape == (1, 2, 4, 6, 6)
    with pytest.raises(InputError, match=r"by yzx .*\(4, 6, 6\).*section"):
        Averaged([lopsided(0)], [IDENTITY, Symmetry.parse("yzx")])(image)


def test_nothing_to_compare_is_refused():
    with pytest.raises(InputError, match="variance over one pass is zero"):
        OrientedAverages([lopsided(0)], {(4, 4, 4): (IDENTITY,)}, variance=True)
    with pytest.raises(InputError, match="at least one network"):
        Averaged([])


def test_results_do_not_pile_up():
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in outputs))
        out = x + len(outputs)
        outputs.append(weakref.ref(out))
        return out

    averaged = Averaged([network, network], ALL, samples=2, variance=True)
    averaged(torch.rand(1, 1, 4, 4, 4))
    assert len(outputs) == averaged.passes == 192
    assert max(alive) <= 2, "one result is held while the next is made, whatever the number of passes"


# -- dropout -----------------------------------------------------------------------------------------------------------
class Dropping(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.nn.functional.avg_pool3d(x, 3, 1, 1)) / 2


def test_dropout_follows_from_the_window_alone():
    network, images = Dropping().eval(), torch.rand(3, 1, 6, 6, 6)
    averaged = Averaged([network], SYMMETRY_SETS["flips"], samples=3, variance=True)
    assert averaged.passes == 24
    state = torch.get_rng_state()
    with dropout_on(network):
        assert network.dropout.training
        assert not network.training
        together = averaged(images)
        torch.rand(5)
        assert torch.equal(averaged(images[1:2]), together[1:2])
        torch.set_rng_state(state)
        averaged(images)
        assert torch.equal(torch.get_rng_state(), state), "the random numbers of others stay as they are"
    assert not network.dropout.training
    mean, variance = together.split(1, 1)
    plain = network(images)
    assert (mean - plain).abs().mean() < 0.1
    ratio = float((variance / plain**2).mean())  # x or 0 with the same chance: mean x / 2, variance (x / 2)^2
    assert 0.9 < ratio * 24 / 23 < 1.1


def test_a_network_without_dropout():
    for network in (lopsided(0), torch.nn.Dropout(0.0)):
        with pytest.raises(InputError, match="needs a network that was trained with dropout"), dropout_on(network):
            pass


def test_entropy_in_bits():
    p = np.array([0, 0.25, 0.5, 1, 0.11], np.float32)
    expected = [0, 2 - 0.75 * np.log2(3), 1, 0, 0.49992]
    np.testing.assert_allclose(entropy(p), expected, atol=1e-5)


# -- tasks -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> str:
    values = np.random.default_rng(0).integers(0, 255, (48, 48, 64), dtype=np.uint8)
    return str(write_raw(tmp_path_factory.mktemp("raw"), "set-a", values, grid_of((48, 48, 64)), levels=2))


def task_of(raw: str, folder: Path, **options) -> PredictTask:
    defaults = dict(
        raw=raw,
        output=str(folder / "set-a.zarr" / "crop1"),
        classes=("mito",),
        targets={"mito": grid_of((16, 16, 24), 8, 64)},
        voxel_size=(8, 8, 8),
        window=(8, 8, 8),
        checkpoint="abc",
        block_size=(8, 16, 8),
    )
    return PredictTask(**{**defaults, **options})


def read(task: PredictTask, name: str) -> np.ndarray:
    stored = Multiscale.open(f"{task.output}/{name}")
    assert stored.grid == task.targets["mito"]
    return stored.read_level(0, (0, 0, 0), stored.grid.shape)[0]


@pytest.mark.parametrize("size", [8, 4], ids=["same voxels", "finer voxels"])
def test_variance_beside_the_probabilities(raw, tmp_path, size):
    grid = grid_of((16, 16, 24), size, 64)
    task = task_of(raw, tmp_path, uncertainty="variance", targets={"mito": grid})
    run_predict_task(task, [lambda x: torch.full_like(x, 0.2), lambda x: torch.full_like(x, 0.6)])
    assert (read(task, "mito") == 102).all(), "0.4 x 255"
    assert (read(task, "mito/uncertainty") == 41).all(), "0.04 of at most 0.25"
    about = require_complete(f"{task.output}/mito/uncertainty")
    assert (about["artefact"], about["kind"], about["class_name"]) == ("uncertainty", "variance", "mito")
    assert 41 * about["scale"] == pytest.approx(0.04, abs=about["scale"] / 2)
    assert require_complete(f"{task.output}/mito")["artefact"] == "probability"
    assert list(find_arrays(tmp_path)) == [("set-a", "crop1", "mito")], "no stage takes it for a class"


def test_entropy_of_the_mean(raw, tmp_path):
    task = task_of(raw, tmp_path, uncertainty="entropy", symmetries=["zyx", "-zyx"])
    run_predict_task(task, [lambda x: torch.full_like(x, 0.1), lambda x: torch.full_like(x, 0.4)])
    assert (read(task, "mito/uncertainty") == round(255 * (2 - 0.75 * np.log2(3)))).all()
    about = require_complete(f"{task.output}/mito/uncertainty")
    assert about["scale"] == 1 / 255
    assert about["model"]["symmetries"] == ["zyx", "-zyx"]


@pytest.mark.parametrize("window", [(1, 16, 16), (4, 16, 8), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_exchanged_axes_cut_windows_in_the_exchanged_shape(tmp_path, window, batch_size):
    """As predicting the volume with its axes exchanged, whatever the blocks; so a 2-D network sees all three planes."""
    values = np.random.default_rng(1).integers(0, 255, (24, 28, 36), dtype=np.uint8)
    grid = grid_of(values.shape)
    raw = str(write_raw(tmp_path / "raw", "set-a", values, grid, levels=1))
    chosen, network = symmetries(["zyx", "yzx", "xyz"]), lopsided(5)
    task = task_of(
        raw, tmp_path, symmetries=list(map(str, chosen)), window=window, batch_size=batch_size, context=(0, 0, 0),
        classes=("mito", "er"), targets=dict.fromkeys(("mito", "er"), grid), block_size=(16, 16, 16), dtype="float16",
        uncertainty="variance",
    )  # fmt: skip
    run_predict_task(task, network)
    image = RawSource(raw, task.normalization).read(grid)
    single = []
    for symmetry in chosen:
        turned = symmetry.apply(torch.from_numpy(image)).numpy()
        whole = VoxelGrid(grid.voxel_size, grid.translation, turned.shape)

        def read_turned(part: VoxelGrid, turned=turned, whole=whole):
            (z, y, x), (z1, y1, x1) = whole.index_range(part.box)
            return turned[z:z1, y:y1, x:x1]

        ((_, found),) = predict_blocks(read_turned, whole, network, channels=2, window=window, context=0, block_size=64)
        single.append(symmetry.inverse.apply(torch.from_numpy(found)).double().numpy())
    for channel, name in enumerate(task.classes):
        stored = Multiscale.open(f"{task.output}/{name}").read_level(0, (0, 0, 0), grid.shape)[0]
        np.testing.assert_allclose(stored, np.mean(single, axis=0)[channel], atol=6e-4)
        spread = np.var(single, axis=0)[channel]
        assert spread.max() > 0.01
        if len(set(window)) == 1:
            continue  # the passes of one window shape vary within each window, before blending
        found = 0.25 * Multiscale.open(f"{task.output}/{name}/uncertainty").read_level(0, (0, 0, 0), grid.shape)[0]
        np.testing.assert_allclose(found, spread, atol=3e-4)


def test_the_plan_counts_the_windows_of_every_orientation(raw, tmp_path):
    one = task_of(raw, tmp_path, window=(1, 8, 8)).plan()[0]
    three = task_of(raw, tmp_path, window=(1, 8, 8), symmetries=["zyx", "yzx", "y-zx", "xyz"]).plan()[0]
    by_axis = [task_of(raw, tmp_path, window=w).plan()[0].windows for w in ((1, 8, 8), (8, 1, 8), (8, 8, 1))]
    assert by_axis[0] == one.windows
    assert three.windows == by_axis[0] + 2 * by_axis[1] + by_axis[2]
    assert three.blocks == one.blocks
    assert three.bytes > one.bytes


def test_what_decides_the_output_is_compared(raw, tmp_path):
    task = task_of(raw, tmp_path)
    run_predict_task(task, lambda x: x)
    with pytest.raises(WriteError, match=r"\(symmetries, uncertainty, dropout_samples\)"):
        run_predict_task(replace(task, symmetries=["-zyx"], uncertainty="dropout", dropout_samples=2), Dropping())
    assert PredictTask.from_dict(replace(task, symmetries=["x-yz"]).to_dict()).symmetries == ("x-yz",)


def test_an_uncertainty_that_was_removed_is_made_again(raw, tmp_path):
    task = task_of(raw, tmp_path, uncertainty="entropy")
    run_predict_task(task, lambda x: torch.full_like(x, 0.5))
    (Path(task.output) / "mito" / "uncertainty" / ".zattrs").unlink()
    run_predict_task(task, lambda x: torch.full_like(x, 0.5))
    assert (read(task, "mito/uncertainty") == 255).all()


def test_tasks_that_cannot_be(raw, tmp_path):
    every = [str(s) for s in ALL]
    for options, message in [
        ({"symmetries": every, "voxel_size": (16, 8, 8)}, r"the voxel size \(16.0, 8.0, 8.0\)"),
        ({"symmetries": every, "inputs": [((16, 16, 16), (4, 4, 8))]}, r"a further input of \(4, 4, 8\)"),
        ({"symmetries": []}, "at least one"),
        ({"uncertainty": "variences"}, "uncertainty must be one of"),
        ({"uncertainty": "dropout"}, "dropout_samples must be at least 2"),
        ({"dropout_samples": 4}, "and 0 without"),
    ]:
        with pytest.raises(InputError, match=message):
            task_of(raw, tmp_path, **options)
    section = [str(s) for s in SYMMETRY_SETS["section"]]
    task_of(raw, tmp_path, symmetries=section, window=(8, 16, 16), voxel_size=(16, 8, 8))
    with pytest.raises(InputError, match="variance over one pass"):
        run_predict_task(task_of(raw, tmp_path, uncertainty="variance"), lambda x: x)
    assert not list(tmp_path.iterdir()), "refused before anything is written"


_KILLED = """
import os, signal, sys
from connectomics.tasks import pool, runner
pool.REPORT_S, runner._MARK_S, runner._MARK_SHARE = 0.0, 0.0, 1e9  # every block is marked at once
from connectomics.inference.augmented import dropout_on
from connectomics.inference.predict_task import PredictTask, run_predict_task
from tests.inference.test_augmented import Dropping
class Killed(Dropping):
    passes = 0
    def forward(self, x):
        self.passes += 1
        if self.passes == 250:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
network = Killed().eval()
with dropout_on(network):
    run_predict_task(PredictTask.load(sys.argv[1]), network)
"""


def files_of(task: PredictTask) -> dict[str, bytes]:
    found = contents(task.output)
    return {
        name: content
        for name, content in found.items()
        if not name.startswith(("task.json", ".done-")) and ".part-" not in name
    }


def test_dropout_killed_and_resumed_gives_the_same_bytes(raw, tmp_path, starter):
    options = {"uncertainty": "dropout", "dropout_samples": 3, "symmetries": ["zyx", "z-yx"]}
    task = task_of(raw, tmp_path / "a", batch_size=2, **options)
    task.save(tmp_path / "wanted.json")
    assert starter.run(["-c", _KILLED, tmp_path / "wanted.json"]).status == -signal.SIGKILL
    done = Path(task.output) / ".done-predict"
    blocks = done.read_bytes()[-task.blocks("predict") :]
    assert 0 < sum(blocks) < len(blocks)
    network = Dropping().eval()
    whole = task_of(raw, tmp_path / "b", batch_size=5, **options)
    with dropout_on(network):
        torch.rand(7)
        run_predict_task(task, network)
        run_predict_task(whole, network)
    assert files_of(task) == files_of(whole)
    assert read(task, "mito/uncertainty").std() > 0
    assert store.read_attrs(f"{task.output}/mito")["connectomics"]["model"]["dropout_samples"] == 3
