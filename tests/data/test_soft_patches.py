"""Soft labels and even ties from the label array to the batch: cache, spatial augmentation, MONAI, collate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.cache import prepare
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.sampling import PatchRequest
from connectomics.models.batch_labels import DenseLabels, labels_of
from connectomics.models.losses import build_loss
from tests.cellmap.roots import grid_of, write_label, write_raw

BOTH = ["image", "label"]
FLIP: dict[str, Any] = {"RandFlipd": {"keys": BOTH, "prob": 1.0, "spatial_axis": [0, 2]}}
TURN: dict[str, Any] = {"RandAffined": {"keys": BOTH, "prob": 1.0, "rotate_range": [0.5, 0.5, 0.5]}}
#: After the first transform that is not fused, labels move as dense arrays.
DENSE: dict[str, Any] = {"RandGridDistortiond": {"keys": BOTH, "prob": 1.0, "num_cells": 3}}
CLASSES = ("cell", "mito_mem")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels at 4 nm, to be read at 8 nm: blocks of cells with ids, sheets of mito_mem with unknown voxels."""
    folder, rng = tmp_path_factory.mktemp("soft"), np.random.default_rng(0)
    write_raw(folder, "set-a", rng.integers(1, 255, (24, 24, 24), dtype=np.uint8), grid_of((24, 24, 24), 8.0))
    grid = grid_of((40, 40, 40), 4.0, 16.0)
    cells = np.kron(rng.integers(0, 6, (8, 8, 8)), np.ones((5, 5, 5))).astype(np.uint16)
    write_label(folder, "set-a", "crop1", "cell", cells, grid, kind="instance")
    sheets = rng.choice([0, 1, 255], (40, 40, 40), p=[0.6, 0.3, 0.1]).astype(np.uint8)
    write_label(folder, "set-a", "crop1", "mito_mem", sheets, grid, unknown=255)
    return folder


def dataset_of(root: Path, augmentations: dict[str, Any] | None = None, **options: Any) -> CellMapMultiClassDataset:
    shape = (16, 16, 16)
    return CellMapMultiClassDataset.of_crops(
        Catalog.open(str(root)).crops(), CLASSES, options.pop("mode", "train"), shape, (8.0, 8.0, 8.0),
        PatchAugmentor.of(augmentations or {}, shape), PatchOptions(**options),
    )  # fmt: skip


def patch_of(dataset: CellMapMultiClassDataset, seed: int) -> PackedPatch:
    patch = dataset[PatchRequest(0, None, (seed,))]
    assert isinstance(patch, PackedPatch)
    return patch


def labels_in(patch: PackedPatch) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    dense = patch.dense(CLASSES)
    return dense["label"], dense["known"]


@pytest.mark.parametrize("augmentations", [{}, FLIP, TURN, {**TURN, **DENSE}])
@pytest.mark.parametrize("instances", [(), ("cell",)])
def test_cached_and_streamed_patches_are_the_same(
    root: Path, tmp_path: Path, augmentations: dict[str, Any], instances: tuple[str, ...]
) -> None:
    options: dict[str, Any] = {"soft_labels": True, "alternate_ties": True, "instances": instances}
    plain = dataset_of(root, augmentations, **options)
    cached = dataset_of(root, augmentations, cache="disk", cache_dir=str(tmp_path), **options)
    prepare(cached.all_volumes)
    for seed in range(3):
        ours, theirs = patch_of(cached, seed).dense(), patch_of(plain, seed).dense()
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])
        assert len(np.unique(ours["label"][ours["known"]])) > 4


def test_fractions_move_with_the_voxels(root: Path) -> None:
    """A flipped patch holds what the volume holds, flipped; a rotated one no value that the volume does not have."""
    flipped = dataset_of(root, FLIP, soft_labels=True)
    patch = patch_of(flipped, 1)
    label, known = flipped.volumes[0].read_labels(patch.grid)
    np.testing.assert_array_equal(labels_in(patch)[0], label[:, ::-1, :, ::-1])
    np.testing.assert_array_equal(labels_in(patch)[1], known[:, ::-1, :, ::-1])
    turned, seen = labels_in(patch_of(dataset_of(root, TURN, soft_labels=True), 1))
    whole = flipped.volumes[0].read_labels(flipped.volumes[0].grid)[0]
    for channel in range(2):
        assert set(np.unique(turned[channel][seen[channel]])) <= set(np.unique(whole[channel]))


@pytest.mark.parametrize("augmentations", [{}, TURN, DENSE])
def test_present_is_half_of_the_fraction_or_more(root: Path, augmentations: dict[str, Any]) -> None:
    patch = patch_of(dataset_of(root, augmentations, soft_labels=True), 2)
    label, known = labels_in(patch)
    present = np.stack([row[patch.codes] for row in patch.states.tables(CLASSES)[0]])
    assert (label[present] >= 0.5).all()
    assert (label[known & ~present] <= 0.5).all()
    assert not label[~known].any()


def test_a_batch_says_what_its_patches_say(root: Path) -> None:
    dataset = dataset_of(root, TURN, soft_labels=True, instances=("cell",))
    patches = [patch_of(dataset, seed) for seed in range(3)]
    packed = labels_of(collate(patches))
    dense = packed.dense()
    for number, patch in enumerate(patches):
        label, known = labels_in(patch)
        np.testing.assert_array_equal(dense.known[number].numpy(), known)
        np.testing.assert_array_equal(dense.label[number].numpy(), label)
    logits = torch.randn(packed.shape)
    loss = build_loss(["DiceLoss", "BCEWithLogitsLoss"])
    assert torch.equal(loss(logits, packed).total, loss(logits, DenseLabels(dense.label, dense.known)).total)


def test_only_training_reads_them(root: Path) -> None:
    options: dict[str, Any] = {"soft_labels": True, "alternate_ties": True}
    training, validation = dataset_of(root, **options), dataset_of(root, mode="val", **options)
    volume = validation.volumes[0]
    assert (volume.soft, volume.alternate_ties) == (False, False)
    assert set(np.unique(volume.read_labels(volume.grid)[0])) == {0, 1}
    plain = dataset_of(root).volumes[0]
    np.testing.assert_array_equal(volume.read_labels(volume.grid)[0], plain.read_labels(plain.grid)[0])
    even, all_ties = (v.decode_labels(volume.grid).present_of("cell").sum() for v in (training.volumes[0], plain))
    assert even < all_ties


def test_hard_labels_need_no_table_of_fractions(root: Path) -> None:
    assert "fraction" not in collate([patch_of(dataset_of(root), 0)])
