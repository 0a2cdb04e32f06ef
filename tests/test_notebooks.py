"""The notebooks run from the first cell to the last, as a reader would run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that the cells of a notebook print, run in a kernel of its own that works in ``folder``."""
    import nbformat
    from nbclient import NotebookClient

    for key, value in {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)  # it draws
    return "".join(output.get("text", "") for output in outputs)


def test_the_documentation_names_them_all() -> None:
    page = (ROOT / "docs/notebooks.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3
    assert all(f"`{notebook.name}`" in page for notebook in NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_they_are_kept_without_outputs(notebook: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook, "code"))
    assert len(cells(notebook, "markdown")) >= 5


@pytest.mark.slow
def test_explore_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("1_explore_the_data.ipynb", tmp_path, monkeypatch)
    assert "labels of mito" in said


@pytest.mark.slow
def test_train_and_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("2_train_and_look.ipynb", tmp_path, monkeypatch)
    assert "32 steps in 4 epochs" in said
    assert "iou" in said


@pytest.mark.slow
def test_from_prediction_to_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("3_from_prediction_to_instances.ipynb", tmp_path, monkeypatch)
    assert "without specks" in said
    assert "sphericity" in said
