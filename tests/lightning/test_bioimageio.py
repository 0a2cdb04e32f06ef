"""A bioimage.io model: weights that run without this package, preprocessing as described, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from connectomics.errors import InputError, MissingError, UnknownNameError, WriteError
from connectomics.io.normalization import Normalization
from connectomics.lightning.checkpoints import load_network
from connectomics.lightning.module import ConnectomicsModule
from connectomics.pipeline.bioimageio import prepared, write_bioimageio
from connectomics.pipeline.package import write_package
from tests.cli.small_way import pytc
from tests.lightning.synthetic_run import tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("bioimageio") is None, reason="needs pip install 'connectomics-cellmap[bioimageio]'"),
]
GRAY = {"low": 74.0, "high": 192.0, "mean": 0.575, "std": 0.198, "origin": "test"}


def checkpoint_of(folder: Path, **changes: Any) -> Path:
    from connectomics.lightning.checkpoints import CHECKPOINT_FORMAT, CHECKPOINT_KEY

    torch.manual_seed(0)
    module = ConnectomicsModule(tiny_config(**{"data__normalization": {"cell": GRAY}, **changes}))
    content: dict[str, Any] = {"state_dict": module.state_dict()}
    from connectomics.config import config_to_dict

    content[CHECKPOINT_KEY] = {
        "format": CHECKPOINT_FORMAT, "version": "0", "classes": list(module.classes), "voxel_size": [8.0] * 3,
        "config": config_to_dict(module.config),
    }  # fmt: skip
    torch.save(content, folder / "net.ckpt")
    return folder / "net.ckpt"


def described(file: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as package:
        name = next(n for n in ("rdf.yaml", "bioimageio.yaml") if n in package.namelist())
        found: dict[str, Any] = yaml.safe_load(package.read(name))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    checkpoint = checkpoint_of(folder, data__patch_size=[32, 32, 64])
    return write_bioimageio(checkpoint, folder / "net.zip", authors=["A. Name"], license_name="CC-BY-4.0")


@pytest.mark.slow
def test_the_zoo_reproduces_the_test_output(model: Path) -> None:
    core = pytest.importorskip("bioimageio.core")
    summary = core.load_description_and_test(model).validation_summary
    assert summary.status != "failed", summary.display()
    assert any("Reproduce test outputs" in d.name and d.status == "passed" for d in summary.details)
    assert any("size parameter n: 1" in d.name and d.status == "passed" for d in summary.details)  # another size


def test_the_weights_give_the_test_output_without_this_package(model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(model) as package:
        package.extractall(tmp_path)
    code = (
        "import sys; sys.modules['connectomics'] = sys.modules['monai'] = None\n"
        "import numpy as np, torch\n"
        "raw = np.load('raw.npy').astype(np.float32)\n"
        f"unit = np.clip((raw - {GRAY['low']}) / {GRAY['high'] - GRAY['low']}, 0, 1)\n"
        f"image = torch.from_numpy(((unit - {GRAY['mean']}) / {GRAY['std']}).astype(np.float32))\n"
        "found = torch.jit.load('weights.pt')(image).detach().numpy()\n"
        "print(np.abs(found - np.load('probabilities.npy')).max())\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
    raw = np.load(tmp_path / "raw.npy")
    assert raw.dtype == np.uint8
    assert np.load(tmp_path / "probabilities.npy").std() > 1e-3
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "weights.pt").read_bytes()


def test_raw_becomes_the_input_as_in_prediction(model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(model) as package:
        package.extractall(tmp_path)
    network = load_network(checkpoint_of(tmp_path, data__patch_size=[32, 32, 64]))
    raw = np.load(tmp_path / "raw.npy")
    image = network.normalization("cell").input(raw)
    np.testing.assert_allclose(prepared(raw, network.normalization("cell")), image, atol=1e-5)
    with torch.no_grad():
        expected = network.probabilities(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), expected, atol=1e-5)
    inverted = Normalization(255.0, 0.0, 0.5, 0.25)
    np.testing.assert_allclose(prepared(raw, inverted), inverted.input(raw), atol=1e-5)


def test_what_it_says(model: Path) -> None:
    about = described(model)
    (raw,), (probabilities,) = about["inputs"], about["outputs"]
    assert about["license"] == "CC-BY-4.0"
    assert probabilities["axes"][1]["channel_names"] == ["mito", "er"]
    sizes = [axis["size"] for axis in raw["axes"][2:]]
    assert sizes == [{"min": 32, "step": 32}] * 3
    assert [(axis["unit"], axis["scale"]) for axis in raw["axes"][2:]] == [("nanometer", 8.0)] * 3
    assert [step["id"] for step in raw["preprocessing"]][1:4] == [
        "scale_linear",
        "clip",
        "fixed_zero_mean_unit_variance",
    ]


def test_a_patch_of_another_size_and_further_inputs_have_fixed_sizes(tmp_path: Path) -> None:
    from connectomics.config.schema import InputConfig

    further = [InputConfig([16.0, 16.0, 16.0], [16, 16, 16])]
    checkpoint = checkpoint_of(tmp_path, data__inputs=further, model__dropout=0.0)
    about = described(write_bioimageio(checkpoint, tmp_path / "net.zip"))
    assert [given["id"] for given in about["inputs"]] == ["raw", "raw_1"]
    assert [axis["size"] for axis in about["inputs"][1]["axes"][2:]] == [16, 16, 16]
    assert about["inputs"][1]["axes"][2]["scale"] == 16.0


@pytest.mark.slow
def test_deep_networks_are_tested_on_as_much_as_they_take(tmp_path: Path) -> None:
    """At 32 voxels per side, the coarsest level of five halvings would be one voxel, which instance norm refuses."""
    five = {"channels": [4] * 6, "strides": [2] * 5}
    checkpoint = checkpoint_of(tmp_path, model__architecture="unet", model__options=five, data__patch_size=[64] * 3)
    (raw,) = described(write_bioimageio(checkpoint, tmp_path / "net.zip"))["inputs"]
    assert [axis["size"] for axis in raw["axes"][2:]] == [{"min": 64, "step": 32}] * 3
    assert write_package(checkpoint, tmp_path / "net.pytc.zip").path.exists()
    wide = {"features": [4, 4, 8], "stem": 16}  # divides 64
    plane = checkpoint_of(tmp_path, model__architecture="unet_2d", model__options=wide, data__patch_size=[32, 128, 128])
    (raw,) = described(write_bioimageio(plane, tmp_path / "plane.zip"))["inputs"]
    assert [axis["size"]["step"] for axis in raw["axes"][2:]] == [32, 64, 64]
    auto = {"strides": "auto", "filters": [4, 8, 8, 8]}  # those that the voxel size and the patch ask for
    deep = checkpoint_of(tmp_path, model__architecture="dynunet", model__options=auto, data__patch_size=[32] * 3)
    assert described(write_bioimageio(deep, tmp_path / "auto.zip"))["inputs"]


def test_what_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"a": GRAY, "b": {**GRAY, "low": 0.0}}
    checkpoint = checkpoint_of(tmp_path, data__normalization=two)
    with pytest.raises(InputError, match=r"\(a, b\).*--dataset"):
        write_bioimageio(checkpoint, tmp_path / "net.zip")
    with pytest.raises(UnknownNameError, match="'c'"):
        write_bioimageio(checkpoint, tmp_path / "net.zip", dataset="c")
    (raw,) = described(write_bioimageio(checkpoint, tmp_path / "net.zip", dataset="b"))["inputs"]
    assert raw["preprocessing"][1]["kwargs"]["offset"] == 0.0
    with pytest.raises(WriteError, match="exists; add --overwrite"):
        write_bioimageio(checkpoint, tmp_path / "net.zip", dataset="a")
    with pytest.raises(InputError, match=r"bioimage.io does not allow this description: license"):
        write_bioimageio(checkpoint, tmp_path / "other.zip", dataset="a", license_name="mine")
    assert not (tmp_path / "other.zip").exists()
    (tmp_path / "text.zip").write_text("mine")
    with pytest.raises(WriteError, match=r"text\.zip"):
        write_bioimageio(checkpoint, tmp_path / "text.zip", dataset="a", overwrite=True)
    monkeypatch.setitem(sys.modules, "bioimageio.spec", None)
    with pytest.raises(MissingError, match="pip install"):
        write_bioimageio(checkpoint, tmp_path / "other.zip", dataset="a")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoint_of(tmp_path)
    pytc("package", checkpoint, "--format", "bioimageio", "--out", tmp_path / "a.zip", "--author", "A. Name")
    assert "a.zip" in capsys.readouterr().out
    assert described(tmp_path / "a.zip")["authors"] == [{"name": "A. Name"}]
