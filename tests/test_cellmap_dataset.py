"""The plan's example tests, on the phantom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from connectomics.data.dataset.dataset_cellmap import CellMapDataset, CellMapMultiClassDataset
from connectomics.errors import MissingError, UnknownNameError

DATASET = "phantom-iso"


@pytest.fixture
def crop(phantom: Path) -> str:
    return sorted(p.name for p in (phantom / DATASET / f"{DATASET}.zarr/recon-1/labels/groundtruth").glob("crop*"))[0]


def test_cellmap_dataset_discovery(phantom: Path) -> None:
    dataset = CellMapDataset(
        data_root=str(phantom),
        datasets=[DATASET],
        crops=None,
        classes=["nuc", "mito"],
        mode="train",
        patch_size=(64, 64, 64),
        resolution=(8.0, 8.0, 8.0),
    )
    assert len(dataset) > 0
    assert all(DATASET in sample["dataset"] for sample in dataset.data_samples)
    assert {"dataset", "crop", "class", "raw_path", "label_path", "scale_level"} <= set(dataset.data_samples[0])


def test_cellmap_dataset_getitem(phantom: Path, crop: str) -> None:
    dataset = CellMapDataset(
        data_root=str(phantom),
        datasets=[DATASET],
        crops=[crop],
        classes=["mito"],
        mode="train",
        patch_size=(64, 64, 64),
        resolution=(8.0, 8.0, 8.0),
    )
    sample = dataset[0]
    assert "image" in sample
    assert "label" in sample
    assert sample["image"].shape == (1, 64, 64, 64)
    assert sample["label"].shape == (1, 64, 64, 64)
    assert sample["image"].dtype == np.float32
    assert sample["known"].shape == (1, 64, 64, 64)
    assert sample["known"].dtype == bool
    assert 0.0 <= sample["image"].min() < sample["image"].max() <= 1.0
    assert set(np.unique(sample["label"])) <= {0.0, 1.0}


def test_cellmap_multiclass_dataset(phantom: Path, crop: str) -> None:
    dataset = CellMapMultiClassDataset(
        data_root=str(phantom),
        datasets=[DATASET],
        crops=[crop],
        classes=["nuc", "mito", "er"],
        mode="train",
        patch_size=(64, 64, 64),
        resolution=(8.0, 8.0, 8.0),
    )
    sample = dataset[0]
    assert sample["image"].shape == (1, 64, 64, 64)
    assert sample["label"].shape == (3, 64, 64, 64)
    assert dataset.crop_groups[0]["crop"] == crop


def test_validation_is_the_same_every_time_and_training_is_not(phantom: Path) -> None:
    arguments = dict(data_root=str(phantom), datasets=[DATASET], classes=["mito"], patch_size=(24, 24, 24))
    val = CellMapMultiClassDataset(mode="val", **arguments)
    np.testing.assert_array_equal(val[0]["image"], val[0]["image"])
    train = CellMapMultiClassDataset(mode="train", **arguments)
    draws = [train[0]["image"] for _ in range(4)]
    assert any(not np.array_equal(draws[0], other) for other in draws[1:])
    again = CellMapMultiClassDataset(mode="train", **arguments)
    np.testing.assert_array_equal(draws[0], again[0]["image"])


def test_bad_names_are_one_line_with_the_nearest(phantom: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'phantom-iso'"):
        CellMapDataset(str(phantom), ["phantom-isso"], classes=["mito"])
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        CellMapDataset(str(phantom), [DATASET], classes=["mitto"])
    with pytest.raises(UnknownNameError, match="unknown crop 'crop99999'"):
        CellMapDataset(str(phantom), [DATASET], ["crop99999"], classes=["mito"])
    with pytest.raises(MissingError, match="no data root at"):
        CellMapDataset(str(phantom / "nowhere"), [DATASET], classes=["mito"])
    with pytest.raises(UnknownNameError, match="balance"):
        CellMapDataset(str(phantom), [DATASET], classes=["mito"], mode_kwargs={"balanse": 1})


def test_a_data_loader_with_workers_reads_after_its_parent_did(phantom: Path) -> None:
    dataset = CellMapMultiClassDataset(str(phantom), [DATASET], classes=["mito"], mode="val", patch_size=(16, 16, 16))
    first = dataset[0]
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="forkserver")
    batch = next(iter(loader))
    np.testing.assert_array_equal(batch["image"], first["image"])
