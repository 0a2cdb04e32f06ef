"""`benchmarks/whole_cell_volume.py`: a tiny volume through all verbs, in both formats and places, each killed once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_formats_and_places_give_the_same_voxels_also_after_kills(tmp_path: Path) -> None:
    sizes = "--shapes 64,64,96 --block 32 --chunk 16 --window 32 --workers 1 --kills 1 --cold"
    script = [sys.executable, ROOT / "benchmarks" / "whole_cell_volume.py", *sizes.split()]
    said = subprocess.run(
        [*script, "--out", tmp_path / "out", "--json", tmp_path / "rows.json"], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout + said.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 24
    assert said.stdout.count("\n") == 26
    for row in rows:
        assert row["files equal"]
        assert row["voxels equal"] if row["place"] == "disk" else "voxels equal" not in row
        good, of = row["killed"].split(",")[0].split(" of ")
        assert good == of, row
    files = {(row["place"], row["format"], row["step"]): row["files"] for row in rows}
    assert files["disk", "0.5", "predict"] < files["disk", "0.4", "predict"]
    assert not list((tmp_path / "out").rglob("*.zarr")), "volumes are removed"
