"""Measures and meshes as tasks: tables as CSV and Parquet, any engine, killed and run again, another task's output."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from connectomics.cli import main
from connectomics.config.schema import EngineConfig
from connectomics.errors import InputError, MetadataError, WriteError
from connectomics.io import tables
from connectomics.morphology import ContactSpec, ContactsTask, MeasureTask
from connectomics.morphology.block_sums import BlockSums, empty_tables, sum_blocks
from connectomics.pipeline.measure import measure_labels, measure_tasks
from connectomics.pipeline.mesh import mesh_labels, mesh_tasks
from connectomics.tasks import BlockTask, run_task
from connectomics.tasks.block_task import TASK_FILE
from connectomics.testing.block_tasks import check_order_does_not_matter, check_round_trip
from tests.morphology.test_measure import BLOCK, noise, stored
from tests.morphology.test_measure import rows as rows_of
from tests.starter import Starter

ROOT = Path(__file__).resolve().parents[2]
CONTACT = ContactSpec("mito", "er", 16)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    folder = tmp_path / "labels"
    stored(folder, noise(1), (8, 8, 8))
    stored(folder, noise(3), (8, 4, 5.24), crop="crop2")
    stored(folder, noise(2), (8, 8, 8), "er")
    return folder


def tasks_of(labels: Path, out: Path, **options: object) -> tuple[MeasureTask, ContactsTask]:
    one, two = measure_tasks(labels, out, classes=["mito"], contacts=[CONTACT], block=BLOCK, **options)  # type: ignore[arg-type]
    assert isinstance(one, MeasureTask)
    assert isinstance(two, ContactsTask)
    return one, two


# -- tables ------------------------------------------------------------------------------------------------------------
def test_parquet_holds_what_csv_holds_and_says_the_units(labels: Path, tmp_path: Path) -> None:
    for form in tables.FORMATS:
        measure_labels(
            measure_tasks(labels, tmp_path, classes=["mito"], contacts=[CONTACT], table_format=form, block=BLOCK)
        )
    for name in ("mito", "contacts_mito_er_16nm"):
        plain, found = rows_of(tmp_path / f"{name}.csv"), pq.read_table(tmp_path / f"{name}.parquet")
        assert found.column_names == list(plain[0])
        assert found.num_rows == len(plain)
        for row, other in zip(plain, found.to_pylist(), strict=True):
            for key, value in other.items():
                if isinstance(value, list):
                    assert row[key] == " ".join(map(str, value))
                elif isinstance(value, float):
                    assert float(row[key]) == pytest.approx(value, abs=0.0006)
                else:
                    assert row[key] == ("" if value is None else str(int(value) if isinstance(value, bool) else value))
    schema = pq.read_schema(tmp_path / "mito.parquet")
    units = {field.name: (field.metadata or {}).get(b"unit", b"").decode() for field in schema}
    assert units["volume_nm3"] == "nm3"
    assert units["begin_z_nm"] == "nm"
    assert units["voxels"] == "voxels"
    assert all(unit in ("", "voxels") or name.endswith(f"_{unit}") for name, unit in units.items())
    about = json.loads(schema.metadata[b"connectomics"])
    assert about.pop("kind") == "measure"
    assert MeasureTask.from_dict(about).class_name == "mito"


def test_an_unknown_table_format_is_refused(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown table format 'xlsx'"):
        measure_labels(measure_tasks(labels, tmp_path / "out", table_format="xlsx"))
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_read_back(tmp_path: Path) -> None:
    columns = (tables.Column("id", "id"), tables.Column("size_nm", "number", "nm"))
    for form in tables.FORMATS:
        path = tmp_path / f"a.{form}"
        with tables.table(path, columns) as out:
            out.write({"id": np.array([2**63, 5], np.uint64), "size_nm": np.array([0.25, np.nan])})
            out.write({"id": np.array([7], np.uint64), "size_nm": np.array([-3.0])})
        found = tables.read_columns(path, ["id"])
        assert found["id"].tolist() == [2**63, 5, 7]
        with pytest.raises(InputError, match="expected the columns id, depth"):
            tables.read_columns(path, ["id", "depth"])
        with pytest.raises(RuntimeError), tables.table(path, columns) as out:
            raise RuntimeError
        assert tables.read_columns(path, ["id"])["id"].tolist() == [2**63, 5, 7]  # as it was
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.parquet"]
    for text in ("id,a_nm\nx,1\n", "id,a_nm\n1\n"):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(InputError, match="is no table of numbers"):
            tables.read_columns(tmp_path / "a.csv", ["id", "a_nm"])


def test_a_sum_over_blocks_does_not_depend_on_how_many_ids_are_summed_at_a_time() -> None:
    rng = np.random.default_rng(0)
    columns = {"sizes": 1, "boxes": 6}
    parts = []
    for _ in range(9):
        ids = rng.permutation(rng.choice(40, 12, replace=False)).astype(np.uint64)
        made = empty_tables(columns, len(ids))
        made["sizes"] += rng.integers(1, 9, (len(ids), 1))
        made["boxes"] = rng.integers(0, 50, (len(ids), 6))
        pairs = np.column_stack([ids, rng.integers(0, 3, len(ids)).astype(np.uint64)])
        parts.append(BlockSums(ids, made, pairs))
    parts.append(BlockSums(np.zeros(0, np.uint64), empty_tables(columns, 0), np.zeros((0, 2), np.uint64)))
    (whole,) = sum_blocks(len(parts), parts.__getitem__, columns)
    few = list(sum_blocks(len(parts), parts.__getitem__, columns, at_once=7))
    assert len(few) == -(-len(whole.ids) // 7)
    assert np.array_equal(np.concatenate([part.ids for part in few]), whole.ids)
    assert np.array_equal(np.concatenate([part.pairs for part in few]), whole.pairs)
    for name in columns:
        assert np.array_equal(np.concatenate([part.tables[name] for part in few]), whole.tables[name])
    each = [(int(i), int(n)) for part in parts for i, n in zip(part.ids, part.tables["sizes"][:, 0], strict=True)]
    for label, size in zip(whole.ids.tolist(), whole.tables["sizes"][:, 0].tolist(), strict=True):
        assert size == sum(n for i, n in each if i == label)


# -- tasks -------------------------------------------------------------------------------------------------------------
def test_a_task_comes_back_from_its_file(labels: Path, tmp_path: Path) -> None:
    every: list[BlockTask] = [
        *tasks_of(labels, tmp_path),
        mesh_tasks(labels, tmp_path, "mito", ids=[3], crops=["crop2"])[0],
    ]
    for task in every:
        task.save(tmp_path / "task.json")
        assert type(task).load(tmp_path / "task.json") == task
        data = task.to_dict()
        data["colour"] = data.pop("output")
        with pytest.raises(MetadataError, match="colour"):
            type(task).from_dict(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"workers": 2}, id="local"),
        pytest.param({"name": "dask", "workers": 2}, id="dask", marks=pytest.mark.slow),
    ],
)
def test_other_processes_write_the_same(labels: Path, tmp_path: Path, engine: dict[str, object]) -> None:
    for one, other in zip(tasks_of(labels, tmp_path / "here"), tasks_of(labels, tmp_path / "there"), strict=True):
        run_task(one)
        run_task(other, EngineConfig(**engine))  # type: ignore[arg-type]
        assert one.path.read_bytes() == other.path.read_bytes()
        assert not other.folder.exists()


def test_a_finished_table_is_left_and_another_is_refused(labels: Path, tmp_path: Path) -> None:
    task, _ = tasks_of(labels, tmp_path)
    assert run_task(task)
    assert not run_task(task)
    other = replace(task, inputs=task.inputs[:1])
    with pytest.raises(WriteError, match=r"holds a table made with other settings \(volumes\)"):
        run_task(other)
    assert run_task(other, overwrite=True)
    assert {row["crop"] for row in rows_of(task.path)} == {"crop1"}
    task.task_file.unlink()
    with pytest.raises(WriteError, match="holds a table that is only half written"):
        run_task(other)
    other.save(other.folder / TASK_FILE)  # killed right before the task's file: it goes on
    assert run_task(other)
    task.save(task.folder / TASK_FILE)
    assert not run_task(other)
    other.path.unlink()
    with pytest.raises(WriteError, match="holds an unfinished table"):
        run_task(other)


def test_labels_that_were_made_anew_are_another_input(labels: Path, tmp_path: Path) -> None:
    task, _ = tasks_of(labels, tmp_path)
    stored(labels, noise(5), (8, 8, 8), crop="crop3")
    shutil.rmtree(labels / "set-a.zarr/crop2/mito")
    stored(labels, noise(3), (8, 4, 5.24), crop="crop2", decode={"threshold": 0.7})
    with pytest.raises(MetadataError, match="has changed since"):
        run_task(task)


def test_the_verbs_take_an_engine_and_say_what_they_would_do(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["measure", str(labels), "--class", "mito", "--out", str(tmp_path / "out")]
    assert main([*words, "--dry-run"]) == 0
    assert "blocks" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([*words, "engine.workers=2"]) == 0
    assert main([*words, "model.name=unet"]) == 1
    assert "expected engine.key=value" in capsys.readouterr().err
    again = tmp_path / "again.json"
    data = json.loads((tmp_path / "out/mito.task.json").read_text())
    again.write_text(json.dumps({**data, "output": str(tmp_path / "again/mito.csv")}))
    assert main(["run-task", str(again)]) == 0
    assert (tmp_path / "again/mito.csv").read_bytes() == (tmp_path / "out/mito.csv").read_bytes()
    words = ["mesh", str(labels), str(tmp_path / "meshes"), "--class", "er"]
    assert main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "meshes").exists()


@pytest.mark.parametrize("verb", ["measure", "mesh"])
def test_resume_only_goes_on(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    out = tmp_path / "out"
    words = [verb, str(labels), *(["--out"] if verb == "measure" else []), str(out), "--class", "mito"]
    assert main([*words, "--resume"]) == 1
    assert f"--resume: nothing was begun below {out}; leave it out to begin" in capsys.readouterr().err
    assert not out.exists()
    task = (measure_tasks(labels, out, classes=["mito"]) if verb == "measure" else mesh_tasks(labels, out, "mito"))[0]
    task.claim()  # and killed then
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--resume"]) == 0  # of what is finished nothing is left
    assert not task.check()


def test_what_a_killed_run_left_half_written_is_removed(labels: Path, tmp_path: Path) -> None:
    task, _ = tasks_of(labels, tmp_path / "tables")
    (mesh,) = mesh_tasks(labels, tmp_path / "meshes", "er")
    left = [task.path.with_name(f".{task.path.name}.77.part"), task.path.with_name(".mito.summary.json.part-77-ab")]
    left += [mesh.folder / ".3.ply.part-77-ab", mesh.folder / ".meshes.csv.77.part"]
    mesh.claim()
    for path in left:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("half")
    run_task(task)
    run_task(mesh)
    assert [path for path in left if path.exists()] == []
    (task.folder / "blocks").mkdir(parents=True)  # killed as it was removed, when all was finished
    task.save(task.folder / TASK_FILE)
    (mesh.folder / ".boxes").mkdir()
    assert not run_task(task)
    measure_labels(measure_tasks(labels, task.path.parent, classes=["mito"], block=BLOCK))
    mesh_labels([mesh])
    hidden = [path for folder in (task.path.parent, mesh.folder) for path in folder.iterdir() if path.name[0] == "."]
    assert hidden == []


# -- killed ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        pytest.param("measure", 2, id="measure"),
        pytest.param("measure", 20, id="measure-20", marks=pytest.mark.slow),
        pytest.param("contacts", 20, id="contacts-20", marks=pytest.mark.slow),
        pytest.param("mesh", 20, id="mesh-20", marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again(tmp_path: Path, starter: Starter, kind: str, kills: int) -> None:
    """SIGKILL at random moments to the process that leads; in the end all files are those of an undisturbed run."""
    labels = tmp_path / "labels"
    n = 18 if kills < 20 else 48
    for seed, name in enumerate(("mito", "er")):
        cells = np.random.default_rng(seed).integers(0, 2 * n, (n, n, n)).astype(np.uint16)
        stored(labels, np.where(cells < n, 0, cells).astype(np.uint16), (8, 8, 8), name)
    task, undisturbed = _task(kind, labels, tmp_path / "killed"), _task(kind, labels, tmp_path / "whole")
    run_task(undisturbed)
    file = tmp_path / "wanted.json"
    task.save(file)
    command = ["pytc", "run-task", file]
    chance, progress = random.Random(kills), 0
    for _ in range(kills):
        before, leader = _files(task.folder), starter.start(command)
        leader.wait_for(lambda before=before: _files(task.folder) != before)  # type: ignore[misc]  # it has begun to work
        time.sleep(chance.random() * 0.1)
        progress += leader.is_running()
        leader.kill()
    assert progress >= 0.5 * kills  # it was not done long before
    assert starter.run(command).status == 0
    assert _outputs(tmp_path / "killed") == _outputs(tmp_path / "whole")


def _task(kind: str, labels: Path, out: Path) -> BlockTask:
    if kind == "mesh":
        (mesh,) = mesh_tasks(labels, out, "mito")
        return replace(mesh, block_shape=(6, 6, 6))
    one, two = measure_tasks(labels, out, classes=["mito"], contacts=[CONTACT], block=(3, 3, 3))
    return one if kind == "measure" else two


def _files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))  # what is removed meanwhile it does not mind


def _outputs(folder: Path) -> dict[str, bytes]:
    """Contents of all finished files but those that name the folder. Hidden ones are what the work needed: a run that
    is killed as it removes them, all else being done, leaves some."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: path for name, path in found.items() if "/." not in f"/{name}"}
    named = ("task.json", "summary.json")
    return {name: b"" if name.endswith(named) else path.read_bytes() for name, path in found.items()}


@pytest.mark.parametrize("kind", ["measure", "contacts", "mesh"])
def test_the_order_of_blocks_does_not_matter(tmp_path: Path, kind: str) -> None:
    labels = tmp_path / "labels"
    for seed, name in enumerate(("mito", "er")):
        stored(labels, np.random.default_rng(seed).integers(0, 9, (6, 6, 6)).astype(np.uint16), (8, 8, 8), name)
    check_round_trip(_task(kind, labels, tmp_path / "once"))
    check_order_does_not_matter(lambda out: _task(kind, labels, out), _outputs, tmp_path / "out")
