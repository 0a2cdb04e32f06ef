"""A small run with everything a report can show, written by hand: two crops, two classes, one anisotropic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.geometry import VoxelGrid
from connectomics.io.write import create_array, create_multiscale, ensure_group, write_multiscale
from connectomics.pages.report.sources import ReportSources

DATASETS = ("jrc_iso", "jrc_aniso")
#: Grids of the truth: nm, z y x; offsets are centres of first voxels on no other lattice.
GRIDS = {
    "crop7": ("jrc_iso", VoxelGrid((8.0, 8.0, 8.0), (106.0, 210.0, 58.0), (24, 30, 36))),
    "crop9": ("jrc_aniso", VoxelGrid((20.96, 8.0, 8.0), (107.86, 122.0, 130.0), (12, 32, 28))),
}
RAW = {
    "jrc_iso": VoxelGrid((4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (96, 128, 112)),
    "jrc_aniso": VoxelGrid((5.24, 4.0, 4.0), (0.0, 0.0, 0.0), (96, 120, 112)),
}


def balls(grid: VoxelGrid) -> list[tuple[NDArray[np.float64], float]]:
    """Middle (nm) and radius (nm) of two balls in the box of a grid."""
    begin, extent = np.asarray(grid.box.begin), np.asarray(grid.box.extent)
    small = 0.18 * min(extent)
    return [(begin + extent * 0.33, small), (begin + extent * 0.68, small * 1.2)]


def ids_at(crop: VoxelGrid, grid: VoxelGrid) -> NDArray[np.uint16]:
    """The balls of ``crop``'s box as ids 1 and 2, at the voxel centres of ``grid``."""
    z, y, x = np.meshgrid(*grid.axes(), indexing="ij")
    ids = np.zeros(grid.shape, np.uint16)
    for number, (middle, radius) in enumerate(balls(crop), start=1):
        ids[(z - middle[0]) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2 <= radius**2] = number
    return ids


@dataclass(frozen=True)
class Made:
    """Everything on disk, and the sources that name it all."""

    root: Path
    sources: ReportSources
    scores: dict[str, Any]


def write_class(
    out: Path, dataset: str, crop: str, name: str, values: NDArray[Any], grid: VoxelGrid, **about: Any
) -> None:
    """One array as predict or decode leave it."""
    attrs = {"connectomics": {"class_name": name, "complete": True, "version": "0.1.0", **about}}
    (writer,) = create_multiscale(out / f"{dataset}.zarr" / crop / name, [grid], values.dtype, attrs=attrs)
    writer.write((0, 0, 0), values)


def prediction_of(crop: str, name: str, truth: NDArray[Any]) -> NDArray[Any]:
    """The worse crop (9) misses its second ball; both lose a rim."""
    found = truth.copy()
    if crop == "crop9":
        found[found == 2] = 0
    found[:, ::7] = 0
    return (found > 0).astype(np.uint8) if name == "er" else found


def _raw(root: Path) -> None:
    for dataset, grid in RAW.items():
        dark = np.zeros(grid.shape, bool)
        for of, crop in GRIDS.values():
            if of == dataset:
                dark |= ids_at(crop, grid) > 0
        noise = np.random.default_rng(0).normal(0, 4, grid.shape)
        raw = np.clip(np.where(dark, 60, 180) + noise, 0, 255).astype(np.uint8)
        location = root / dataset / f"{dataset}.zarr/recon-1/em/fibsem-uint8"
        write_multiscale(location, raw, grid, levels=2)


def _annotated_crop(root: Path) -> None:
    """A training crop of the data root, crop1, whose last quarter along z is unknown."""
    _, grid = GRIDS["crop7"]
    values = (ids_at(grid, grid) > 0).astype(np.uint8)
    values[18:] = 255
    counts = {"absent": int((values == 0).sum()), "unknown": int((values == 255).sum())}
    annotation = Annotation("er", "semantic", 0, 255, counts)
    location = root / "jrc_iso/jrc_iso.zarr/recon-1/labels/groundtruth/crop1/er"
    write_multiscale(location, values, grid, kind="label", attrs=annotation.to_attrs())


def _run_folder(run: Path) -> None:
    run.mkdir()
    (run / "config.yaml").write_text("name: test_run\ndataset:\n  classes: [mito, er]\n  resolution: [8.0, 8.0, 8.0]\n")
    rows = [
        "epoch,step,train/loss,train/loss_step,train/DiceLoss,train/lr,val/dice,val/mito/dice,val/er/dice,"
        "data/mito/patches,data/mito/present,data/mito/known"
    ]
    for epoch in range(6):
        rows.append(f"{epoch},{epoch * 10 + 5},,{1.1 / (epoch + 1)},,,,,,,,")
        rows.append(
            f"{epoch},{epoch * 10 + 9},{1 / (epoch + 1)},,{0.6 / (epoch + 1)},{0.001 / (epoch + 1)},,,,3,250,1000"
        )
        rows.append(f"{epoch},{epoch * 10 + 9},,,,,{0.1 * epoch},{0.12 * epoch},nan,,,")
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    by_epoch = [
        {"epoch": e, "samples_per_s": 2.0 + e, "data_wait_share": 0.1, "memory_bytes": 3e9, "gpu_memory_bytes": None}
        for e in range(6)
    ]
    timing: dict[str, Any] = {"by_epoch": by_epoch, "samples": 24}
    timing |= {"total_s": 100.0, "data_wait_s": 5.0, "step_s": 70.0, "validation_s": 20.0, "other_s": 5.0, "epochs": 6}
    (run / "timing.json").write_text(json.dumps(timing))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A root with raw, truth, predictions, labels, a submission and its scores."""
    from connectomics.metrics.challenge import score_submission
    from connectomics.metrics.tables import write_scores
    from connectomics.submission import export_submission

    root = tmp_path_factory.mktemp("a run with späces")
    entries = []
    ensure_group(root / "truth.zarr")
    _raw(root / "data")
    _annotated_crop(root / "data")
    for crop, (dataset, grid) in GRIDS.items():
        ids = ids_at(grid, grid)
        for name in ("mito", "er"):
            truth = ids if name == "mito" else (ids > 0).astype(np.uint8)
            create_array(root / "truth.zarr" / crop / name, grid.shape, truth.dtype, grid=grid).write((0, 0, 0), truth)
            entries.append(TableEntry(int(crop[4:]), dataset, name, grid))
            found = prediction_of(crop, name, truth)
            kind = "instance" if name == "mito" else "semantic"
            source = {"model": {"checkpoint": "0123456789abcdef", "window": [64, 64, 64]}}
            decode = {"threshold": 0.5, "method": "cc3d"}
            write_class(
                root / "labels",
                dataset,
                crop,
                name,
                found,
                grid,
                artefact="labels",
                kind=kind,
                decode=decode,
                source=source,
            )
            probability = np.where(found > 0, 230, 20).astype(np.uint8)
            write_class(root / "predictions", dataset, crop, name, probability, grid, artefact="probability", **source)
    table = CropTable(tuple(entries))
    table.save(root / "crops.csv")
    export_submission(root / "labels", root / "submission.zip", crops=table)
    result = score_submission(root / "submission.zip", root / "truth.zarr", root / "crops.csv")
    write_scores(result, root / "scores")
    _run_folder(root / "run")
    sources = ReportSources(
        title="Test report",
        run=root / "run",
        stages={"training": 100.0, "predicting": 25.0},
        data_root=root / "data",
        truth=root / "truth.zarr",
        crop_table=root / "crops.csv",
        labels=root / "labels",
        probabilities=root / "predictions",
        submission=root / "submission.zip",
        scores=root / "scores/scores.json",
        baseline_scores=root / "scores/scores.json",
        baseline_name="itself",
    )
    return Made(root, sources, result.to_dict())
