"""Outputs know what they were made from: what is outdated is not kept, what is foreign is not deleted, where they lie
does not matter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.decoding.label_artifact import partial_of
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import BlocksFailedError, InputError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.io.artifacts import about
from connectomics.io.normalization import Normalization
from connectomics.io.write import write_multiscale
from connectomics.pipeline.decode import decode_jobs
from connectomics.pipeline.measure import measure_labels, measure_tasks
from connectomics.pipeline.mesh import mesh_labels, mesh_tasks
from connectomics.submission import export_submission
from connectomics.tasks import run_task
from connectomics.tasks.lock import leading
from tests.decoding.decode_kit import decode_predictions
from tests.trees import contents

ROOT = Path(__file__).parents[1]
GRID = VoxelGrid((8, 8, 8), (4, 4, 4), (32, 32, 64))
COMPONENTS = {"mito": DecodeParameters(method="cc3d")}
BLOCKWISE = pytest.mark.parametrize("limit", [pytest.param(10**9, id="whole"), pytest.param(0, id="blocks")])


def write_raw(folder: Path, seed: int = 0) -> str:
    location = folder / "a.zarr/recon-1/em/fibsem-uint8"
    values = np.random.default_rng(seed).integers(0, 255, GRID.shape).astype(np.uint8)
    values[8:16, 8:16, 8:16] = 250
    write_multiscale(location, values, GRID, chunks=(16, 16, 16), overwrite=True)
    return str(location)


def predict_task(raw: str, out: Path, **options: object) -> PredictTask:
    given: dict[str, object] = {
        "raw": raw,
        "output": str(out / "a.zarr/crop1"),
        "classes": ("mito",),
        "targets": {"mito": GRID},
        "voxel_size": (8, 8, 8),
        "window": (16, 16, 16),
        "checkpoint": "abc",
        "block_size": (32, 32, 16),
    }
    return PredictTask(**{**given, **options})  # type: ignore[arg-type]


def itself(x: torch.Tensor) -> torch.Tensor:
    return x


def voxels_of(folder: Path) -> dict[str, bytes]:
    """Chunks and tables; not the descriptions, which have an id of their own in every run."""
    return {
        name: data
        for name, data in contents(folder).items()
        if not Path(name).name.startswith(".") and Path(name).suffix != ".json"
    }


class Way:
    """Predicted, decoded and measured, all in one folder."""

    def __init__(self, folder: Path, limit: int = 10**9) -> None:
        self.folder, self.limit = folder, limit
        self.raw = write_raw(folder / "raw")
        self.predictions, self.labels, self.tables = folder / "p", folder / "l", folder / "t"

    def predict(self, **options: object) -> None:
        run_predict_task(predict_task(self.raw, self.predictions, **options), itself, overwrite=True)

    def decode(self, **options: object) -> bool:
        """Whether the labels that are there were left."""
        done = decode_predictions(self.predictions, self.labels, COMPONENTS, blockwise_above=self.limit, **options)  # type: ignore[arg-type]
        return done[0].skipped

    def measure(self, **options: object) -> None:
        measure_labels(measure_tasks(self.labels, self.tables), **options)  # type: ignore[arg-type]

    def mesh(self, **options: object) -> None:
        mesh_labels(mesh_tasks(self.labels, self.folder / "m", "mito"), **options)  # type: ignore[arg-type]

    @property
    def mito(self) -> Path:
        return self.labels / "a.zarr/crop1/mito"


# -- what is outdated --------------------------------------------------------------------------------------------------
@BLOCKWISE
def test_what_was_made_from_another_prediction_is_not_taken_for_current(tmp_path: Path, limit: int) -> None:
    way = Way(tmp_path, limit)
    way.predict()
    way.decode()
    way.measure()
    way.mesh()
    first = about(way.mito)
    assert first["made_from"] == {"probabilities": about(way.predictions / "a.zarr/crop1/mito")["id"]}
    assert way.decode(), "the same again is left alone"
    way.measure()
    way.mesh()

    write_raw(tmp_path / "raw", seed=1)  # other raw, at the same place and of the same shape
    with pytest.raises(WriteError, match="holds a prediction made from other raw"):
        run_predict_task(predict_task(way.raw, way.predictions), itself)
    way.predict()
    with pytest.raises(WriteError, match=r"mito holds labels made from other probabilities; overwrite them"):
        way.decode()
    assert about(way.mito) == first, "and nothing was touched"
    assert not way.decode(overwrite=True)
    assert about(way.mito)["id"] != first["id"]
    with pytest.raises(WriteError, match=r"mito\.csv holds a table made from other a/crop1/mito"):
        way.measure()
    way.measure(overwrite=True)
    with pytest.raises(WriteError, match="holds meshes made from other labels"):
        way.mesh()
    way.mesh(overwrite=True)
    summary = json.loads((way.tables / "mito.summary.json").read_text())
    assert set(summary["made_from"]) == {"a/crop1/mito"}


@pytest.mark.parametrize(
    ("options", "named"),
    [({"normalization": Normalization(0, 128)}, r"normalization\.high"), ({"checkpoint": "def"}, "checkpoint")],
    ids=str,
)
def test_a_prediction_with_other_settings_makes_labels_outdated(
    tmp_path: Path, options: dict[str, object], named: str
) -> None:
    way = Way(tmp_path)
    way.predict()
    way.decode()
    with pytest.raises(WriteError, match=rf"made with other settings \({named}\)"):
        run_predict_task(predict_task(way.raw, way.predictions, **options), itself)
    way.predict(**options)
    with pytest.raises(WriteError, match="made from other probabilities"):
        way.decode()


def test_the_same_settings_predicted_again_are_another_output(tmp_path: Path) -> None:
    way = Way(tmp_path)
    way.predict()
    before = about(way.predictions / "a.zarr/crop1")["id"]
    way.predict()
    assert about(way.predictions / "a.zarr/crop1")["id"] != before


def test_labels_that_were_edited_in_place_are_measured_again(tmp_path: Path) -> None:
    way = Way(tmp_path)
    way.predict()
    way.decode()
    way.measure()
    chunk = next(p for p in (way.mito / "s0").rglob("*") if p.is_file() and not p.name.startswith("."))
    time.sleep(0.01)
    chunk.write_bytes(chunk.read_bytes())  # by a program that keeps attributes and sizes
    with pytest.raises(WriteError, match="holds a table made from other"):
        way.measure()


def test_labels_are_packed_with_their_own_probabilities_only(tmp_path: Path) -> None:
    way = Way(tmp_path)
    way.predict()
    parameters = {"mito": DecodeParameters()}
    decode_predictions(way.predictions, way.labels, parameters)
    table = CropTable((TableEntry(1, "a", "mito", GRID),))
    pack = {"crops": table, "probabilities_dir": way.predictions}
    export_submission(way.labels, tmp_path / "s.zip", **pack)  # type: ignore[arg-type]
    way.predict()
    with pytest.raises(InputError, match="was not decoded from"):
        export_submission(way.labels, tmp_path / "s.zip", **pack)  # type: ignore[arg-type]


def test_classes_tuned_on_another_prediction_are_dropped(tmp_path: Path) -> None:
    from connectomics.pipeline.tune import tune
    from tests.cellmap.roots import write_label
    from tests.cellmap.roots import write_raw as write_em

    root = tmp_path / "root"
    truth = np.zeros((16, 16, 16), np.uint8)
    truth[4:12, 4:12, 4:12] = 1
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (16, 16, 16))
    write_em(root, "a", truth, grid)
    for name in ("er", "nuc"):
        write_label(root, "a", "crop1", name, truth, grid)

    def predict(run: str) -> None:
        for name in ("er", "nuc"):
            attrs = {"artefact": "probability", "class_name": name, "complete": True, "id": run}
            place = tmp_path / "p/a.zarr/crop1" / name
            write_multiscale(place, truth * 200, grid, attrs={"connectomics": attrs}, overwrite=True)

    base = {name: DecodeParameters() for name in ("er", "nuc")}
    predict("first")
    tune(tmp_path / "p", str(root), tmp_path / "tuned", classes=["er"], base=base)
    tune(tmp_path / "p", str(root), tmp_path / "tuned", classes=["nuc"], base=base)
    kept = json.loads((tmp_path / "tuned/tuning.json").read_text())["classes"]
    assert set(kept) == {"er", "nuc"}
    predict("second")
    tune(tmp_path / "p", str(root), tmp_path / "tuned", classes=["nuc"], base=base)
    kept = json.loads((tmp_path / "tuned/tuning.json").read_text())["classes"]
    assert set(kept) == {"nuc"}


# -- what is foreign ---------------------------------------------------------------------------------------------------
def foreign_group(place: Path) -> None:
    """Somebody's proofread labels: a Zarr group without our attribute."""
    write_multiscale(place, np.ones(GRID.shape, np.uint32), GRID)


def foreign_file(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("hours of work")


@BLOCKWISE
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("leave", [foreign_group, foreign_file])
def test_decode_never_deletes_what_it_did_not_write(tmp_path: Path, limit: int, overwrite: bool, leave) -> None:
    way = Way(tmp_path, limit)
    way.predict()
    leave(way.mito)
    before = contents(way.labels)
    with pytest.raises(WriteError, match="was not written by decode"):
        way.decode(overwrite=overwrite)
    assert contents(way.labels).items() >= before.items()


@BLOCKWISE
def test_a_foreign_file_among_our_labels_is_kept(tmp_path: Path, limit: int) -> None:
    way = Way(tmp_path, limit)
    way.predict()
    way.decode()
    (way.mito / "proofread.npy").write_bytes(b"hours of work")
    with pytest.raises(WriteError, match=r"proofread\.npy was not written by decode"):
        way.decode(overwrite=True)
    assert (way.mito / "proofread.npy").read_bytes() == b"hours of work"


@BLOCKWISE
def test_labels_of_other_parameters_are_replaced_when_asked_for_only(tmp_path: Path, limit: int) -> None:
    way = Way(tmp_path, limit)
    way.predict()
    way.decode()
    other = {"mito": DecodeParameters(method="cc3d", threshold=0.75)}
    before = contents(way.labels)
    with pytest.raises(WriteError, match=r"holds labels made with other settings \(threshold\)"):
        decode_predictions(way.predictions, way.labels, other, blockwise_above=limit)
    assert contents(way.labels) == before
    (done,) = decode_predictions(way.predictions, way.labels, other, blockwise_above=limit, overwrite=True)
    assert not done.skipped
    assert about(way.mito)["decode"]["threshold"] == 0.75


def test_other_verbs_keep_what_they_did_not_write(tmp_path: Path) -> None:
    way = Way(tmp_path)
    way.predict()
    (way.predictions / "a.zarr/crop1/mito_proofread").mkdir()
    with pytest.raises(WriteError, match="mito_proofread lies in the prediction to be replaced"):
        way.predict()
    (way.predictions / "a.zarr/crop1/mito_proofread").rmdir()
    way.decode()
    way.tables.mkdir()
    (way.tables / "mito.csv").write_text("my own table")
    foreign_file(tmp_path / "m/a/crop1/mito")
    (tmp_path / "s.zip").write_bytes(b"my own archive")
    table = CropTable((TableEntry(1, "a", "mito", GRID),))
    for overwrite in (False, True):
        with pytest.raises(WriteError, match="was not written by measure and is left alone"):
            way.measure(overwrite=overwrite)
        with pytest.raises(WriteError, match="was not written by mesh and is left alone"):
            way.mesh(overwrite=overwrite)
    with pytest.raises(WriteError, match="was not written by export and is left alone"):
        export_submission(way.labels, tmp_path / "s.zip", crops=table)
    assert (way.tables / "mito.csv").read_text() == "my own table"
    assert (tmp_path / "m/a/crop1/mito/notes.txt").exists()
    assert (tmp_path / "s.zip").read_bytes() == b"my own archive"


# -- two at a time -----------------------------------------------------------------------------------------------------
def test_a_second_decode_or_export_at_the_same_place_is_refused(tmp_path: Path) -> None:
    way = Way(tmp_path)
    way.predict()
    with leading(partial_of(way.mito)), pytest.raises(WriteError, match=r"process \d+ on .* is working on"):
        way.decode()
    way.decode()
    table = CropTable((TableEntry(1, "a", "mito", GRID),))
    with leading(tmp_path / "s.zip.partial"), pytest.raises(WriteError, match="is working on"):
        export_submission(way.labels, tmp_path / "s.zip", crops=table)


_RACE = """
import sys, time
from pathlib import Path
from tests.decoding.decode_kit import decode_predictions
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import WriteError
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
decode_predictions(folder / "p", folder / f"warm-{sys.argv[3]}", {"mito": DecodeParameters(method="cc3d")})
for n in range(rounds):
    (folder / f"ready-{n}-{sys.argv[3]}").touch()
    while len(list(folder.glob(f"ready-{n}-*"))) < 2:
        time.sleep(0.0005)
    try:
        decode_predictions(folder / "p", folder / f"l{n}", {"mito": DecodeParameters(method="cc3d")})
        print("done")
    except WriteError as error:
        assert "is working on" in str(error), error
        print("refused")
"""


def test_two_decodes_of_one_small_array_at_a_time_leave_the_labels(tmp_path: Path) -> None:
    way, rounds = Way(tmp_path), 20
    way.predict()
    both = [
        subprocess.Popen([sys.executable, "-c", _RACE, str(tmp_path), str(rounds), who], cwd=ROOT, stdout=-1, text=True)
        for who in "ab"
    ]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("done" in pair for pair in zip(*said, strict=True))
    expected = voxels_of(tmp_path / "warm-a")
    for n in range(rounds):
        assert voxels_of(tmp_path / f"l{n}") == expected
        assert about(tmp_path / f"l{n}/a.zarr/crop1/mito")["complete"] is True


def test_a_submission_with_errors_does_not_replace_a_good_one(tmp_path: Path) -> None:
    table = CropTable((TableEntry(1, "a", "mito", GRID),))

    def write(values: np.ndarray) -> None:
        attrs = {"artefact": "labels", "kind": "instance", "complete": True}
        place = tmp_path / "l/a.zarr/crop1/mito"
        write_multiscale(place, values, GRID, attrs={"connectomics": attrs}, overwrite=True)

    good = np.zeros(GRID.shape, np.uint8)
    good[4:9, 4:9, 4:9] = 1
    write(good)
    assert not export_submission(tmp_path / "l", tmp_path / "s.zip", crops=table).has_errors
    before = (tmp_path / "s.zip").read_bytes()

    wrapped = np.zeros(GRID.shape, np.uint8)  # 1,024 objects, in ids that have run over
    spots = wrapped[::4, ::4, ::4]
    spots[:] = (np.arange(spots.size) % 255 + 1).reshape(spots.shape)
    write(wrapped)
    result = export_submission(tmp_path / "l", tmp_path / "s.zip", crops=table)
    assert result.has_errors
    assert (tmp_path / "s.zip").read_bytes() == before
    assert result.kept == tmp_path / "s.zip"
    assert f"{tmp_path / 's.zip'} is the earlier submission still" in result.summary()
    assert zipfile.ZipFile(result.path).namelist()

    write(good)
    assert not export_submission(tmp_path / "l", tmp_path / "s.zip", crops=table).has_errors
    assert (tmp_path / "s.zip").read_bytes() == before
    assert not (tmp_path / "s.zip.partial").exists()


# -- where things lie --------------------------------------------------------------------------------------------------
class Counting:
    """The raw itself; fails from some call on until told to go on."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.calls, self.fail_after = 0, fail_after

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise RuntimeError("the machine is needed for something else")
        return x


def moved(folder: Path, to: Path) -> Path:
    """The folder at another place, seen through a link."""
    (to / "elsewhere").mkdir(parents=True)
    shutil.move(folder, to / "elsewhere" / folder.name)
    (to / "link").symlink_to(to / "elsewhere", target_is_directory=True)
    return to / "link" / folder.name


def test_a_moved_prediction_is_resumed(tmp_path: Path) -> None:
    here = tmp_path / "here"
    raw = write_raw(here / "raw")
    whole = Counting()
    run_predict_task(predict_task(raw, here / "whole"), whole)
    part = Counting(fail_after=whole.calls // 2)
    with pytest.raises(BlocksFailedError):
        run_predict_task(predict_task(raw, here / "p"), part)
    there = moved(here, tmp_path / "there")
    raw = str(there / "raw" / Path(raw).relative_to(here / "raw"))
    rest = Counting()
    run_predict_task(predict_task(raw, there / "p"), rest)
    assert 0 < rest.calls < whole.calls, "what was done before is not done again"
    assert voxels_of(there / "p") == voxels_of(there / "whole")
    assert not run_predict_task(predict_task(raw, there / "p"), rest), "and then it is complete"


def test_a_moved_decoding_keeps_its_partial_work(tmp_path: Path) -> None:
    here = tmp_path / "here"
    way = Way(here, 0)
    way.predict()
    (job,) = decode_jobs(way.predictions, way.labels, COMPONENTS, blockwise_above=0)
    assert job.task is not None
    job.task.claim()
    job.task.prepare("label")
    witness = job.task.scratch / "witness"
    witness.touch()
    there = moved(here, tmp_path / "there")
    (job,) = decode_jobs(there / "p", there / "l", COMPONENTS, blockwise_above=0)
    assert job.task is not None
    assert job.task.is_begun
    job.task.claim()
    assert (job.task.scratch / "witness").exists(), "nothing of it was removed"
    assert run_task(job.task)
    other = {"mito": DecodeParameters(method="cc3d", threshold=0.75)}
    with pytest.raises(WriteError, match=r"made with other settings \(threshold\)"):
        decode_predictions(there / "p", there / "l", other, blockwise_above=0)


def test_unfinished_labels_of_other_parameters_are_kept(tmp_path: Path) -> None:
    way = Way(tmp_path, 0)
    way.predict()
    (job,) = decode_jobs(way.predictions, way.labels, COMPONENTS, blockwise_above=0)
    assert job.task is not None
    job.task.claim()
    before = contents(way.labels)
    other = {"mito": DecodeParameters(method="cc3d", threshold=0.75)}
    with pytest.raises(WriteError, match=r"holds unfinished labels made with other settings \(parameters\.threshold"):
        decode_predictions(way.predictions, way.labels, other, blockwise_above=0)
    with pytest.raises(WriteError, match="unfinished labels that are decoded block by block"):
        decode_predictions(way.predictions, way.labels, other, blockwise_above=10**9)
    assert contents(way.labels) == before


def test_a_copy_of_the_whole_folder_is_complete_everywhere(tmp_path: Path) -> None:
    way = Way(tmp_path / "here")
    way.predict()
    way.decode()
    way.measure()
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "here", there)  # keeps times, as cp -a does
    raw = str(there / "raw/a.zarr/recon-1/em/fibsem-uint8")
    assert not run_predict_task(predict_task(raw, there / "p"), itself)
    (done,) = decode_predictions(there / "p", there / "l", COMPONENTS)
    assert done.skipped
    measure_labels(measure_tasks(there / "l", there / "t"))
