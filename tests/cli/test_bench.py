"""`pytc bench data` on the command line: a table, JSON, and one line on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from connectomics.cli import main

SMALL = ["data.patch_size=[16,16,16]", "data.num_workers=0", "dataset.datasets=[phantom-iso]"]


def overrides(phantom: Path, tmp_path: Path) -> list[str]:
    return [f"dataset.data_root={phantom}", f"data.cache_dir={tmp_path / 'crops'}", *SMALL]


def test_the_table_names_stages_limits_and_the_whole_loader(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "data", "--config", "phantom", "--patches", "4", *overrides(phantom, tmp_path)]) == 0
    out = capsys.readouterr().out
    for said in ("read", "spatial", "collate", "whole", "bare copy", "bare fused pass", "patches/s", "(no transfer)"):
        assert said in out


def test_json_is_alone_on_the_output(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", "--patches", "2", "--json", *overrides(phantom, tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "setup", "rounds", "stages", "whole", "patches_per_s", "peaks", "limits", "ratios", "loader", "prepare_s",
        "peak_mb", "peer",
    }  # fmt: skip
    assert found["setup"]["patch_size"] == [16, 16, 16]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--patches", "0"], "--patches must be at least 1, found 0"),
        (["--against", "cellmapdata"], "did you mean 'cellmap-data'"),
        (["--peer-env", "somewhere"], "give that too"),
        (["--config", "phantm"], "phantm"),
        (["data.patchsize=[8,8,8]"], "patch_size"),
        (["dataset.data_root=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", *arguments]) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert said in error[0]
