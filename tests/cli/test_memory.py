"""Training the demo stays below 3 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from connectomics.phantom import PhantomOptions, make_phantom

ROOT = Path(__file__).resolve().parents[2]

_SCRIPT = """
import json, re, sys
from connectomics.cli import main
status = main(sys.argv[1:])
# not ru_maxrss: it counts the parent
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"status": status, "peak": peak}))
"""


@pytest.mark.slow
def test_training_the_demo_takes_less_than_three_gigabytes(tmp_path: Path) -> None:
    make_phantom(tmp_path / "data", PhantomOptions())
    command = [
        sys.executable, "-c", _SCRIPT, "train", str(ROOT / "tutorials/phantom.yaml"),
        "--run-dir", str(tmp_path / "run"),
        f"dataset.data_root={tmp_path / 'data'}", f"data.cache_dir={tmp_path / 'cache'}", "training.max_epochs=1",
        "training.val_every_n_epochs=1", "data.patches_per_epoch=8",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    numbers = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"peak {numbers['peak'] / 1e9:.2f} GB")
    assert numbers["status"] == 0
    assert numbers["peak"] < 3e9
