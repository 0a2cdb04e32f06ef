"""The run folder: what a run was, kept beside its results, listed and compared; MLflow sees the same numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import connectomics
from connectomics.cli import main
from connectomics.errors import InputError, MetadataError, MissingError
from connectomics.lightning.run_state import git_state, save_environment
from connectomics.pipeline.runs import differences, find_runs, open_run
from connectomics.pipeline.train import train
from connectomics.pipeline.tune_results import run_scores
from tests.lightning.synthetic_run import MadeUpData, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which the second has another learning rate and logs to MLflow, too."""
    place = tmp_path_factory.mktemp("outputs")
    train(tiny_config(training__max_epochs=1), place / "run/version_0", datamodule=MadeUpData())
    config = tiny_config(training__max_epochs=2, optimizer__lr=0.02, logging__use_mlflow=True)
    config.output_dir = str(place)
    train(config, place / "run/version_1", datamodule=MadeUpData())
    return place


def test_a_run_says_what_it_ran_in(folder: Path) -> None:
    about = open_run(folder / "run/version_0").environment
    assert about["connectomics"] == connectomics.__version__
    assert about["packages"]["torch"]
    assert about["git"] == git_state(Path(connectomics.__file__).parent)


def test_a_broken_record_of_the_starts_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run/version_0", tmp_path / "run")
    (run / "environment.json").write_text("[{")
    for read in (open_run, save_environment):
        with pytest.raises(MetadataError, match=r"cannot read .*/environment\.json as JSON: .*; remove it, or"):
            read(run)
    (run / "environment.json").unlink()
    assert open_run(run).environment == {}


def test_the_state_of_the_code(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    (tmp_path / "__init__.py").touch()
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert (len(state["commit"]), state["changed"]) == (40, False)
    (tmp_path / "__init__.py").write_text("1")
    assert git_state(tmp_path) == {**state, "changed": True}


def test_runs_are_found_with_their_scores(folder: Path) -> None:
    first, second = find_runs(folder)
    assert (first.folder.name, first.epochs, second.epochs) == ("version_0", 1, 2)
    assert first.best == pytest.approx(first.metrics["val/dice"])
    assert first.checkpoint == first.folder / "checkpoints/best.ckpt"
    apart = differences([first, second])
    assert apart["optimizer.lr"] == [0.01, 0.02]
    assert apart["training.max_epochs"] == [1, 2]
    assert "model.architecture" not in apart


def test_scores_of_a_run_are_those_of_its_weights(tmp_path: Path) -> None:
    """Without a best checkpoint these are the last ones."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("dataset: {classes: [mito]}\n")
    rows = ["epoch,step,val/dice,val/mito/dice", "0,4,0.6,0.5", "1,9,0.8,0.7", "2,14,0.4,0.3"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    for name, expected in (("last.ckpt", 0.3), ("best.ckpt", 0.7)):
        (tmp_path / "checkpoints" / name).touch()
        run = open_run(tmp_path)
        assert run.checkpoint == tmp_path / "checkpoints" / name
        assert run_scores(run)["mito"].score == expected


def test_the_log_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    config = tiny_config(training__max_epochs=1, training__precision="16-mixed")
    train(config, tmp_path / "run", datamodule=MadeUpData())
    assert "precision 16-mixed is for GPUs" in (tmp_path / "run/run.log").read_text()


def test_mlflow_has_the_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(f"file:{folder / 'mlruns'}")
    experiment = client.get_experiment_by_name("run")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    ours = open_run(folder / "run/version_1").metrics
    assert run.data.metrics["val/dice"] == pytest.approx(ours["val/dice"], abs=1e-6)
    assert run.info.run_name == "version_1"


def test_the_verb_lists_and_compares(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.index("version_0") < said.index("version_1")
    pair = [str(folder / "run" / name) for name in ("version_0", "version_1")]
    assert main(["runs", "--compare", *pair]) == 0
    assert "optimizer.lr" in capsys.readouterr().out
    assert main(["runs", "--json", str(folder)]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.yaml").write_text("- [")
    for arguments, error in (
        (["runs", str(tmp_path / "nowhere")], "no folder"),
        (["runs", "--compare", pair[0]], "at least two runs"),
        (["runs", "--compare", pair[0], str(tmp_path)], "not a run folder"),
        (["runs", str(tmp_path)], "cannot read"),
    ):
        assert main(arguments) == 1
        assert error in capsys.readouterr().err
    with pytest.raises((MissingError, MetadataError, InputError)):
        open_run(tmp_path / "bad")
