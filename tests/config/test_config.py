"""Configuration: Hydra composition onto the schema, and one line for every mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from connectomics.config import as_config, config_from_dict, config_to_dict, known_keys, load_config, save_config
from connectomics.errors import ConfigError, MissingError

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.yaml"))


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda p: p.stem)
def test_every_tutorial_composes_and_survives_saving(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert config.name == file.stem
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


def test_the_plans_values() -> None:
    config = load_config(ROOT / "tutorials/cellmap_cos7.yaml")
    assert config.dataset.classes == ["nuc", "mito", "er", "golgi", "ves"]
    assert (config.model.mednext_size, config.model.mednext_kernel_size) == ("M", 5)
    assert config.optimizer.lr == 1e-3  # from the base
    assert config.training.max_epochs == 500
    assert list(config.data.augmentations)[:2] == ["RandFlipd", "RandRotate90d"]
    assert load_config(ROOT / "tutorials/cellmap_mito.yaml").optimizer.lr == 5e-4


def test_overrides_win_and_reach_keys_that_no_file_sets() -> None:
    config = load_config(
        ROOT / "tutorials/cellmap_cos7.yaml",
        ["training.max_epochs=3", "data.cache=disk", "dataset.crops=[crop234,'crop236']",
         "data.augmentations.RandFlipd.prob=0.1", "+model.loss_options.FocalLoss={gamma: 3}",
         "data.intensity.noise={prob: 0.4}", "data.sampling={dataset: 1.0}", "data.class_weights.mito=3"],
    )  # fmt: skip
    assert config.training.max_epochs == 3
    assert config.data.cache == "disk"
    assert config.dataset.crops == ["crop234", "crop236"]
    assert config.data.augmentations["RandFlipd"]["prob"] == 0.1
    assert config.model.loss_options == {"FocalLoss": {"gamma": 3}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_epoch=3", "unknown key 'training.max_epoch'.*did you mean 'training.max_epochs'"),
        ("data.lr=3", "did you mean 'optimizer.lr'"),
        ("training.max_epochs=many", "training.max_epochs must be a valid integer.*got 'many'"),
        ("dataset.voxel_size=[8,8]", "three positive numbers"),
        ("dataset.classes=[]", "at least one class"),
        ("dataset.classes=[nuc,nuc]", "twice"),
        ("model.out_channels=3", "5 classes"),
        ("model.loss_weights=[1]", "one weight for each loss"),
        ("dataset.split=croop", "did you mean 'crop'"),
        ("inference.overlap=1.0", "below 1"),
        ("nonsense", "nonsense"),
        ("++batch_size=3", "unknown key 'batch_size'.*did you mean 'data.batch_size'"),
        ("+data.lr=3", "unknown key 'data.lr'.*did you mean 'optimizer.lr'"),
        ("data.patch_size=[16.5,16,16]", r"data.patch_size\[0\] must be a valid integer, .*16.5"),
        ("model.loss_weights=[1,nan]", r"model.loss_weights\[1\] must be a finite number, got nan"),
        ("optimizer.lr=inf", "optimizer.lr must be a finite number, got inf"),
        ("training.gradient_clip_val=nan", "training.gradient_clip_val must be a finite number"),
        ("data.augmentations.RandFlipd.prob=nan", "data.augmentations.RandFlipd.prob must be a finite number"),
        ("data.batch_size=0", "data.batch_size must be at least 1"),
        ("data.patches_per_epoch=1", "less than one batch"),
        ("data.patches_per_epoch=-1", "at least 1"),
        ("data.num_workers=-1", "at least 0"),
        ("data.min_known=3", "data.min_known must be at most 1"),
        ("data.cache=ram", "none, memory, disk"),
        ("data.worker_start=thread", "must be one of forkserver, spawn"),
        ("data.inputs=[{voxel_size:[8,8]}]", r"data.inputs\[0\].voxel_size must be three"),
        ("data.inputs=[{spacing:[8,8,8]}]", "unknown key 'data.inputs\\[0\\].spacing'"),
        ("data.intensity_range=[1]", r"auto, table, or \[low, high\]"),
        ("data.intensity_range=[1,2,3]", r"two different numbers, got \[1, 2, 3\]"),
        ("data.intensity_range=autom", "got 'autom'"),
        ("data.intensity_range={jrc_hela-2: [5, 5]}", "data.intensity_range of jrc_hela-2 must be auto"),
        ("inference.window=[8,8]", "three positive numbers"),
        ("inference.tta=flip", "inference.tta must be none, flips, section, planes, all.*got 'flip'"),
        ("inference.tta=[zyx,-zzx]", "each z, y, x in some order"),
        ("inference.tta=[zyx,zyx]", "none twice"),
        ("inference.tta=[]", "inference.tta must be"),
        ("inference.uncertainty=varience", "did you mean 'variance'"),
        ("inference.dropout_samples=1", "at least 2"),
        ("system.seed=-1", "at least 0"),
        ("engine.name=dusk", "did you mean 'dask'"),
        ("engine.cluster=slurn", "did you mean 'slurm'"),
        ("engine.workers=-1", "engine.workers must be at least 0"),
        ("engine.attempts=0", "engine.attempts must be at least 1"),
        ("engine.block_timeout_s=0", "engine.block_timeout_s must be above 0"),
        ("engine.memory_gb=-2", "engine.memory_gb must be above 0"),
        ("engine.address=tcp://10.0.0.1:8786", "engine.address needs engine.name=dask"),
        ("engine.options.queue=short", "engine.options needs engine.name=dask"),
    ],
)
def test_bad_overrides_are_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(ROOT / "tutorials/cellmap_cos7.yaml", [override])
    assert "\n" not in str(error.value)


def test_older_spellings_of_keys_are_taken_and_the_newer_one_counts(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(
        "dataset: {resolution: [4, 4, 4]}\n"
        "data: {use_cache: true, inputs: [{resolution: [16, 16, 16], patch_size: [8, 8, 8]}]}\n"
    )
    config = load_config(file)
    assert (config.dataset.voxel_size, config.data.cache) == ([4, 4, 4], "disk")
    assert config.data.inputs[0].voxel_size == [16, 16, 16]
    for override, size, cache in (
        ("dataset.resolution=[2,2,2]", [2, 2, 2], "disk"),
        ("dataset.voxel_size=[2,2,2]", [2, 2, 2], "disk"),
        ("data.use_cache=false", [4, 4, 4], "none"),
        ("data.cache=memory", [4, 4, 4], "memory"),
    ):
        config = load_config(file, [override])
        assert (config.dataset.voxel_size, config.data.cache) == (size, cache)
    assert config_from_dict({"dataset": {"resolution": [3, 3, 3]}}).dataset.voxel_size == [3, 3, 3]


def test_a_file_may_refer_to_defaults_of_the_schema(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("inference: {window: '${data.patch_size}'}\n")
    assert load_config(tmp_path / "run.yaml").inference.window == [128, 128, 128]


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"did you mean .*cellmap_cos7\.yaml"):
        load_config(ROOT / "tutorials/cellmap_cos8.yaml")
    for content, message in (
        ("data: [1", "not valid YAML at line"),
        ("- a\n- b\n", "must hold keys and values"),
        ("data:\n  patch_sise: [1, 2, 3]\n", "did you mean 'data.patch_size'"),
        ("defaults:\n  - no_such_base\n", "no_such_base"),
        ("defaults:\n  - /elsewhere/base\n", r"expected names of files in .*, got /elsewhere/base"),
    ):
        file = tmp_path / "bad.yaml"
        file.write_text(content)
        with pytest.raises(ConfigError, match=message) as error:
            load_config(file)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="unknown key"):
        config_from_dict({"data": {"no_such": 1}})


def test_the_last_override_of_a_key_is_the_one_to_blame() -> None:
    with pytest.raises(ConfigError, match=r"override 'data\.batch_size=many'"):
        load_config(ROOT / "tutorials/cellmap_cos7.yaml", ["data.batch_size=2", "data.batch_size=many"])


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xa6\x00\xff")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "run.yaml")


def test_a_configuration_with_overrides_is_the_same_but_for_them() -> None:
    config = load_config(ROOT / "tutorials/cellmap_cos7.yaml")
    config.name = "connectomics"  # the default
    changed = as_config(config, "system.seed=7", ["data.intensity_range={a: [1, 2]}"])
    system, data = replace(config.system, seed=7), replace(config.data, intensity_range={"a": [1, 2]})
    assert changed == replace(config, system=system, data=data)
    assert as_config(changed, ["system.seed=8"]).data.intensity_range == {"a": [1, 2]}
    with pytest.raises(ConfigError, match=r"^override 'system.sed=7': the configuration: unknown key"):
        as_config(config, ["system.sed=7"])


def test_every_key_is_read_somewhere() -> None:
    """No option that nothing reads: each field's name occurs in the code outside of the schema."""
    code = "\n".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "connectomics").rglob("*.py") if p.name != "schema.py"
    )
    unread = [k for k in known_keys() if f".{k.split('.')[-1]}" not in code]
    assert unread == []
