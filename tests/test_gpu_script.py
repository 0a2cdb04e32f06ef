"""`benchmarks/gpu.py`: it runs everywhere, and whatever breaks, it keeps what it had and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_script(out: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The script on the CPU, started elsewhere, as from any folder; what it printed, and ``gpu.json``."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *arguments]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent, env=variables)
    return done, json.loads((out / "gpu.json").read_text())


def rows_of(content: Any, section: str) -> list[dict[str, Any]]:
    return content["sections"][section]["rows"]


@pytest.mark.slow
def test_a_section_breaks_and_the_next_one_runs(tmp_path: Path) -> None:
    """Without a GPU and without a home."""
    (tmp_path / "data" / "lucchi-train").mkdir(parents=True)  # and nothing in it
    arguments = ("--sections", "learning,inference", "--data", str(tmp_path / "data"))
    done, content = run_script(tmp_path / "out", *arguments, HOME="/proc/nowhere")
    assert done.stdout.splitlines()[0].startswith("no GPU here"), done.stderr
    assert content["about"]["GPU"] == "none"
    (row,) = rows_of(content, "learning")
    assert "lucchi-train" in row["error"]
    assert "\n" not in row["error"]
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("FAILED")] == [
        f"FAILED: learning, {row['name']}: {row['error']}"
    ]
    networks = rows_of(content, "inference")
    assert [row["name"].split(",")[0] for row in networks] == ["MedNeXt-S", "U-Net", "U-Net"]
    for row in networks:
        assert row["values"]["of bare"] > 0
        assert row["values"]["Mvoxel/s"] > 0
    assert networks[0]["values"]["MONAI's inferer"] > 0
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "(goal >= 0.85: not judged)" in table
    assert table.strip() in done.stdout


def test_rows_are_kept_whatever_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_sections.record import Record, Section

    record = Record.start(tmp_path / "out", {"device": "cuda"}, goals=True)
    record.begin("inference")
    section = Section("inference", record, "cuda", False, tmp_path, tmp_path / "scratch", seconds=60)
    with section.row("prediction", "first", rate=10) as row:
        row["rate"] = 12.3456
    with section.row("prediction", "second", rate=10) as row:
        row["rate"] = 8.0
        raise RuntimeError("CUDA error: an illegal memory access\nand a long explanation")
    with section.row("prediction", "third") as row:
        section.need(3600)
    found = Record.load(tmp_path / "out")  # as after a kill at this moment
    rows = rows_of(found.content, "inference")
    assert [row["values"].get("rate") for row in rows] == [12.35, 8.0, None]
    assert rows[1]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "it takes about 3600 s" in rows[2]["left_out"]
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "| first | 12.3 (goal >= 10: met) |" in table
    assert "| second | 8 (goal >= 10: missed) | error: RuntimeError" in table
    assert not list((tmp_path / "out").glob(".*"))
    found.end("inference", "cut off", 80.0, "it did not end")
    assert found.failures == ["inference: cut off (it did not end)", f"inference, second: {rows[1]['error']}"]


@pytest.mark.slow
def test_a_run_that_is_told_to_end_takes_its_section_along(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--sections", "training", "--tiny"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([*command, "--device", "cpu", "--out", str(tmp_path)], env=variables) as running:
        deadline = time.monotonic() + 120
        while not (tmp_path / "gpu.json").exists() or not rows_so_far(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = psutil.Process(running.pid).children(recursive=True)
        running.terminate()
        assert running.wait(30) == 143
    assert children
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert rows_so_far(tmp_path)


def rows_so_far(out: Path) -> list[dict[str, Any]]:
    content = json.loads((out / "gpu.json").read_text())
    return content["sections"].get("training", {"rows": []})["rows"]


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(tmp_path: Path, shared_data: Path) -> None:
    done, content = run_script(tmp_path / "out", "--tiny", "--device", "cpu", "--data", str(shared_data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: section["state"] for name, section in content["sections"].items()} == dict.fromkeys(
        ("tests", "inference", "training", "learning"), "done"
    )
    assert {row["values"]["result"] for row in rows_of(content, "tests")} <= {"passed", "skipped"}
    training = {row["table"]: row for row in rows_of(content, "training")}
    assert training["training step"]["values"]["real / constant"] > 0
    assert training["where a step's time goes"]["values"]["loss"].endswith("%")
    different = training["two devices"]["values"]
    assert different["largest difference of a weight, of the largest change"] < different["allowed"]
    curve = [row for row in rows_of(content, "learning") if row["table"].startswith("foreground IoU")]
    assert [row["values"]["steps"] for row in curve] == [1, 2]


@pytest.mark.slow
def test_the_data_for_a_node_without_it(tmp_path: Path, shared_data: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--data", str(shared_data)]
    subprocess.run([*command, "--write-data", str(tmp_path / "data")], check=True)
    assert sum(p.stat().st_size for p in (tmp_path / "data").rglob("*") if p.is_file()) < 20e6
    done, content = run_script(tmp_path / "out", "--sections", "learning", "--data", str(tmp_path / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows_of(content, "learning")[-1]["values"]["voxels present"] > 0
