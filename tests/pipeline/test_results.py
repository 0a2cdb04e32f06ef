"""Folders of arrays: which are chosen by the names that a user gives. What verbs without a configuration import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from connectomics.config import load_config
from connectomics.errors import UnknownNameError
from connectomics.io.write import ensure_group
from connectomics.pipeline.results import chosen_arrays

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
