"""Pre-training on raw: what is hidden, what counts, and what a segmentation takes of it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectomics.config import RunConfig, load_config, save_config
from connectomics.config.few_labels import pretraining_config
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.patches import centered
from connectomics.errors import ConfigError, InputError, UnknownNameError
from connectomics.io.multiscale import Multiscale
from connectomics.lightning.checkpoints import load_network
from connectomics.lightning.fine_tuning import begin_with
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.pretraining import PretrainingModule
from connectomics.models.hidden_voxels import blind_spots, hide_blocks
from connectomics.pipeline.pretrain import pretrain
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.cli.small_way import pytc
from tests.lightning.synthetic_run import tiny_config


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- what is hidden ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shape", "block"), [((24, 30, 17), (4, 5, 3)), ((1, 40, 40), (8, 8, 8))])
def test_whole_blocks_are_hidden_and_the_rest_stays(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    image = torch.rand(shape, generator=generator(1)) + 1
    shares = []
    for seed in range(20):
        seen, hidden = hide_blocks(image, 0.6, block, generator(seed))
        assert (seen[hidden] == 0).all()
        assert torch.equal(seen[~hidden], image[~hidden])
        shares.append(float(hidden.float().mean()))
        for axis, b in enumerate(block):  # changes along an axis are a block apart
            different = (hidden.movedim(axis, 0)[1:] != hidden.movedim(axis, 0)[:-1]).flatten(1).any(1).nonzero()
            assert len({int(n) % b for n in different}) <= 1
    assert np.mean(shares) == pytest.approx(0.6, abs=0.05)
    again = hide_blocks(image, 0.6, block, generator(19))[1]
    assert torch.equal(again, hidden)


@pytest.mark.parametrize("shape", [(9, 12, 10), (1, 30, 30)])
def test_blind_spots_take_the_value_of_another_voxel_nearby(shape: tuple[int, int, int]) -> None:
    image = torch.arange(float(np.prod(shape))).view(shape)  # each voxel has its own value
    seen, hidden = blind_spots(image, 0.2, generator())
    assert torch.equal(seen[~hidden], image[~hidden])
    assert float(hidden.float().mean()) == pytest.approx(0.2, abs=0.06)
    places = hidden.nonzero().numpy()
    taken = np.stack(np.unravel_index(seen[hidden].long().numpy(), shape), axis=-1)
    apart = np.abs(taken - places).max(axis=1)
    assert apart.min() >= 1
    assert apart.max() == 2


class Zeros(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(image)


@pytest.mark.parametrize("objective", ["masked", "denoise"])
def test_only_hidden_voxels_with_raw_count(objective: str) -> None:
    config = pretraining_config(tiny_config(pretraining__objective=objective, pretraining__block_nm=[16.0, 16.0, 32.0]))
    module = PretrainingModule(config)
    module.network = Zeros()
    codes = torch.ones((2, 16, 16, 16), dtype=torch.uint8)
    codes[:, 10:] = 0  # no raw there
    tables = torch.tensor([[[False, True]], [[False, True]]])
    image = torch.rand((2, 1, 16, 16, 16), generator=generator())
    batch = {"image": image, "codes": codes, "present": tables, "known_states": tables, "seed": torch.tensor([5, 6])}
    found = module.reconstruct(batch)
    assert 0 < found.counted.sum() < (found.seen != image).sum() + 9
    assert not found.counted[:, :, 10:].any()
    assert not (found.counted & (found.seen == image)).any()
    assert float(found.loss) == pytest.approx(float(image[found.counted].square().mean()), rel=1e-5)
    assert not torch.equal(found.counted[0], found.counted[1])  # each patch has its own
    louder = {**batch, "image": torch.where(found.counted, image, image + 100)}
    if objective == "masked":  # blind spots show other voxels to the network, here without an effect on its output
        assert torch.equal(module.reconstruct(louder).seen == 0, found.seen == 0)
    assert float(module.reconstruct(louder).loss) == pytest.approx(float(found.loss))


# -- a run on the phantom ----------------------------------------------------------------------------------------------
def config_of(root: Path, *changes: str) -> RunConfig:
    small = [
        f"dataset.data_root={root}", "dataset.datasets=[phantom-iso]", "model.options.channels=[8,16]",
        "model.options.strides=[2]", "model.options.num_res_units=1", "data.patch_size=[16,16,16]",
        "data.patches_per_epoch=32", "data.batch_size=2", "data.cache=none", "system.num_cpus=1", "optimizer.lr=2e-2",
        "inference.window=null", "pretraining.block_size=[2,2,2]", "pretraining.ratio=0.3",
        "data.validation_windows=8", "training.ema=0.5",
        "scheduler.name=constant", "scheduler.warmup_epochs=0", "training.val_every_n_epochs=1",
    ]  # fmt: skip
    return load_config(Path(__file__).parents[2] / "tutorials/phantom.yaml", small, list(changes))


def losses(run: Run, name: str) -> list[float]:
    with (run.folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def pretrained(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(config_of(phantom, "training.max_epochs=4"), tmp_path_factory.mktemp("raw") / "run")


def test_the_loss_on_held_out_raw_falls(pretrained: Run, phantom: Path) -> None:
    values = losses(pretrained, "val/loss")
    assert len(values) == 4
    assert values[-1] < 0.9 * values[0]
    data = sides(config_of(phantom))
    nothing = PretrainingModule(data.config)
    nothing.network = Zeros()  # the mean of raw
    found = [nothing.reconstruct(centered(batch)) for batch in data.val_dataloader()]
    weights = [int(one.counted.sum()) for one in found]
    assert values[-1] < 0.75 * np.average([float(one.loss) for one in found], weights=weights)
    assert pretrained.best == min(values)
    assert pretrained.monitor == "val/loss"
    assert losses(pretrained, "train/loss")[-1] < losses(pretrained, "train/loss")[0]
    from PIL import Image

    picture = np.asarray(Image.open(pretrained.folder / "reconstruction.png"))
    assert picture.shape == (4 * 16 + 3 * 4, 3 * 16 + 2 * 4, 3)  # four batches of held-out patches, three columns
    assert picture.std() > 10


def test_a_segmentation_begins_with_all_but_the_output(
    pretrained: Run, phantom: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "connectomics")
    module = ConnectomicsModule(config_of(phantom))
    begin_with(pretrained.folder, module)
    stored = torch.load(pretrained.checkpoint, weights_only=True)["state_dict"]
    same = {
        n
        for n, value in module.network.state_dict().items()
        if torch.equal(value, stored.get(f"network.{n}", value + 1))
    }
    others = set(module.network.state_dict()) - same
    assert {name.split(".")[1] for name in others} == {"2"}  # the last stage, which mixes output channels
    assert len(same) > 2 * len(others)
    assert "new: mito, nuc, ld, er; unused channels of the checkpoint: reconstruction" in caplog.text


def test_a_training_runs_with_it(pretrained: Run, phantom: Path, tmp_path: Path) -> None:
    config = config_of(phantom, f"model.weights={pretrained.folder}", "training.max_epochs=1", "model.init_bias=-2")
    assert train(config, tmp_path / "run").classes == ["mito", "nuc", "ld", "er"]


def test_a_resumed_run_has_the_same_weights(pretrained: Run, phantom: Path, tmp_path: Path) -> None:
    for epochs in (2, 4):
        run = pretrain(config_of(phantom, f"training.max_epochs={epochs}"), tmp_path / "run", resume=True)
    one, other = (torch.load(r.last_checkpoint, weights_only=True) for r in (pretrained, run))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert losses(run, "val/loss") == losses(pretrained, "val/loss")


def test_it_is_not_taken_for_a_segmentation(pretrained: Run, phantom: Path) -> None:
    for config in (None, config_of(phantom)):
        with pytest.raises(InputError, match=r"was pre-trained without labels .* model.weights="):
            load_network(pretrained.checkpoint, config)


def test_the_verb_and_denoising(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(
        phantom, "pretraining.objective=denoise", "training.max_cpu_minutes=0.01", "training.max_epochs=-1"
    )
    save_config(config, tmp_path / "mine.yaml")
    pytc("pretrain", tmp_path / "mine.yaml", "--run-dir", tmp_path / "run", "data.patches_per_epoch=4")
    assert f"model.weights={tmp_path / 'run'}" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert not (tmp_path / "run/split.yaml").exists()


# -- which raw ---------------------------------------------------------------------------------------------------------
def sides(config: RunConfig) -> Any:
    data = CellMapDataModule(pretraining_config(config))
    data.setup("fit")
    return data


def test_data_sets_without_labels_have_raw_too(phantom: Path, tmp_path: Path) -> None:
    source = phantom / "phantom-iso/phantom-iso.zarr"
    target = tmp_path / "plain/plain.zarr/recon-1"
    shutil.copytree(source / "recon-1/em", target / "em")
    data = sides(config_of(tmp_path, "dataset.datasets=null", "dataset.train_val_split=0.75"))
    (own,), (held,) = data.train_dataset.volumes, data.val_volumes
    whole = Multiscale.open(own.crop.raw).grid.box
    axis = int(np.argmax(whole.extent))
    assert own.crop.box.begin == whole.begin
    assert held.crop.box.end == whole.end
    assert held.crop.box.begin[axis] - own.crop.box.end[axis] == pytest.approx(16 * 8)  # a patch
    assert held.crop.box.extent[axis] == pytest.approx(0.25 * whole.extent[axis])
    patch = data.train_dataset[data.sampler().request(0, 0)]
    assert patch.states.tables()[1][0][patch.codes].any()
    assert patch.images[0].std() > 0.01


def test_only_stored_raw_is_used_and_boxes_narrow_it(phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom / "phantom-iso", tmp_path / "phantom-iso")
    config = config_of(tmp_path)
    level = Multiscale.open(str(tmp_path / "phantom-iso/phantom-iso.zarr/recon-1/em/fibsem-uint8"))
    used = level.levels[level.level_for((8.0, 8.0, 8.0))]
    grid = used.grid
    kept = grid.crop((0, 0, 0), used.chunks)
    array, _, end = level.chunks_behind(grid)
    for index in np.ndindex(*end):
        if any(index):
            Path(array.chunk_location(index)).unlink()
    data = sides(config)
    assert len(data.train_dataset.volumes) == 1
    assert kept.box.contains(data.train_dataset.volumes[0].crop.box, tolerance=1e-6)
    low, high = kept.box.begin, kept.box.center
    box = ":".join(["phantom-iso", *(",".join(f"{v:g}" for v in corner) for corner in (low, high))])
    narrow = sides(config_of(tmp_path, f"pretraining.boxes=['{box}']"))
    assert narrow.train_dataset.volumes[0].crop.box.begin == low
    assert all(np.less_equal(narrow.val_volumes[0].crop.box.end, high))
    with pytest.raises(InputError, match="lies outside of the raw"):
        sides(config_of(tmp_path, "pretraining.boxes=['phantom-iso:-900,-900,-900:-800,-800,-800']"))
    with pytest.raises(UnknownNameError, match=r"'phantom-is'.*pretraining.boxes"):
        sides(config_of(tmp_path, "pretraining.boxes=['phantom-is:0,0,0:80,80,80']"))


def test_whole_data_sets_can_be_held_out_and_other_inputs_are_refused(phantom: Path) -> None:
    both = ["dataset.datasets=null", "dataset.split=dataset", "dataset.held_out=[phantom-iso]"]
    data = sides(config_of(phantom, *both))
    assert {v.dataset for v in data.val_volumes} == {"phantom-iso"}
    assert "phantom-iso" not in {v.dataset for v in data.train_dataset.volumes}
    with pytest.raises(ConfigError, match="pre-training takes one input"):
        pretraining_config(config_of(phantom, "data.inputs=[{voxel_size: [32,32,32], patch_size: [16,16,16]}]"))
