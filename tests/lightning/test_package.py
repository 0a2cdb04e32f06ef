"""A model package: all that it takes to use a network, checked before it is used, and nothing that runs code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import connectomics
from connectomics.cli import main
from connectomics.errors import CorruptDataError, InputError, MissingError, WriteError
from connectomics.lightning.checkpoints import load_module
from connectomics.lightning.model_package import open_package
from connectomics.pipeline.package import write_package
from tests.pipeline.test_predict_crops import config_of, root, save_checkpoint  # noqa: F401  (root is a fixture)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    (place / "version_0/checkpoints").mkdir(parents=True)
    return save_checkpoint(place / "version_0/checkpoints/best.ckpt", config_of(place / "data"), 0)


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("package") / "mito.pytc"
    write_package(checkpoint, out, scores={"overall": 0.5}, license_name="CC-BY-4.0", description="for tests")
    return out


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def rewritten(path: Path, target: Path, **changed: bytes) -> Path:
    with zipfile.ZipFile(target, "w") as file:
        for name, data in members(path).items():
            file.writestr(name, changed.get(name.split(".")[0], data))
    return target


def test_it_is_the_network_of_the_checkpoint(packed: Path, checkpoint: Path) -> None:
    ours, theirs = connectomics.load_model(packed), load_module(checkpoint)
    assert ours.classes == theirs.classes
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert not ours.training


def test_it_says_what_it_is(packed: Path, checkpoint: Path) -> None:
    about = open_package(packed)
    config = load_module(checkpoint).config
    assert (about.classes, list(about.voxel_size)) == (config.dataset.classes, config.dataset.voxel_size)
    assert about.about["license"] == "CC-BY-4.0"
    assert about.about["scores"] == {"overall": 0.5}
    assert about.config.model == config.model


def test_its_scores_are_those_of_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    """The best weights are those of the first of three validations."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    rows = ["epoch,step,val/dice,train/loss", "0,7,0.8,", "0,7,,1.0", "1,15,0.7,", "1,15,,0.9", "2,23,0.5,"]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    content = torch.load(checkpoint, weights_only=True)
    for name, steps, dice in (("best", 8, 0.8), ("last", 24, 0.5)):
        torch.save({**content, "global_step": steps}, run / f"checkpoints/{name}.ckpt")
        package = write_package(run / f"checkpoints/{name}.ckpt", tmp_path / f"{name}.pytc")
        assert package.about["validation"] == {"val/dice": dice}
    assert write_package(run, tmp_path / "run.pytc").about["validation"] == {"val/dice": 0.8}


def test_the_same_checkpoint_gives_the_same_bytes(packed: Path, checkpoint: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.pytc"
    write_package(checkpoint, again, scores={"overall": 0.5}, license_name="CC-BY-4.0", description="for tests")
    assert again.read_bytes() == packed.read_bytes()
    with pytest.raises(WriteError, match="--overwrite"):
        write_package(checkpoint, again)


def test_damage_is_found_before_it_is_used(packed: Path, tmp_path: Path) -> None:
    weights = bytearray(members(packed)["weights.safetensors"])
    weights[-3] ^= 0x40
    with pytest.raises(CorruptDataError, match="SHA-256 differs"):
        connectomics.load_model(rewritten(packed, tmp_path / "a.pytc", weights=bytes(weights)))
    cut = tmp_path / "cut.pytc"
    cut.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises((CorruptDataError, InputError)):
        connectomics.load_model(cut)
    with pytest.raises(MissingError):
        connectomics.load_model(tmp_path / "nowhere.pytc")
    later = json.loads(members(packed)["model.json"]) | {"format": 99}
    with pytest.raises(InputError, match="format 99"):
        connectomics.load_model(rewritten(packed, tmp_path / "later.pytc", model=json.dumps(later).encode()))


def test_a_network_that_computes_something_else_is_found(packed: Path, tmp_path: Path) -> None:
    """Weights and their sum are in order, and the answer is not: as where a library changed what it computes."""
    import hashlib

    from safetensors.torch import load, save

    parts = members(packed)
    changed = load(parts["weights.safetensors"])
    name = next(n for n, v in changed.items() if v.ndim > 1)
    changed[name] = changed[name] + 1
    data = save(changed)
    about = json.loads(parts["model.json"])
    about["sha256"]["weights.safetensors"] = hashlib.sha256(data).hexdigest()
    other = rewritten(packed, tmp_path / "b.pytc", weights=data, model=json.dumps(about).encode())
    with pytest.raises(CorruptDataError, match="answer to the test input differs"):
        connectomics.load_model(other)


def test_nothing_is_unpickled(packed: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "ran"),))

    import hashlib

    data = pickle.dumps(Evil())
    about = json.loads(members(packed)["model.json"])
    about["sha256"]["weights.safetensors"] = hashlib.sha256(data).hexdigest()
    evil = rewritten(packed, tmp_path / "evil.pytc", weights=data, model=json.dumps(about).encode())
    with pytest.raises(CorruptDataError):
        connectomics.load_model(evil)
    assert not (tmp_path / "ran").exists()
    bomb = tmp_path / "bomb.pytc"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.json", b" " * (1 << 24))
    with pytest.raises(CorruptDataError, match="compressed or too large"):
        connectomics.load_model(bomb)


def test_the_verb_takes_a_run_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = checkpoint.parent.parent
    assert main(["package", str(run), "--license", "MIT"]) == 0
    made = tmp_path / f"{run.parent.name}-version_0.pytc"
    assert open_package(made).about["license"] == "MIT"
    capfd.readouterr()
    for arguments, expected in (
        ([str(tmp_path)], "without checkpoints"),
        ([str(tmp_path / "nowhere")], "no checkpoint at"),
        ([str(run)], "--overwrite"),
        ([str(run), "--scores", "nowhere.json"], "no scores at"),
        ([str(made), "--out", str(tmp_path)], "is a folder"),
    ):
        assert main(["package", *arguments]) == 1, arguments
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1
        assert expected in said[0]


def test_predicting_with_it_gives_what_the_checkpoint_gives(
    root: Path,  # noqa: F811
    packed: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    from connectomics.pipeline.predict import predict_cellmap_crops

    config = config_of(root)
    for name, model in (("a", checkpoint), ("b", packed)):
        predict_cellmap_crops(None, config, model, tmp_path / name, device="cpu")
    chunks = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("s0/*/*/*"))
    assert chunks
    for chunk in chunks:
        assert (tmp_path / "a" / chunk).read_bytes() == (tmp_path / "b" / chunk).read_bytes()


def test_the_verb_predicts_with_it_alone(
    root: Path,  # noqa: F811
    packed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = f"dataset.data_root='{root}'"
    arguments = ["predict", "--checkpoint", str(packed), data, "dataset.crops=[crop1]", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/set-a.zarr/crop1/mito/s0/.zarray").is_file()
    capfd.readouterr()
    assert main([*arguments, "--checkpoint", str(packed)]) == 1
    assert "hold the same weights" in capfd.readouterr().err
    assert main(["predict", "--checkpoint", str(root), data]) == 1
    assert main(["predict", data]) == 2
