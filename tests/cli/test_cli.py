"""The command line: help, and one clear line with a non-zero status for every mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from connectomics.cli import main, run_guarded
from connectomics.errors import CorruptDataError, InputError
from connectomics.pipeline.predict import known_device
from tests.cellmap.roots import GROUND_TRUTH, grid_of, plain_root, write_label, write_raw, zarr_of
from tests.starter import Starter

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    "demo",
    "phantom",
    "describe",
    "annotate",
    "inspect",
    "cache",
    "train",
    "predict",
    "decode",
    "measure",
    "mesh",
    "evaluate",
    "tune",
    "propose",
    "export",
    "validate",
    "score",
    "report",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"pytc {verb}" in text.split("Examples:")[1]


def test_help_lists_the_verbs_and_a_mistyped_one_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert main(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err


def test_describe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain_root(tmp_path)
    assert main(["describe", str(root)]) == 0
    text = capsys.readouterr().out
    assert "set-a" in text
    assert "crop1" in text
    assert "mito" in text
    assert main(["describe", str(root), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["datasets"][0]["crops"][0]["extent_nm"] == [128.0, 128.0, 128.0]


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def fast(root: Path) -> list[str]:
    return ["train", str(ROOT / "tutorials/phantom.yaml"), "--fast-dev-run", f"dataset.data_root={root}",
            "dataset.classes=[mito]", "data.patch_size=[32,32,32]", "inference.window=[32,32,32]",
            "data.cache=none", "dataset.train_val_split=1.0"]  # fmt: skip


def test_bad_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain_root(tmp_path / "root")
    assert "no data root at" in failure(capsys, "describe", tmp_path / "nowhere")
    assert "did you mean 'set-a'" in failure(capsys, "describe", root, "--dataset", "set-b")
    assert "did you mean 'crop1'" in failure(capsys, "describe", root, "--crop", "crop11")
    assert "did you mean 'mito'" in failure(capsys, "describe", root, "--class", "mitos")
    assert "did you mean 'training.max_epochs'" in failure(capsys, *fast(root), "training.max_epoch=1")
    assert "did you mean 'basic_unet'" in failure(capsys, *fast(root), "model.architecture=basik_unet")
    assert "did you mean 'DiceLoss'" in failure(
        capsys, *fast(root), "model.loss_functions=[DiceLos]", "model.loss_weights=[1]"
    )
    assert "no checkpoint" in failure(
        capsys,
        "predict",
        ROOT / "tutorials/phantom.yaml",
        "--checkpoint",
        tmp_path / "no.ckpt",
        f"dataset.data_root={root}",
    )
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK not a checkpoint")
    assert "broken.ckpt" in failure(
        capsys, "predict", ROOT / "tutorials/phantom.yaml", "--checkpoint", broken, f"dataset.data_root={root}"
    )


def test_corrupt_raw_is_one_line_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain_root(tmp_path)
    chunks = (zarr_of(root, "set-a") / "recon-1/em/fibsem-uint8/s0").rglob("0")
    chunk = next(p for p in chunks if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:20])
    message = failure(capsys, *fast(root))
    assert "fibsem-uint8/s0/0" in message


def test_nan_in_raw_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.full((16, 16, 16), 0.5, np.float32)
    values[3, 4, 5] = np.nan
    write_raw(tmp_path, "set-a", values, grid_of((16, 16, 16)))
    write_label(
        tmp_path, "set-a", "crop1", "mito", np.eye(16, dtype=np.uint8)[None].repeat(16, 0), grid_of((16, 16, 16))
    )
    assert "NaN" in failure(capsys, *fast(tmp_path))


def test_missing_attributes_and_raw_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain_root(tmp_path / "a")
    attrs = zarr_of(root, "set-a") / GROUND_TRUTH / "crop1/mito/.zattrs"
    good = attrs.read_text()
    attrs.write_text(json.dumps({"multiscales": json.loads(good)["multiscales"]}))
    inner = zarr_of(root, "set-a") / GROUND_TRUTH / "crop1/mito/s0/.zattrs"
    if inner.exists():
        inner.write_text("{}")
    assert "could mean absent or unknown" in failure(capsys, *fast(root))
    attrs.write_text("{ not json")
    assert "not valid JSON" in failure(capsys, "describe", root)
    root = tmp_path / "b"
    write_raw(root, "set-a", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    label = np.eye(8, dtype=np.uint8)[None].repeat(8, 0)
    write_label(root, "set-a", "crop1", "mito", label, grid_of((8, 8, 8), start=5000.0))
    assert "no raw to train on" in failure(capsys, *fast(root))


def test_a_patch_larger_than_the_raw_trains(tmp_path: Path) -> None:
    """The normal case, not an error: raw and labels beyond are missing and unknown."""
    root = plain_root(tmp_path, shape=(10, 12, 9))
    assert main(fast(root)) == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let any file grow beyond 8 kB, as it would on a full disk."""
    code = (
        "import resource, signal, sys; from connectomics.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000));"
        f"sys.exit(main(['phantom', {str(tmp_path / 'p')!r}, '--preset', 'tiny']))"
    )
    # neither kernels nor bytecode beside the code: Python 3.11 keeps a .pyc that the limit has cut
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "numba"), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.returncode == 1, found.stderr
    assert "error: " in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "p").exists()


def test_demo_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("keep")
    assert "--overwrite" in failure(capsys, "demo", "--out", tmp_path)
    assert (tmp_path / "mine").read_text() == "keep"


def test_the_plans_script_says_what_it_needs(starter: Starter) -> None:
    """Its training is one of the guide's commands."""
    script = [ROOT / "scripts/main.py", "--config", ROOT / "tutorials/phantom.yaml"]
    bad = starter.run([*script, "--mode", "test", "training.max_epochs=1"])
    assert bad.status == 1
    assert bad.stderr.strip() == "error: --mode test needs --checkpoint FILE"


def test_the_list_of_verbs_says_all_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out.split("Commands:")[1].strip().splitlines()
    assert len(listed) > 20
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


def test_a_verb_that_is_added_later_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from connectomics.cli.app import app

    assert main(["greet"]) == 2
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    app.command("greet")(lambda: print("hello"))
    assert main(["greet"]) == 0
    assert "hello" in capsys.readouterr().out


def test_list_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list-models"]) == 0
    assert "mednext" in capsys.readouterr().out


def test_phantom_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "p", ignore_errors=True)
    assert main(["phantom", str(tmp_path / "p"), "--preset", "tiny", "--size", "400"]) == 0
    assert "test_crops.csv" in capsys.readouterr().out


def test_a_path_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain_root(tmp_path / "root")
    (tmp_path / "file").write_text("in the way")
    train = [a for a in fast(root) if a != "--fast-dev-run"]
    line = failure(capsys, *train, "--run-dir", tmp_path / "file")
    assert str(tmp_path / "file") in line
    assert "nothing at" in failure(capsys, "report", tmp_path / "report.html", "--run", tmp_path / "nowhere")
    (tmp_path / "no.json").write_text("not json")
    for option in ("--scores", "--baseline", "--evaluation"):
        said = failure(capsys, "report", tmp_path / "report.html", option, tmp_path / "no.json")
        assert "is not valid JSON" in said
    assert not (tmp_path / "report.html").exists()


def test_a_workers_error_is_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch hands an error of a loader worker over as the text of its traceback."""

    def work() -> None:
        text = "Caught CorruptDataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        text += '  File "a.py", line 1, in read\nValueError: low\n\nThe above exception was the direct cause:\n\n'
        text += '  File "b.py", line 2, in read\nconnectomics.errors.CorruptDataError: chunk 0/0/0 is cut short\n'
        raise CorruptDataError(text)

    assert run_guarded(work) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: chunk 0/0/0 is cut short"


def test_a_limit_of_file_sizes_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    assert run_guarded(work) == 1
    assert "error: a file is larger than the limit of file sizes (ulimit -f)" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_one_line() -> None:
    assert known_device("cpu") == "cpu"
    for name in ("gpu7", "cuda:99"):
        with pytest.raises(InputError, match="this machine has cpu"):
            known_device(name)


def test_without_arguments_the_way_through_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    places = [said.index(f"pytc {verb} ") for verb in ("fetch", "describe", "train", "predict", "decode", "export")]
    assert places == sorted(places)


def test_quiet_leaves_results_and_verbose_and_quiet_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = plain_root(tmp_path / "root")
    arguments = ["ingest", str(tmp_path / "mine"), "--dataset", "a", "--raw"]
    raw = str(next(root.rglob("fibsem-uint8")))
    assert main([*arguments, raw]) == 0
    assert "raw " in capsys.readouterr().err
    assert main(["-q", *arguments, raw, "--overwrite"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.strip().endswith("fibsem-uint8")
    assert main([*arguments, raw, "--overwrite", "--quiet"]) == 0  # behind the verb, too
    assert capsys.readouterr().err == ""
    assert main(["-q", "-v", "describe", str(root)]) == 2


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(tmp_path / "nowhere")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["describe", str(tmp_path / "nowhere"), "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err
