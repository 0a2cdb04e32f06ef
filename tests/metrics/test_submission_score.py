"""Whole submissions: what is scored, what is missing, and what is said of bad input."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from connectomics.cli.score_verbs import print_score
from connectomics.errors import (
    ConnectomicsError,
    IncompleteError,
    InputError,
    MetadataError,
    MissingError,
    UnknownNameError,
)
from connectomics.geometry import VoxelGrid
from connectomics.io.write import create_multiscale, write_multiscale
from connectomics.metrics import tables
from connectomics.metrics.challenge import SubmissionScore, blocks, score_instance, score_submission

VOXEL = (8.0, 8.0, 8.0)
GRID = VoxelGrid(VOXEL, (4.0, 4.0, 4.0), (12, 13, 14))


def write_group(folder: Path, arrays: dict[str, NDArray[Any]], **attrs: Any) -> Path:
    """A Zarr v2 group of plain arrays with the portal's attributes."""
    group = zarr.open_group(folder, mode="a", zarr_format=2)
    for name, values in arrays.items():
        chunks = tuple(min(6, n) for n in values.shape)
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, overwrite=True)
        array[...] = values
        array.attrs.update({"voxel_size": VOXEL, "translation": (4.0, 4.0, 4.0)} | attrs)
    return folder


def labels(seed: int, shape: tuple[int, int, int] = (12, 13, 14)) -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    out = np.zeros(shape, np.uint16)
    for i in range(4):
        z, y, x = rng.integers(0, 9, 3)
        out[z : z + 5, y : y + 5, x : x + 5] = i + 1
    return out


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    arrays = {"crop1/mito": labels(0), "crop1/er": labels(1), "crop2/mito": labels(2)}
    return write_group(tmp_path / "truth.zarr", arrays)


@pytest.fixture
def submission(tmp_path: Path) -> Path:
    arrays = {"crop1/mito": labels(0), "crop1/er": (labels(1) > 2).astype(np.uint8), "crop2/mito": labels(5)}
    return write_group(tmp_path / "submission.zarr", arrays)


def plain_numbers(score: SubmissionScore) -> dict[str, Any]:
    return {k: v for k, v in score.to_dict().items() if k not in ("warnings", "submission")}


# -- what is scored ----------------------------------------------------------------------------------------------------
def test_folder_zip_and_wrapped_zip_are_one(truth: Path, submission: Path, tmp_path: Path) -> None:
    expected = plain_numbers(score_submission(submission, truth))
    for name, prefix in (("plain.zip", ""), ("wrapped.zip", "submission.zarr/")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in submission.rglob("*"):
                archive.write(file, prefix + str(file.relative_to(submission)))
        assert plain_numbers(score_submission(tmp_path / name, truth)) == expected
    (tmp_path / "holder").mkdir()
    shutil.copytree(submission, tmp_path / "holder/submission.zarr")
    assert plain_numbers(score_submission(tmp_path / "holder", truth)) == expected


@pytest.mark.parametrize("crops", ["1", "2"])
def test_decoded_labels_in_ome_zarr_0_5_are_not_missing(
    truth: Path, submission: Path, tmp_path: Path, crops: str
) -> None:
    source = zarr.open_group(submission, mode="r")
    for name in [f"crop{crops}/mito", *(["crop1/er"] if crops == "1" else [])]:
        values = np.asarray(source[name])
        (array,) = create_multiscale(
            tmp_path / "out" / f"{crops}.zarr" / name, [GRID], values.dtype, shards=(64, 64, 64),
            attrs={"connectomics": {"artefact": "labels", "complete": True}},
        )  # fmt: skip
        array.write((0, 0, 0), values)
    expected = plain_numbers(score_submission(submission, truth, crop_names=[crops]))
    assert plain_numbers(score_submission(tmp_path / "out", truth, crop_names=[crops])) == expected


def test_absent_chunks_of_labels_have_the_fill_value(tmp_path: Path) -> None:
    truth = write_group(tmp_path / "truth.zarr", {"crop1/er": np.ones(GRID.shape, np.uint8)})
    create_multiscale(tmp_path / "out/a.zarr/crop1/er", [GRID], np.uint8, fill_value=1)
    assert score_submission(tmp_path / "out", truth).label_scores["er"].tp == np.prod(GRID.shape)


def test_a_folder_of_decoded_labels(truth: Path, submission: Path, tmp_path: Path) -> None:
    """``{dataset}.zarr/{crop}/{class}/s0`` is scored as the same labels packed."""
    source = zarr.open_group(submission, mode="r")
    attrs: dict[str, Any] = {"connectomics": {"artefact": "labels", "complete": True}}
    for name in ("crop1/mito", "crop1/er", "crop2/mito"):
        values = np.asarray(source[name])
        place = tmp_path / "out" / ("a.zarr" if "crop1" in name else "b.zarr") / name
        write_multiscale(str(place), values, GRID, kind="label", attrs=attrs)
    expected = plain_numbers(score_submission(submission, truth))
    assert plain_numbers(score_submission(tmp_path / "out", truth)) == expected
    for change, error, says in (
        ({"artefact": "probability"}, MetadataError, "expected labels written by decode"),
        ({"artefact": "labels", "complete": False}, IncompleteError, "half written"),
    ):
        about = tmp_path / "out/a.zarr/crop1/mito/.zattrs"
        about.write_text(json.dumps(json.loads(about.read_text()) | {"connectomics": change}))
        with pytest.raises(error, match=says):
            score_submission(tmp_path / "out", truth)
    shutil.copytree(tmp_path / "out/a.zarr/crop1", tmp_path / "out/b.zarr/crop1")
    with pytest.raises(InputError, match="keep one of them"):
        score_submission(tmp_path / "out", truth)


def test_filters_progress_and_workers(truth: Path, submission: Path) -> None:
    seen: list[Any] = []
    one = score_submission(submission, truth, classes=["mito"], progress=lambda *a: seen.append(a), workers=1)
    assert seen == [(1, 2, "crop1/mito"), (2, 2, "crop2/mito")]
    assert one.totals.semantic is None
    assert one.overall_score is None
    assert one.totals.instance == one.label_scores["mito"].score
    many = score_submission(submission, truth, workers=4)
    assert plain_numbers(many) == plain_numbers(score_submission(submission, truth, workers=1))
    assert many.label_scores["mito"] == one.label_scores["mito"]
    for name in ("2", "crop2"):
        assert [r.crop for r in score_submission(submission, truth, crop_names=[name]).results] == ["crop2"]
    only_er = score_submission(submission, truth, classes=["er"])
    assert only_er.totals.instance is None
    assert only_er.totals.semantic == only_er.label_scores["er"].iou
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        score_submission(submission, truth, classes=["mitto"])
    with pytest.raises(UnknownNameError, match="crop9"):
        score_submission(submission, truth, crop_names=["9"])
    with pytest.raises(InputError, match="none of the crops"):
        score_submission(submission, truth, crop_names=["2"], classes=["er"])


def test_missing_labels_and_crops(truth: Path, submission: Path) -> None:
    shutil.rmtree(submission / "crop2")
    shutil.rmtree(submission / "crop1/er")
    score = score_submission(submission, truth)
    missing = {(r.crop, r.class_name): r.score.to_dict() for r in score.results if r.is_missing}
    assert missing["crop1", "er"].pop("panoptic")["fn"] == 1
    assert missing["crop1", "er"] == {"tp": 0, "fp": 0, "fn": 12 * 13 * 14, "status": "missing"}
    ids = len(np.unique(labels(2))) - 1
    assert {k: v for k, v in missing["crop2", "mito"].items() if k != "panoptic"} == {
        "tp": 0, "fp": 0, "fn": ids, "hausdorff_norm_sum": 0.0, "n_hausdorff": ids, "status": "missing",
    }  # fmt: skip
    assert score.submitted_only.classes["mito"].score == 1.0
    assert score.submitted_only.semantic == 0.0
    assert len(score.results) == score.total_evals == 3


def test_labels_that_only_the_submission_has_are_named(truth: Path, submission: Path) -> None:
    write_group(submission, {"crop1/golgi": labels(3), "crop7/mito": labels(3)})
    score = score_submission(submission, truth)
    assert len(score.results) == 3
    assert score.warnings == ("crop1: golgi not in the ground truth, ignored",)


def test_masks_leave_regions_out(truth: Path, submission: Path) -> None:
    mask = np.zeros((12, 13, 14), np.uint8)
    mask[:, :, :7] = 1
    write_group(truth, {"crop1/mito_mask": mask, "crop1/er_mask": mask})
    results = {(r.crop, r.class_name): r.score for r in score_submission(submission, truth).results}
    assert set(results) == {("crop1", "er"), ("crop1", "mito"), ("crop2", "mito")}
    assert results["crop1", "mito"] == score_instance(labels(0) * mask, labels(0) * mask, VOXEL)
    assert results["crop1", "er"].fn == np.count_nonzero((labels(1) > 0) & (labels(1) <= 2) & (mask > 0))
    blocked = {(r.crop, r.class_name): r.score for r in score_submission(submission, truth, memory_bytes=1000).results}
    assert blocked == results


def test_nan_and_too_many_instances_are_told(truth: Path, submission: Path) -> None:
    values = labels(0).astype(np.float32)
    values[0, 0, :3] = np.nan
    many = np.zeros((12, 13, 14), np.uint8)
    many[::2, ::2, ::2] = 1
    write_group(submission, {"crop1/mito": values, "crop2/mito": many, "crop1/er": values})
    for memory in (None, 1000):
        score = score_submission(submission, truth, memory_bytes=memory)
        assert "crop1/mito: 3 voxels of the prediction are NaN and count as background" in score.warnings
        assert "crop1/er: 3 voxels of the prediction are NaN and count as background" in score.warnings
        assert [r.score.status for r in score.results if r.crop == "crop2"] == ["skipped_too_many_instances"]
        assert any("too many predicted instances" in w for w in score.warnings)
        assert score.label_scores["mito"].n_skipped == 1


def test_nothing_anywhere_is_perfect(tmp_path: Path) -> None:
    empty = {"crop1/mito": np.zeros((4, 4, 4), np.uint8), "crop1/er": np.zeros((4, 4, 4), np.uint8)}
    score = score_submission(write_group(tmp_path / "s.zarr", empty), write_group(tmp_path / "t.zarr", empty))
    assert score.overall_score == 1.0


def test_a_crop_table_decides_what_is_scored(truth: Path, submission: Path, tmp_path: Path) -> None:
    table = tmp_path / "crops.csv"
    head = "crop_name,dataset,class_label,voxel_size,translation,shape\n"
    row = "1,jrc_a,{},[8.0;8.0;8.0],[4.0;4.0;4.0],[12;13;{}]\n"
    table.write_text(head + row.format("mito", 14))
    score = score_submission(submission, truth, table)
    assert [(r.crop, r.class_name, r.dataset) for r in score.results] == [("crop1", "mito", "jrc_a")]
    assert score.total_evals == 1
    table.write_text(head + row.format("golgi", 14))
    with pytest.raises(MissingError, match=r"no ground truth at .*crop1/golgi"):
        score_submission(submission, truth, table)
    table.write_text(head + row.format("mito", 15))
    with pytest.raises(InputError, match=r"the crop table expects shape \(12, 13, 15\), got \(12, 13, 14\)"):
        score_submission(submission, truth, table)
    table.write_text(head + row.format("mito", "x"))
    with pytest.raises(ConnectomicsError, match="line 2"):
        score_submission(submission, truth, table)


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_no_crop_matches(truth: Path, tmp_path: Path) -> None:
    other = write_group(tmp_path / "other.zarr", {"mito": labels(0)})
    with pytest.raises(InputError, match="expected crops of the ground truth"):
        score_submission(other, truth)
    with pytest.raises(MissingError, match="no submission at"):
        score_submission(tmp_path / "nowhere", truth)
    with pytest.raises(MissingError, match="no folder at"):
        score_submission(other, tmp_path / "nowhere")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(MissingError, match="no ground truth found"):
        score_submission(other, tmp_path / "empty.zarr")


def test_arrays_of_the_wrong_rank(truth: Path, submission: Path) -> None:
    write_group(submission, {"crop1/mito": labels(0)[None]})
    with pytest.raises(InputError, match=r"crop1/mito: expected three dimensions"):
        score_submission(submission, truth)
    write_group(truth, {"crop1/mito": labels(0)[0]})
    with pytest.raises(InputError, match="expected three dimensions \(z y x\), got shape \(13, 14\)"):
        score_submission(submission, truth)


def test_resampling_that_does_not_fit_into_memory_is_refused(truth: Path, submission: Path) -> None:
    attrs = submission / "crop1/er/.zattrs"
    attrs.write_text(json.dumps(json.loads(attrs.read_text()) | {"voxel_size": [4, 4, 4]}))
    with pytest.raises(InputError, match=r"crop1/er: resampling .* needs 0\.0 GB, more than is free"):
        score_submission(submission, truth, memory_bytes=1000)
    score_submission(submission, truth)


def test_a_corrupt_chunk_names_its_path(truth: Path, submission: Path) -> None:
    next((submission / "crop1/mito").glob("0.0.0")).write_bytes(b"junk")
    with pytest.raises(ConnectomicsError, match=r"crop1/mito/0\.0\.0"):
        score_submission(submission, truth)


def test_a_truth_without_voxel_size(truth: Path, submission: Path) -> None:
    (truth / "crop1/er/.zattrs").write_text("{}")
    with pytest.raises(MetadataError, match="voxel_size is absent"):
        score_submission(submission, truth)


# -- slab by slab ------------------------------------------------------------------------------------------------------
class Volume:
    """An array that is read by blocks."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values, self.shape, self.dtype, self.where = values, values.shape, values.dtype, "memory"

    def read(self, begin: Any = None, shape: Any = None) -> NDArray[Any]:
        return self.values[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.05, 0.15, 0.4]),
    planes=st.integers(1, 5),
    dtype=st.sampled_from(["uint8", "int32", "float32", "bool"]),
)
def test_slabs_give_what_memory_gives(seed: int, density: float, planes: int, dtype: str) -> None:
    """Components that wind through many slabs keep cc3d's numbers, and so every number of the score."""
    from connectomics.metrics.challenge import get_rules
    from connectomics.metrics.challenge.scoring import score_pair

    rng = np.random.default_rng(seed)
    pred = (rng.integers(1, 4, (11, 9, 10)) * (rng.random((11, 9, 10)) < density)).astype(dtype)
    truth = labels(seed % 1000, (11, 9, 10))
    expected = score_instance(pred, truth, VOXEL)
    with blocks.BlockPair(Volume(pred), Volume(truth), memory_bytes=1 << 20) as pair:
        pass  # the folder is gone afterwards
    assert not Path(pair._folder.name).exists()
    pair = blocks.BlockPair(Volume(pred), Volume(truth), memory_bytes=1 << 20)
    pair._planes = planes
    with pair:
        found = score_pair(pair, VOXEL, get_rules("2026-06"), 1)
    assert found == expected
    if expected.instances is not None:
        assert found.instances is not None
        assert found.instances.rows() == expected.instances.rows()


def test_truth_labels_too_large_for_tables() -> None:
    truth = np.full((2, 2, 2), 1 << 20, np.uint32)
    with (
        pytest.raises(InputError, match="renumber the ground truth"),
        blocks.BlockPair(Volume(truth), Volume(truth), memory_bytes=1000),
    ):
        pass


# -- tables ------------------------------------------------------------------------------------------------------------
def test_tables_are_written_whole(truth: Path, submission: Path, tmp_path: Path) -> None:
    shutil.rmtree(submission / "crop1/er")
    score = score_submission(submission, truth)
    paths = tables.write_scores(score, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "scores.json", "scores_per_class.csv", "scores_per_crop.csv", "scores_per_instance.csv",
    ]  # fmt: skip
    stored = json.loads(paths["json"].read_text())
    assert stored["overall_score"] == score.overall_score
    assert stored["crop1"]["mito"]["is_missing"] is False
    assert stored["rules"] == "2026-06"
    assert stored["verified"] is True
    lines = paths["classes"].read_text().splitlines()
    assert lines[0].startswith("class,kind,score,score_submitted_only")
    assert lines[1].startswith("er,semantic,0.0,,")
    assert len(paths["crops"].read_text().splitlines()) == 4
    instances = paths["instances"].read_text().splitlines()
    assert instances[0] == "crop,class,truth,prediction,component,iou,distance_nm,voxels"
    assert len(instances) == 1 + sum(len(np.unique(labels(seed))) - 1 for seed in (0, 2))


def test_the_terminal_shows_both_totals(truth: Path, submission: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(submission / "crop1/er")
    print_score(score_submission(submission, truth, rules="2026-07"))
    shown = capsys.readouterr().out
    for text in ("2026-07", "not verified", "overall", "mito", "1/1"):
        assert text in shown


def test_json_has_no_nan_and_failures_leave_nothing(tmp_path: Path) -> None:
    tables.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5]}
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ConnectomicsError, match=r"cannot write .*b\.json"):
        tables.write_json(tmp_path / "b.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
