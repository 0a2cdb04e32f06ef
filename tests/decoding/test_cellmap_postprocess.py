"""Masks to instances: what counts as an object, how touching ones are cut, what is filled and what is removed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from connectomics.decoding.cellmap_postprocess import (
    fill_holes,
    filter_by_size,
    semantic_to_instance,
)
from connectomics.errors import InputError


def ball(shape, center, radius, spacing=(1, 1, 1)):
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((a - c) * s) ** 2 for a, c, s in zip(axes, center, spacing, strict=True)) <= radius**2


def loop_filter(instances, min_size):
    """The plan's sketch, on a copy: the reference for the one-pass filter."""
    out = instances.copy()
    for identifier, count in zip(*np.unique(instances, return_counts=True), strict=True):
        if identifier != 0 and count < min_size:
            out[out == identifier] = 0
    return out


masks = st.integers(0, 2**32 - 1).map(
    lambda seed: ndimage.binary_opening(np.random.default_rng(seed).random((9, 11, 13)) < 0.62)
)


def test_the_plans_call_gives_one_id_an_object_and_removes_small_ones():
    mask = np.zeros((30, 30, 30), np.uint8)
    mask[2:8, 2:8, 2:8] = 1  # 216 voxels
    mask[15:20, 15:20, 15:20] = 1  # 125 voxels
    mask[25, 25, 25] = 1
    before = mask.copy()
    instances = semantic_to_instance(mask, min_size=100, method="cc3d")
    assert instances.dtype == np.uint8
    assert np.unique(instances).tolist() == [0, 1, 2]
    assert (instances > 0).sum() == 341
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize(("connectivity", "objects"), [(6, 3), (18, 2), (26, 1)])
def test_connectivity_decides_what_holds_together(connectivity, objects):
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True  # share a corner
    mask[2, 1, 2] = True  # shares an edge with the middle
    assert semantic_to_instance(mask, 0, connectivity=connectivity).max() == objects


def test_ids_get_the_type_that_holds_their_number():
    mask = np.zeros((20, 40, 40), bool)
    mask[::2, ::2, ::2] = True
    instances = semantic_to_instance(mask, 0, connectivity=6)
    assert instances.max() == 4000
    assert instances.dtype == np.uint16


@settings(max_examples=40, deadline=None)
@given(masks, st.integers(0, 60), st.sampled_from(["cc3d", "watershed"]), st.booleans())
def test_ids_have_no_gaps_and_lie_on_the_mask(mask, min_size, method, holes):
    instances = semantic_to_instance(mask, min_size, method, fill_holes=holes, min_distance=3)
    n = int(instances.max())
    ids, counts = np.unique(instances[instances > 0], return_counts=True)
    assert ids.tolist() == list(range(1, n + 1))
    assert counts.min(initial=min_size) >= min_size
    if not holes:
        assert not instances[~mask].any()
    if min_size == 0:
        assert instances[mask].all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.sampled_from(["u1", "u2", "u4", "u8", "i2", "i4", "i8"]))
def test_the_size_filter_equals_the_loop(seed, min_size, dtype):
    instances = np.random.default_rng(seed).integers(0, 120, (8, 9, 10)).astype(dtype)
    before = instances.copy()
    found = filter_by_size(instances, min_size)
    np.testing.assert_array_equal(found, loop_filter(instances, min_size))
    assert found.dtype == instances.dtype
    np.testing.assert_array_equal(instances, before)


def test_the_size_filter_takes_a_boolean_mask_and_refuses_floats():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = True
    assert not filter_by_size(mask, 2).any()
    assert filter_by_size(mask, 1).any()
    with pytest.raises(InputError, match="integer ids, got float32"):
        filter_by_size(mask.astype(np.float32), 2)


def test_watershed_parts_two_touching_balls_where_they_are_narrow():
    mask = ball((40, 40, 60), (20, 20, 18), 12) | ball((40, 40, 60), (20, 20, 38), 12)
    assert semantic_to_instance(mask, 100).max() == 1
    cut = semantic_to_instance(mask, 100, "watershed", min_distance=6)
    assert cut.max() == 2
    assert cut[20, 20, 18] != cut[20, 20, 38]
    assert abs(int((cut == 1).sum()) - int((cut == 2).sum())) < 0.02 * mask.sum()
    assert ((cut > 0) == mask).all()


def test_watershed_measures_in_nanometres_on_anisotropic_voxels():
    spacing = (20.0, 4.0, 4.0)
    shape = (16, 60, 100)
    mask = ball(shape, (8, 30, 30), 100, spacing) | ball(shape, (8, 30, 66), 100, spacing)
    cut = semantic_to_instance(mask, 10, "watershed", voxel_size=spacing, min_distance=60.0)
    assert cut.max() == 2
    assert cut[8, 30, 30] != cut[8, 30, 66]


def test_watershed_seeds_closer_than_the_distance_are_one():
    mask = ball((40, 40, 60), (20, 20, 18), 12) | ball((40, 40, 60), (20, 20, 38), 12)
    assert semantic_to_instance(mask, 100, "watershed", min_distance=25).max() == 1


def test_watershed_of_a_component_does_not_depend_on_the_rest_of_the_volume():
    pair = ball((26, 26, 50), (13, 13, 14), 11) | ball((26, 26, 50), (13, 13, 34), 11)
    alone = semantic_to_instance(pair, 0, "watershed", min_distance=5)
    both = np.zeros((26, 60, 120), bool)
    both[:, 2:28, 3:53] = pair
    both[:, 32:58, 64:114] = pair
    cut = semantic_to_instance(both, 0, "watershed", min_distance=5)
    assert cut.max() == 2 * alone.max() == 4
    np.testing.assert_array_equal(cut[:, 2:28, 3:53] > 1, alone > 1)
    second = cut[:, 32:58, 64:114].astype(int)
    np.testing.assert_array_equal(np.where(second > 0, second - 2, 0), alone)


@pytest.mark.parametrize("min_distance", [3, 10, 100])
def test_watershed_leaves_what_is_nowhere_narrow_in_one_piece(min_distance):
    plate = np.zeros((9, 40, 40), bool)
    plate[2:7, 2:38, 2:38] = True  # its middle plane is one plateau of equal depth: one peak, whatever the reach
    assert semantic_to_instance(plate, 0, "watershed", min_distance=min_distance).max() == 1
    rod = ball((9, 9, 60), (4, 4, 30), 3, (1, 1, 0)) & (np.arange(60) > 2) & (np.arange(60) < 57)
    assert semantic_to_instance(rod, 0, "watershed", min_distance=min_distance).max() == 1


def test_watershed_does_not_cut_what_is_deeper_than_the_limit():
    mask = ball((40, 40, 60), (20, 20, 18), 12) | ball((40, 40, 60), (20, 20, 38), 12)  # the neck is 6.6 deep
    assert semantic_to_instance(mask, 0, "watershed", min_distance=6, max_depth=5).max() == 1
    assert semantic_to_instance(mask, 0, "watershed", min_distance=6, max_depth=9).max() == 2


def test_watershed_numbers_objects_by_their_first_voxel():
    mask = (
        ball((60, 20, 20), (44, 10, 10), 9) | ball((60, 20, 20), (28, 10, 10), 10) | ball((60, 20, 20), (12, 9, 9), 8)
    )
    cut = semantic_to_instance(mask, 0, "watershed", min_distance=5)
    assert [int(cut[z, 10, 10]) for z in (12, 28, 44)] == [1, 2, 3]


def test_a_cavity_is_filled_and_a_bay_is_not():
    mask = np.zeros((12, 12, 24), bool)
    mask[1:11, 1:11, 1:11] = True
    mask[4:8, 4:8, 4:8] = False  # closed
    mask[1:11, 1:11, 13:23] = True
    mask[4:8, 4:8, 13:18] = False  # open to one side
    filled = semantic_to_instance(mask, 0, fill_holes=True)
    assert filled[5, 5, 5] == filled[1, 1, 1]
    assert filled[5, 5, 15] == 0
    assert (filled > 0).sum() == mask.sum() + 64


def test_a_cavity_at_the_border_of_the_volume_stays_open():
    mask = np.ones((6, 6, 6), bool)
    mask[0:2, 2:4, 2:4] = False
    np.testing.assert_array_equal(semantic_to_instance(mask, 0, fill_holes=True) > 0, mask)


def test_a_diagonal_gap_is_closed_for_corner_connected_objects_and_open_for_face_connected_ones():
    mask = np.ones((5, 5, 5), bool)
    mask[2, 2, 2] = mask[1, 1, 1] = mask[0, 0, 0] = False  # a diagonal of background from the middle to the corner
    assert semantic_to_instance(mask, 0, fill_holes=True)[2, 2, 2] == 1
    assert fill_holes(mask.astype(np.uint8), connectivity=6)[2, 2, 2] == 0


def test_a_cavity_goes_to_the_innermost_object_and_objects_inside_stay():
    instances = np.zeros((20, 20, 20), np.uint16)
    instances[1:19, 1:19, 1:19] = 300
    instances[4:16, 4:16, 4:16] = 0  # cavity of 300 ...
    instances[6:14, 6:14, 6:14] = 7  # ... with an object ...
    instances[9:11, 9:11, 9:11] = 0  # ... that has a cavity of its own
    filled = fill_holes(instances)
    assert filled.dtype == np.uint16
    assert filled[10, 10, 10] == 7
    assert filled[5, 5, 5] == 300
    assert (filled == 7).sum() == 8**3
    assert filled[0, 0, 0] == 0


@settings(max_examples=30, deadline=None)
@given(masks)
def test_filling_a_single_object_equals_scipy(mask):
    labels, n = ndimage.label(mask, np.ones((3, 3, 3)))
    one = (labels == 1) if n else mask
    np.testing.assert_array_equal(fill_holes(one), ndimage.binary_fill_holes(one))


@pytest.mark.parametrize("method", ["cc3d", "watershed"])
def test_empty_and_full_volumes(method):
    assert semantic_to_instance(np.zeros((4, 5, 6), bool), 0, method).sum() == 0
    assert semantic_to_instance(np.ones((4, 5, 6), bool), 0, method, min_distance=20, fill_holes=True).max() == 1
    assert semantic_to_instance(np.zeros((0, 5, 6), bool), 0, method).shape == (0, 5, 6)


def test_filling_and_filtering_take_boolean_and_empty_volumes_and_refuse_the_rest():
    hollow = np.ones((5, 5, 5), bool)
    hollow[2, 2, 2] = False
    assert fill_holes(hollow).dtype == bool
    assert fill_holes(hollow).all()
    assert fill_holes(np.zeros((0, 3, 3), np.uint8)).shape == (0, 3, 3)
    with pytest.raises(InputError, match="got float64 of shape"):
        fill_holes(np.zeros((3, 3, 3)))
    with pytest.raises(InputError, match="6, 18 or 26"):
        fill_holes(hollow, connectivity=4)


def test_nan_is_background():
    mask = np.full((3, 3, 3), np.nan, np.float32)
    mask[1, 1, 1] = 0.7
    assert semantic_to_instance(mask, 0).sum() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": np.zeros((3, 3))}, r"\(D, H, W\) mask, got shape \(3, 3\)"),
        ({"method": "graphcut"}, "unknown method 'graphcut'; use one of cc3d, watershed"),
        ({"connectivity": 8}, "connectivity must be 6, 18 or 26, got 8"),
        ({"min_size": -1}, "at least 0 voxels"),
        ({"min_distance": 0.0}, "must be positive"),
        ({"max_depth": 0.0}, "max_depth must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        semantic_to_instance(**{"mask": np.ones((3, 3, 3), bool), **arguments})


@pytest.mark.parametrize("shape", [(1, 1, 27), (1, 27, 1), (27, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_a_line_of_voxels_is_a_volume_too(shape, connectivity):
    """Alternating voxels of a volume that is one voxel wide: each is an object (cc3d 4.1 fails here with 26)."""
    mask = (np.arange(max(shape)) % 2 == 0).reshape(shape)
    instances = semantic_to_instance(mask, 0, connectivity=connectivity)
    np.testing.assert_array_equal(instances[mask], np.arange(1, mask.sum() + 1))
    assert not instances[~mask].any()
