"""Edits of instances: the log, each edit against plain numpy, blocks against the whole, undo, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import connectomics as cx
from connectomics.decoding.edit_task import EditTask, divided
from connectomics.decoding.edits import Edit, Step, append_edit, apply_steps, read_edits
from connectomics.errors import ConnectomicsError, InputError, MissingError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.levels import halve_labels
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import ArrayWriter, write_multiscale
from connectomics.pipeline.apply_edits import edit_tasks, run_edits
from connectomics.tasks import run_task
from tests.cli.small_way import pytc
from tests.trees import contents

SIZE = (8.0, 4.0, 4.0)
GRID = VoxelGrid(SIZE, (804.0, 402.0, 2.0), (30, 44, 52))
Array = NDArray[Any]


def world(*voxel: float) -> list[float]:
    return [float(v) for v in GRID.to_world(voxel)]


def dumbbell() -> Array:
    """Two balls with a neck: instance 5; further instances 2, 9 and 300 (larger than a byte)."""
    z, y, x = np.indices(GRID.shape)
    labels = np.zeros(GRID.shape, np.uint16)
    for center in ((15, 20, 12), (15, 20, 38)):
        labels[((z - center[0]) * 2) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 <= 10**2] = 5
    labels[14:16, 18:22, 12:38] = 5
    labels[1:4, 1:6, 1:9] = 2
    labels[5:9, 36:42, 2:9] = 9
    labels[20:28, 36:42, 30:50] = 300
    return labels


def er() -> Array:
    labels = np.zeros(GRID.shape, np.uint8)
    labels[22:24, 36:38, 28:34] = 3
    return labels


def write_labels(folder: Path, name: str, values: Array, kind: str = "instance", crop: str = "crop1") -> None:
    about = {"artefact": "labels", "class_name": name, "kind": kind, "complete": True, "id": name}
    place = folder / "cell.zarr" / crop / name
    write_multiscale(place, values, GRID, attrs={"connectomics": about}, chunks=(16, 16, 16))


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    write_labels(tmp_path / "labels", "mito", dumbbell())
    write_labels(tmp_path / "labels", "er", er())
    return tmp_path / "labels"


def log(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps({"class": "mito", **line}) + "\n" for line in lines))
    return path


def values(folder: Path, name: str = "mito") -> Array:
    source = Multiscale.open(str(folder / "cell.zarr/crop1" / name))
    return source.read_level(0, (0, 0, 0), GRID.shape, absent_is_missing=False)[0]


SPLIT = {"op": "split", "id": 5, "seeds": [world(15, 20, 12), world(15, 20, 38)]}


# -- each edit ---------------------------------------------------------------------------------------------------------
def test_merge_and_delete_are_tables(labels: Path, tmp_path: Path) -> None:
    edits = log(tmp_path, {"op": "merge", "ids": [9, 2, 300], "comment": "one tube"}, {"op": "delete", "id": 5})
    before = contents(labels)
    made = cx.apply_edits(labels, edits, out=tmp_path / "out")
    expected = dumbbell()
    expected[np.isin(expected, [2, 300])] = 9
    expected[expected == 5] = 0
    assert np.array_equal(values(made.folder), expected)
    assert np.array_equal(values(made.folder, "er"), er())
    assert contents(labels) == before
    with (made.folder / "cell.zarr/crop1/mito/instances.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (int(row["id"]), int(row["voxels"])) == (9, int((expected == 9).sum()))
    assert float(row["begin_z_nm"]) == 804 + (1 - 0.5) * 8
    said = Multiscale.open(str(made.folder / "cell.zarr/crop1/mito")).attrs["connectomics"]
    assert said["objects"] == 1
    assert said["kind"] == "instance"
    assert said["complete"] is True


def test_blocks_in_any_order_of_memory() -> None:
    """fastremap replaces only the values of contiguous arrays in place."""
    block = np.arange(24, dtype=np.uint64).reshape(2, 3, 4)[:, :, ::2]
    volumes = {"mito": block}
    apply_steps([Step(Edit("delete", "mito", ids=(2,), line=1))], volumes, (0, 0, 0), {})
    assert 2 not in volumes["mito"]
    assert volumes["mito"].sum() == block.sum() - 2


def test_a_split_cuts_at_the_neck_and_the_second_seed_gets_a_new_instance(labels: Path, tmp_path: Path) -> None:
    made = cx.apply_edits(labels, log(tmp_path, SPLIT), out=tmp_path / "out")
    found, before = values(made.folder), dumbbell()
    assert found.dtype == np.uint16
    assert np.array_equal(found > 0, before > 0)
    assert np.array_equal(found[before != 5], before[before != 5])
    x = np.broadcast_to(np.arange(GRID.shape[2]), GRID.shape)
    assert (found[(before == 5) & (x < 22)] == 5).all()
    assert (found[(before == 5) & (x > 28)] == 301).all()  # the largest before is 300
    assert json.loads((made.folder / "edits.json").read_text()) == [
        {"line": 1, "op": "split", "class": "mito", "ids": [5], "new": 301, "voxels": (found == 301).sum(),
         "dataset": "cell", "crop": "crop1"}
    ]  # fmt: skip


def test_seeds_at_the_rim_still_cut_at_the_neck() -> None:
    """A marker climbs to the middle of its lobe first, else the other one would flow through the neck before it."""
    mask = dumbbell() == 5
    part = divided(mask, (15, 11, 12), (15, 20, 38), SIZE)
    assert np.array_equal(part > 0, mask)
    assert part[15, 20, 12] == 1
    assert part[15, 20, 38] == 2
    assert abs(int((part == 1).sum()) - int((part == 2).sum())) < 0.1 * mask.sum()


def test_a_part_without_a_seed_goes_to_the_nearer_one() -> None:
    mask = np.zeros((1, 9, 40), bool)
    mask[:, 2:7, 2:8] = mask[:, 2:7, 20:26] = mask[:, 4:5, 12:14] = True
    part = divided(mask, (0, 4, 4), (0, 4, 22), SIZE)
    assert (part[:, :, :14][mask[:, :, :14]] == 1).all()
    assert (part[:, :, 20:][mask[:, :, 20:]] == 2).all()


def test_reclassified_instances_leave_what_the_other_class_has(labels: Path, tmp_path: Path) -> None:
    edits = log(tmp_path, {"op": "reclassify", "id": 300, "to": "er"}, {"op": "merge", "class": "er", "ids": [4, 3]})
    made = cx.apply_edits(labels, edits, out=tmp_path / "out")
    mito, network = dumbbell(), er()
    network[mito == 300] = 4
    network[er() == 3] = 4
    mito[mito == 300] = 0
    assert np.array_equal(values(made.folder), mito)
    assert np.array_equal(values(made.folder, "er"), network)
    done = json.loads((made.folder / "edits.json").read_text())
    assert [(e["op"], e.get("to"), e.get("new")) for e in done] == [("reclassify", "er", 4), ("merge", None, None)]
    # what er has stays er's
    alone = cx.apply_edits(labels, log(tmp_path, {"op": "reclassify", "id": 300, "to": "er"}), out=tmp_path / "alone")
    assert (values(alone.folder, "er")[er() == 3] == 3).all()


def test_an_instance_that_finds_no_room_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    move, labels = {"op": "reclassify", "id": 300, "to": "er"}, tmp_path / "labels"
    write_labels(labels, "mito", dumbbell())
    write_labels(labels, "er", np.full(GRID.shape, 3, np.uint16))
    found = cx.apply_edits(labels, log(tmp_path, move), out=tmp_path / "full")
    assert "line 1: instance 300 of mito is lost: as instance 4 of er it has no voxels" in caplog.text
    (step,) = json.loads((found.folder / "edits.json").read_text())
    assert (step["new"], step["voxels"]) == (4, 0)
    caplog.clear()
    made = cx.apply_edits(labels, log(tmp_path, {"op": "delete", "class": "er", "id": 3}, move), out=tmp_path / "room")
    assert json.loads((made.folder / "edits.json").read_text())[1]["voxels"] == (dumbbell() == 300).sum()
    again = log(tmp_path, move, {"op": "delete", "class": "er", "id": 4})  # it is meant to be gone
    cx.apply_edits(labels, again, out=tmp_path / "gone")
    assert "is lost" not in caplog.text


def test_a_semantic_class_can_take_instances(labels: Path, tmp_path: Path) -> None:
    write_labels(labels, "cyto", np.zeros(GRID.shape, np.uint8), kind="semantic")
    made = cx.apply_edits(labels, log(tmp_path, {"op": "reclassify", "id": 5, "to": "cyto"}), out=tmp_path / "out")
    assert np.array_equal(values(made.folder, "cyto") == 1, dumbbell() == 5)


# -- order, blocks, undo -----------------------------------------------------------------------------------------------
MANY = (
    {"op": "merge", "ids": [5, 2]},
    SPLIT,
    {"op": "split", "id": 301, "seeds": [world(15, 14, 38), world(15, 26, 38)]},
    {"op": "delete", "id": 9},
    {"op": "merge", "ids": [300, 302]},
    {"op": "reclassify", "id": 301, "to": "er"},
    {"op": "delete", "id": 5},
)


def tasks_of(labels: Path, edits: Path, out: Path, block: tuple[int, int, int], **changes: Any) -> list[EditTask]:
    fields = [{**task.to_dict(), "block_shape": block, **changes} for task in edit_tasks(labels, edits, out)]
    return [EditTask.from_dict(one) for one in fields]


@pytest.mark.parametrize("block", [(16, 16, 16), (32, 16, 48), (48, 48, 64)])
def test_blocks_give_what_the_whole_gives(labels: Path, tmp_path: Path, block: tuple[int, int, int]) -> None:
    edits = log(tmp_path, *MANY)
    whole = cx.apply_edits(labels, edits, out=tmp_path / "whole")
    run_edits(tasks_of(labels, edits, tmp_path / "blocks", block), None, overwrite=False, resume=False, progress=print)
    for name in ("mito", "er"):
        assert np.array_equal(values(tmp_path / "blocks", name), values(whole.folder, name))
        tables = [f / "cell.zarr/crop1" / name / "instances.csv" for f in (tmp_path / "blocks", whole.folder)]
        assert tables[0].read_text() == tables[1].read_text()
    assert set(np.unique(values(whole.folder))) == {0, 300}
    assert set(np.unique(values(whole.folder, "er"))) == {0, 3, 4}


def test_edits_in_order_are_edits_one_after_the_other(labels: Path, tmp_path: Path) -> None:
    """Each applied to the output of the one before gives the same as all of them together."""
    folder = labels
    for number, edit in enumerate(MANY):
        target = tmp_path / f"step{number}"
        cx.apply_edits(folder, log(tmp_path, edit), out=target)
        folder = target
    together = cx.apply_edits(labels, log(tmp_path, *MANY), out=tmp_path / "together")
    assert np.array_equal(values(folder), values(together.folder))
    assert np.array_equal(values(folder, "er"), values(together.folder, "er"))


def test_undo_leaves_out_the_last_edits_and_all_of_them_give_the_original(labels: Path, tmp_path: Path) -> None:
    edits = log(tmp_path, *MANY)
    out = tmp_path / "out"
    cx.apply_edits(labels, edits, out=out)
    with pytest.raises(WriteError, match=r"made from other edits; overwrite"):
        cx.apply_edits(labels, edits, out=out, undo=1)
    cx.apply_edits(labels, edits, out=out, undo=5, overwrite=True)
    first = cx.apply_edits(labels, log(tmp_path, *MANY[:2]), out=tmp_path / "first")
    assert np.array_equal(values(out), values(first.folder))
    cx.apply_edits(labels, log(tmp_path, *MANY), out=out, undo=7, overwrite=True)
    assert np.array_equal(values(out), dumbbell())
    with pytest.raises(InputError, match="from 0 to the 7 edits"):
        cx.apply_edits(labels, log(tmp_path, *MANY), out=out, undo=8)


def test_repeated_it_does_nothing_and_killed_it_resumes(labels: Path, tmp_path: Path) -> None:
    edits, out = log(tmp_path, *MANY), tmp_path / "out"
    (task,) = (t for t in tasks_of(labels, edits, out, (16, 16, 16)) if t.class_name == "mito")
    task.claim()
    task.prepare("survey")
    with task.open_worker("survey", "cpu") as worker:
        list(worker.run(range(task.blocks("survey"))))
    task.prepare("write")
    with task.open_worker("write", "cpu") as worker:
        list(worker.run([3, 1]))
    moved = log(tmp_path, {**MANY[0], "comment": "x"}, *MANY[1:])
    moved.write_text("\n" + moved.read_text())  # other numbers of lines, the same edits
    (same,) = (t for t in tasks_of(labels, moved, out, (16, 16, 16)) if t.class_name == "mito")
    assert run_task(same, resume=True)
    whole = cx.apply_edits(labels, edits, out=tmp_path / "whole")
    assert np.array_equal(values(out), values(whole.folder))
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("s0/*")}
    cx.apply_edits(labels, edits, out=whole.folder)
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("s0/*")} == before


def test_labels_that_were_changed_since_are_other_labels(labels: Path, tmp_path: Path) -> None:
    """They keep their ID when another program draws in them."""
    edits, out = log(tmp_path, {"op": "delete", "id": 5}), tmp_path / "out"
    cx.apply_edits(labels, edits, out=out)
    ArrayWriter.open(labels / "cell.zarr/crop1/mito/s0").write((0, 0, 0), np.full((16, 16, 16), 9, np.uint16))
    with pytest.raises(WriteError, match="from other labels of mito"):
        cx.apply_edits(labels, edits, out=out)
    cx.apply_edits(labels, edits, out=out, overwrite=True)
    assert (values(out)[:16, :16, :16] == 9).all()


def test_the_summary_has_the_lines_of_this_log(labels: Path, tmp_path: Path) -> None:
    """Of a class that an earlier log has edited alike, with other lines before it."""
    er_line = {"op": "delete", "class": "er", "id": 3}
    cx.apply_edits(labels, log(tmp_path, er_line), out=tmp_path / "out")
    edits = log(tmp_path, {"op": "delete", "id": 5}, er_line)
    made = cx.apply_edits(labels, edits, out=tmp_path / "out", overwrite=True, resume=True)
    told = [(e["line"], e["class"], e["ids"]) for e in json.loads((made.folder / "edits.json").read_text())]
    assert told == [(1, "mito", [5]), (2, "er", [3])]


def test_a_large_instance_is_divided_on_coarser_cells(labels: Path, tmp_path: Path) -> None:
    edits = log(tmp_path, SPLIT)
    tasks = tasks_of(labels, edits, tmp_path / "out", (16, 16, 16), split_voxels=500)
    assert tasks[1]._stride(np.array([11, 21, 47])) == (2, 4, 4)
    run_edits(tasks, None, overwrite=False, resume=False, progress=print)
    found, fine = values(tmp_path / "out"), cx.apply_edits(labels, edits, out=tmp_path / "fine")
    assert np.array_equal(found > 0, dumbbell() > 0)
    assert {int(found[15, 20, 12]), int(found[15, 20, 38])} == {5, 301}
    assert (found != values(fine.folder)).sum() < 0.1 * (dumbbell() == 5).sum()


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"op": "merge", "ids": [5]}, "line 1: merge: expected two or more ids"),
        ({"op": "merge", "ids": [5, 5]}, "names an instance twice"),
        ({"op": "remove", "id": 5}, r"line 1: op must be one of merge, split"),
        ({"op": "delete", "id": 5, "why": "x"}, "line 1.*why"),
        ({"op": "delete", "id": 7}, "line 1: mito has no instance 7"),
        ({"op": "split", "id": 5}, "a split has two seeds"),
        ({"op": "split", "id": 5, "seeds": [world(15, 20, 12), world(0, 0, 0)]}, r"is in 0, expected 5"),
        ({"op": "split", "id": 5, "seeds": [[-9e3, 0, 0], world(15, 20, 12)]}, r"is in 0, expected 5"),
        ({"op": "split", "id": 5, "seeds": [world(15, 20, 12)] * 2}, "voxels apart"),
        ({"op": "reclassify", "id": 5}, "needs the class"),
        ({"op": "reclassify", "id": 5, "to": "nuc"}, "cell/crop1 has no labels of nuc"),
        ({"op": "delete", "id": 5, "class": "nuc"}, "nuc: there are no such labels"),
        ({"op": "delete", "id": 5, "crop": "crop2"}, "there are no such labels"),
    ],
)
def test_wrong_edits_are_refused_with_their_line(
    labels: Path, tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConnectomicsError, match=message):
        cx.apply_edits(labels, log(tmp_path, line), out=tmp_path / "out")
    assert not (tmp_path / "out/cell.zarr/crop1/mito").exists()


def test_what_else_is_refused(labels: Path, tmp_path: Path) -> None:
    gone = log(tmp_path, {"op": "delete", "id": 5}, {"op": "merge", "ids": [2, 5]})
    with pytest.raises(InputError, match="line 2: mito has no instance 5 after line 1"):
        cx.apply_edits(labels, gone, out=tmp_path / "a")
    for place in (labels, labels / "proofread", labels / "cell.zarr/crop1"):
        with pytest.raises(InputError, match="never changed"):
            cx.apply_edits(labels, gone, out=place)
    with pytest.raises(MissingError, match="no edits at"):
        cx.apply_edits(labels, tmp_path / "none.jsonl", out=tmp_path / "a")
    gone.write_text('{"op": "delete", "id": 5}')
    with pytest.raises(InputError, match="line 1: expected an edit with keys op, class, and id or ids"):
        read_edits(gone)
    gone.write_text('{"op": "delete", "class": "mito", "id": 5}\n{"op": "del')
    with pytest.raises(InputError, match="line 2 is no JSON"):
        read_edits(gone)
    write_labels(labels, "nuc", (dumbbell() > 0).astype(np.uint8), kind="semantic")
    with pytest.raises(InputError, match="line 1: nuc is semantic, and edits are of instances"):
        cx.apply_edits(labels, log(tmp_path, {"op": "reclassify", "class": "nuc", "id": 1, "to": "er"}), out=tmp_path)
    largest = dumbbell().astype(np.uint64)
    largest[0, 0, 0] = 2**64 - 1
    write_labels(tmp_path / "large", "mito", largest)
    with pytest.raises(InputError, match="line 1: no ID is left for a new instance: mito has IDs up to 18446744"):
        cx.apply_edits(tmp_path / "large", log(tmp_path, SPLIT), out=tmp_path / "b")
    write_labels(labels, "mito", dumbbell(), crop="crop2")
    with pytest.raises(InputError, match="2 arrays fit; give dataset and crop"):
        cx.apply_edits(labels, log(tmp_path, {"op": "delete", "id": 5}), out=tmp_path / "a")


def test_a_written_line_reads_as_the_edit(tmp_path: Path) -> None:
    edits = [
        Edit("merge", "mito", (3, 7), line=1),
        Edit("split", "mito", (5,), ((1.5, 2.0, 3.0), (4.0, 5.0, 6.0)), crop="crop7", line=2),
        Edit("reclassify", "mito", (4,), to="er", dataset="cell", line=3),
    ]
    for edit in edits:
        append_edit(tmp_path / "edits.jsonl", edit)
    assert read_edits(tmp_path / "edits.jsonl") == edits
    written = (tmp_path / "edits.jsonl").read_bytes()
    (tmp_path / "edits.jsonl").write_bytes(written.rstrip(b"\n"))  # as some editors leave a file
    append_edit(tmp_path / "edits.jsonl", Edit("delete", "mito", (8,)))
    assert (tmp_path / "edits.jsonl").read_bytes() == written + b'{"op": "delete", "class": "mito", "id": 8}\n'


def test_the_verb(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits = log(tmp_path, *MANY[:2])
    pytc("apply-edits", labels, edits, "--out", tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out)[1]["new"] == 301
    pytc("apply-edits", labels, edits, "--out", tmp_path / "out", "--undo", "1", "--overwrite")
    assert "merge" in capsys.readouterr().out
    pytc("apply-edits", labels, edits, "--out", tmp_path / "other", "--dry-run")
    assert "survey" in capsys.readouterr().out
    assert not (tmp_path / "other/cell.zarr/crop1/mito").exists()


def test_decoded_labels_keep_what_they_say(tmp_path: Path) -> None:
    from tests.decoding.decode_kit import decode_predictions
    from tests.decoding.test_blocks import write_input

    probability = (dumbbell() > 0).astype(np.uint8) * 255
    write_input(tmp_path / "in", probability)
    decode_predictions(tmp_path / "in", tmp_path / "labels")
    edits = tmp_path / "edits.jsonl"
    append_edit(edits, Edit("delete", "mito", (1,)))
    made = cx.apply_edits(tmp_path / "labels", edits, out=tmp_path / "out")
    before, after = (Multiscale.open(str(f / "in.zarr/crop1/mito")) for f in (tmp_path / "labels", made.folder))
    old, new = (source.attrs["connectomics"] for source in (before, after))
    assert new["decode"] == old["decode"]
    assert new["source"] == old["source"]
    assert new["made_from"]["labels of mito"].startswith(old["id"])
    assert new["objects"] == old["objects"] - 1


def test_edited_labels_have_coarser_levels_if_the_labels_do(tmp_path: Path) -> None:
    from tests.decoding.decode_kit import decode_predictions
    from tests.decoding.test_blocks import write_input

    probability = np.zeros((70, 20, 24), np.uint8)
    probability[4:30, 2:9, 2:9] = probability[40:66, 8:19, 8:19] = 255
    write_input(tmp_path / "in", probability)
    edits = tmp_path / "edits.jsonl"
    append_edit(edits, Edit("delete", "mito", (1,)))
    for pyramid in (True, False):
        out = tmp_path / str(pyramid)
        decode_predictions(tmp_path / "in", out / "labels", pyramid=pyramid)
        made = cx.apply_edits(out / "labels", edits, out=out / "edited")
        source = Multiscale.open(str(made.folder / "in.zarr/crop1/mito"))
        levels = [source.read_level(n, (0, 0, 0), level.grid.shape)[0] for n, level in enumerate(source.levels)]
        assert np.array_equal(levels[0], 2 * (np.indices(probability.shape)[0] > 35) * (probability > 0))
        assert len(levels) == 1 + pyramid
        assert not pyramid or np.array_equal(levels[1], halve_labels(levels[0]))
