"""Targets of heads: closed forms, plain references, what is known, and that they turn along with their ids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from connectomics.config.heads import Head
from connectomics.errors import InputError
from connectomics.inference.symmetry import SYMMETRY_SETS, Symmetry
from connectomics.models.targets import (
    AffinityLabels,
    affinities,
    affinity,
    border_distance,
    boundary,
    distance,
    head_labels,
    reach,
    shape_descriptors,
)

ISO = (8.0, 8.0, 8.0)
FLAT = (20.0, 8.0, 5.24)


def blobs(seed: int, shape: tuple[int, int, int] = (9, 11, 10), unknown: bool = True) -> Tensor:
    """Objects that touch each other, background, and (with ``unknown``) a corner of which nothing is known."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, 1, (7, 3)) * shape
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    nearest = ((at[..., None, :] - seeds) ** 2).sum(-1).argmin(-1)
    ids = np.array([0, 5, 1000, 3, 0, 17, 2**31 - 1])[nearest].astype(np.int32)
    if unknown:
        ids[:2, -3:] = -1
    return torch.from_numpy(ids)[None]


# -- affinities ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [(-1, 0, 0), (0, 2, -3), (3, 1, 1), (0, 0, 20)])
def test_affinities_are_what_their_definition_says(offset: tuple[int, int, int]) -> None:
    ids = blobs(0)
    target, known = affinity(ids, offset)
    n = ids.shape[1:]
    for p in itertools.product(*map(range, n)):
        q = tuple(a + o for a, o in zip(p, offset, strict=True))
        inside = all(0 <= a < m for a, m in zip(q, n, strict=True))
        a, b = int(ids[0][p]), int(ids[0][q]) if inside else -1
        assert bool(known[0][p]) == (a >= 0 and b >= 0), p
        if known[0][p]:
            assert float(target[0][p]) == float(a == b and a != 0), p


def test_affinities_for_a_loss_are_those_in_one_array() -> None:
    ids, offsets = torch.cat([blobs(1), blobs(2)]), ((-1, 0, 0), (0, 3, 2))
    target, known = affinities(ids, offsets)
    lazy = AffinityLabels(ids, offsets)
    assert target.shape == known.shape == lazy.shape == (2, 2, 9, 11, 10)
    for channel in range(2):
        assert torch.equal(lazy.of(channel)[0], target[:, channel])
        assert torch.equal(lazy.of(channel)[1], known[:, channel])


# -- distances -------------------------------------------------------------------------------------------------------
def plain_distance(ids: NDArray[np.int32], size: tuple[float, ...], far: float) -> tuple[NDArray[np.float64], ...]:
    """Every voxel with every other: distance to the nearest box of another id, and to the nearest unknown one."""
    padded = np.pad(ids, 6, constant_values=-1)
    others = np.argwhere(np.ones(padded.shape, bool)) - 6
    numbers = padded.reshape(-1)
    found, known = np.zeros(ids.shape), np.zeros(ids.shape, bool)
    for p in np.ndindex(ids.shape):
        gap = np.maximum(np.abs(others - p) - 0.5, 0) * size
        all_of_them = np.sqrt((gap**2).sum(1))
        border = all_of_them[(numbers != ids[p]) & (numbers >= 0)].min(initial=far)
        unknown = all_of_them[numbers < 0].min(initial=far)
        found[p], known[p] = min(border, far), ids[p] >= 0 and min(border, far) <= unknown + 1e-6
    return found, known


@pytest.mark.parametrize("size", [ISO, FLAT])
@pytest.mark.parametrize("far", [19.0, 45.0])
def test_distances_are_exact_as_far_as_they_reach(size: tuple[float, float, float], far: float) -> None:
    ids = blobs(3)
    found, known = border_distance(ids, size, far)
    expected, expected_known = plain_distance(ids[0].numpy(), size, far)
    np.testing.assert_array_equal(known[0].numpy(), expected_known)
    assert 0.1 < expected_known.mean() < 0.95
    np.testing.assert_allclose(found[0].numpy()[expected_known], expected[expected_known], atol=1e-3)


def test_distance_from_a_plane_is_that_of_voxel_centres() -> None:
    ids = torch.zeros((1, 24, 24, 24), dtype=torch.int32)
    ids[:, :, 12:] = 7
    target, known = distance(ids, FLAT, 16.0)
    depth = (torch.arange(24) - 11.5) * FLAT[1]
    expected = 0.5 + 0.5 * torch.tanh(depth.clamp(-48, 48) / 16)
    seen = known[0, 12, :, 12]
    assert seen.nonzero().flatten().tolist() == list(range(6, 18))  # elsewhere a face is nearer than the plane
    torch.testing.assert_close(target[0, 12, seen, 12], expected[seen])


def test_distance_in_a_sphere_falls_with_the_radius() -> None:
    at = torch.stack(torch.meshgrid(*[torch.arange(41.0) - 20] * 3, indexing="ij"))
    radius = at.norm(dim=0)
    ids = (radius < 12).int()[None]
    found, known = border_distance(ids, (1.0, 1.0, 1.0), 10.0)
    inside = (radius > 4) & (radius < 11)
    assert known[0][inside].all()
    assert (found[0] - (12 - radius))[inside].abs().max() < 0.9  # a staircase of voxels
    far = radius > 30
    assert not known[0][far].any()  # the corners are nearer to a face than to the sphere


def test_a_cut_object_does_not_teach_a_wrong_distance() -> None:
    whole = torch.zeros((1, 30, 30, 30), dtype=torch.int32)
    whole[:, 5:25, 5:25, 5:25] = 1
    truth = border_distance(whole, ISO, 60.0)[0][:, 8:22, 8:22, 8:22]
    found, known = border_distance(whole[:, 8:22, 8:22, 8:22].contiguous(), ISO, 60.0)
    assert not known.all()
    torch.testing.assert_close(found[known], truth[known])


def test_boundaries_are_as_wide_as_said_on_both_sides_and_between_objects_too() -> None:
    ids = torch.zeros((1, 16, 16, 30), dtype=torch.int32)
    ids[..., 10:20], ids[..., 20:] = 1, 2
    target, known = boundary(ids, ISO, 12.0)  # centres at 4, 12, 20 nm
    line = target[0, 8, 8].bool()
    assert line[2:28].nonzero().flatten().add(2).tolist() == [8, 9, 10, 11, 18, 19, 20, 21]
    assert known[0, 8, 8].nonzero().flatten().tolist() == list(range(2, 28))
    assert not known[0, 0, 0, :8].any()


@pytest.mark.parametrize("width", [4.0, 9.0, 21.0])
def test_boundaries_are_distances_cut_off(width: float) -> None:
    ids = blobs(4)
    expected, expected_known = plain_distance(ids[0].numpy(), FLAT, width * 1.001)
    target, known = boundary(ids, FLAT, width)
    np.testing.assert_array_equal(known[0].numpy(), expected_known)
    np.testing.assert_array_equal(target[0].numpy()[expected_known] > 0, (expected <= width)[expected_known])


@pytest.mark.parametrize("target", [lambda ids: boundary(ids, ISO, 20.0), lambda ids: distance(ids, ISO, 16.0)])
def test_in_a_patch_of_one_plane_only_the_plane_counts(target: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """As in the middle of many equal planes; nothing is unknown because of the faces above and below."""
    plane = blobs(5, (9, 30, 30))[:, 4:5]
    thick = plane.expand(-1, 41, -1, -1).contiguous()
    found, known = target(plane)
    expected, expected_known = (values[:, 20:21] for values in target(thick))
    assert 0.3 < known.float().mean() < 1
    assert torch.equal(known, expected_known)
    torch.testing.assert_close(found[known], expected[known])
    descriptors, whole = shape_descriptors(plane, ISO, 12.0)
    assert whole.float().mean() > 0.1 * (plane > 0).float().mean()
    assert not descriptors[0, 3].any(), "a plane has no extent along z"


# -- shape descriptors -----------------------------------------------------------------------------------------------
def plain_descriptors(ids: NDArray[np.int32], size: tuple[float, ...], sigma: float) -> NDArray[np.float64]:
    """Object by object over the whole array, with moments in absolute coordinates."""
    result = np.zeros((10, *ids.shape))
    place = np.meshgrid(*[np.arange(n) * s for n, s in zip(ids.shape, size, strict=True)], indexing="ij")

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        widths = [sigma / s for s in size]
        radii = [math.floor(3 * w) for w in widths]
        return ndimage.gaussian_filter(values, widths, mode="constant", radius=radii)

    for number in np.unique(ids[ids > 0]):
        mask = (ids == number).astype(float)
        weight = np.maximum(blurred(mask), 1e-30)
        mean = [blurred(mask * p) / weight for p in place]
        cov = {(a, b): blurred(mask * place[a] * place[b]) / weight - mean[a] * mean[b]
               for a in range(3) for b in range(a, 3)}  # fmt: skip
        thin = 1e-4 * sigma**2
        spread = [np.maximum(cov[a, a], 0) for a in range(3)]
        values = [0.5 + (m - p) / (2 * sigma) for m, p in zip(mean, place, strict=True)]
        values += [s / sigma**2 for s in spread]
        values += [0.5 + cov[p] / np.sqrt((spread[p[0]] + thin) * (spread[p[1]] + thin)) / 2
                   for p in ((0, 1), (0, 2), (1, 2))]  # fmt: skip
        result += np.clip([*values, weight], 0, 1) * mask
    return result


@pytest.mark.parametrize("size", [ISO, FLAT])
def test_descriptors_are_those_of_the_plain_reference(size: tuple[float, float, float]) -> None:
    ids = blobs(5, (10, 14, 16))
    found, known = shape_descriptors(ids, size, 24.0)
    expected = plain_descriptors(ids[0].numpy(), size, 24.0)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-4)
    assert not known[ids <= 0].any()


def test_descriptors_of_a_half_space_are_those_of_a_half_gaussian() -> None:
    ids = torch.zeros((1, 37, 37, 37), dtype=torch.int32)
    ids[:, 18:] = 1
    sigma = 6.0  # voxels
    found, known = shape_descriptors(ids, (1.0, 1.0, 1.0), sigma)
    at = found[0, :, 18, 18, 18]  # half a voxel inside of the plane
    assert known[0, 18, 18, 18]
    assert not known[0, 34, 18, 18]  # a face is near
    assert float(at[9]) == pytest.approx(0.5, abs=0.05)
    assert float(at[0]) == pytest.approx(0.5 + math.sqrt(2 / math.pi) / 2, abs=0.05)
    assert at[1:3].tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    assert float(at[3]) == pytest.approx(1 - 2 / math.pi, abs=0.04)
    assert at[4:6].tolist() == pytest.approx([1, 1], abs=0.04)  # the Gaussian ends at three sigma
    assert at[6:9].tolist() == pytest.approx([0.5] * 3, abs=1e-3)


def test_descriptors_are_known_in_whole_objects_and_those_are_right() -> None:
    whole = torch.zeros((1, 40, 40, 40), dtype=torch.int32)
    whole[:, 12:18, 12:18, 12:18], whole[:, 20:40, 20:40, 20:40] = 4, 9
    inner = whole[:, 10:32, 10:32, 10:32].contiguous()
    truth = shape_descriptors(whole, ISO, 24.0)[0][:, :, 10:32, 10:32, 10:32]
    found, known = shape_descriptors(inner, ISO, 24.0)
    assert known[inner == 4].all()
    assert 0 < int(known[inner == 9].sum()) < int((inner == 9).sum()) / 2
    seen = known[:, None].expand_as(found)
    assert (found - truth)[seen].abs().max() < 0.05


# -- all of them -----------------------------------------------------------------------------------------------------
HEADS = [
    Head("affinities", "mito", ISO, ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 2, 3))),
    Head("boundary", "mito", ISO, scale_nm=12.0),
    Head("distance", "mito", ISO, scale_nm=16.0),
    Head("lsd", "mito", ISO, scale_nm=20.0),
]


def turned_vector(symmetry: Symmetry, vector: tuple[int, int, int]) -> tuple[int, int, int]:
    z, y, x = (vector[a] * (-1 if b else 1) for a, b in zip(symmetry.axes, symmetry.backwards, strict=True))
    return z, y, x


@pytest.mark.parametrize("symmetry", SYMMETRY_SETS["all"][1::5], ids=str)
def test_targets_turn_along_with_their_ids(symmetry: Symmetry) -> None:
    ids = blobs(6)
    turned = symmetry.apply(ids)
    offset = (0, 2, 3)
    for before, after in zip(affinity(ids, offset), affinity(turned, turned_vector(symmetry, offset)), strict=True):
        assert torch.equal(symmetry.apply(before), after)
    plain: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = [
        lambda ids: boundary(ids, ISO, 12.0), lambda ids: distance(ids, ISO, 16.0)
    ]  # fmt: skip
    for make in plain:
        for before, after in zip(make(ids), make(turned), strict=True):
            torch.testing.assert_close(symmetry.apply(before), after)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_targets_are_computed_in_float32_also_in_mixed_precision(head: Head) -> None:
    """As in a validation, which Lightning runs within its autocast."""
    expected = head_labels(head, blobs(7)).dense()
    with torch.autocast("cpu", torch.bfloat16):
        found = head_labels(head, blobs(7)).dense()
    assert torch.equal(found.label, expected.label)
    assert torch.equal(found.known, expected.known)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_a_head_has_targets_from_0_to_1_as_many_as_channels_and_none_where_nothing_is_known(head: Head) -> None:
    ids = torch.cat([blobs(7, (16, 16, 16), unknown=False), torch.full((1, 16, 16, 16), -1, dtype=torch.int32)])
    labels = head_labels(head, ids)
    dense = labels.dense()
    assert labels.shape == dense.label.shape == (2, head.channels, 16, 16, 16)
    assert dense.known[0].any()
    assert not dense.known[1].any()
    assert dense.label.isfinite().all()
    assert float(dense.label.min()) >= 0
    assert float(dense.label.max()) <= 1


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_what_is_known_does_not_change_with_what_lies_beyond_the_reach(head: Head) -> None:
    """So a block with a margin of `reach` around it has the targets of the whole."""
    ids = blobs(8, (40, 40, 40), unknown=False)
    m = reach(head)
    block = ids[:, 12 - m[0]:28 + m[0], 12 - m[1]:28 + m[1], 12 - m[2]:28 + m[2]].contiguous()  # fmt: skip
    part, whole = head_labels(head, block).dense(), head_labels(head, ids).dense()
    inside = tuple(slice(n, n + 16) for n in m)
    seen = whole.known[..., 12:28, 12:28, 12:28]
    assert torch.equal(part.known[:, :, *inside] & seen, part.known[:, :, *inside])
    if head.kind != "lsd":  # whole objects are known altogether
        assert torch.equal(part.known[:, :, *inside], seen)
    found, expected = part.label[:, :, *inside], whole.label[..., 12:28, 12:28, 12:28]
    assert (found - expected)[part.known[:, :, *inside]].abs().max() < 1e-3


def test_ids_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="int32"):
        head_labels(HEADS[0], torch.zeros((1, 4, 4, 4)))
