"""The doctor says what is there and what to change."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from connectomics.cli import main
from connectomics.pipeline import doctor
from connectomics.pipeline.doctor import Finding, examine
from tests.s3_server import FolderServer


def test_versions_and_disk_are_those_of_this_machine(tmp_path: Path) -> None:
    found = {f.what: f for f in examine(tmp_path)}
    assert found["Python"].found == platform.python_version()
    assert f"torch {torch.__version__.split('+')[0]}" in found["libraries"].found
    assert float(found["disk speed"].found.split(" MB/s")[0]) > 0
    assert found["S3"].found == "not checked"
    assert list(tmp_path.iterdir()) == []


def test_s3_is_asked_and_a_server_that_is_not_there_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phantom: Path
) -> None:
    with FolderServer(phantom) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        (said,) = [f for f in examine(tmp_path, s3="s3://public") if f.what == "S3"]
        assert "answers in" in said.found
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    (said,) = [f for f in examine(tmp_path, s3="s3://public") if f.what == "S3"]
    assert said.level == "note"
    assert "AWS_ENDPOINT_URL" in said.advice


def test_a_card_that_torch_cannot_use_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: Some Card (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (said,) = doctor._gpus()
    assert said.level == "problem"
    assert said.found.startswith("GPU 0: Some Card, but")


def test_problems_make_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--at", str(tmp_path), "--json"]) == 0
    assert {"what", "found", "level", "advice"} == set(json.loads(capsys.readouterr().out)[0])
    monkeypatch.setattr(doctor, "_memory", lambda: Finding("memory", "none", "problem", "buy some"))
    assert main(["doctor", "--at", str(tmp_path)]) == 1
    assert "X memory: none\n    -> buy some" in capsys.readouterr().out


def test_another_package_of_the_same_import_name_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "name" not in {f.what for f in doctor._versions()}
    about = tmp_path / "connectomics-0.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: connectomics\nVersion: 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = [f for f in doctor._versions() if f.what == "name"]
    assert (found.level, "pip uninstall connectomics" in found.advice) == ("problem", True)
