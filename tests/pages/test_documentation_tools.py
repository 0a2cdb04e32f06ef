"""The scripts beside the documentation that draw its pictures."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from connectomics.errors import InputError, UnknownNameError

from .conftest import GRIDS, Made

DOCS = Path(__file__).resolve().parents[2] / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_panel_is_a_row_of_four(made: Made, tmp_path: Path) -> None:
    from PIL import Image

    write_panel = script("make_panel").write_panel
    path = write_panel(tmp_path / "panel.png", made.sources, "crop9", "mito", axis=1, longest=120)
    _, grid = GRIDS["crop9"]
    width, height = grid.shape[2] * grid.voxel_size[2], grid.shape[0] * grid.voxel_size[0]
    shown = Image.open(path)
    assert shown.size[1] == 120
    assert shown.size[0] == 4 * round(width / height * 120) + 3 * 4
    with pytest.raises(UnknownNameError, match="crop9/mito"):
        write_panel(tmp_path / "panel.png", made.sources, "crop9", "mitos")
    with pytest.raises(InputError, match="no raw"):
        write_panel(tmp_path / "panel.png", replace(made.sources, data_root=None), "crop9", "mito")


def test_a_picture_of_an_augmentation_shows_the_patch_and_three_strengths() -> None:
    from connectomics.data.augmentation import KINDS

    tool = script("make_augmentation_pictures")
    edge = tool.EDGE
    patch = np.random.default_rng(0).uniform(0.25, 0.75, (edge,) * 3).astype(np.float32)
    assert list(tool.SHEETS) == list(KINDS)
    for kind in ("missing_sections", "cutout"):
        row = tool.draw(kind, patch, (8.0, 8.0, 8.0))
        assert row.shape[1] == 4 * edge + 3 * 4
        columns = [row[16:, at : at + edge] for at in range(0, row.shape[1], edge + 4)]
        assert all((columns[0][: edge // 2] != later[: edge // 2]).any() for later in columns[1:])
