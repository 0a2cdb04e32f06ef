"""The watershed in memory against its definition, voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from connectomics.decoding.watershed.forest import grow, seed_radius, split
from connectomics.decoding.watershed.heights import OUTSIDE, DepthRule, depth_heights
from connectomics.errors import InputError

from . import watershed_reference as reference

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**32 - 1)
spacings = st.sampled_from([(8.0, 8.0, 8.0), (20.0, 4.0, 4.0), (5.24, 4.0, 4.0), (1.74, 1.74, 1.74)])
neighbours = st.sampled_from([6, 18, 26])


def some_mask(seed, shape):
    random = np.random.default_rng(seed)
    if seed % 3 == 0:
        return ndimage.gaussian_filter(random.standard_normal(shape), 1) > -0.1
    return random.random(shape) < random.choice([0.5, 0.8, 0.97])


@settings(max_examples=40)
@given(seeds, shapes, spacings, st.sampled_from([np.inf, 12.0, 30.0]))
def test_depth_is_the_distance_to_the_nearest_background_voxel(seed, shape, spacing, cap):
    mask = some_mask(seed, shape)
    rule = DepthRule.of(spacing, cap, shape)
    found = depth_heights(mask, rule, (0, 0, 0), shape)
    inner = found[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(-inner[mask], reference.squared_depths(mask, rule.weights, rule.cap)[mask])
    assert (inner[~mask] == OUTSIDE).all()
    assert (found == OUTSIDE).sum() == found.size - mask.sum()
    if not mask.all():
        unit = min(spacing) / np.sqrt(rule.weights[int(np.argmin(spacing))])
        exact = np.minimum(ndimage.distance_transform_edt(mask, spacing), np.sqrt(rule.cap) * unit)[mask]
        np.testing.assert_allclose(np.sqrt(-inner[mask]) * unit, exact, rtol=2e-3)


@settings(max_examples=40)
@given(seeds, shapes, spacings, st.sampled_from([12.0, 30.0]))
def test_depth_is_the_same_from_a_part_with_its_halo(seed, shape, spacing, cap):
    mask = some_mask(seed, shape)
    random = np.random.default_rng(seed)
    rule = DepthRule.of(spacing, cap, shape)
    begin = np.array([random.integers(0, n) for n in shape])
    size = np.array([random.integers(1, n - b + 1) for n, b in zip(shape, begin, strict=True)])
    low, high = np.maximum(begin - rule.halo, 0), np.minimum(begin + size + rule.halo, shape)
    around = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    part = depth_heights(around, rule, begin - low, size)[1:-1, 1:-1, 1:-1]
    whole = depth_heights(mask, rule, (0, 0, 0), shape)[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(part, whole[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))])


def test_cubes_are_measured_in_voxels_and_too_long_distances_are_refused():
    assert DepthRule.of((8.0, 8.0, 8.0), 80.0, (512, 512, 512)) == DepthRule((1, 1, 1), 100)
    assert DepthRule.of((20.0, 4.0, 4.0), 40.0, (512, 512, 512)) == DepthRule((25, 1, 1), 100)
    assert DepthRule((25, 1, 1), 100).halo == (1, 9, 9)
    with pytest.raises(InputError, match="do not fit into 31 bits; give a smaller max_depth"):
        DepthRule.of((5000.0, 1.0, 1.0), np.inf, (100, 100, 100))


@settings(max_examples=5)  # the definition in plain Python takes a second an example
@given(seeds, shapes, spacings, neighbours, st.sampled_from([8.0, 16.0, 30.0]), st.sampled_from([np.inf, 16.0, 24.0]))
def test_splitting_is_the_watershed_as_it_is_defined(seed, shape, spacing, connectivity, min_distance, max_depth):
    mask = some_mask(seed, shape)
    rule = DepthRule.of(spacing, max_depth, shape)
    height = -reference.squared_depths(mask, rule.weights, rule.cap)
    cores = np.zeros(shape, int)
    peaks = reference.seeds(mask, height, seed_radius(min_distance, spacing), connectivity)
    for number, voxel in enumerate(peaks, start=1):
        cores[voxel] = number
    expected = reference.watershed(mask, height, cores, connectivity, floor=-rule.cap)
    found = split(mask, connectivity, spacing, min_distance, max_depth)
    np.testing.assert_array_equal(found, expected)
    assert (found[mask] > 0).all()


@settings(max_examples=60)
@given(seeds, shapes, neighbours, st.sampled_from([2, 6, 200]), st.sampled_from([np.uint8, np.float16]))
def test_growing_is_the_watershed_as_it_is_defined(seed, shape, connectivity, levels, dtype):
    random = np.random.default_rng(seed)
    mask = some_mask(seed, shape)
    height = random.integers(0, levels, shape).astype(dtype)
    height = height / dtype(256) if dtype == np.float16 else height
    cores = np.where(random.random(shape) < 0.1, random.integers(1, 6, shape), 0) * mask
    found = grow(mask, height, cores, connectivity)
    np.testing.assert_array_equal(found, reference.watershed(mask, height, cores, connectivity))


def test_seeds_reach_only_through_the_object():
    mask = np.zeros((5, 12, 40), bool)
    mask[1:4, 1:4, 2:38] = True
    mask[0:5, 7:12, 2:38] = True  # deeper, and nearer than a seed's reach, but apart
    assert split(mask, 26, (1, 1, 1), 10).max() == 2
