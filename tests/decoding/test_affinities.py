"""Instances from affinities in memory: against plain definitions, mwatershed and waterz."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from connectomics.decoding.affinities.segment import segment
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import InputError
from tests.decoding.affinity_kit import affinities_of, instances

OFFSETS = np.array(
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-3, 0, 0), (0, 3, 1), (0, -2, 3)]
)  # two that point backwards: a stored offset may have any sign
UNITS = OFFSETS[:3]


def same_partition(one: np.ndarray, two: np.ndarray) -> bool:
    pairs = np.unique(np.stack([one.ravel(), two.ravel()]).astype(np.int64), axis=1)
    return pairs.shape[1] == len(np.unique(one)) == len(np.unique(two))


def touching_balls(shape: tuple[int, int, int] = (24, 30, 36), number: int = 12, seed: int = 0) -> np.ndarray:
    """Instances that touch each other along flat faces, with background between."""
    rng = np.random.default_rng(seed)
    centers = rng.random((number, 3)) * shape
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm(places[..., None, :] - centers, axis=-1)
    return np.where(distance.min(axis=-1) < 9, distance.argmin(axis=-1) + 1, 0).astype(np.uint8)


def edges_of(affinities: np.ndarray, offsets: np.ndarray, mask: np.ndarray):
    """(channel, value, p, q) of every pair of voxels, channel by channel in z-y-x order of p."""
    for k, offset in enumerate(offsets):
        for p in itertools.product(*map(range, mask.shape)):
            q = tuple(int(i) for i in np.add(p, offset))
            if all(0 <= i < n for i, n in zip(q, mask.shape, strict=True)) and mask[p] and mask[q]:
                yield k, int(affinities[(k, *p)]), p, q


def numbered(mask: np.ndarray, find) -> np.ndarray:
    numbers: dict = {}
    labels = np.zeros(mask.shape, int)
    for p in map(tuple, np.argwhere(mask).tolist()):
        labels[p] = numbers.setdefault(find(p), len(numbers) + 1)
    return labels


def plain_mutex_watershed(affinities, offsets, mask, bias_short, bias_long):
    """The definition, with sets: clusters, and pairs of them that are apart."""
    cluster = {tuple(p): {tuple(p)} for p in np.argwhere(mask).tolist()}
    apart: set[frozenset[int]] = set()
    edges = []
    for k, value, p, q in edges_of(affinities, offsets, mask):
        weight = value / 255 - (bias_short if np.abs(offsets[k]).sum() == 1 else bias_long)
        if abs(weight) > 1e-9:
            edges.append((-round(abs(weight), 9), weight < 0, k, value, p, q))
    for _, repels, _, _, p, q in sorted(edges):
        one, two = cluster[p], cluster[q]
        if one is two or frozenset((id(one), id(two))) in apart:
            continue
        if repels:
            apart.add(frozenset((id(one), id(two))))
            continue
        apart = {frozenset(id(one) if i == id(two) else i for i in pair) for pair in apart}
        one |= two
        for voxel in two:
            cluster[voxel] = one
    return numbered(mask, lambda p: id(cluster[p])), len(apart)


def plain_agglomeration(affinities, offsets, mask, threshold):
    """The definition: what each voxel's strongest affinity links; then the pair with the highest mean, repeatedly."""
    cluster = {tuple(p): {tuple(p)} for p in np.argwhere(mask).tolist()}

    def unite(one: set, two: set) -> None:
        if one is not two:
            one |= two
            for voxel in two:
                cluster[voxel] = one

    edges = list(edges_of(affinities, offsets, mask))
    links = []
    for voxel in list(cluster):
        mine = [
            (-v, k, p != voxel, q if p == voxel else p)
            for k, v, p, q in edges
            if voxel in (p, q) and v > threshold * 255
        ]
        if mine:
            links.append((voxel, min(mine)[3]))
    for p, q in links:
        unite(cluster[p], cluster[q])
    while True:
        faces: dict = {}
        for row, (_, v, p, q) in enumerate(edges):
            if cluster[p] is not cluster[q]:
                values, _ = faces.setdefault(frozenset((id(cluster[p]), id(cluster[q]))), ([], row))
                values.append(v)
        best = max(((sum(v) / len(v), -row) for v, row in faces.values()), default=(0.0, 0))
        if best[0] <= threshold * 255:
            return numbered(mask, lambda p: id(cluster[p])), len(faces)
        _, _, p, q = edges[-best[1]]
        unite(cluster[p], cluster[q])


# -- against the definitions -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [256, 5])
@pytest.mark.parametrize("seed", range(4))
def test_mutex_watershed_is_its_definition_also_where_weights_are_equal(levels, seed):
    rng = np.random.default_rng(seed)
    affinities = (rng.integers(0, levels, (6, 6, 7, 8)) * (255 // (levels - 1))).astype(np.uint8)
    mask = rng.random((6, 7, 8)) < (1.0 if seed == 0 else 0.7)
    found = segment(
        affinities, OFFSETS, mask, DecodeParameters(method="mutex_watershed", bias_short=0.35, bias_long=0.6)
    )
    labels, apart = plain_mutex_watershed(affinities, OFFSETS, mask, 0.35, 0.6)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.count == labels.max()
    assert len(found.apart) == apart
    assert (found.apart > 0).all()
    assert (found.apart[:, 0] != found.apart[:, 1]).all()


@pytest.mark.parametrize("levels", [256, 5])
@pytest.mark.parametrize("seed", range(3))
def test_agglomeration_is_its_definition_also_where_means_are_equal(levels, seed):
    rng = np.random.default_rng(seed)
    affinities = (rng.integers(0, levels, (3, 4, 5, 6)) * (255 // (levels - 1))).astype(np.uint8)
    mask = rng.random((4, 5, 6)) < (1.0 if seed == 0 else 0.8)
    found = segment(affinities, UNITS, mask, DecodeParameters(method="agglomeration", merge_threshold=0.55))
    labels, touching = plain_agglomeration(affinities, UNITS, mask, 0.55)
    np.testing.assert_array_equal(found.labels, labels)
    assert len(found.apart) == touching


# -- against the libraries ---------------------------------------------------------------------------------------------
def noisy(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float affinities of touching balls under noise, in steps of 1/65535."""
    truth = touching_balls()
    exact = affinities_of(truth, OFFSETS[[0, 1, 2, 4]]).astype(float) / 255
    values = np.clip(0.2 + 0.6 * exact + np.random.default_rng(seed).normal(0, 0.12, exact.shape), 0, 1)
    return truth, np.rint(values * 65535) / 65535


def test_mwatershed_finds_the_same():
    import mwatershed

    _, affinities = noisy()
    offsets = OFFSETS[[0, 1, 2, 4]]
    found = instances(affinities, offsets, bias_short=0.4, bias_long=0.6)
    signed = affinities - np.array([0.4, 0.4, 0.4, 0.6])[:, None, None, None]
    theirs = mwatershed.agglom(signed, offsets.tolist())
    inside = theirs > 0  # single voxels are 0 there
    assert len(np.unique(found[inside])) > 5
    assert same_partition(found[inside], theirs[inside])


def test_waterz_unites_the_same_fragments():
    import waterz

    from connectomics.decoding.affinities import agglomeration_kernels as agglomerate
    from connectomics.decoding.affinities import mutex_kernels as mutex

    truth, affinities = noisy()
    values = np.rint(affinities[:3] * 65535).astype(np.uint16)
    nodes = np.arange(truth.size, dtype=np.int32).reshape(truth.shape)
    forest = agglomerate.strongest_links(values, nodes, UNITS, 32767, truth.size)
    fragments = np.empty(truth.size, np.int32)
    assert mutex.number_trees(forest, fragments) > 1000
    theirs = np.zeros((3, *truth.shape), np.float32)  # there a voxel's affinities are to the voxels before it
    theirs[0, 1:], theirs[1, :, 1:] = affinities[0, :-1], affinities[1, :, :-1]
    theirs[2, :, :, 1:] = affinities[2, :, :, :-1]
    united = next(waterz.agglomerate(theirs, [0.5], fragments=fragments.reshape(truth.shape).astype(np.uint64)))
    found = instances(affinities[:3], UNITS, method="agglomeration", merge_threshold=0.5)
    assert same_partition(found, united)


# -- what comes out ----------------------------------------------------------------------------------------------------
def test_affinities_of_labels():
    ids = np.zeros((1, 2, 4), int)
    ids[0, 0] = [1, 1, 2, 2]
    ids[0, 1] = [1, 0, 0, 2]
    found = affinities_of(ids, [(0, 0, 1), (0, 1, 0), (0, -1, 1), (0, 0, 9)]) // 255
    assert found[0, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert found[1, 0].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert found[2, 0].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert not found[3].any()


@pytest.mark.parametrize("method", ["mutex_watershed", "agglomeration"])
def test_perfect_affinities_give_the_instances(method):
    truth = touching_balls()
    affinities = affinities_of(truth, OFFSETS)
    found = instances(affinities, OFFSETS, truth > 0, method)
    assert same_partition(found, truth)
    assert found.dtype == np.uint8
    first = [np.flatnonzero(found.ravel() == i)[0] for i in range(1, found.max() + 1)]
    assert first == sorted(first)
    np.testing.assert_array_equal(instances(affinities / 255, OFFSETS, truth > 0, method), found)
    half = (affinities / 255).astype(np.float16)
    np.testing.assert_array_equal(instances(half, OFFSETS, truth > 0, method), found)


def test_one_leaking_affinity_joins_two_objects_only_without_long_offsets():
    """Two slabs with a faint border that leaks at one voxel: pairs farther apart know better."""
    ids = np.ones((6, 6, 12), int)
    ids[:, :, 6:] = 2
    offsets = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 4)])
    affinities = affinities_of(ids, offsets)
    affinities[2, :, :, 5] = 100
    affinities[2, 3, 3, 5] = 250
    assert instances(affinities[:3], offsets[:3]).max() == 1
    assert same_partition(instances(affinities, offsets), ids)
    # and a mean over the border is not moved by one voxel of it
    assert same_partition(instances(affinities[:3], offsets[:3], method="agglomeration"), ids)


def test_small_instances_are_left_out_and_the_others_closed_up():
    ids = np.zeros((4, 8, 8), int)
    ids[0, 0, :2], ids[1:, 2:6, 2:6], ids[0, 7, 7] = 1, 2, 3
    affinities = affinities_of(ids, UNITS)
    found = instances(affinities, UNITS, ids > 0, min_size=3)
    np.testing.assert_array_equal(found, ids == 2)


@pytest.mark.parametrize("method", ["mutex_watershed", "agglomeration"])
def test_nothing_to_segment(method):
    mask = np.zeros((3, 4, 5), bool)
    found = segment(np.zeros((3, 3, 4, 5), np.uint8), UNITS, mask, DecodeParameters(method=method))
    assert found.count == 0
    assert not found.labels.any()
    assert found.apart.shape == (0, 2)


@pytest.mark.parametrize(
    ("affinities", "offsets", "told"),
    [
        (np.zeros((3, 4, 4)), UNITS, "must be \\(K, D, H, W\\)"),
        (np.zeros((2, 4, 4, 4)), UNITS, "offsets \\(K, 3\\)"),
        (np.zeros((3, 4, 4, 4)), UNITS * 1.0, "whole voxels"),
        (np.zeros((3, 4, 4, 4)), UNITS * 2, "an offset to a neighbor"),
        (np.zeros((3, 4, 4, 4)), UNITS[[0, 0, 1]], "differ from each other"),
        (np.zeros((3, 4, 4, 4), np.int16), UNITS, "uint8 \\(value/255\\) or floats"),
        (np.full((3, 4, 4, 4), 2.5), UNITS, "must lie in \\[0, 1\\]"),
        (np.full((3, 4, 4, 4), np.nan), UNITS, "must lie in \\[0, 1\\]"),
    ],
)
def test_bad_input_is_told_in_one_line(affinities, offsets, told):
    with pytest.raises(InputError, match=told) as error:
        instances(affinities, offsets)
    assert "\n" not in str(error.value)


def test_bad_masks():
    with pytest.raises(InputError, match="expected a bool mask"):
        instances(np.zeros((3, 4, 4, 4)), UNITS, np.ones((4, 4, 4)))
