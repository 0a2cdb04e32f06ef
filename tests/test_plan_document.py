"""Every code block and command of the user's plan, in its order, on a phantom that is named as its data set.

The plan lies beside the checkout. Where its sketches disagree with the design (it says so at its head) they are only
made to import and define what they define; the names that they use, and those that stand, are called. Training commands
get a tiny network and one step behind their own overrides.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from connectomics.cli.plan_script import main as plan_main
from connectomics.config import load_config
from connectomics.data.dataset import build, dataset_cellmap
from connectomics.decoding import cellmap_postprocess
from connectomics.metrics import cellmap_metrics
from scripts import export_cellmap_submission, train_cellmap
from tests.conftest import ROOT, _shared
from tests.plan_root import TINY, named_root

pytestmark = pytest.mark.slow
_DATA = "/projects/weilab/dataset/cellmap"


@pytest.fixture(scope="module")
def blocks() -> list[tuple[str, str, str]]:
    """(the file that the plan names above it, language, text) of every block of code."""
    text = _shared("PLAN.md").read_text(encoding="utf-8")
    found = []
    for block in re.finditer(r"```(python|yaml|bash)\n(.*?)```", text, re.S):
        named = re.findall(r"\*\*File\*\*: `([^`]+)`", text[: block.start()])
        found.append((named[-1] if named else "", block[1], block[2]))
    assert len(found) > 12
    return found


@pytest.fixture(scope="module")
def root(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named_root(phantom, tmp_path_factory.mktemp("plan") / "cellmap")


def of(blocks: list[tuple[str, str, str]], file: str, language: str = "python") -> list[str]:
    found = [text for name, kind, text in blocks if (name, kind) == (file, language)]
    assert found, f"the plan has no {language} of {file}"
    return found


def executed(text: str, package: str, names: dict[str, Any] | None = None, file: str = "") -> dict[str, Any]:
    """The names that a block defines, as a module of that package."""
    scope: dict[str, Any] = {"__name__": f"{package}.plan", "__package__": package, "__file__": file, **(names or {})}
    exec(compile(text, "PLAN.md", "exec"), scope)
    return scope


def test_no_block_is_left_out(blocks: list[tuple[str, str, str]]) -> None:
    """A block that the plan gains needs its place in a test here."""
    assert {(name, kind) for name, kind, _ in blocks} == {
        ("connectomics/data/dataset/dataset_cellmap.py", "python"),
        ("connectomics/data/dataset/build.py", "python"),
        ("tutorials/cellmap_base.yaml", "yaml"),
        ("tutorials/cellmap_cos7.yaml", "yaml"),
        ("tutorials/cellmap_mito.yaml", "yaml"),
        ("scripts/train_cellmap.py", "python"),
        ("scripts/train_cellmap.py", "bash"),
        ("connectomics/pipeline/predict.py", "python"),
        ("connectomics/pipeline/predict.py", "bash"),
        ("connectomics/decoding/cellmap_postprocess.py", "python"),
        ("connectomics/metrics/cellmap_metrics.py", "python"),
        ("scripts/export_cellmap_submission.py", "python"),
        ("tests/test_cellmap_dataset.py", "python"),
        ("tests/test_cellmap_dataset.py", "bash"),
    }


def test_the_sketches_of_data_sets_import_and_ours_take_their_arguments(
    blocks: list[tuple[str, str, str]], root: Path
) -> None:
    first, second = of(blocks, "connectomics/data/dataset/dataset_cellmap.py")
    scope = executed(second, "connectomics.data.dataset", executed(first, "connectomics.data.dataset"))
    for name in ("CellMapDataset", "CellMapMultiClassDataset"):
        ours, sketch = getattr(dataset_cellmap, name), scope[name]
        assert issubclass(sketch, scope["BaseDataset"])
        wanted = [
            n for n in sketch.__init__.__code__.co_varnames[: sketch.__init__.__code__.co_argcount] if n != "self"
        ]
        given: dict[str, Any] = {
            "data_root": str(root), "datasets": ["jrc_cos7-1a"], "crops": ["crop234"], "classes": ["mito"],
            "mode": "train", "patch_size": (16, 16, 16), "resolution": (8.0, 8.0, 8.0), "augmentor": None,
            "mode_kwargs": {},
        }  # fmt: skip
        made = ours(**{key: given[key] for key in wanted})
        for key in set(wanted) & {"data_root", "datasets", "classes", "patch_size", "resolution"}:
            assert list(getattr(made, key)) == list(given[key])
        assert made.augmentor is None
        assert len(made) == 1


def test_the_factory(blocks: list[tuple[str, str, str]], root: Path) -> None:
    (text,) = of(blocks, "connectomics/data/dataset/build.py")
    get_dataset = executed(text.replace("elif", "if"), "connectomics.data.dataset")["get_dataset"]
    cfg = load_config(ROOT / "tutorials/cellmap_cos7.yaml", [*TINY, f"dataset.data_root={root}"])
    sketched, ours = get_dataset(cfg, None), build.get_dataset(cfg, None)
    assert {s["dataset"] for s in sketched.data_samples} == {g["dataset"] for g in ours.crop_groups}


@pytest.mark.parametrize("name", ["cellmap_base", "cellmap_cos7", "cellmap_mito"])
def test_the_configurations(blocks: list[tuple[str, str, str]], name: str, tmp_path: Path) -> None:
    """They load, key by key, and ours are theirs but for where the data lies."""
    for file in ("cellmap_base", "cellmap_cos7", "cellmap_mito"):
        (text,) = of(blocks, f"tutorials/{file}.yaml", "yaml")
        (tmp_path / f"{file}.yaml").write_text(text)
    theirs = load_config(tmp_path / f"{name}.yaml")
    ours = load_config(ROOT / f"tutorials/{name}.yaml")
    assert theirs.dataset.data_root == _DATA
    theirs.dataset.data_root = ours.dataset.data_root
    written = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    for group in set(written) - {"defaults"}:
        for key in written[group]:
            assert getattr(getattr(theirs, group), key) == getattr(getattr(ours, group), key), f"{group}.{key}"


def test_postprocessing(blocks: list[tuple[str, str, str]]) -> None:
    (text,) = of(blocks, "connectomics/decoding/cellmap_postprocess.py")
    sketch = executed(text, "connectomics.decoding")
    mask = np.zeros((48, 48, 48), np.uint8)  # away from the border, where the sketch finds no seeds
    mask[12:19, 12:19, 12:19], mask[26:35, 26:35, 26:35], mask[30, 12, 12] = 1, 1, 1
    for method in ("cc3d", "watershed"):
        expected = sketch["semantic_to_instance"](mask, min_size=100, method=method)
        found = cellmap_postprocess.semantic_to_instance(mask, min_size=100, method=method)
        assert np.array_equal(found > 0, expected > 0)
        assert len(np.unique(found)) == len(np.unique(expected)) == 3


def test_metrics(blocks: list[tuple[str, str, str]]) -> None:
    (text,) = of(blocks, "connectomics/metrics/cellmap_metrics.py")
    sketch = executed(text, "connectomics.metrics")
    rng = np.random.default_rng(0)
    pred, gt = rng.integers(0, 2, (2, 8, 8, 8))
    expected = sketch["evaluate_semantic"](pred, gt)
    found = cellmap_metrics.evaluate_semantic(pred, gt)
    assert found == pytest.approx(expected, abs=1e-6)
    assert set(cellmap_metrics.evaluate_instance(pred, gt)) == {"rand_error", "voi_split", "voi_merge"}
    sketch["evaluate_instance"](pred, gt)


def test_scripts(blocks: list[tuple[str, str, str]], tmp_path: Path) -> None:
    (text,) = of(blocks, "scripts/train_cellmap.py")
    assert executed(text, "scripts", file=str(ROOT / "scripts/train_cellmap.py"))["main"] is train_cellmap.main
    (text,) = of(blocks, "scripts/export_cellmap_submission.py")
    sketch = executed(text, "scripts")["export_submission"]
    names = sketch.__code__.co_varnames[: sketch.__code__.co_argcount]
    (tmp_path / "predictions").mkdir()
    with pytest.raises(Exception, match="jrc_cos7-1a"):  # ours takes its arguments, and says that there is nothing
        export_cellmap_submission.export_submission(
            **dict(zip(names, (tmp_path / "predictions", tmp_path / "s.zip", ["mito"], ["jrc_cos7-1a"]), strict=True))
        )
    executed(of(blocks, "connectomics/pipeline/predict.py")[0], "connectomics.lightning")


def test_the_plan_s_own_tests(blocks: list[tuple[str, str, str]], root: Path) -> None:
    (text,) = of(blocks, "tests/test_cellmap_dataset.py")
    scope = executed(text.replace(_DATA, str(root)), "tests")
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def commands(blocks: list[tuple[str, str, str]]) -> list[list[str]]:
    """The words of every command, in the plan's order, as bash hands them over."""
    lines = [line for _, kind, text in blocks if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.split("#")[0].strip()]


def test_every_command(
    blocks: list[tuple[str, str, str]], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cellmap").symlink_to(root)
    for name in ("tutorials", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    epochs = 0
    done = []
    for words in commands(blocks):
        if words[0] == "source":  # that lab's environment
            continue
        assert words[:2] == ["python", "scripts/main.py"]
        tiny = [*TINY, f"data.cache_dir={tmp_path}/cache"]
        if "--mode" not in words:  # each trains one epoch more, where its own override says 200 or 500
            epochs += 1
            tiny.append(f"training.max_epochs={epochs}")
        if "outputs/test.ckpt" in words:
            shutil.copy("outputs/cellmap_cos7/version_0/checkpoints/last.ckpt", "outputs/test.ckpt")
        if "dataset.crops=[crop234," in words:
            tiny.append("dataset.datasets=[jrc_cos7-1a]")
        assert plan_main([*words[2:], *tiny]) == 0, words
        done.append(words)
    assert len(done) == 7
    found = Path("outputs/cellmap_cos7/version_0/predictions/jrc_cos7-1a.zarr")
    assert {"crop234", "crop236"} <= {p.name for p in found.iterdir()}
    assert Path("predictions/jrc_cos7-1b.zarr").is_dir()  # beside outputs/test.ckpt's folder
