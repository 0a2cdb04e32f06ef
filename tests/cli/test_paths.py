"""Paths of the command line: output goes to a local disk or to S3, another URL is refused before anything is made."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from connectomics.cli import main, plan_script
from connectomics.config import load_config
from connectomics.config.schema import RunConfig
from connectomics.data.cache import CropCache
from connectomics.errors import ConfigError, WriteError
from connectomics.io.location import is_url, local_path
from connectomics.io.write import create_array, write_file
from connectomics.metrics.tables import write_csv, write_json
from connectomics.pages.report.build import build_report
from connectomics.pages.report.sources import ReportSources
from connectomics.phantom import make_phantom
from connectomics.pipeline.measure import measure_tasks
from connectomics.pipeline.mesh import mesh_tasks
from connectomics.pipeline.package import write_package
from connectomics.pipeline.train import choose_run_dir, train
from connectomics.pipeline.tune import tune
from connectomics.submission import export_submission
from tests.cli.small_way import Way, pytc
from tests.decoding.decode_kit import decode_predictions

URL = "s3://bucket/x"
CLI = Path(plan_script.__file__).parent
TUTORIAL = str(CLI.parents[1] / "tutorials/phantom.yaml")

#: a command of each verb that writes, with a URL where its output goes
WRITE_TO_A_URL = [
    f"phantom {URL} --preset tiny",
    f"demo --out {URL}",
    f"fetch {URL} --class mito",
    f"ingest {URL} --dataset a --raw a.npy",
    f"plan root --class mito --out {URL}",
    f"inspect phantom --out {URL}.html",
    f"train {TUTORIAL} --run-dir {URL}",
    f"train {TUTORIAL} output_dir={URL}",
    f"train {TUTORIAL} data.cache_dir={URL}",
    f"predict {TUTORIAL} --checkpoint a.ckpt --out gs://bucket/x",
    "decode predictions gs://bucket/x",
    "measure labels --out gs://bucket/x",
    "mesh labels gs://bucket/x --class mito",
    f"tune predictions root --out {URL}",
    f"evaluate labels root --out {URL}.json",
    "export labels gs://bucket/x.zip",
    f"validate a.zip --out {URL}.json",
    f"score a.zip truth.zarr --out {URL}",
    f"report {URL}.html --run run",
    f"package run --out {URL}.pytc",
    f"view root --state {URL}.json",
    f"cache --dir {URL}",
    f"doctor --at {URL}",
]


@pytest.mark.parametrize("command", WRITE_TO_A_URL)
def test_an_output_that_is_a_url_is_refused_in_one_line_and_nothing_is_made(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert "local disk" in said[0]
    assert "://bucket/x" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_so_do_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_script.main(["--config", TUTORIAL, "--mode", "predict", "--checkpoint", "a.ckpt", "--out", URL]) == 1
    assert "local disk" in capfd.readouterr().err
    script = str(CLI.parents[1] / "scripts/export_cellmap_submission.py")
    place = ["--predictions_dir", str(tmp_path), "--output_path", "gs://bucket/x"]
    words = [*place, "--classes", "mito", "--datasets", "jrc_cos7-1a"]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(script, run_name="__main__")
    assert "local disk" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [f"evaluate {URL} root", f"predict {TUTORIAL} --checkpoint {URL}.ckpt"])
def test_an_input_that_must_be_local_is_refused_too(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    assert "cannot read s3://bucket/x" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


#: every function behind a verb, with a URL where its output goes
FUNCTIONS: dict[str, Callable[[Path | str], object]] = {
    "write_file": lambda url: write_file(Path(url), b""),
    "make_phantom": make_phantom,
    "train": lambda url: train(RunConfig(), url),
    "choose_run_dir": lambda url: choose_run_dir(RunConfig(output_dir=str(url))),
    "tune": lambda url: tune("predictions", "root", url),
    "build_report": lambda url: build_report(url, ReportSources()),
    "write_package": lambda url: write_package("a.ckpt", url),
    "write_json": lambda url: write_json(url, {}),
    "write_csv": lambda url: write_csv(url, []),
    "CropCache": CropCache,
}


@pytest.mark.parametrize("given", [str, Path])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_so_does_the_function_behind_each_verb(
    name: str, given: Callable[[str], Path | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As text, and as the path that Python makes of it: s3:/bucket/x."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WriteError, match="expected a path, got a URL"):
        FUNCTIONS[name](given(URL))
    assert list(tmp_path.iterdir()) == []


#: functions that write to S3 as well: any other URL is refused, and S3 without credentials
ON_S3: dict[str, Callable[[Path | str], object]] = {
    "create_array": lambda url: create_array(url, (1, 1, 1), np.uint8),
    "export_submission": lambda url: export_submission(".", url),
    "decode_predictions": lambda url: decode_predictions("predictions", url),
    "measure_tasks": lambda url: measure_tasks("labels", url),
    "mesh_tasks": lambda url: mesh_tasks("labels", url, "mito"),
}


@pytest.mark.parametrize("given", [str, Path])
@pytest.mark.parametrize("name", ON_S3)
def test_places_that_cannot_be_written_are_refused_before_anything_is_made(
    name: str, given: Callable[[str], Path | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with pytest.raises(WriteError, match="expected a path, got a URL"):
        ON_S3[name](given("gs://bucket/x"))
    with pytest.raises(WriteError, match="cannot write s3://bucket/x: there are no credentials; set AWS_ACCESS"):
        ON_S3[name](given(URL))
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_a_configuration_are_local_folders() -> None:
    for key in ("output_dir", "data.cache_dir"):
        with pytest.raises(ConfigError, match=f"{key} must be a folder on a local disk"):
            load_config(None, [f"{key}=s3://bucket/x"])
    assert load_config(None, ["dataset.data_root=s3://bucket/x"]).dataset.data_root == "s3://bucket/x"


def test_what_is_a_url() -> None:
    for url in ("s3://b/x", "gs://b", "https://a.b/c", Path("s3://b/x")):
        assert is_url(url), url
    for path in ("a/b", "./s3/x", "C:/x", "/s3:/x", "~/x", "file:///x", "a=s3://b"):
        assert not is_url(path), path
    assert local_path("~/x") == Path.home() / "x"


def test_home_is_expanded_where_the_shell_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").touch()
    assert main(["phantom", "~/taken"]) == 1
    assert f"{tmp_path / 'taken'} is there already" in capfd.readouterr().err


def test_a_root_on_s3_may_stand_where_a_configuration_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first override takes the place of a configuration that is not needed; its URL stays whole."""
    seen: list[str] = []
    monkeypatch.setattr("connectomics.lightning.model_package.is_package", lambda model: True)

    def config(config: RunConfig, overrides: list[str]) -> RunConfig:
        seen.extend(overrides)
        raise WriteError("seen")

    package = SimpleNamespace(config=RunConfig())
    monkeypatch.setattr("connectomics.lightning.model_package.open_package", lambda model: package)
    monkeypatch.setattr("connectomics.pipeline.network_task.as_config", config)
    assert main(["predict", "--checkpoint", "a.pytc", "dataset.data_root=s3://bucket/x", "--box", "a:0,0,0:1,1,1"]) == 1
    assert seen == ["dataset.data_root=s3://bucket/x"]


def test_files_that_the_documents_name_are_written_there(way: Way, tmp_path: Path) -> None:
    """A stored task below outputs/, in the documents and in the help: the same place as in a run."""
    pytc(
        "decode", way.predictions, tmp_path / "labels", "decoding.default.threshold=0.25", "decoding.blockwise_above=1"
    )
    pages = [CLI.parents[1] / "README.md", *CLI.parents[1].glob("docs/*.md"), *CLI.glob("*.py")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = set(re.findall(r"outputs/(predictions|labels)/jrc_[\w-]+\.zarr/crop234/(\S*task\.json)", text))
    assert {kind for kind, _ in found} == {"predictions", "labels"}
    for kind, name in found:
        base = way.predictions if kind == "predictions" else tmp_path / "labels"
        assert (base / "set-a.zarr/crop1" / name).is_file(), f"{kind}: {name}"


@pytest.mark.parametrize("file", sorted(CLI.glob("*.py")), ids=lambda file: file.stem)
def test_every_path_of_the_command_line_is_made_in_one_place(file: Path) -> None:
    """An option that is a `Path` and not made by `connectomics.cli.options` would take a URL for a folder."""
    kinds = {f"{way}{what}{kind}" for way in ("In", "Out") for what in ("", "Place") for kind in ("Option", "Argument")}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
            kind, *about = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if "Path" in ast.unparse(kind):
                (made,) = [ast.unparse(part.func) for part in about if isinstance(part, ast.Call)]
                assert made in kinds, f"{file.name}:{node.lineno}"
