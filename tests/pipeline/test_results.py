"""Folders of arrays: which are chosen by the names that a user gives. What verbs without a configuration import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.cellmap.catalog import open_root
from connectomics.config import load_config
from connectomics.decoding.probabilities import above
from connectomics.errors import UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import ensure_group, write_multiscale
from connectomics.pipeline.results import Probabilities, chosen_arrays
from connectomics.pipeline.show import show
from tests.cellmap.roots import write_label, write_raw

ARRAYS = [("a", "crop1", "mito"), ("a", "crop2", "er"), ("b", "crop1", "er")]


def test_arrays_are_chosen_by_data_set_crop_and_class(tmp_path: Path) -> None:
    for dataset, crop, name in ARRAYS:
        place = tmp_path
        for part in (f"{dataset}.zarr", crop, name):
            place = place / part
            ensure_group(place)
    assert chosen_arrays(tmp_path) == ARRAYS
    assert chosen_arrays(tmp_path, crops=["1"]) == [ARRAYS[0], ARRAYS[2]]
    assert chosen_arrays(tmp_path, datasets=["a"], classes=["er"]) == [ARRAYS[1]]
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        chosen_arrays(tmp_path, classes=["mitos"])
    with pytest.raises(UnknownNameError, match="unknown class 'mito'"):
        chosen_arrays(tmp_path, datasets=["b"], classes=["mito"])


def test_lengths_of_a_run_are_tuples() -> None:
    config = load_config(None, "dataset.voxel_size=[16,8,8]", "data.patch_size=[32,64,64]")
    assert (config.voxel_size, config.patch, config.window) == ((16.0, 8.0, 8.0), (32, 64, 64), (32, 64, 64))
    config = load_config(None, "data.patch_size=[32,64,64]", "inference.window=[64,64,64]")
    assert config.window == (64, 64, 64)


@pytest.mark.parametrize("verb", ["export", "validate"])
def test_what_reads_no_configuration_and_computes_no_score_starts_without_them(verb: str) -> None:
    heavy = ("numba", "hydra", "connectomics.config.schema")
    code = f"import sys, connectomics.pipeline.{verb}; print(*[m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_show_cuts_probabilities_at_one_half_also_if_they_are_given_by_their_folder(
    tmp_path: Path, dtype: type[Any]
) -> None:
    grid = VoxelGrid((40, 4.6, 4.6), (-500, 1234.5, 0.3), (5, 31, 23))
    write_raw(tmp_path / "root", "a", np.full(grid.shape, 90, np.uint8), grid)
    write_label(tmp_path / "root", "a", "crop1", "er", np.zeros(grid.shape, np.uint8), grid)
    share = np.random.default_rng(0).random(grid.shape)
    values = (np.rint(share * 255) if dtype is np.uint8 else share).astype(dtype)
    made = {"probability": values, "labels": above(values, 0.5).astype(np.uint8)}
    for kind, array in made.items():
        about = {"artefact": kind, "class_name": "er", "kind": "semantic", "complete": True}
        write_multiscale(tmp_path / kind / "a.zarr/crop1/er", array, grid, attrs={"connectomics": about})
    crop = open_root(tmp_path / "root").crop("a", "crop1")
    places = [tmp_path / "labels", tmp_path / "probability", Probabilities.open(tmp_path / "probability")]
    pictures = [np.asarray(show(crop, place, "er", at=(2, 15, 11)).axes[0].images[0].get_array()) for place in places]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
