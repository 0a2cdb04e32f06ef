"""What a prediction lacks is refused or recorded, never taken for empty tissue: raw that is missing or cannot be read,
blocks that fail, memory that runs out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import BlocksFailedError, InputError, OutOfMemoryError
from connectomics.geometry import VoxelGrid
from connectomics.inference.background_io import ReadAhead
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.io import store
from connectomics.io.artifacts import require_complete
from connectomics.io.levels import halve_raw
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import StoreError
from connectomics.io.write import write_multiscale
from tests.decoding.decode_kit import decode_predictions
from tests.s3_server import FaultyProxy, FolderServer

GRID = VoxelGrid((8, 8, 8), (4, 4, 4), (16, 16, 96))
CHUNK = 16
RAW = np.random.default_rng(0).integers(1, 255, GRID.shape, dtype=np.uint8)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A row of six chunks."""
    location = tmp_path / "root" / "a.zarr" / "em"
    write_multiscale(location, RAW, GRID, chunks=(CHUNK,) * 3)
    return location


def task_of(raw: Path | str, out: Path, **options) -> PredictTask:
    """Six blocks of one chunk each, windows without context."""
    defaults = dict(
        raw=str(raw), output=str(out / "a.zarr" / "crop1"), classes=("mito",), targets={"mito": GRID},
        voxel_size=(8, 8, 8), window=(16, 16, 16), checkpoint="", block_size=(16, 16, 16), context=(0, 0, 0),
        overlap=0.0, 
    )  # fmt: skip
    return PredictTask(**{**defaults, **options})


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def stored(task: PredictTask) -> np.ndarray:
    values, there = Multiscale.open(f"{task.output}/mito").read_level(0, (0, 0, 0), task.targets["mito"].shape)
    assert there.all()
    return values


def attributes(task: PredictTask, name: str = "") -> dict:
    return require_complete(str(Path(task.output, name)))


def chunk_of(raw: Path, x: int) -> Path:
    return raw / "s0" / "0" / "0" / str(x)


class Network:
    """The raw itself as a probability; before window ``at`` (counted from 0, after the window of noise) something
    happens."""

    def __init__(self, at: int, what) -> None:
        self.calls, self._at, self._what = -1, at, what

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls == self._at:
            self._what()
        self.calls += 1
        return x


# -- raw that cannot be read -------------------------------------------------------------------------------------------
def test_raw_that_is_unmounted_meanwhile_ends_the_run_which_then_goes_on(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(ReadAhead.__init__, "__defaults__", (0,))  # one block is read ahead
    task, away = task_of(raw, tmp_path / "out"), raw.with_name("elsewhere")
    with pytest.raises(
        StoreError, match=r"em/s0 was there and is no longer .* check that its disk is mounted"
    ) as error:
        run_predict_task(task, Network(1, lambda: raw.rename(away)))
    assert "--accept-failed a/crop1:" in str(error.value)
    assert store.read_attrs(task.output)["connectomics"]["complete"] is False
    away.rename(raw)
    again = Network(99, None)
    run_predict_task(task, again)
    assert again.calls < 6, "the first blocks were kept"
    assert np.array_equal(stored(task), RAW)
    assert attributes(task)["missing_raw"] == 0


def test_a_mask_that_is_unmounted_meanwhile_ends_the_run(raw, tmp_path):
    mask = tmp_path / "mask.zarr"
    write_multiscale(mask, np.ones(GRID.shape, np.uint8), GRID, chunks=(CHUNK,) * 3, kind="label")
    task = task_of(raw, tmp_path / "out", mask=str(mask))
    away = mask.with_name("elsewhere")
    with pytest.raises(StoreError, match=r"mask\.zarr/s0 was there and is no longer"):
        run_predict_task(task, Network(-1, lambda: mask.rename(away)))
    assert store.read_attrs(task.output)["connectomics"]["complete"] is False
    away.rename(mask)
    run_predict_task(task, identity)
    assert np.array_equal(stored(task), RAW)


def test_a_server_that_refuses_a_chunk_ends_the_run_at_once(raw, tmp_path, monkeypatch):
    with FolderServer(tmp_path / "root") as server, FaultyProxy(server.endpoint) as proxy:
        proxy.always["s0/0/0/3"] = "403"
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        task = task_of("s3://public/a.zarr/em", tmp_path / "out")
        with pytest.raises(StoreError, match=r"cannot read s3://public/a\.zarr/em/s0/0/0/3.*access is denied"):
            run_predict_task(task, identity)
        assert proxy.failed["403"] <= 2, "not once for each attempt of each block"
        assert store.read_attrs(task.output)["connectomics"]["complete"] is False
        proxy.always.clear()
        run_predict_task(task, identity)
    assert np.array_equal(stored(task), RAW)


# -- raw that is missing -----------------------------------------------------------------------------------------------
def test_missing_raw_is_refused_with_its_share_its_place_and_the_remedy(raw, tmp_path):
    chunk_of(raw, 4).unlink()
    task = task_of(raw, tmp_path / "out", targets={"mito": GRID.crop((0, 0, 40), (16, 16, 48))})
    with pytest.raises(InputError) as error:
        run_predict_task(task, lambda x: pytest.fail("was run"))
    text = str(error.value)
    assert text.startswith(
        "crop1 of a: 33.3 % of the voxels to predict have no raw (4096 of 12288, the first at 4 4 516"
    )
    assert f"{chunk_of(raw, 4)} is not stored" in text
    assert "data.allow_missing_raw=true" in text
    assert not Path(task.output).exists()


@pytest.mark.parametrize("engine", ["whole", "resumed"])
def test_missing_raw_that_is_allowed_is_0_and_its_share_is_recorded(raw, tmp_path, engine, caplog):
    chunk_of(raw, 4).unlink()
    task = task_of(raw, tmp_path / "out", allow_missing_raw=True, targets={"mito": GRID.crop((0, 0, 0), (16, 16, 80))})
    if engine == "resumed":
        with pytest.raises(StoreError, match="the disk is gone"):
            run_predict_task(task, Network(2, _lost))
        assert not (Path(task.output) / ".zattrs").read_text().count('"complete": true')
    run_predict_task(task, lambda x: torch.full_like(x, 0.5))
    assert attributes(task)["missing_raw"] == attributes(task, "mito")["missing_raw"] == 1 / 5
    assert (stored(task)[..., 64:] == 0).all()
    assert "20 % of the voxels have no raw" in caplog.text


def _lost() -> None:
    raise StoreError("the disk is gone")


def test_what_was_missing_when_a_block_was_done_stays_missing(raw, tmp_path):
    """Both chunks come back between two runs, but one of the blocks was predicted without."""
    for x in (0, 5):
        chunk_of(raw, x).rename(tmp_path / str(x))
    task = task_of(raw, tmp_path / "out", allow_missing_raw=True)
    with pytest.raises(StoreError, match="the disk is gone"):
        run_predict_task(task, Network(3, _lost))
    for x in (0, 5):
        (tmp_path / str(x)).rename(chunk_of(raw, x))
    run_predict_task(task, identity)
    assert attributes(task)["missing_raw"] == 1 / 6
    expected = RAW.copy()
    expected[..., :CHUNK] = 0
    assert np.array_equal(stored(task), expected)


def test_raw_that_is_deleted_while_it_is_predicted_is_noticed(raw, tmp_path):
    kept = tmp_path / "kept"
    task = task_of(raw, tmp_path / "out")
    with pytest.raises(StoreError, match="raw under 1 blocks went missing while they were predicted"):
        run_predict_task(task, Network(0, lambda: chunk_of(raw, 5).rename(kept)))
    with pytest.raises(InputError, match=r"16\.7 % of the voxels to predict have no raw"):
        run_predict_task(task, identity)
    kept.rename(chunk_of(raw, 5))
    again = Network(99, None)
    run_predict_task(task, again)
    assert again.calls == 1, "that block, and no other"
    assert np.array_equal(stored(task), RAW)


def test_coarser_levels_follow_a_block_that_is_predicted_again(raw, tmp_path):
    kept = tmp_path / "kept"
    task = task_of(raw, tmp_path / "out", pyramid=True)
    with pytest.raises(StoreError, match="raw under 1 blocks went missing while they were predicted"):
        run_predict_task(task, Network(0, lambda: chunk_of(raw, 5).rename(kept)))
    kept.rename(chunk_of(raw, 5))
    run_predict_task(task, identity)
    level = Multiscale.open(f"{task.output}/mito").arrays[1]
    assert np.array_equal(level.read((0, 0, 0), level.shape)[0], halve_raw(RAW))


TARGETS = {
    "as raw": GRID,
    "finer": VoxelGrid((2.62, 4, 4), (40.0, 20, 21), (20, 20, 150)),
    "coarser": VoxelGrid((16, 16, 16), (8, 8, 8), (8, 8, 48)),
    "beyond": VoxelGrid((8, 8, 8), (-20, 4, 604), (9, 9, 30)),
}


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_share_against_its_definition_voxel_by_voxel(raw, tmp_path, name):
    for x in (1, 4):
        chunk_of(raw, x).unlink()
    grid = TARGETS[name]
    task = task_of(raw, tmp_path / "out", targets={"mito": grid}, allow_missing_raw=True)
    run_predict_task(task, lambda x: torch.full_like(x, 0.5))
    index = [np.floor(axis / 8 + 1e-6).astype(int) for axis in grid.axes()]
    inside = [
        (a + s / 2 > 0) & (a - s / 2 < n * 8) for a, s, n in zip(grid.axes(), grid.voxel_size, GRID.shape, strict=True)
    ]
    there = inside[0][:, None, None] & inside[1][:, None] & (inside[2] & ~np.isin(index[2] // CHUNK, (1, 4)))
    assert 0 < there.mean() < 1
    assert attributes(task)["missing_raw"] == pytest.approx(1 - there.mean())
    assert np.array_equal(stored(task) == 0, ~there)


def test_raw_outside_of_the_mask_is_not_missed(raw, tmp_path):
    inside = np.zeros(GRID.shape, np.uint8)
    inside[..., :40] = 1
    write_multiscale(tmp_path / "mask.zarr", inside, GRID, chunks=(CHUNK,) * 3, kind="label")
    chunk_of(raw, 4).unlink()
    task = task_of(raw, tmp_path / "out", mask=str(tmp_path / "mask.zarr"))
    run_predict_task(task, identity)
    assert attributes(task)["missing_raw"] == 0
    chunk_of(raw, 2).unlink()
    with pytest.raises(InputError, match=r"16\.7 % of the voxels"):
        run_predict_task(replace(task, output=str(tmp_path / "b.zarr" / "crop1")), identity)


# -- blocks that fail --------------------------------------------------------------------------------------------------
def test_accepted_blocks_are_unknown_from_the_prediction_to_the_labels(raw, tmp_path, caplog):
    chunk_of(raw, 2).write_bytes(b"no chunk")
    task = task_of(raw, tmp_path / "out", pyramid=True)
    with pytest.raises(BlocksFailedError) as error:
        run_predict_task(task, lambda x: torch.full_like(x, 0.8))
    text = str(error.value)
    assert "block 2 at [0 0 256] to [128 128 384] nm: cannot decode a chunk" in text
    assert text.endswith("to store this block as unknown, add --accept-failed a/crop1:2")
    run_predict_task(task, lambda x: torch.full_like(x, 0.8), accept=[2])
    (unknown,) = attributes(task)["unknown"]
    assert unknown == attributes(task, "mito")["unknown"][0]
    assert (unknown["block"], unknown["box"]) == (2, [[0, 0, 256], [128, 128, 384]])
    assert "cannot decode a chunk" in unknown["reason"]
    expected = np.full(GRID.shape, 204, np.uint8)
    expected[..., 32:48] = 0
    assert np.array_equal(stored(task), expected)

    holes = DecodeParameters(method="cc3d", fill_holes=True)
    for name, above in (("whole", 10**9), ("blocks", 0)):
        caplog.clear()
        out = tmp_path / name
        (labels,) = decode_predictions(tmp_path / "out", out, {"mito": holes}, blockwise_above=above)
        assert labels.objects == 2
        found = Multiscale.open(labels.job.location)
        assert found.attrs["connectomics"]["unknown"] == [unknown]
        values, _ = found.read_level(0, (0, 0, 0), GRID.shape)
        assert np.array_equal(values > 0, expected > 0)
        assert "a/crop1/mito: 16.7 % of the volume was not predicted" in caplog.text


@pytest.mark.parametrize("above", [10**9, 0], ids=["whole", "blocks"])
def test_an_unknown_block_is_no_hole_to_be_filled(raw, tmp_path, above):
    """One in the middle of an object, which would be closed around it."""
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (48, 48, 48))
    write_multiscale(tmp_path / "em", np.full(grid.shape, 7, np.uint8), grid, chunks=(CHUNK,) * 3)
    (tmp_path / "em" / "s0" / "1" / "1" / "1").write_bytes(b"no chunk")
    task = task_of(tmp_path / "em", tmp_path / "out", targets={"mito": grid})
    run_predict_task(task, lambda x: torch.full_like(x, 0.8), accept=[13])
    holes = DecodeParameters(method="cc3d", fill_holes=True)
    (labels,) = decode_predictions(tmp_path / "out", tmp_path / "labels", {"mito": holes}, blockwise_above=above)
    values, _ = Multiscale.open(labels.job.location).read_level(0, (0, 0, 0), grid.shape)
    expected = np.ones(grid.shape)
    expected[16:32, 16:32, 16:32] = 0
    assert np.array_equal(values, expected)


def test_accepted_blocks_are_kept_by_a_run_that_goes_on(raw, tmp_path):
    chunk_of(raw, 1).write_bytes(b"no chunk")
    chunk_of(raw, 4).write_bytes(b"no chunk")
    task = task_of(raw, tmp_path / "out")
    with pytest.raises(BlocksFailedError, match=r"--accept-failed a/crop1:4$"):
        run_predict_task(task, identity, accept=[1])
    run_predict_task(task, identity, accept=[4])
    assert [item["block"] for item in attributes(task)["unknown"]] == [1, 4]
    assert list(json.loads((task.folder / ".unknown.json").read_text())) == ["1", "4"]


# -- numbers that are not finite, memory -------------------------------------------------------------------------------
def test_a_block_that_is_not_finite_in_mixed_precision_is_done_in_float32(raw, tmp_path, caplog):
    mixed: list[bool] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        """NaN in mixed precision for windows that begin with a value above the middle."""
        autocast = torch.is_autocast_enabled("cpu")
        mixed.append(autocast)
        return torch.where((x[:, :, :1, :1, :1] > 0.5) & autocast, torch.nan, x)

    firsts = RAW[0, 0, ::CHUNK] / 255
    assert 0 < (firsts > 0.5).sum() < 6
    task = task_of(raw, tmp_path / "out", precision="bf16")
    run_predict_task(task, network)
    assert np.array_equal(stored(task), RAW)
    wrong = np.flatnonzero(firsts > 0.5)
    assert [f"block {n} is not finite in bf16, trying it in float32" in caplog.text for n in range(6)] == [
        n in wrong for n in range(6)
    ]
    assert mixed.count(False) >= len(wrong)


def test_a_network_that_is_never_finite_is_an_error(raw, tmp_path):
    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, :, :1, :1, :1] * 255 == float(RAW[0, 0, 16]), torch.nan, x)

    task = task_of(raw, tmp_path / "out", precision="bf16")
    with pytest.raises(BlocksFailedError, match=r"1 of 6 blocks failed \(block 1 .*not finite"):
        run_predict_task(task, network)


class Greedy:
    """Runs out of memory with more than ``most`` windows at a time."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.seen = most, error, list[int]()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise self.error
        return x


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("Unable to allocate 2 GiB")],
    ids=["gpu", "host"],
)
def test_the_batch_is_halved_until_memory_suffices(tmp_path, error, caplog):
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (64, 64, 32))
    values = np.random.default_rng(1).integers(0, 255, grid.shape, dtype=np.uint8)
    write_multiscale(tmp_path / "em", values, grid, chunks=(CHUNK,) * 3)
    task = task_of(tmp_path / "em", tmp_path / "out", targets={"mito": grid}, block_size=(64, 64, 16), batch_size=16)
    network = Greedy(4, error)
    run_predict_task(task, network)
    assert network.seen == [1, 16, 8, *[4] * 8], "each size is given up once, for all blocks"
    assert np.array_equal(stored(task), values)
    assert "out of memory on cpu, continuing with batches of 4" in caplog.text


def test_memory_that_holds_not_even_one_window_ends_the_run_with_the_remedy(raw, tmp_path):
    network = Greedy(0, MemoryError("Unable to allocate 2 GiB"))
    with pytest.raises(OutOfMemoryError, match=r"inference\.block_size or inference\.window smaller"):
        run_predict_task(task_of(raw, tmp_path / "out"), network)
    assert network.seen == [1]
    network = Greedy(1, MemoryError("Unable to allocate 2 GiB"))
    task = task_of(raw, tmp_path / "out")

    def later(x: torch.Tensor) -> torch.Tensor:
        network.most = 1 if len(network.seen) < 2 else 0
        return network(x)

    with pytest.raises(OutOfMemoryError, match=r"with a single window at a time"):
        run_predict_task(task, later)
    assert len(network.seen) == 3, "no other block is tried"
