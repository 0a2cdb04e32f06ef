"""A run whose network sees a further, coarser view of every place: trained, validated, predicted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from connectomics.config import RunConfig, load_config, tutorial
from connectomics.errors import InputError
from connectomics.inference.predict_task import PredictTask
from connectomics.io.artifacts import require_complete
from connectomics.lightning.module import ConnectomicsModule
from connectomics.pipeline.predict import predict_cellmap_crops
from connectomics.pipeline.targets import targets_of
from connectomics.pipeline.train import train


def config_of(root: Path, out: Path, *more: str) -> RunConfig:
    return load_config(tutorial("phantom"), [
        f"dataset.data_root={root}", f"data.cache_dir={out / 'cache'}", "data.num_workers=0",
        "data.patches_per_epoch=2", "training.max_epochs=1", "data.patch_size=[16,16,16]", "data.batch_size=1",
        "inference.window=[16,16,16]",
        "inference.block_size=[64,64,64]", "system.accelerator=cpu", "dataset.datasets=[phantom-iso]",
        "model.architecture=unet", "model.options={channels:[4,8],strides:[2],num_res_units:1}",
        "model.deep_supervision=false", "logging.images=false", *more,
    ])  # fmt: skip


@pytest.mark.parametrize("fusion", ["encoder", "channels"])
def test_a_run_with_views(fusion: str, phantom: Path, tmp_path: Path) -> None:
    shape = "[12,16,16]" if fusion == "encoder" else "[16,16,16]"
    view = f"data.inputs=[{{voxel_size:[32,32,32],patch_size:{shape}}}]"
    config = config_of(phantom, tmp_path, view, f"model.fusion={fusion}", "data.intensity={noise:{prob:1}}")
    result = train(config, tmp_path / "run")
    assert result.checkpoint is not None
    targets = targets_of(config)[:1]
    (folder,) = predict_cellmap_crops(None, config, result.checkpoint, tmp_path / "out", targets=targets)
    assert require_complete(folder)["complete"]
    size = [12, 16, 16] if fusion == "encoder" else [16, 16, 16]
    assert PredictTask.load(folder / "task.json").to_dict()["views"] == [[[32.0] * 3, size]]


def test_the_view_is_part_of_the_step(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = "data.inputs=[{voxel_size:[32,32,32],patch_size:[8,8,8]}]"
    module = ConnectomicsModule(config_of(phantom, tmp_path, view))
    batch = {
        "image": torch.rand(1, 1, 16, 16, 16), "image_1": torch.rand(1, 1, 8, 8, 8),
        "label": torch.ones(1, len(module.classes), 16, 16, 16),
        "known": torch.ones(1, len(module.classes), 16, 16, 16, dtype=torch.bool),
    }  # fmt: skip
    module.eval()
    module.trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])])  # type: ignore[assignment]
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    with torch.no_grad():
        first = module.training_step(batch, 0)
        assert not torch.equal(first, module.training_step({**batch, "image_1": batch["image_1"] * 0}, 0))


def test_stacked_views_must_be_as_large_as_the_patch(phantom: Path, tmp_path: Path) -> None:
    view = "data.inputs=[{voxel_size:[32,32,32],patch_size:[8,8,8]}]"
    with pytest.raises(InputError, match=r"data\.inputs\[0\]\.patch_size .*must be equal"):
        ConnectomicsModule(config_of(phantom, tmp_path, view, "model.fusion=channels"))


def test_a_window_that_a_view_does_not_cover(phantom: Path, tmp_path: Path) -> None:
    """Beyond the view its edge would be repeated, which the network has never seen. The patch may be wider."""
    narrow, wide = (f"data.inputs=[{{voxel_size:[32,32,32],patch_size:[{n},{n},{n}]}}]" for n in (3, 8))
    assert ConnectomicsModule(config_of(phantom, tmp_path, narrow)).window == [16] * 3
    assert ConnectomicsModule(config_of(phantom, tmp_path, wide, "inference.window=[16,32,32]")).window == [16, 32, 32]
    for view, window in ((wide, "[16,16,36]"), (narrow, "[16,16,20]")):
        with pytest.raises(InputError, match=r"inference\.window .* reaches beyond data\.inputs\[0\], which covers"):
            ConnectomicsModule(config_of(phantom, tmp_path, view, f"inference.window={window}"))
