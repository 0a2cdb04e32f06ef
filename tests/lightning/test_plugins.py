"""A network of one's own, as docs/extending.md says: written in a module, named in a configuration, used by verbs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import connectomics
from connectomics.cli import main
from connectomics.config import import_plugins, load_config
from connectomics.errors import ConfigError, InputError, MissingError, UnknownNameError
from connectomics.io.multiscale import Multiscale
from connectomics.models import build_model, list_models, register_model, registry
from tests.cli.small_way import Way, config_of, make_data, pytc

ROOT = Path(__file__).resolve().parents[2]


def of_the_page(language: str) -> str:
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8").split("## Your own network")[1].split("\n## ")[0]
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    return str(block)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is registered here is forgotten again."""
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    yield
    sys.modules.pop("my_networks", None)


@pytest.fixture
def way(tmp_path: Path) -> Way:
    """A data root, a run.yaml with the page's keys, and the page's module in a folder of its own."""
    from connectomics.config import save_config

    way = Way(tmp_path)
    make_data(way)
    config = config_of(way.root, tmp_path / "cache")
    config.model.options = {}
    save_config(config, way.config)
    content = yaml.safe_load(way.config.read_text())
    page = yaml.safe_load(of_the_page("yaml"))
    content["model"] |= page.pop("model")
    way.config.write_text(yaml.safe_dump(content | page))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/my_networks.py").write_text(of_the_page("python"))
    return way


@pytest.mark.usefixtures("own_registry")
def test_the_page_s_network_goes_all_the_way(
    way: Way, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(way.base / "modules")  # as PYTHONPATH does
    assert load_config(way.config).plugins == ["my_networks"]
    pytc("train", way.config, "--list-models")
    assert "two convolutions, to try things" in capsys.readouterr().out
    pytc("train", way.config, "--run-dir", way.run)
    packed = way.base / "model.pytc"
    pytc("package", way.checkpoint, "--out", packed)
    model = connectomics.load_model(packed)
    assert (type(model.network).__name__, model.network.first.out_channels) == ("TwoLayers", 16)
    pytc("predict", way.config, "--checkpoint", way.checkpoint, "--out", way.predictions, "--device", "cpu")
    assert main(["train", str(way.config), "--run-dir", str(way.base / "x"), "model.options={widht: 4}"]) == 1
    assert "did you mean 'width'" in capsys.readouterr().err


@pytest.mark.slow
def test_other_processes_know_it_too(way: Way) -> None:
    """From a package alone, with two worker processes, and in a process of its own."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{way.base / 'modules'}"}
    command = [sys.executable, "-m", "connectomics"]
    for words in (
        ["train", way.config, "--run-dir", way.run],
        ["package", way.checkpoint, "--out", way.base / "model.pytc"],
        ["predict", "--checkpoint", way.base / "model.pytc", "--out", way.predictions, "engine.workers=2"],
    ):
        done = subprocess.run([*command, *map(str, words)], env=environment, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr[-3000:]
    assert Multiscale.open(str(way.predictions / "set-a.zarr/crop1/mito")).attrs["connectomics"]["complete"]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [*command, "predict", "--checkpoint", str(way.base / "model.pytc"), "--out", str(way.base / "again")],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 1
    assert "PYTHONPATH" in done.stderr


@pytest.mark.usefixtures("own_registry")
def test_what_is_wrong_with_a_plugin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import no_such_library_at_all")
    (tmp_path / "fails.py").write_text("raise RuntimeError('two\\nlines')")
    for name, kind, says in (
        ("nowhere_to_be_found", MissingError, "there is no module 'nowhere_to_be_found'; install it, or add"),
        ("needs_more", MissingError, "needs no_such_library_at_all"),
        ("fails", ConfigError, "RuntimeError: two lines"),
    ):
        with pytest.raises(kind, match=says):
            import_plugins([name])


@pytest.mark.usefixtures("own_registry")
def test_registering() -> None:
    from torch import nn

    def network(
        in_channels: int, out_channels: int, deep_supervision: bool, patch_size: object, depth: int = 1
    ) -> object:
        return nn.Conv3d(in_channels, out_channels, depth) if depth else None

    register_model("mine", network, "mine", multiple=(4, 8, 8), deep_supervision=True, fixed_size=True)
    assert list_models()["mine"] == "mine"
    assert registry.required_multiple("mine") == (4, 8, 8)
    assert isinstance(build_model("mine", 1, 2, patch_size=(8, 16, 16), options={"depth": 3}), nn.Conv3d)
    with pytest.raises(InputError, match="must be a multiple of"):
        build_model("mine", 1, 2, patch_size=(9, 16, 16))
    with pytest.raises(UnknownNameError, match="Known: depth"):
        build_model("mine", 1, 2, patch_size=(8, 16, 16), options={"patch_size": 3})
    with pytest.raises(InputError, match="must return a torch"):
        build_model("mine", 1, 2, patch_size=(8, 16, 16), options={"depth": 0})
    with pytest.raises(InputError, match="'unet' is a network of this package"):
        register_model("unet", network, "mine")
