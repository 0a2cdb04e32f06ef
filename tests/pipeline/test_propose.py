"""Active learning: boxes to annotate are free, ranked, prefilled with the prediction, and come back at their place."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import connectomics as cx
from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.editing import EditableLabels
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.cli import main
from connectomics.config import save_config
from connectomics.config.schema import DataConfig, DatasetConfig, InferenceConfig, ModelConfig, RunConfig
from connectomics.data.candidates import Area, Pool, choose_even, choose_random, choose_uncertain
from connectomics.data.run_split import half_patch
from connectomics.data.splits import Split
from connectomics.errors import MetadataError
from connectomics.geometry import Box
from connectomics.inference.predict_task import PredictTask
from connectomics.inference.uncertainty import Bottleneck, Observer
from connectomics.io.formats import open_volume
from connectomics.io.formats.tiff import write_tiff
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.models.registry import build_model
from connectomics.pipeline.proposals import Proposal, read_table, without_unknown, write_labels, write_table
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.conftest import ROOT
from tests.pipeline.test_predict_crops import save_checkpoint

SIZE = (2, 16, 16)
CLASSES = ["mito", "er"]


def same(first: Box, second: Box) -> bool:
    return np.allclose([*first.begin, *first.end], [*second.begin, *second.end], atol=1e-6)


def overlap(first: Box, second: Box) -> bool:
    return min(first.intersect(second).extent) > 1e-6


@pytest.fixture(scope="module")
def root(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom that may be written to."""
    return Path(shutil.copytree(phantom, tmp_path_factory.mktemp("root") / "data"))


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, with a network of random weights; the last crop of the first data set validates."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    config = RunConfig(
        dataset=DatasetConfig(data_root=str(root), classes=CLASSES),
        model=ModelConfig(architecture="unet", options={"channels": [4, 8], "strides": [2], "num_res_units": 0}),
        data=DataConfig(patch_size=[8, 16, 16], num_workers=0),
        inference=InferenceConfig(block_size=[32, 32, 32]),
    )
    (folder / "checkpoints").mkdir(parents=True)
    save_checkpoint(folder / "checkpoints/best.ckpt", config, 0)
    save_config(config, folder / "config.yaml")
    crops = Catalog.open(str(root)).crops()
    held = [crop.key for crop in crops if crop.dataset == crops[0].dataset][-1]
    Split(tuple(crop.key for crop in crops if crop.key != held), (held,)).save(folder / "split.yaml")
    return folder


@pytest.fixture(scope="module")
def first(run: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a first round, made by the command line."""
    out = tmp_path_factory.mktemp("rounds") / "1"
    words = ["propose", run, root, "--budget", 4, "--size", "2,16,16", "--candidates", 24, "--out", out]
    assert main([str(word) for word in words]) == 0
    return out


def test_boxes_are_free_and_ranked(first: Path, run: Path, root: Path) -> None:
    found, catalog = read_table(first), Catalog.open(str(root))
    assert [p.rank for p in found] == [1, 2, 3, 4]
    assert len({p.dataset for p in found}) == len(catalog.datasets) == 2
    config = cx.load_config(run / "config.yaml")
    (held,) = Split.load(run / "split.yaml").val
    test = CropTable.load(root / "test_crops.csv")
    for number, one in enumerate(found):
        assert one.grid.shape == SIZE
        assert one.grid.voxel_size == config.voxel_size
        assert Multiscale.open(catalog.raw_location(one.dataset)).grid.box.contains(one.grid.box, 1e-6)
        assert not any(overlap(one.grid.box, p.grid.box) for p in found[:number] if p.dataset == one.dataset)
        crops = catalog.crops([one.dataset])
        assert not any(read_labels(crop, CLASSES, one.grid).known.any() for crop in crops)
        kept = [crop.box for crop in crops if crop.key == held]
        kept += [entry.grid.box for entry in test if entry.dataset == one.dataset]
        assert kept
        assert not any(overlap(one.grid.box, box.grow(half_patch(config))) for box in kept)
    with (first / "proposals.csv").open() as table:
        rows = list(csv.DictReader(table))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < float(row["uncertainty"]) < 1 and float(row["novelty"]) > 0 for row in rows)
    assert {row["done"] for row in rows} == {"no"}
    assert 'content="connectomics"' in (first / "proposals.html").read_text()
    assert sorted(p.name for p in first.iterdir()) == ["labels", "proposals.csv", "proposals.html", "split.yaml"]


def test_labels_are_the_prediction(first: Path, run: Path, root: Path, tmp_path: Path) -> None:
    """As `pytc predict --box` and `pytc decode` make them."""
    one = read_table(first)[0]
    corners = ":".join(",".join(map(repr, corner)) for corner in (one.grid.box.begin, one.grid.box.end))
    made = cx.predict(run, out=tmp_path / "p", box=f"{one.dataset}:{corners}", device="cpu")
    labels = cx.decode(made, out=tmp_path / "l")
    present = 0
    for name in CLASSES:
        expected, _ = labels.array(name).read_level(0, (0, 0, 0), SIZE)
        stored = Multiscale.open(one.file(first, name, "zarr"))
        values, _ = stored.read_level(0, (0, 0, 0), SIZE)
        assert same(stored.grid.box, one.grid.box)
        assert np.array_equal(values, expected)
        present += int((values != 0).sum())
    assert 0 < present < len(CLASSES) * one.grid.size


def done(folder: Path, ranks: set[int], **changes: Any) -> list[Proposal]:
    found = [replace(p, done=p.rank in ranks, **(changes if p.rank in ranks else {})) for p in read_table(folder)]
    write_table(folder / "proposals.csv", found)
    return found


def test_each_proposal_has_a_link(first: Path, root: Path) -> None:
    """It is on the page, and what it shows are raw and labels at the place of the box."""
    from urllib.request import urlopen

    from connectomics.pages.view import VolumeServer, state_of
    from connectomics.pipeline.view_proposals import proposal_layers

    rows, page = read_table(first), (first / "proposals.html").read_text()
    assert len({row.link for row in rows}) == len(rows)
    assert all(f'href="{row.link}"' in page for row in rows)
    assert f"pytc view {root} --proposals {first}" in page
    found = proposal_layers(str(root), first, rows)
    one, layers = rows[0], found[0]
    with VolumeServer(layers.roots, layers.made) as server:
        state = state_of(layers, server.url)
        assert state["position"] == list(reversed(one.grid.box.center))
        assert [layer["name"] for layer in state["layers"]] == [
            "raw", f"mito proposed {one.crop}", f"er proposed {one.crop}", "crops"
        ]  # fmt: skip
        raw, mito = (layer["source"].partition("://")[2] for layer in state["layers"][:2])
        with urlopen(f"{mito}/s0/0/0/0") as answer:
            kind = np.uint32 if one.classes["mito"] == "instance" else np.uint8
            values = np.frombuffer(answer.read(), kind).reshape(64, 64, 64)
        with urlopen(f"{raw}/.zattrs") as answer:
            assert "multiscales" in json.loads(answer.read())
    stored = Multiscale.open(one.file(first, "mito", "zarr")).read_level(0, (0, 0, 0), SIZE)[0]
    assert np.array_equal(values[tuple(map(slice, SIZE))], stored)
    assert not values[SIZE[0] :].any()


@pytest.mark.slow
def test_the_links_lead_somewhere_while_view_serves(first: Path, root: Path, tmp_path: Path) -> None:
    import os
    import signal
    import socket
    import subprocess
    import sys
    from urllib.error import HTTPError
    from urllib.request import urlopen

    pytest.importorskip("neuroglancer", reason="the viewer needs pip install 'connectomics-cellmap[view]'")
    folder = Path(shutil.copytree(first, tmp_path / "1"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = [replace(row, link=row.link.replace(":8473/", f":{port}/")) for row in read_table(folder)]
    write_table(folder / "proposals.csv", rows)  # other tests may have the usual port
    words = [sys.executable, "-m", "connectomics", "view", str(root), "--proposals", str(folder)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as serving:
        assert serving.stdout is not None
        said = [serving.stdout.readline().strip() for _ in range(len(rows) + 1)]
        for row in rows:
            with urlopen(row.link) as answer:
                assert b"<html" in answer.read().lower()
        with pytest.raises(HTTPError):
            urlopen(rows[0].link.replace("-1/", "-9/"))
        serving.send_signal(signal.SIGINT)
    assert said == [*(f"{row.rank}. {row.key}: {row.link}" for row in rows), (folder / "proposals.html").as_uri()]


def test_proposals_are_viewed_alone(first: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs the data root" in failure(capsys, "view", "--proposals", first)
    assert "no other option" in failure(capsys, "view", root, "--proposals", first, "--class", "mito")


def test_what_is_done_comes_back_at_its_place(
    first: Path, run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(first, tmp_path / "1"))
    one, other = (p for p in read_table(folder) if p.rank in (1, 2))
    mito = one.file(folder, "mito", "zarr")
    corrected = np.zeros(SIZE, np.uint8)
    corrected[:, 4:8] = 1
    corrected[:, :, 8:] = 255  # nobody looked there
    shutil.rmtree(mito)
    write_multiscale(mito, corrected, one.grid)
    before = read_table(folder)
    write_table(folder / "proposals.csv", [replace(p, classes={"mito": "semantic"}) for p in before])  # nobody saw er
    assert main(["ingest", str(root), "--proposals", str(folder), "--done", "1"]) == 0
    after = read_table(folder)
    assert [p.done for p in after] == [True, False, False, False]
    assert [(p.score, p.reason, p.grid) for p in after] == [(p.score, p.reason, p.grid) for p in before]
    catalog = Catalog.open(str(root))
    assert other.crop not in catalog.crop_names(other.dataset)
    crop = catalog.crop(one.dataset, one.crop)
    assert list(crop.labels) == ["mito"]
    assert same(crop.box, one.grid.box)
    read = read_labels(crop, CLASSES, one.grid)
    assert np.array_equal(read.known_of("mito"), corrected != 255)
    assert np.array_equal(read.present_of("mito"), corrected == 1)
    assert one.key in Split.load(folder / "split.yaml").train
    assert Split.load(folder / "split.yaml").val == Split.load(run / "split.yaml").val
    # again: kept; another folder with the name: refused; annotations are not replaced
    assert main(["ingest", str(root), "--proposals", str(folder)]) == 0
    elsewhere = [replace(p, grid=p.grid.crop((2, 0, 0), SIZE)) for p in read_table(folder)]
    write_table(folder / "proposals.csv", elsewhere)
    assert "is another crop" in failure(capsys, "ingest", root, "--proposals", folder)
    again = ["propose", run, root, "--budget", 1, "--size", "2,16,16", "--out", folder]
    assert "holds proposals already" in failure(capsys, *again)
    assert "holds annotations" in failure(capsys, *again, "--overwrite")
    # the next round leaves it out, even if it is the only box to choose from
    place = ":".join(",".join(map(repr, corner)) for corner in (one.grid.box.begin, one.grid.box.end))
    next_round = ["propose", run, root, "--size", "2,16,16", "--box", f"{one.dataset}:{place}", "--out", tmp_path / "2"]
    assert "(1 annotated)" in failure(capsys, *next_round)
    assert not (tmp_path / "2").exists()


def test_tiff_stacks_and_other_methods(run: Path, root: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"budget": 3, "size": SIZE, "candidates": 12, "file_format": "tiff", "device": "cpu"}
    found = cx.propose(run, root, out=tmp_path / "even", method="even", **asked)
    # one in each; which comes first depends on what other tests have annotated
    assert sorted(p.dataset for p in found[:2]) == Catalog.open(str(root)).datasets
    assert np.isnan([p.score for p in found]).all()
    raw = open_volume(found[0].file(tmp_path / "even", "raw", "tiff"))
    stored = Multiscale.open(Catalog.open(str(root)).raw_location(found[0].dataset))
    assert np.array_equal(raw.read((0, 0, 0), SIZE), np.rint(stored.read_raw(found[0].grid)[0]))
    assert np.allclose(raw.voxel_size or 0, found[0].grid.voxel_size)
    done(tmp_path / "even", {1}, classes={"er": "semantic"})
    cx.ingest(root, proposals=tmp_path / "even")
    crop = Catalog.open(str(root)).crop(found[0].dataset, found[0].crop)
    assert same(crop.box, found[0].grid.box)
    assert read_labels(crop, ["er"], found[0].grid).known_of("er").all()


def small_box(root: Path, y: int, crop: str, classes: dict[str, str]) -> Proposal:
    """A box of 2 x 6 x 6 voxels in the first data set that somebody has looked at."""
    catalog = Catalog.open(str(root))
    dataset = catalog.datasets[0]
    grid = Multiscale.open(catalog.raw_location(dataset)).grid.crop((3, y, 5), (2, 6, 6))
    return Proposal(1, dataset, crop, grid, classes=classes, done=True)


def mito_above_er(box: Proposal) -> dict[str, np.ndarray]:
    labels = {name: np.zeros(box.grid.shape, np.uint8) for name in CLASSES}
    labels["mito"][:, :2], labels["er"][:, 3:] = 1, 1
    return labels


def test_an_ensemble_keeps_for_validation_what_none_of_its_networks_saw(
    run: Path, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the order of the networks: a crop that one of them was trained on does not validate the next round."""
    (held,) = Split.load(run / "split.yaml").val
    keys = [crop.key for crop in Catalog.open(str(root)).crops()]
    other = next(key for key in keys if key != held)
    options: dict[str, Any] = {"budget": 1, "size": SIZE, "method": "even", "candidates": 2, "device": "cpu"}
    for number, val in enumerate(((held, other), (other,))):
        second = Path(shutil.copytree(run, tmp_path / f"second{number}"))
        save_checkpoint(second / "checkpoints/best.ckpt", cx.load_config(run / "config.yaml"), 1)
        Split(tuple(key for key in keys if key not in val), val).save(second / "split.yaml")
        networks = [folder / "checkpoints/best.ckpt" for folder in (second, run)]
        caplog.clear()
        cx.propose(networks, root, out=tmp_path / f"out{number}", **options)
        split = Split.load(tmp_path / f"out{number}/split.yaml")
        assert split.val == ((held,) if held in val else ())
        assert set(split.train) == set(keys) - set(split.val)
        assert ("no crop was held out by all networks" in caplog.text) == (held not in val)


def test_a_label_map_of_classes_that_do_not_overlap(root: Path, tmp_path: Path) -> None:
    one = small_box(root, 4, "crop900", {"mito": "semantic", "er": "semantic"})
    dataset, grid, labels = one.dataset, one.grid, mito_above_er(one)
    write_labels(tmp_path, one, labels, "tiff")
    source = open_volume(one.file(tmp_path, "label_map", "tiff"))
    assert np.array_equal(source.read((0, 0, 0), grid.shape), labels["mito"] + 2 * labels["er"])
    assert one.values_table(tmp_path, "tiff").read_text() == "value,class,kind\n1,mito,semantic\n2,er,semantic\n"
    write_table(tmp_path / "proposals.csv", [replace(one, classes={})])
    assert (tmp_path / "proposals.csv").read_text().endswith(",label_map,yes\n")
    cx.ingest(root, proposals=tmp_path)
    read = read_labels(Catalog.open(str(root)).crop(dataset, "crop900"), CLASSES, grid)
    for name in CLASSES:
        assert np.array_equal(read.present_of(name), labels[name] == 1)
    overlapping = {name: np.ones(grid.shape, np.uint8) for name in CLASSES}
    write_labels(tmp_path / "other", one, overlapping, "tiff")
    assert not one.file(tmp_path / "other", "label_map", "tiff").exists()


def test_a_class_that_was_taken_out_of_a_proposal_is_named(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is known of a class that is not in the row, but what came in before stays in the data root."""
    one = small_box(root, 24, "crop905", {"mito": "semantic", "er": "semantic"})
    write_labels(tmp_path, one, mito_above_er(one), "zarr")
    write_table(tmp_path / "proposals.csv", [one])
    cx.ingest(root, proposals=tmp_path)
    cx.ingest(root, proposals=tmp_path, overwrite=True)
    assert "in its row" not in caplog.text
    write_table(tmp_path / "proposals.csv", [replace(one, classes={"mito": "semantic"})])
    cx.ingest(root, proposals=tmp_path, overwrite=True)
    assert f"{one.key} has labels of er in the data root, but not in its row of proposals.csv; remove" in caplog.text


def test_a_class_that_was_drawn_with_annotate_is_unknown_where_nobody_drew(root: Path, tmp_path: Path) -> None:
    """New labels of `pytc annotate` have another value for unknown voxels than those of `propose`, and may have 255."""
    one = small_box(root, 14, "crop901", {"nuc": "instance"})
    dataset, grid = one.dataset, one.grid
    drawn = EditableLabels.create(one.file(tmp_path, "nuc", "zarr"), "nuc", grid)
    for z in (0, 1):
        drawn.write(z, 0, 0, np.array([[255, 256, 0]], np.uint32))
    drawn.finish()
    write_table(tmp_path / "proposals.csv", [one])
    cx.ingest(root, proposals=tmp_path)
    ids, known = read_instances(Catalog.open(str(root)).crop(dataset, "crop901"), "nuc", grid)
    assert known[:, 0, :3].all()
    assert known.sum() == 6
    assert ids[:, 0, :3].tolist() == [[255, 256, 0]] * 2


def test_a_label_map_that_was_corrected_and_is_not_taken_is_named(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = small_box(root, 24, "crop902", {"mito": "semantic", "er": "semantic"})
    grid, labels = one.grid, mito_above_er(one)
    together = labels["mito"] + 2 * labels["er"]
    for number, file_format in enumerate(("tiff", "zarr")):
        folder = tmp_path / file_format
        write_labels(folder, one, labels, file_format)
        write_table(folder / "proposals.csv", [one])
        cx.ingest(root, proposals=folder, overwrite=number > 0)
        assert "label_map" not in caplog.text
        place = one.file(folder, "label_map", file_format)
        corrected = np.where(together == 2, 0, together)
        if file_format == "tiff":
            write_tiff(place, corrected, np.dtype(np.uint8), grid)
        else:
            write_multiscale(place, corrected, grid, overwrite=True)
        cx.ingest(root, proposals=folder, overwrite=True)
        assert "crop902: label_map is newer than the files of mito, er, and differs; these are taken" in caplog.text
        caplog.clear()
        for name in ("mito", "er"):  # corrected later
            for file in [one.file(folder, name, file_format), *one.file(folder, name, file_format).rglob("*")]:
                os.utime(file, (2e9, 2e9))
        cx.ingest(root, proposals=folder, overwrite=True)
        assert "label_map" not in caplog.text


def test_a_table_without_rows_or_with_other_links_is_no_accident(
    first: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("neuroglancer", reason="the viewer needs pip install 'connectomics-cellmap[view]'")
    from connectomics.pipeline.view_proposals import open_proposals

    folder = Path(shutil.copytree(first, tmp_path / "1"))
    wrong = ["http://[127", "http://127.0.0.1:port/v/a/", "http://127.0.0.1:99999/v/a/", "see notes"]
    rows = read_table(folder)
    write_table(folder / "proposals.csv", [replace(row, link=link) for row, link in zip(rows, wrong, strict=True)])
    served = open_proposals(root, folder)
    served[0].close()
    assert len({page.url for page in served}) == len(wrong)
    write_table(folder / "proposals.csv", [])
    assert "lists no proposal" in failure(capsys, "view", root, "--proposals", folder)


def test_rounds_of_other_options_are_not_continued(phantom: Path, tmp_path: Path) -> None:
    rounds = runpy.run_path(str(ROOT / "benchmarks/active_learning.py"))["Study"]
    crop = next(crop for crop in Catalog.open(str(phantom)).crops() if "mito" in crop.labels)
    options = Namespace(
        root=phantom, dataset=crop.dataset, crop=crop.name, names=["mito"], validate=2, out=tmp_path / "rounds",
        minutes=1.0, boxes=[2, 4], methods=["random"], seeds=[1],
    )  # fmt: skip
    rounds(options)
    rounds(Namespace(**{**vars(options), "methods": ["uncertainty"], "seeds": [1, 2]}))
    with pytest.raises(SystemExit, match=r"rounds holds rounds of other options, .*\"minutes\": 1\.0"):
        rounds(Namespace(**{**vars(options), "minutes": 2.0}))


@pytest.mark.slow
def test_rounds_with_the_truth_as_oracle(phantom: Path, tmp_path: Path) -> None:
    """Both methods begin with the same boxes, and have as many in the second round; a second run adds nothing."""

    def ends_with_mito(crop: Crop) -> bool:
        if (label := crop.labels.get("mito")) is None:
            return False
        depth, *plane = label.grid.shape
        end = label.read_stored((depth - depth // 4, 0, 0), (depth // 4, *plane))
        return bool(np.isin(end, (0, 255), invert=True).any())

    crop = next(crop for crop in Catalog.open(str(phantom)).crops() if ends_with_mito(crop))
    depth, *_ = crop.labels["mito"].grid.shape
    words = [
        ROOT / "benchmarks/active_learning.py",
        ROOT / "tutorials/phantom.yaml",
        phantom,
    ]
    words += ["--dataset", crop.dataset, "--crop", crop.name, "--class", "mito", "--out", tmp_path / "rounds"]
    words += ["--seeds", 1, "--boxes", 2, 4, "--size", depth // 4, 12, 12, "--validate", depth // 4, "--minutes", 0.02]
    size = list(map(float, crop.labels["mito"].grid.voxel_size))
    words += ["dataset.classes=[mito]", f"dataset.voxel_size={size}", "data.patches_per_epoch=4", "data.num_workers=0"]
    words += ["data.patch_size=[16,16,16]", "inference.window=[16,16,16]", "training.val_every_n_epochs=1"]
    run = [sys.executable, *map(str, words)]
    first = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert first.count("| random |") == first.count("| uncertainty |") == 2
    boxes = {
        method: {c.name: c.box for c in Catalog.open(str(tmp_path / f"rounds/{method}-1/data")).crops()}
        for method in ("random", "uncertainty")
    }
    for found in boxes.values():
        assert len(found) == 5  # one of them validates
        assert not any(overlap(a, b) for a, b in combinations(found.values(), 2))
    for name in ("crop1", "crop2", "crop1000"):
        assert same(boxes["random"][name], boxes["uncertainty"][name])
    assert (
        subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-4:]
        == (first.splitlines()[-4:])
    )


def test_no_object_is_called_unknown() -> None:
    found = without_unknown(np.array([0, 254, 255, 256]))
    assert found.tolist() == [0, 254, 256, 257]
    assert found.dtype == np.uint16


def test_what_is_free_in_closed_form(tmp_path: Path) -> None:
    """Of eight sections, 0 to 2 are annotated, 7 is held out with a margin of one, 4 is black, and 3 outside a mask."""
    raw = np.random.default_rng(0).integers(1, 255, (8, 8, 8), dtype=np.uint8)
    raw[4] = 0
    write_raw(tmp_path, "a", raw, grid_of((8, 8, 8)))
    drawn = np.full((8, 8, 8), 255, np.uint8)
    drawn[:3] = 0
    write_label(tmp_path, "a", "crop1", "mito", drawn, grid_of((8, 8, 8)), unknown=255)
    catalog = Catalog.open(str(tmp_path))
    held = grid_of((8, 8, 8)).crop((7, 0, 0), (1, 8, 8)).box.grow(8.0)
    source = Multiscale.open(catalog.raw_location("a"))
    area = Area("a", source, source.grid.box, catalog.crops(), [held], lambda grid: grid.translation[0] != 28.0)
    how: Any = ((1, 8, 8), (8.0, 8.0, 8.0), ["mito"], 99, np.random.default_rng(0))
    found, refused = area.candidates(*how)
    assert [grid.translation[0] for grid in found] == [5 * 8.0 + 4.0]
    assert refused == {"annotated": 3, "at or near held-out crops": 2, "without raw": 1, "outside the mask": 1}
    chunk = next(Path(catalog.raw_location("a"), "s0").glob("0/0/0*"))
    chunk.unlink()
    assert area.candidates(*how)[0] == []


# -- the choice, in closed form ----------------------------------------------------------------------------------------
def pool_of(positions: list[float], groups: list[int], **more: Any) -> Pool:
    boxes = [Box((x, 0.0, 0.0), (x + 1.0, 1.0, 1.0)) for x in positions]
    return Pool(boxes, np.array(groups), **more)


def test_uncertainty_times_novelty() -> None:
    """Features -1 and 1 have a standard deviation of 1; all boxes are so far apart that distance does not count."""
    features = np.array([[-1.0], [-1.0], [1.0], [1.0]])
    uncertain = np.array([0.4, 0.3, 0.2, 0.1])
    pool = pool_of([0, 1e9, 2e9, 3e9], [0, 0, 0, 0], uncertainty=uncertain, features=features, reach=1e-9)
    found = choose_uncertain(pool, 4)
    assert [c.number for c in found[:2]] == [0, 2]  # 1 looks like 0
    assert [c.score for c in found] == pytest.approx([0.4, 0.2 * 2 / 2, 0, 0])
    known = replace(pool, annotated_features=np.array([[-1.0]]))  # the scale is of all five now
    assert choose_uncertain(known, 1)[0].number == 2


def test_spread_over_space_and_data_sets() -> None:
    same_features = {"features": np.array([[0.0], [1.0], [2.0]]), "uncertainty": np.array([0.5, 0.5, 0.5])}
    near = pool_of([0, 10, 1000], [0, 0, 0], **same_features, reach=100.0)
    assert [c.number for c in choose_uncertain(near, 2)] == [0, 2]
    pool = pool_of([0, 10, 20], [0, 0, 1], features=np.array([[0.0], [9.0], [9.0]]), uncertainty=np.array([0.5] * 3))
    assert [c.number for c in choose_uncertain(pool, 2)] == [0, 2]
    annotated = replace(near, annotated=[Box((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))], annotated_groups=[0])
    assert choose_uncertain(annotated, 1)[0].number == 2


def test_even_and_random() -> None:
    pool = pool_of([0, 10, 20, 30, 40, 0], [0, 0, 0, 0, 0, 1])
    assert [c.number for c in choose_even(pool, 4)] == [2, 5, 0, 4]
    assert len(choose_even(pool, 99)) == 6
    annotated = replace(pool, annotated=[Box((0.0, 0.0, 0.0), (9.0, 1.0, 1.0))], annotated_groups=[0])
    assert choose_even(annotated, 1)[0].number == 4
    drawn = [[c.number for c in choose_random(pool, 6, np.random.default_rng(seed))] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[2]) == list(range(6))


class Half(nn.Module):
    """Probability 1 in the left half of a window, else 0: a flip of x disagrees at every voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Conv3d(1, 1, 1, stride=2, bias=False)
        nn.init.constant_(self.coarse.weight, 2.0)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.coarse(image)
        out = torch.zeros_like(image)
        out[..., : image.shape[-1] // 2] = 1
        return out


@pytest.mark.parametrize(("views", "expected"), [(("zyx", "-zyx"), 0.0), (("zyx", "zy-x"), 1.0)])
def test_uncertainty_in_closed_form(tmp_path: Path, views: tuple[str, ...], expected: float) -> None:
    raw = write_raw(tmp_path, "a", np.full((16, 16, 16), 100, np.uint8), grid_of((16, 16, 16)))
    task = PredictTask(
        raw=str(raw), output=str(tmp_path / "out"), classes=("mito",), targets={"mito": grid_of((8, 8, 8))},
        voxel_size=(8.0, 8.0, 8.0), window=(8, 8, 8), checkpoint="0", context=(0, 0, 0), overlap=0.0,
        symmetries=views, uncertainty="variance", block_size=(8, 8, 8),
    )  # fmt: skip
    network = Half()
    bottleneck = Bottleneck(network, torch.rand(1, 1, 8, 8, 8))
    observer = Observer(task, [network], [bottleneck], "cpu", 1)
    uncertainty, features = observer.look(grid_of((8, 8, 16)))
    assert uncertainty == pytest.approx(expected, abs=1e-6)
    value = task.normalization.centered(
        task.normalization.unit(np.full((1, 1, 1), 100, np.float32)), np.ones((1, 1, 1), bool)
    )
    assert features == pytest.approx([2 * float(value[0, 0, 0]), 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("architecture", "options", "channels"),
    [
        ("unet_2d", {"features": [4, 6, 8]}, 8),
        # MONAI joins the deepest stage with its input before it enlarges both
        ("unet", {"channels": [4, 6, 8], "strides": [2, 2], "num_res_units": 0}, 6 + 8),
        ("residual_unet", {"size": "S", "strides": [1, 2], "kernel_size": [3, 3]}, 32),
    ],
)
def test_features_are_those_of_the_deepest_stage(architecture: str, options: dict[str, Any], channels: int) -> None:
    network = build_model(architecture, 1, 2, patch_size=[16, 16, 16], deep_supervision=False, options=options).eval()
    bottleneck = Bottleneck(network, torch.zeros(1, 1, 16, 16, 16))
    assert bottleneck.features.size == 0
    with torch.inference_mode():
        network(torch.rand(2, 1, 16, 16, 16))
    assert bottleneck.features.shape == (2 * channels,)
    assert bottleneck.features.std() > 0
    bottleneck.close()


# -- wrong input -------------------------------------------------------------------------------------------------------
def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", 0], "budget must be at least 1"),
        (["--seed", -1], "seed must be at least 0"),
        (["--size", "1,2"], "--size: expected three whole numbers"),
        (["--size", "inf,2,2"], "--size: expected three whole numbers"),
        (["--size", "1.5,2,2"], "--size: expected three whole numbers"),
        (["--size", "0,2,2"], "size must be three whole numbers >= 1"),
        (["--size", "1,900,900"], "data set smaller than a box"),
        (["--method", "entropy"], "unknown method 'entropy'"),
        (["--format", "png"], "unknown format 'png'"),
        (["--dataset", "phantom-isoo"], "did you mean 'phantom-iso'"),
        (["--box", "phantom-iso:0,0,0"], "a box is DATASET"),
        (["--box", "phantom-iso:0,0,0:9,9,9", "--dataset", "phantom-iso"], "exclude each other"),
        (["dataset.split=dataset", "dataset.held_out=[phantom-iso]", "--dataset", "phantom-iso"], "is held out"),
    ],
)
def test_wrong_options_are_one_line(
    run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[object], said: str
) -> None:
    assert said in failure(capsys, "propose", run, root, "--out", tmp_path / "new", *words)
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_are_one_line(
    first: Path, run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "was not written by propose" in failure(
        capsys, "propose", run, root, "--out", tmp_path / "mine", "--overwrite"
    )
    assert "no proposals.csv" in failure(capsys, "ingest", root, "--proposals", tmp_path / "mine")
    assert "leave out --dataset" in failure(capsys, "ingest", root, "--proposals", first, "--dataset", "x")
    assert "no proposal of rank 9" in failure(capsys, "ingest", root, "--proposals", first, "--done", "1,9")
    assert "--done: expected numbers" in failure(capsys, "ingest", root, "--proposals", first, "--done", "all")
    assert "no proposal is done" in failure(capsys, "ingest", root, "--proposals", first)
    folder = Path(shutil.copytree(first, tmp_path / "1"))
    rows = done(folder, {4}, classes={"nuc": "semantic"})
    assert "unknown class 'nuc'" in failure(capsys, "ingest", root, "--proposals", folder)
    write_table(folder / "proposals.csv", [replace(p, grid=p.grid.crop((0, 0, 0), (1, 16, 16))) for p in rows])
    done(folder, {4}, classes={"er": "semantic"})
    assert "they must agree" in failure(capsys, "ingest", root, "--proposals", folder)
    assert rows[3].crop not in Catalog.open(str(root)).crop_names(rows[3].dataset)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (",no\n", ",perhaps\n", "done must be yes or no, got 'perhaps'"),
        (",crop3", ",volume3", "a crop's name is crop and a number"),
        (",2,16,16,", ",2,x,16,", "expected numbers for rank"),
        ("mito:instance", "mito", "CLASS:semantic or CLASS:instance"),
        ("begin_z_nm", "z", "columns ['begin_z_nm'] are missing"),
    ],
)
def test_a_table_that_cannot_be_read_names_the_row(
    first: Path, tmp_path: Path, before: str, after: str, said: str
) -> None:
    text = (first / "proposals.csv").read_text()
    assert before in text
    (tmp_path / "proposals.csv").write_text(text.replace(before, after, 1))
    with pytest.raises(MetadataError) as error:
        read_table(tmp_path)
    assert said in str(error.value)
