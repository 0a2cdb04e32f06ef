"""Voxels near another object: found as in a plain search, and left out of what is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from connectomics.models.batch_labels import DenseLabels
from connectomics.models.gaps import GapLabels, near_another


def plain(ids: np.ndarray, steps: tuple[int, int, int]) -> np.ndarray:
    """Voxel by voxel: whether a box of ``steps`` around an object's voxel holds another object."""
    near = np.zeros(ids.shape, bool)
    for place in np.ndindex(*ids.shape):
        box = tuple(slice(max(0, p - s), p + s + 1) for p, s in zip(place, steps, strict=True))
        around = ids[box]
        near[place] = ids[place] > 0 and ((around > 0) & (around != ids[place])).any()
    return near


@pytest.mark.parametrize(
    ("length", "steps"), [(3.0, (0, 0, 0)), (4.0, (0, 1, 1)), (15.0, (1, 2, 2)), (30.0, (1, 4, 4))]
)
def test_it_is_a_box_in_nm(length: float, steps: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    ids = np.kron(rng.choice([-1, 0, 0, 1, 2, 2**24 - 1, 2**24 - 2], (4, 4, 3)), np.ones((2, 3, 4))).astype(np.int32)
    found = near_another(torch.from_numpy(np.stack([ids, ids[::-1].copy()])), length, (30.0, 8.0, 8.0))
    np.testing.assert_array_equal(found[0], plain(ids, steps))
    np.testing.assert_array_equal(found[1], plain(ids[::-1], steps))


def test_touching_objects_get_a_gap_and_others_keep_their_rim() -> None:
    ids = torch.zeros((1, 1, 1, 12), dtype=torch.int32)
    ids[..., 1:5], ids[..., 5:8], ids[..., 10:] = 7, 3, 9
    near = near_another(ids, 4.0, (8.0, 8.0, 8.0))
    assert near.flatten().int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("unknown", [False, True])
def test_the_gap_becomes_absent_or_unknown(unknown: bool) -> None:
    label, known = torch.rand(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4) < 0.7
    gap = torch.rand(2, 4, 4, 4) < 0.3
    labels = GapLabels(DenseLabels(label, known), {1: gap}, unknown).to("cpu")
    assert labels.shape == (2, 3, 4, 4, 4)
    for channel in (0, 2):
        assert all(torch.equal(a, b[:, channel]) for a, b in zip(labels.of(channel), (label, known), strict=True))
    found, seen = labels.of(1)
    assert torch.equal(seen, known[:, 1] & ~gap if unknown else known[:, 1])
    assert torch.equal(found[seen], (label[:, 1] if unknown else torch.where(gap, 0.0, label[:, 1]))[seen])
