"""The package works where nothing but the temporary folder can be written: a read-only installation and no home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import connectomics


def test_kernels_compile_without_a_cache_folder(tmp_path: Path) -> None:
    installed = tmp_path / "connectomics"
    shutil.copytree(Path(connectomics.__file__).parent, installed, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (installed, *(p for p in installed.rglob("*") if p.is_dir())):
        (folder / "__pycache__").touch()  # a file: nothing can be stored in it, whoever tries
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    variables = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    code = (
        "import connectomics, numpy as np; from connectomics.decoding.blocks.component_kernels import add_voxel\n"
        f"assert connectomics.__file__.startswith({str(tmp_path)!r})\n"
        "sizes, boxes, sums = np.zeros(1, np.int64), np.zeros((1, 6), np.int64), np.zeros((1, 3), np.int64)\n"
        "add_voxel(0, 1, 2, 3, sizes, boxes, sums)\n"
        "assert sums.tolist() == [[1, 2, 3]]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, "HOME": "/proc/nowhere", "PYTHONPATH": str(tmp_path), "TMPDIR": str(temporary)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.glob("connectomics-numba-*"))
