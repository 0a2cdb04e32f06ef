"""`import connectomics as cx`: light, complete, and the README's example runs."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import connectomics as cx
from connectomics.errors import MissingError, UnknownNameError

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = [name for name in cx.__all__ if name.islower() and not name.startswith("_")]


def test_importing_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; begin = time.process_time(); import connectomics; seconds = time.process_time() - begin;"
        "print(min(seconds, 9), *[m for m in ('numpy', 'torch', 'zarr', 'pydantic', 'hydra') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    seconds, *loaded = min((run.stdout.split() for run in runs), key=lambda words: float(words[0]))
    assert loaded == []
    assert float(seconds) < 0.1


def test_every_name_is_there_and_no_other() -> None:
    assert {"VoxelGrid", "Box", "Run", "Probabilities", "Labels", "Scores"} <= set(cx.__all__)
    for name in cx.__all__:
        assert getattr(cx, name) is not None
    assert set(cx.__all__) <= set(dir(cx))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cx.trian  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_share_one_signature(name: str) -> None:
    """Inputs first; all that is written is named ``out``; the common words are keyword-only, and documented."""
    function = getattr(cx, name)
    parameters = inspect.signature(function).parameters
    for word in ("progress", "resume", "overwrite"):
        if word in parameters:
            assert parameters[word].kind is inspect.Parameter.KEYWORD_ONLY, word
    writers = {"train", "predict", "decode", "export", "report"}
    assert ("out" in parameters) >= (name in writers)
    assert not {"output_dir", "output_path", "run_dir", "out_dir"} & set(parameters)
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    assert re.match(r"[A-Z]\w+ ", text)


@pytest.fixture(scope="module")
def root(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    shutil.copytree(phantom, folder / "data/phantom")
    return folder


def test_the_example_of_the_readme_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    small = (
        '"training.max_epochs=1", "data.patches_per_epoch=4", "data.patch_size=[32,32,32]", "data.num_workers=0", '
        '"inference.window=[32,32,32]", "data.cache=none", "model.options.channels=[4,8,16,16]"'
    )
    assert '"training.max_epochs=2"' in example
    monkeypatch.chdir(root)
    (root / "tutorials").symlink_to(ROOT / "tutorials")
    names: dict[str, object] = {}
    exec(compile(example.replace('"training.max_epochs=2"', small), "README.md", "exec"), names)
    assert (root / "out/submission.zip").is_file()
    assert (root / "out/report.html").stat().st_size > 10_000
    run, probabilities, labels, scores = (names[name] for name in ("run", "probabilities", "labels", "scores"))
    assert isinstance(run, cx.Run)
    assert isinstance(probabilities, cx.Probabilities)
    assert isinstance(labels, cx.Labels)
    assert isinstance(scores, cx.Scores)
    assert "finished" in repr(run)
    assert "mito" in repr(labels)
    assert "mito" in labels._repr_html_()
    assert scores.overall is not None
    assert "overall" in repr(scores)
    assert "<table>" in scores._repr_html_()
    dataset, crop, name = labels.arrays[0]
    assert labels.array(name, crop, dataset).levels[0].grid.size > 0
    with pytest.raises(UnknownNameError, match="mitos"):
        labels.array("mitos")


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no data root"):
        cx.open_root(tmp_path / "none")
    with pytest.raises(MissingError, match="no folder"):
        cx.decode(tmp_path / "none", out=tmp_path / "labels")
