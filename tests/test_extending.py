"""Every example of docs/extending.md runs as it is written there."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import connectomics as cx
from connectomics.cli import main
from connectomics.cli.app import app
from connectomics.config import import_plugins, save_config
from connectomics.decoding import DecodeParameters, decode_class, parameters, register_decoder
from connectomics.errors import ConfigError, InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.formats import VolumeSource, register_format, source
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.models import losses, registry
from connectomics.pipeline.tune_space import SearchSpace, Volume, pooled_scores
from tests.cli.small_way import Way, config_of, make_data, pytc

PAGE = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(title), re.S)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of PYTHONPATH with the page's modules; what they register is forgotten afterwards."""
    folder = tmp_path / "modules"
    folder.mkdir()
    names = []
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        (name,) = re.findall(r"^# (my_\w+)\.py$", code, re.M)
        (folder / f"{name}.py").write_text(code)
        names.append(name)
    assert names == ["my_networks", "my_losses", "my_decoders", "my_formats", "my_verbs"]
    monkeypatch.syspath_prepend(folder)
    registries: list[dict[str, Any]] = [registry.ARCHITECTURES, losses.LOSSES, parameters.DECODERS, source.FORMATS]
    kept = [dict(known) for known in registries]
    verbs = list(app.registered_commands)
    yield folder
    app.registered_commands[:] = verbs
    for known, before in zip(registries, kept, strict=True):
        known.clear()
        known.update(before)
    for name in names:
        sys.modules.pop(name, None)


def configuration(*titles: str) -> dict[str, Any]:
    """The configurations of several sections as one."""
    merged: dict[str, Any] = {"plugins": []}
    for title in titles:
        (text,) = blocks(title, "yaml")
        content = yaml.safe_load(text)
        merged["plugins"] += content.pop("plugins")
        for group, values in content.items():
            merged.setdefault(group, {}).update(values)
    return merged


def test_a_network_and_a_loss_train(tmp_path: Path) -> None:
    way = Way(tmp_path)
    make_data(way)
    config = config_of(way.root, tmp_path / "cache")
    config.model.options = {}
    save_config(config, way.config)
    content, page = yaml.safe_load(way.config.read_text()), configuration("Your own network", "Your own loss")
    content["model"] |= page.pop("model")
    way.config.write_text(yaml.safe_dump(content | page))
    pytc("train", way.config, "--run-dir", way.run)
    with (way.run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["train/LogCoshDiceLoss"]) for row in rows if row.get("train/LogCoshDiceLoss")]
    assert values
    assert all(0 < value < np.log(np.cosh(1)) for value in values)
    model = cx.load_model(way.checkpoint)
    assert type(model.network).__name__ == "TwoLayers"
    with pytest.raises(InputError, match="'DiceLoss' is a loss of this package"):
        losses.register_loss(type("DiceLoss", (losses.DiceLoss,), {}))
    with pytest.raises(InputError, match="expected a dataclass derived from ClassLoss, got"):
        losses.register_loss(int)  # type: ignore[arg-type]


def write_prediction(folder: Path) -> VoxelGrid:
    """Probabilities of mito: a box with a bright core, a dim box, and a bright speck."""
    values = np.zeros((24, 32, 32), np.uint8)
    values[2:12, 2:12, 2:12] = 120
    values[5:9, 5:9, 5:9] = 230
    values[2:12, 18:28, 18:28] = 120
    values[20, 20, 20] = 250
    grid = VoxelGrid((8.0, 8.0, 8.0), (0.0, 0.0, 0.0), values.shape)
    about = {"artefact": "probability", "class_name": "mito", "complete": True, "model": {"sha256": "abc"}}
    write_multiscale(folder / "cell.zarr/crop1/mito", values, grid, attrs={"connectomics": about})
    return grid


def test_a_decoder_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = write_prediction(tmp_path / "probabilities")
    file = tmp_path / "decode.yaml"
    file.write_text(yaml.safe_dump(configuration("Your own decoding method")))
    pytc("decode", tmp_path / "probabilities", tmp_path / "labels", "--config", file)
    ids = Multiscale.open(tmp_path / "labels/cell.zarr/crop1/mito").read_level(0, (0, 0, 0), grid.shape)[0]
    assert ids.dtype == np.uint8
    assert (ids[2:12, 2:12, 2:12] == 1).all()
    assert int((ids > 0).sum()) == 1000  # neither the dim box nor the speck, which is too small
    assert (tmp_path / "labels/cell.zarr/crop1/mito/instances.csv").exists()

    words = ["decode", str(tmp_path / "probabilities"), str(tmp_path / "other")]
    assert main([*words, "decoding.default.method=hysteresys", "plugins=[my_decoders]"]) == 1
    assert "must be one of threshold" in capsys.readouterr().err
    parameters.DECODERS["hysteresis"] = lambda values, voxel_size, chosen: values
    with pytest.raises(InputError, match="expected integer ids of shape"):
        decode_class(np.zeros((2, 2, 2), np.uint8), grid.voxel_size, DecodeParameters(method="hysteresis"))
    with pytest.raises(InputError, match="'cc3d' is a method of this package"):
        register_decoder("cc3d", parameters.DECODERS["hysteresis"])


def test_tuning_searches_the_parameters_of_a_decoder() -> None:
    import_plugins(["my_decoders"])
    truth = np.zeros((16, 16, 16), np.uint8)
    truth[2:10, 2:10, 2:10] = 1
    probability = np.where(truth > 0, 120, 0).astype(np.uint8)
    probability[4:6, 4:6, 4:6] = 230
    volume = Volume(probability, None, truth, np.ones(truth.shape, np.bool_), (8.0, 8.0, 8.0))
    base = DecodeParameters(method="hysteresis", threshold=0.7)
    assert {point["method"] for point in SearchSpace.of([volume], base).points()} == {"hysteresis"}
    assert list(pooled_scores([volume], base)) == [1.0]
    assert next(pooled_scores([volume], DecodeParameters(method="cc3d", threshold=0.7))) < 1


def test_a_method_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method must be one of threshold, .*, got 'hysteresis'"):
        DecodeParameters(method="hysteresis")


def test_a_format_is_ingested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.arange(6 * 8 * 10, dtype=np.uint16).reshape(6, 8, 10)
    raw.tofile(tmp_path / "scan.bin")
    about = {"shape": raw.shape, "dtype": "uint16", "voxel_size_nm": [20.0, 8.0, 8.0]}
    (tmp_path / "scan.json").write_text(json.dumps(about))
    (command,) = blocks("Your own file format", "text")
    words = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTC_PLUGINS", words[1].partition("=")[2])
    pytc(*words[3:])
    stored = Multiscale.open(cx.open_root("data/mine").raw_location("cell1"))
    assert stored.levels[0].grid.voxel_size == (20.0, 8.0, 8.0)
    assert (stored.read_level(0, (0, 0, 0), raw.shape)[0] == raw).all()

    def nothing(path: Path, inner: str | None) -> VolumeSource:
        raise AssertionError

    for name, endings in (("tiff", (".xyz",)), ("mine", (".tif",))):
        with pytest.raises(InputError, match=r"format tiff of this package reads .tif \.tiff"):
            register_format(name, nothing, endings)


def test_a_verb_is_listed_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prediction(tmp_path / "probabilities")
    pytc("decode", tmp_path / "probabilities", tmp_path / "labels")
    monkeypatch.setenv("PYTC_PLUGINS", "my_verbs")
    capsys.readouterr()
    assert main(["--help"]) == 0
    assert "Count the instances of every class." in capsys.readouterr().out
    pytc("count", tmp_path / "labels")
    assert capsys.readouterr().out == "cell crop1 mito 1\n"
    monkeypatch.setenv("PYTC_PLUGINS", "my_verbs, nowhere_to_be_found")
    assert main(["--help"]) == 1
    assert "there is no module 'nowhere_to_be_found'" in capsys.readouterr().err
