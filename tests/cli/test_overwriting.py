"""What lies where a verb would write, and was not written by that verb, is refused in one line and stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.fetch import Missing, RemoteFile, transfer
from connectomics.cellmap.fetch.plan import FetchItem, FetchPlan
from connectomics.cellmap.ingest import Drawn, ingest_labels, ingest_raw
from connectomics.cli import main
from connectomics.errors import WriteError
from connectomics.io.formats import open_volume
from connectomics.io.store import StoreOptions
from connectomics.io.write import create_array, create_multiscale, ensure_group, write_multiscale
from tests.cellmap.roots import grid_of, plain_root
from tests.cli.small_way import Way
from tests.cli.test_odd_places import state_of

#: a command of each verb that writes, and the file of somebody else that lies where it would write: in the folder {out}
FOREIGN = [
    ("phantom {out} --preset tiny --overwrite", "notes.txt"),
    ("demo --out {out} --overwrite", "notes.txt"),
    ("plan {root} --class mito --no-trial --overwrite --out {out}", "plan_8nm.yaml"),
    ("inspect {config} --batches 1 --overwrite --out {out}/page.html", "page.html"),
    ("train {config} --run-dir {out}", "config.yaml"),
    ("train {config} --run-dir {out}", "state.json"),
    ("train {config} --run-dir {out}", "metrics.csv"),
    ("evaluate {labels} {root} --out {out}/numbers.json", "numbers.json"),
    ("evaluate {labels} {root} --out {out}/numbers.json", "numbers_per_crop.csv"),
    ("export {labels} {out}/submission.zip --crops {table}", "submission.zip"),
    ("validate {submission} --crops {table} --out {out}/findings.json", "findings.json"),
    ("score {submission} {truth} --crops {table} --out {out}", "scores.json"),
    ("score {submission} {truth} --crops {table} --out {out}", "scores_per_class.csv"),
    ("report {out}/page.html --run {run}", "page.html"),
    ("report {out} --run {run}", "report.html"),
    ("package {run} --out {out}/net.pytc --overwrite", "net.pytc"),
    ("view {root} --dataset set-a --state {out}/state.json", "state.json"),
]


@pytest.mark.parametrize(("command", "name"), FOREIGN, ids=[f"{c.split()[0]}-{n}" for c, n in FOREIGN])
def test_what_others_wrote_stays(
    command: str, name: str, way: Way, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("six months of work\n")
    places = {key: getattr(way, key) for key in ["root", "config", "run", "labels", "table", "truth", "submission"]}
    words = [word.format(out=out, **places) for word in command.split()]
    assert main(words) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1, said
    assert "not written by" in said[0]
    assert str(out) in said[0]
    assert {p.name: p.read_text() for p in out.iterdir() if p.is_file()} == {name: "six months of work\n"}


#: the same, for what the verb wrote itself
OWN = [
    ("evaluate {labels} {root} --out {out}/numbers.json", "numbers.json"),
    ("validate {submission} --crops {table} --out {out}/findings.json", "findings.json"),
    ("score {submission} {truth} --crops {table} --out {out}", "scores.json"),
    ("report {out}/page.html --run {run}", "page.html"),
    ("plan {root} --class mito --no-trial --overwrite --out {out}", ""),
    ("package {run} --out {out}/net.pytc --overwrite", "net.pytc"),
]


@pytest.mark.parametrize(("command", "name"), OWN, ids=[command.split()[0] for command, _ in OWN])
def test_what_the_verb_wrote_itself_is_replaced(command: str, name: str, way: Way, tmp_path: Path) -> None:
    out = tmp_path / "out"
    places = {key: getattr(way, key) for key in ["root", "config", "run", "labels", "table", "truth", "submission"]}
    words = [word.format(out=out, **places) for word in command.split()]
    main(words)  # validate ends with 1 if it finds errors
    first = state_of(out)
    assert (out / name).exists()
    main(words)
    again = state_of(out)
    assert again.keys() == first.keys()
    assert all(again[file] != first[file] for file in first if Path(file).suffix in (".json", ".html", ".pytc"))


def test_a_folder_of_demo_with_something_else_in_it_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    (out / "run").mkdir(parents=True)
    (out / "demo.json").write_text("{}")
    (out / "notes.txt").write_text("six months of work")
    before = state_of(out)
    assert main(["demo", "--out", str(out), "--overwrite"]) == 1
    assert f"{out / 'notes.txt'} was not written by demo" in capfd.readouterr().err
    assert state_of(out) == before


def test_a_data_set_that_was_put_into_a_phantom_is_left_alone(
    tmp_path: Path, phantom: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "phantom"
    shutil.copytree(phantom, out)
    (out / "mine").mkdir()
    before = state_of(out)
    assert main(["phantom", str(out), "--preset", "tiny", "--overwrite"]) == 1
    assert f"{out / 'mine'} was not written by phantom" in capfd.readouterr().err
    assert state_of(out) == before


def test_ingest_replaces_what_it_wrote_and_nothing_else(tmp_path: Path) -> None:
    np.save(tmp_path / "raw.npy", np.full((16, 16, 16), 7, np.uint8))
    np.save(tmp_path / "mito.npy", np.ones((16, 16, 16), np.uint8))
    theirs, ours = plain_root(tmp_path / "theirs"), tmp_path / "ours"
    with open_volume(str(tmp_path / "raw.npy")) as raw, open_volume(str(tmp_path / "mito.npy")) as mito:
        before = state_of(theirs)
        with pytest.raises(WriteError, match="not written by ingest"):
            ingest_raw(theirs, "set-a", raw, (8, 8, 8), overwrite=True)
        with pytest.raises(WriteError, match="not written by ingest"):
            ingest_labels(theirs, "set-a", "crop1", Drawn("mito", mito), overwrite=True)
        assert state_of(theirs) == before
        for overwrite in (False, True):
            place = ingest_raw(ours, "a", raw, (8, 8, 8), overwrite=overwrite)
            ingest_labels(ours, "a", "crop1", Drawn("mito", mito), overwrite=overwrite)
        with pytest.raises(WriteError, match="is there already"):
            ingest_raw(ours, "a", raw, (8, 8, 8))
    assert [path.name for path in place.parent.iterdir() if path.name.startswith(".")] == [".zgroup"]


def test_a_file_that_was_not_fetched_is_not_replaced_by_fetch(tmp_path: Path) -> None:
    mine = tmp_path / "root/a/one"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"proofread labels")
    plan = FetchPlan("s3://public", (FetchItem("a", (RemoteFile("a/one", 3, "abc-2", "a/one"),)),))
    with pytest.raises(WriteError, match="a/one was not written by fetch and is left alone"):
        transfer(Missing.below(tmp_path / "root", plan), tmp_path / "root", StoreOptions())
    assert mine.read_bytes() == b"proofread labels"


WRITERS: dict[str, Callable[[Path], object]] = {
    "create_array": lambda path: create_array(path, (4, 4, 4), np.uint8, overwrite=True),
    "create_multiscale": lambda path: create_multiscale(path, [grid_of((4, 4, 4))], np.uint8, overwrite=True),
    "write_multiscale": lambda path: write_multiscale(
        path, np.zeros((4, 4, 4), np.uint8), grid_of((4, 4, 4)), overwrite=True
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_volume_takes_the_place_of_a_volume_and_not_of_a_group_of_them(name: str, tmp_path: Path) -> None:
    write = WRITERS[name]
    cell = tmp_path / "cell.zarr"
    ensure_group(cell)
    for inner in ("mito", "er"):
        create_multiscale(cell / inner, [grid_of((4, 4, 4))], np.uint8)
    before = state_of(cell)
    with pytest.raises(WriteError, match=r"is no part of a multiscale"):
        write(cell)
    assert state_of(cell) == before
    write(cell / "mito")
    write(cell / "mito")
    assert sorted(path.name for path in cell.iterdir()) == [".zgroup", "er", "mito"]
