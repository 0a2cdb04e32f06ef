"""Every configuration in the repository makes its model, its loss, its data, and one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from connectomics.config import load_config
from connectomics.pipeline.train import train

ROOT = Path(__file__).resolve().parents[1]
REAL = {"baseline_official", "fib25_medulla", "lucchi", "lucchi_gpu", "vnc_larva"}


LARGE = {"cellmap_mito", "cellmap_mito_affinities", "cellmap_multiscale"}  # like cellmap_cos7, and as slow


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=[pytest.mark.slow] * (file.stem in LARGE))
        for file in sorted((ROOT / "tutorials").glob("*.yaml"))
    ],
)
def test_one_step(file: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    real = file.stem in REAL
    root = request.getfixturevalue("shared_data" if real else "phantom")
    small = [
        f"dataset.data_root={root}", "data.batch_size=1", "data.num_workers=0", f"data.cache_dir={tmp_path}",
        "system.num_cpus=2", "training.precision='32'", "dataset.crops=null", "data.patches_per_epoch=1",
    ]  # fmt: skip
    if not real:
        patch = "[32,32,32]" if file.stem == "phantom" else "[16,16,32]"  # large kernels are slow on a CPU
        small += ["dataset.datasets=[phantom-iso]", f"data.patch_size={patch}", f"inference.window={patch}"]
    if file.stem == "lucchi_gpu":
        small += ["data.patch_size=[16,32,32]", "inference.window=null"]
    if file.stem == "baseline_official":
        small += ["model.options.features=[8,16,32,64,128]"]
    if file.stem != "phantom":  # one configuration looks at validation too; for large networks it takes too long here
        small += ["dataset.train_val_split=1.0", "data.cache=none"]
    if file.stem.startswith("cellmap"):  # its planes are not as long on both sides then
        small += ["~data.augmentations.RandRotate90d"]
    config = load_config(file, small)
    train(config, tmp_path / "run", fast_dev_run=True)
    assert not (tmp_path / "run").exists()  # a trial run leaves nothing
