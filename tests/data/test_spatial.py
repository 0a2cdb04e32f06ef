"""The fused spatial pass: against its plain reference, against MONAI on the same parameters and in distribution, and
raw and label registered after every transform."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates
from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import (
    CoordinateMap,
    Displacement,
    PatchAugmentor,
    SpatialAugmentor,
    sample,
)
from connectomics.data.augmentation.elastic_field import draw_field, gaussian_kernel, standard_deviation
from connectomics.errors import ConfigError, InputError
from tests.data.warp_reference import sample_reference

STATES = LabelStates(("a",), np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.uint64))
BOTH = {"keys": ["image", "label"]}
PLANES = [[0, 1], [0, 2], [1, 2]]
AFFINE = {
    "rotate_range": [0.6, 0.4, 0.5], "shear_range": [0.1] * 6, "translate_range": [3, 2, 1],
    "scale_range": [0.2, 0.1, [-0.1, 0.3]],
}  # fmt: skip


def arrays_of(
    raw: NDArray[np.uint8], codes: NDArray[Any], inside: NDArray[np.bool_] | None = None,
    raw_begin: tuple[int, int, int] = (0, 0, 0), codes_begin: tuple[int, int, int] = (0, 0, 0),
) -> CropArrays:  # fmt: skip
    return CropArrays(raw, raw_begin, inside, codes, codes_begin, STATES, fill=0.4)


def block(rng: np.random.Generator, shape: Any = (40, 44, 48)) -> CropArrays:
    """Raw with context, holding a patch of 20 to 30 voxels and everything that a turned one reaches."""
    return arrays_of(rng.integers(0, 256, shape, np.uint8), rng.integers(0, 9, shape, np.uint8))


def offsets_of(shape: Any) -> NDArray[np.float64]:
    axes = [np.arange(n) - (n - 1) / 2 for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def random_map(kind: str, rng: np.random.Generator) -> CoordinateMap:
    def field() -> CoordinateMap:
        vectors = rng.normal(size=(3, *rng.integers(1, 9, 3))).astype(np.float32)
        return CoordinateMap(field=Displacement(vectors, tuple(rng.uniform(1, 5, 3))))

    def affine() -> CoordinateMap:
        return CoordinateMap.affine(rng.normal(size=(3, 3)), rng.normal(size=3))

    if kind == "scaled":
        return CoordinateMap.affine(np.diag(rng.uniform(0.5, 1.5, 3) * rng.choice([-1, 1], 3)), rng.normal(size=3))
    return {
        "affine": affine, "field": field, "affine, field": lambda: affine().then(field()),
        "affine, field, affine": lambda: affine().then(field()).then(affine()),
    }[kind]()  # fmt: skip


# -- the pass against its reference ----------------------------------------------------------------------------------
KINDS = ["scaled", "affine", "field", "affine, field", "affine, field, affine"]
WIDE = {("affine", np.uint16)}  # another type compiles the same kernel again, which takes ten seconds


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=[] if dtype == np.uint8 or (kind, dtype) in WIDE else [pytest.mark.slow])
        for kind in KINDS
        for dtype in (np.uint8, np.uint16, np.uint32)
    ],
)
def test_it_gives_what_the_reference_gives(kind: str, dtype: type) -> None:
    """Over borders, holes, blocks of one voxel, patches beyond everything, and fractional centers."""
    rng = np.random.default_rng([len(kind), np.dtype(dtype).itemsize])
    seen = 0
    for turn in range(16):
        raw = rng.integers(0, 256, rng.integers(1, 60, 3), np.uint8)
        codes = rng.integers(1, 200, rng.integers(1, 40, 3)).astype(dtype)
        inside = rng.random(raw.shape) > (0.3, 1e-4)[turn % 4 == 3] if turn % 2 else None
        begins = [tuple(int(v) for v in rng.integers(-20, 5, 3)) for _ in range(2)]
        arrays = arrays_of(raw, codes, inside, begins[0], begins[1])
        shape = tuple(int(v) for v in rng.integers(1, 90 if turn % 4 == 0 else 30, 3))
        center = rng.uniform(-5, 25, 3)
        map = random_map(kind, rng)
        image, found = sample(arrays, center, map, shape)
        assert (image.dtype, found.dtype, image.shape, found.shape) == (np.float32, dtype, shape, shape)
        wanted_image, wanted = sample_reference(arrays, center, map, shape)
        place = map(offsets_of(shape)) + center
        clear = (np.abs(place - np.floor(place) - 0.5) > 1e-3).all(-1)  # not between two nearest voxels
        assert np.abs(image - wanted_image)[clear].max(initial=0) < 1e-4
        np.testing.assert_array_equal(found[clear], wanted[clear])
        seen += np.count_nonzero(wanted_image[clear])
    assert seen > 1000


@pytest.mark.parametrize("holes", [False, True])
def test_whole_voxels_are_copied(holes: bool) -> None:
    rng = np.random.default_rng(3)
    for turn in range(24):
        raw, codes = rng.integers(0, 256, (40, 50, 35), np.uint8), rng.integers(0, 5, (30, 25, 60), np.uint8)
        inside = rng.random(raw.shape) > 0.2 if holes else None
        arrays = arrays_of(raw, codes, inside, (-7, 3, 2), (4, 3, -9))
        n = int(rng.integers(1, 40))
        shape = (n, n, n) if turn % 2 else (n, n + 2, n + 4)  # odd with odd, even with even
        matrix = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        map = CoordinateMap.affine(matrix, rng.integers(-9, 9, 3))
        assert map.right_angles
        center = rng.integers(0, 25, 3) + (n - 1) / 2
        image, found = sample(arrays, center, map, shape)
        wanted_image, wanted = sample_reference(arrays, center, map, shape)
        np.testing.assert_array_equal(image, wanted_image)
        np.testing.assert_array_equal(found, wanted)


def test_a_plain_patch_is_a_slice_and_a_turned_one_is_its_turn() -> None:
    arrays = block(np.random.default_rng(0))
    image, codes = sample(arrays, (13.5, 14.5, 15.5), CoordinateMap.identity(), (20, 20, 20))
    np.testing.assert_array_equal(image, arrays.raw[4:24, 5:25, 6:26] / np.float32(255))
    np.testing.assert_array_equal(codes, arrays.codes[4:24, 5:25, 6:26])
    quarter = CoordinateMap.affine([[0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    turned, turned_codes = sample(arrays, (13.5, 14.5, 15.5), quarter, (20, 20, 20))
    np.testing.assert_array_equal(turned, np.rot90(image))
    np.testing.assert_array_equal(turned_codes, np.rot90(codes))


def test_odd_and_even_axes_that_change_places_are_interpolated() -> None:
    """Their centres differ by half a voxel: every value is a mean, and a half goes up for labels."""
    arrays = block(np.random.default_rng(1))
    swap = CoordinateMap.affine([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    center = (14.5, 15.0, 16.0)
    for found, wanted in zip(
        sample(arrays, center, swap, (10, 11, 7)), sample_reference(arrays, center, swap, (10, 11, 7)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_beyond_raw_there_is_nothing_and_beyond_labels_nothing_is_known() -> None:
    turn = CoordinateMap.affine(np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0])
    raw = np.full((60, 60, 60), 255, np.uint8)
    for map in (CoordinateMap.identity(), turn):
        image, codes = sample(
            arrays_of(raw, np.ones((4, 4, 4), np.uint8), None, (-28,) * 3), (1.5,) * 3, map, (24,) * 3
        )
        np.testing.assert_allclose(image, 1, atol=1e-6)  # context fills the corners of a turned patch
        assert image.max() <= 1
        assert 0 < codes.sum() < 24**3 / 50
        image, codes = sample(arrays_of(raw, np.ones((60, 60, 60), np.uint8)), (500,) * 3, map, (24,) * 3)
        assert (image == np.float32(0.4)).all()  # the mean of tissue
        assert not codes.any()
        hole = np.ones(raw.shape, bool)
        hole[30:] = False
        image, codes = sample(arrays_of(raw, np.ones_like(raw), hole), (29.5,) * 3, map, (24,) * 3)
        place = map(offsets_of((24,) * 3))[..., 0] + 29.5
        sure = np.abs(place - 29.5) > 1e-3
        expected = np.where(place < 29.5, 1, 0.4)  # tissue's mean in the hole, and never mixed with its zeros
        np.testing.assert_allclose(image[sure], expected[sure], atol=1e-6)
        np.testing.assert_array_equal(codes[sure], (place < 29.5)[sure])


# -- maps ------------------------------------------------------------------------------------------------------------
def test_maps_compose_as_transforms_applied_one_after_the_other() -> None:
    rng = np.random.default_rng(4)
    points = rng.normal(size=(50, 3)) * 6
    a, b, c = (random_map("affine", rng) for _ in range(3))
    elastic = random_map("field", rng)
    for parts in ((a, b), (a, elastic), (elastic, a), (a, elastic, b), (a, b, elastic, c)):
        whole, wanted = CoordinateMap.identity(), points
        for part in parts:
            whole = whole.then(part)
        for part in reversed(parts):  # an offset goes through the last transform first
            wanted = part(wanted)
        np.testing.assert_allclose(whole(points), wanted, atol=1e-9)
    with pytest.raises(InputError, match="one displacement field"):
        elastic.then(elastic)


def test_bounds_hold_every_voxel_and_are_tight_for_affine_maps() -> None:
    rng = np.random.default_rng(5)
    for kind in ("affine", "field", "affine, field, affine"):
        for _ in range(10):
            map, shape = random_map(kind, rng), (7, 9, 4)
            low, high = map.bounds(shape)
            place = map(offsets_of(shape)).reshape(-1, 3)
            assert (place >= low - 1e-6).all()
            assert (place <= high + 1e-6).all()
            if kind == "affine":
                np.testing.assert_allclose([place.min(0), place.max(0)], [low, high], atol=1e-9)


def test_a_scaled_map_is_the_same_place_in_larger_voxels() -> None:
    rng = np.random.default_rng(19)
    for kind in ("affine", "affine, field, affine"):
        map, ratio, points = random_map(kind, rng), np.array([4, 2, 0.5]), rng.normal(size=(20, 3)) * 4
        np.testing.assert_allclose(map.scaled(ratio)(points) * ratio, map(points * ratio), atol=1e-9)
        np.testing.assert_allclose(map.scaled(ratio, 2 * ratio)(points) * ratio, map(points * 2 * ratio), atol=1e-9)


@pytest.mark.parametrize("make", [
    lambda: CoordinateMap.affine(np.eye(2)), lambda: CoordinateMap.affine(np.full((3, 3), np.nan)),
    lambda: Displacement(np.zeros((2, 3, 3, 3), np.float32), (1, 1, 1)),
    lambda: Displacement(np.zeros((3, 3, 3, 3), np.float32), (1, 0, 1)),
])  # fmt: skip
def test_what_is_no_map_and_no_patch_is_refused(make: Any) -> None:
    with pytest.raises(InputError):
        make()


# -- against MONAI on the same parameters ----------------------------------------------------------------------------
def augmentor_of(name: str, patch: Any = (24, 24, 24), **arguments: Any) -> SpatialAugmentor:
    augmentor, remaining = SpatialAugmentor.split({name: {**BOTH, "prob": 1.0, **arguments}}, patch)
    assert augmentor is not None
    assert remaining == {}
    return augmentor


def patch_of(arrays: CropArrays, center: Any, shape: Any) -> NDArray[np.float32]:
    """The unmoved patch (1, D, H, W) that MONAI gets."""
    return sample(arrays, center, CoordinateMap.identity(), shape)[0][None]


def same_where_monai_has_data(
    arrays: CropArrays, map: CoordinateMap, theirs: Any, shape: Any, center: Any, atol: float, least: float
) -> None:
    """Equal wherever the eight neighbours lie inside the patch that MONAI had; that is at least a share ``least``."""
    inner = (np.abs(map(offsets_of(shape))) <= (np.array(shape) - 1) / 2 - 1e-6).all(-1)
    assert inner.mean() > least
    ours, _ = sample(arrays, center, map, shape)
    np.testing.assert_allclose(ours[inner], np.asarray(theirs)[0][inner], atol=atol)


def test_flips_and_right_angles_are_monais() -> None:
    from monai.transforms import Flip, Rotate90

    shape, center = (20, 20, 20), (19.5, 20.5, 21.5)
    arrays = block(np.random.default_rng(6))
    before, rng = patch_of(arrays, center, shape), np.random.default_rng(7)
    for axes in (0, [1, 2], None, [-1]):
        ours, _ = sample(arrays, center, augmentor_of("RandFlipd", spatial_axis=axes).draw(rng), shape)
        np.testing.assert_array_equal(ours, np.asarray(Flip(axes)(before))[0])
    seen = set()
    for _ in range(12):
        for plane in (*PLANES, [2, 0]):
            map = augmentor_of("RandRotate90d", spatial_axes=plane).draw(rng)
            turns = map.parameters[0][1]["quarter_turns"]
            seen.add(turns)
            theirs = Rotate90(turns, tuple(plane))(before)
            np.testing.assert_array_equal(sample(arrays, center, map, shape)[0], np.asarray(theirs)[0])
    assert seen == {1, 2, 3}


def test_transforms_follow_each_other_as_monais() -> None:
    from monai.transforms import Affine, Flip, Rotate90

    shape, center = (20, 20, 20), (19.5, 20.5, 21.5)
    arrays, rng = block(np.random.default_rng(8)), np.random.default_rng(9)
    affine = {**BOTH, "prob": 1.0, "rotate_range": [0.3, 0.2, 0.3], "translate_range": [1, 2, 3]}
    augmentor, _ = SpatialAugmentor.split({
        "RandRotate90d": {**BOTH, "prob": 1.0, "max_k": 1, "spatial_axes": [0, 2]},
        "RandAffined": affine, "RandFlipd": {**BOTH, "prob": 1.0, "spatial_axis": 1},
    }, shape)  # fmt: skip
    assert augmentor is not None
    map = augmentor.draw(rng)
    assert [name for name, _ in map.parameters] == ["RandRotate90d", "RandAffined", "RandFlipd"]
    drawn = map.parameters[1][1]
    moved = Affine(
        rotate_params=np.radians(drawn["rotate_degrees"]).tolist(), translate_params=drawn["translate_voxels"],
        padding_mode="zeros", image_only=True,
    )(Rotate90(1, (0, 2))(patch_of(arrays, center, shape)))  # fmt: skip
    same_where_monai_has_data(arrays, map, Flip(1)(moved), shape, center, 1e-4, 0.3)


@pytest.mark.parametrize("shape", [(20, 20, 20), (21, 20, 25)])
def test_affine_is_monais(shape: tuple[int, int, int]) -> None:
    from monai.transforms import Affine

    center = tuple(20 + (n - 1) / 2 % 1 for n in shape)
    arrays, rng = block(np.random.default_rng(10)), np.random.default_rng(11)
    for _ in range(5):
        map = augmentor_of("RandAffined", shape, **AFFINE).draw(rng)
        drawn = map.parameters[0][1]
        theirs = Affine(
            rotate_params=np.radians(drawn["rotate_degrees"]).tolist(), shear_params=drawn["shear"],
            translate_params=drawn["translate_voxels"], scale_params=drawn["scale"], padding_mode="zeros",
            image_only=True,
        )(patch_of(arrays, center, shape))  # fmt: skip
        same_where_monai_has_data(arrays, map, theirs, shape, center, 1e-4, 0.2)


@pytest.mark.parametrize("align", [None, True])
@pytest.mark.parametrize("shape", [(20, 20, 20), (21, 20, 25)])
def test_zoom_is_monais_with_its_whole_sizes(shape: tuple[int, int, int], align: bool | None) -> None:
    from monai.transforms import Zoom

    center = tuple(20 + (n - 1) / 2 % 1 for n in shape)
    arrays, rng = block(np.random.default_rng(12)), np.random.default_rng(13)
    shifted = 0
    for low, high in ((0.6, 0.95), (1.05, 1.7), ([0.7, 1.1, 0.9], [0.8, 1.4, 1.2]), ([0.7, 1.2], [0.8, 1.3]), (1, 1)):
        for _ in range(3):
            map = augmentor_of("RandZoomd", shape, min_zoom=low, max_zoom=high, align_corners=align).draw(rng)
            shifted += bool((map.outer_shift != 0).any())
            zoom = map.parameters[0][1]["zoom"]
            theirs = Zoom(zoom, mode="trilinear", align_corners=align)(patch_of(arrays, center, shape))
            same_where_monai_has_data(arrays, map, theirs, shape, center, 1e-4, 0.15)
    assert shifted > 3  # sizes that make MONAI move the centre by half a voxel are among them


def test_elastic_is_monais_on_the_same_field() -> None:
    from monai.networks.layers import GaussianFilter
    from monai.transforms import AffineGrid, Resample
    from monai.transforms.utils import create_grid

    torch = pytest.importorskip("torch")
    shape, center = (20, 22, 24), (19.5, 21.5, 22.5)
    arrays, rng = block(np.random.default_rng(14)), np.random.default_rng(15)
    noise = torch.from_numpy(rng.uniform(-1, 1, (1, 3, *shape)).astype(np.float32))
    field = GaussianFilter(3, 4.0, 3.0)(noise)[0] * 150.0
    angles, scales = [0.2, -0.1, 0.3], [1.1, 0.9, 1.0]
    grid = create_grid(shape, backend="torch")
    grid[:3] += field
    grid, matrix = AffineGrid(rotate_params=angles, scale_params=scales)(grid=grid)
    theirs = Resample(mode="bilinear", padding_mode="zeros")(torch.from_numpy(patch_of(arrays, center, shape)), grid)
    map = CoordinateMap.affine(np.asarray(matrix)[:3, :3]).then(
        CoordinateMap(field=Displacement(field.numpy(), (1.0, 1.0, 1.0)))
    )
    assert np.abs(np.asarray(field)).max() > 1
    same_where_monai_has_data(arrays, map, theirs, shape, center, 1e-3, 0.4)


# -- against MONAI in distribution -----------------------------------------------------------------------------------
DRAWS = 1500


def draws_of(augmentor: SpatialAugmentor) -> list[dict[str, Any]]:
    rng = np.random.default_rng(16)
    return [dict(map.parameters[0][1]) if map.parameters else {} for map in (augmentor.draw(rng) for _ in range(DRAWS))]


def alike(ours: Any, theirs: Any) -> None:
    """Two samples of one distribution, number by number (two-sample Kolmogorov-Smirnov)."""
    from scipy.stats import ks_2samp

    ours, theirs = np.atleast_2d(np.array(ours).T), np.atleast_2d(np.array(theirs).T)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert ks_2samp(a, b).pvalue > 0.001


def test_how_often_and_what_is_turned_is_monais() -> None:
    from monai.transforms import RandFlipd, RandRotate90d

    flip, turn = RandFlipd(prob=0.3, **BOTH), RandRotate90d(prob=0.6, max_k=3, **BOTH)
    flip.set_random_state(1)
    turn.set_random_state(2)
    theirs_flipped, theirs_turns = [], []
    for _ in range(DRAWS):
        flip.randomize(None)
        turn.randomize(None)
        theirs_flipped.append(flip._do_transform)
        theirs_turns.append(turn._rand_k if turn._do_transform else 0)
    ours = draws_of(augmentor_of("RandFlipd", prob=0.3))
    assert np.mean([bool(d) for d in ours]) == pytest.approx(np.mean(theirs_flipped), abs=0.05)
    turns = [d.get("quarter_turns", 0) for d in draws_of(augmentor_of("RandRotate90d", prob=0.6))]
    for count in range(4):
        assert np.mean(np.equal(turns, count)) == pytest.approx(np.mean(np.equal(theirs_turns, count)), abs=0.05)


@pytest.mark.parametrize("ranges", [
    AFFINE, {"rotate_range": 0.3, "scale_range": [None, 0.1]},
    {"translate_range": [[-3, 5]], "shear_range": [0.1, 0.2]},
])  # fmt: skip
def test_affine_parameters_are_drawn_as_monais(ranges: dict[str, Any]) -> None:
    from monai.transforms import RandAffineGrid

    grid = RandAffineGrid(**ranges)
    grid.set_random_state(3)
    theirs = []
    for _ in range(DRAWS):
        grid.randomize()
        theirs.append((grid.rotate_params, grid.shear_params, grid.translate_params, grid.scale_params))
    ours = draws_of(augmentor_of("RandAffined", **ranges))
    for number, (name, length) in enumerate(
        {"rotate_degrees": 3, "shear": 6, "translate_voxels": 3, "scale": 3}.items()
    ):
        given = len(theirs[0][number])
        assert given <= length
        assert (name in ours[0]) == bool(given)
        if given:
            drawn = np.array([d[name] for d in ours])
            alike(np.radians(drawn) if number == 0 else drawn[:, :given], [t[number] for t in theirs])
            assert number != 3 or (drawn[:, given:] == 1).all()


def test_zooms_are_drawn_as_monais() -> None:
    from monai.transforms import RandZoom

    for low, high in ((0.7, 0.9), ([0.7, 1.1], [0.8, 1.4]), ([0.7, 1.1, 0.9], [0.8, 1.4, 1.2])):
        zoom = RandZoom(prob=1.0, min_zoom=low, max_zoom=high)
        zoom.set_random_state(4)
        theirs = []
        for _ in range(DRAWS):
            zoom.randomize(np.zeros((1, 4, 4, 4), np.float32))
            theirs.append(list(zoom._zoom))
        alike([d["zoom"] for d in draws_of(augmentor_of("RandZoomd", min_zoom=low, max_zoom=high))], theirs)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 6.5])
def test_the_closed_form_of_an_elastic_fields_spread_is_monais(sigma: float) -> None:
    """Independent noise of variance 1/3 through a linear filter: what the filter makes of one voxel says all."""
    torch = pytest.importorskip("torch")
    from monai.networks.layers import GaussianFilter

    impulse = torch.zeros((1, 1, 51, 51, 51))
    impulse[0, 0, 25, 25, 25] = 1
    response = GaussianFilter(3, sigma, 3.0)(impulse)[0, 0].numpy().astype(np.float64)
    assert standard_deviation(sigma, -80.0) == pytest.approx(80 * np.sqrt((response**2).sum() / 3), rel=1e-5)
    along = response[25, 25] / np.sqrt((response[25, 25] ** 2).sum())
    np.testing.assert_allclose(
        correlations(sigma, 5), [(along[lag:] * along[: 51 - lag]).sum() for lag in range(5)], atol=1e-5
    )


def correlations(sigma: float, count: int) -> NDArray[np.float64]:
    """Of MONAI's field over 0, 1, 2... voxels along an axis."""
    kernel = gaussian_kernel(sigma)
    folded = np.correlate(kernel, np.pad(kernel, (0, count)), "full")[::-1][len(kernel) - 1 :]
    return (folded / folded[0])[:count]


@pytest.mark.parametrize("sigma", [0.7, 2.0, 3.0, 6.5])
def test_elastic_fields_vary_as_far_and_as_fast_as_monais(sigma: float) -> None:
    rng, n = np.random.default_rng(int(sigma * 10)), int(12 * max(sigma, 4))
    offsets, reach = offsets_of((n, n, n)), np.full(3, (n - 1) / 2)
    fields = [draw_field(rng, sigma, 80.0, reach).at(offsets) for _ in range(4)]
    values = np.moveaxis(np.concatenate(fields, axis=-1), -1, 0)
    assert abs(values.mean()) < 0.1 * standard_deviation(sigma, 80.0)
    assert values.std() == pytest.approx(standard_deviation(sigma, 80.0), rel=0.06)
    if sigma > 1:
        wanted = correlations(sigma, int(2 * sigma) + 2)
        for lag in (1, int(sigma), int(2 * sigma)):
            for axis in (1, 2, 3):
                moved = np.moveaxis(values, axis, -1)
                found = (moved[..., lag:] * moved[..., :-lag]).mean() / (values**2).mean()
                assert found == pytest.approx(wanted[lag], abs=0.07)
                assert wanted[lag] == pytest.approx(np.exp(-(lag**2) / (4 * sigma**2)), abs=0.02)


# -- registration ----------------------------------------------------------------------------------------------------
SPATIAL: dict[str, dict[str, Any]] = {
    "RandFlipd": {"spatial_axis": [0, 1, 2]},
    "RandRotate90d": {"spatial_axes": PLANES},
    "RandAffined": {
        "rotate_range": [0.6, 0.6, 0.6], "scale_range": [0.1, 0.1, 0.1], "shear_range": [0.1] * 6,
        "translate_range": [2, 2, 2],
    },
    "RandZoomd": {"min_zoom": 0.8, "max_zoom": 1.2},
    "Rand3DElasticd": {"sigma_range": [12, 14], "magnitude_range": [300, 600], "rotate_range": [0.3, 0.3, 0.3]},
}  # fmt: skip


def inverse(map: CoordinateMap, source: NDArray[np.float64]) -> NDArray[np.float64]:
    """The offset that the map takes to ``source``."""
    matrix = map.outer @ map.inner
    offset = np.zeros(3)
    for _ in range(200):
        offset = offset + np.linalg.solve(matrix, source - map(offset)) * 0.7
    assert np.abs(map(offset) - source).max() < 1e-6
    return offset


@pytest.mark.parametrize("fraction", [0.0, 0.37], ids=["whole voxels", "between voxels"])
@pytest.mark.parametrize("name", [*SPATIAL, "all"])
def test_raw_and_label_stay_registered_and_go_where_the_map_says(name: str, fraction: float) -> None:
    chosen = SPATIAL if name == "all" else {name: SPATIAL[name]}
    shape = (40, 40, 40)
    augmentor, remaining = SpatialAugmentor.split({k: {**BOTH, "prob": 1.0, **v} for k, v in chosen.items()}, shape)
    assert augmentor is not None
    assert not remaining
    rng = np.random.default_rng(17)
    offsets, grid = offsets_of(shape), np.stack(np.indices((76, 76, 76)), -1)
    apart, away, bent = [], [], []
    for turn in range(12):
        # of an even patch on whole voxels: half an index. A label moves by whole voxels only, so that where all of a
        # patch lies as far off the lattice it lags behind as far; it does so to either side alike
        center = rng.integers(35, 40, 3) + 0.5 + (fraction if turn % 2 else -fraction)
        ball = center + rng.uniform(-4, 4, 3)
        distance = np.linalg.norm(grid - ball, axis=-1)
        soft = np.rint(255 * np.clip((7 - distance) / 2 + 0.5, 0, 1)).astype(np.uint8)
        map = augmentor.draw(rng)
        image, codes = sample(arrays_of(soft, (distance < 7).astype(np.uint8)), center, map, shape)
        exact = np.clip((7 - np.linalg.norm(map(offsets) + center - ball, axis=-1)) / 2 + 0.5, 0, 1)
        raw_at, label_at, exact_at = (
            np.average(offsets.reshape(-1, 3), axis=0, weights=w.reshape(-1)) for w in (image, codes, exact)
        )
        apart.append(map(raw_at) - map(label_at))  # seen in the source, where labels go to the nearest voxel
        away.append(raw_at - exact_at)
        bent.append(raw_at - inverse(map, ball - center))
    assert np.abs(away).max() < 0.03  # where the closed form of the moved ball is
    assert np.abs(np.mean(apart, axis=0)).max() < 0.1
    assert np.abs(apart).max() < 0.55
    # and about where the map takes its centre, which is where it takes the ball where it does not bend it
    assert np.abs(bent).max() < (0.4 if "Rand3DElasticd" in chosen else 0.05)
    assert np.abs(np.mean(bent, axis=0)).max() < 0.1


# -- the configuration -----------------------------------------------------------------------------------------------
def test_what_is_fused_and_what_is_left_to_monai() -> None:
    noise, moving = {"keys": ["image"], "prob": 0.5}, {**BOTH, "prob": 0.5}
    augmentor, remaining = SpatialAugmentor.split({
        "RandGaussianNoised": noise, "RandFlipd": moving, "RandFlipd_2": {**moving, "spatial_axis": 0},
        "RandGaussianSmoothd": None, "RandRotated": moving, "RandZoomd": moving,
    }, (8, 8, 8))  # fmt: skip
    assert augmentor is not None
    assert [name for name, _ in augmentor.transforms] == ["RandFlipd", "RandFlipd_2"]
    # the zoom comes after a rotation that MONAI makes, so it must wait for it
    assert list(remaining) == ["RandGaussianNoised", "RandRotated", "RandZoomd"]
    assert SpatialAugmentor.split({"RandGaussianNoised": noise}, (8, 8, 8)) == (None, {"RandGaussianNoised": noise})
    assert SpatialAugmentor.split({}, (8, 8, 8)) == (None, {})


@pytest.mark.parametrize(("name", "arguments"), [
    ("RandZoomd", {"keep_size": False}), ("RandZoomd", {"mode": ["area", "nearest"]}),
    ("RandAffined", {"spatial_size": [4, 8, 8]}), ("RandAffined", {"mode": "nearest"}),
    ("Rand3DElasticd", {"sigma_range": [2, 3], "magnitude_range": [1, 2], "mode": 3}),
])  # fmt: skip
def test_what_one_pass_does_not_do_is_left_to_monai(name: str, arguments: dict[str, Any]) -> None:
    config = {name: {**BOTH, **arguments}, "RandFlipd": BOTH}
    assert SpatialAugmentor.split(config, (8, 8, 8)) == (None, config)


def test_arguments_that_cannot_matter_are_taken() -> None:
    same = {"spatial_size": [8, -1, 8], "mode": ["bilinear", "nearest"], "padding_mode": "border", "device": "cpu"}
    config = {
        "RandAffined": {**BOTH, **same, "cache_grid": True, "lazy": True, "allow_missing_keys": True},
        "RandZoomd": {**BOTH, "mode": ["trilinear", "nearest-exact"], "keep_size": True, "dtype": "float32"},
        "Rand3DElasticd": {**BOTH, **same, "sigma_range": [2, 3], "magnitude_range": (1, 2)},
        "RandRotate90d": {"keys": ["image", "label", "known"], "spatial_axes": PLANES},
    }
    augmentor, remaining = SpatialAugmentor.split(config, (8, 9, 8))
    assert augmentor is not None
    assert [name for name, _ in augmentor.transforms] == ["RandAffined", "RandZoomd", "Rand3DElasticd"] + 3 * [
        "RandRotate90d"
    ]
    assert remaining == {}


def test_a_second_elastic_field_is_left_to_monai() -> None:
    elastic = {**BOTH, "sigma_range": [2, 3], "magnitude_range": [1, 2]}
    augmentor, remaining = SpatialAugmentor.split({"Rand3DElasticd": elastic, "Rand3DElasticd_2": elastic}, (8, 8, 8))
    assert augmentor is not None
    assert [name for name, _ in augmentor.transforms] == ["Rand3DElasticd"]
    assert list(remaining) == ["Rand3DElasticd_2"]


@pytest.mark.parametrize(("config", "error", "message"), [
    ({"RandFlipd": {**BOTH, "probb": 0.1}}, ConfigError, "unknown key 'probb'; did you mean 'prob'"),
    ({"RandFlipd": {"keys": ["image", "lable"]}}, ConfigError, r"RandFlipd: keys\[1\] .* did you mean 'label'"),
    ({"RandFlipd": {"prob": 0.1}}, ConfigError, "keys is missing"),
    ({"RandFlipd_2": 0.5}, ConfigError, r"data\.augmentations\.RandFlipd_2: .* must be keys and values, got 0\.5"),
    ({"RandFlipd": {"keys": ["image"]}}, ConfigError, r"keys must be \[image, label\], .* got \['image'\]"),
    ({"RandAffined": {"keys": "label"}}, ConfigError, r"got \['label'\]"),
    ({"RandFlipd": {**BOTH, "prob": 1.5}}, ConfigError, r"RandFlipd: prob must be at most 1\.0, got 1\.5"),
    ({"RandFlipd": {**BOTH, "spatial_axis": 7}}, ConfigError, "spatial_axis must be axes from 0"),
    ({"RandFlipd": {**BOTH, "spatial_axis": [0, -3]}}, ConfigError, "different axes"),
    ({"RandRotate90d": {**BOTH, "spatial_axes": [0, 0]}}, ConfigError, "pair of different axes"),
    ({"RandRotate90d": {**BOTH, "spatial_axes": [0, 1, 2]}}, ConfigError, "pair of different axes"),
    ({"RandRotate90d": {**BOTH, "max_k": 0}}, ConfigError, "max_k must be at least 1, got 0"),
    ({"RandAffined": {**BOTH, "rotate_range": [1, 2, 3, 4]}}, ConfigError, "rotate_range must be at most 3"),
    ({"RandAffined": {**BOTH, "scale_range": "x"}}, ConfigError, "scale_range must be numbers or pairs"),
    ({"RandAffined": {**BOTH, "shear_range": [[0.2, 0.1]]}}, ConfigError, r"shear_range\[0\] .* low <= high"),
    ({"RandAffined": {**BOTH, "mode": "bilinar"}}, ConfigError, "mode must be one for all keys"),
    ({"RandAffined": {**BOTH, "spatial_size": [4, 4]}}, ConfigError, "spatial_size must be one or three"),
    ({"RandZoomd": {**BOTH, "min_zoom": [0.5, 0.6], "max_zoom": 1.0}}, ConfigError, "must have the same length"),
    ({"RandZoomd": {**BOTH, "min_zoom": 1.2, "max_zoom": 0.9}}, ConfigError, "min_zoom must be at most max_zoom"),
    ({"RandZoomd": {**BOTH, "min_zoom": 0.01}}, ConfigError, r"at least one of 8 voxels"),
    ({"RandZoomd": {**BOTH, "align_corners": [True, False]}}, ConfigError, "the same for image and label"),
    ({"RandZoomd": {**BOTH, "keep_size": "yes"}}, ConfigError, "keep_size must be a valid boolean"),
    ({"Rand3DElasticd": {**BOTH, "sigma_range": [2, 3]}}, ConfigError, "magnitude_range is missing"),
    ({"Rand3DElasticd": {**BOTH, "sigma_range": [0, 3], "magnitude_range": [1, 2]}}, ConfigError, "must be positive"),
])  # fmt: skip
def test_bad_arguments_are_refused(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        SpatialAugmentor.split(config, (8, 16, 16))
    assert "\n" not in str(caught.value)


def test_drawing_is_reproducible_and_the_augmentor_travels() -> None:
    augmentor, _ = SpatialAugmentor.split({k: {**BOTH, "prob": 0.7, **v} for k, v in SPATIAL.items()}, (16, 16, 16))
    assert augmentor is not None
    sent = pickle.dumps(augmentor)
    assert len(sent) < 5000
    again = pickle.loads(sent)
    points = 3 * offsets_of((5, 5, 5))
    for seed in range(5):
        a, b = augmentor.draw(np.random.default_rng(seed)), again.draw(np.random.default_rng(seed))
        assert a.parameters == b.parameters
        np.testing.assert_array_equal(a(points), b(points))
    assert augmentor.draw(np.random.default_rng(0)).parameters != augmentor.draw(np.random.default_rng(1)).parameters


def test_no_draw_asks_for_more_than_its_reach() -> None:
    rng = np.random.default_rng(18)
    for chosen in (*([k] for k in SPATIAL), list(SPATIAL)[:4], list(SPATIAL)):
        for shape in ((16, 16, 16), (6, 20, 13)):
            config = {k: {**BOTH, "prob": 0.8, **SPATIAL[k]} for k in chosen}
            augmentor, _ = SpatialAugmentor.split(config, shape)
            assert augmentor is not None
            reach = augmentor.reach(shape)
            seen = np.max([np.abs(augmentor.draw(rng).bounds(shape)).max(0) for _ in range(40)], axis=0)
            assert (seen <= reach + 1e-9).all()
            assert (reach <= 4 * seen.max() + 8).all()  # and it is not far more than what is asked for


def test_an_elastic_field_covers_the_larger_patch_of_a_coarser_input() -> None:
    config = {"Rand3DElasticd": {**BOTH, "prob": 1.0, "sigma_range": [2, 2], "magnitude_range": [20, 20]}}
    augmentor, _ = SpatialAugmentor.split(config, (8, 8, 8), extent=(32, 32, 32))
    assert augmentor is not None
    map = augmentor.draw(np.random.default_rng(0))
    assert map.field is not None
    edge = map.field.at(offsets_of((32, 1, 1)))[..., 0].ravel()
    assert np.abs(np.diff(edge)).min() > 0  # beyond its control points a field would stand still


class TestInNanometers:
    """On voxels that are no cubes a rotation is one of the tissue."""

    SIZE = np.array([30.0, 8.0, 4.0])

    def split(self, name: str, **arguments: Any) -> SpatialAugmentor:
        config = {name: {**BOTH, "prob": 1.0, **arguments}}
        augmentor, remaining = SpatialAugmentor.split(config, (16, 24, 32), voxel_size=self.SIZE)
        assert augmentor is not None
        assert not remaining
        return augmentor

    def test_a_rotation_turns_nanometers(self) -> None:
        """Against scipy's rotation of positions in nm."""
        from scipy.spatial.transform import Rotation

        augmentor = self.split("RandAffined", rotate_range=[3.0, 3.0, 3.0])
        offsets = np.random.default_rng(0).uniform(-20, 20, (50, 3))
        for seed in range(5):
            drawn = augmentor.draw(np.random.default_rng(seed))
            angles = dict(drawn.parameters)["RandAffined"]["rotate_degrees"]
            turn = Rotation.from_euler("XYZ", angles, degrees=True).as_matrix()  # its X, Y, Z are our z, y, x
            np.testing.assert_allclose(drawn(offsets) * self.SIZE, offsets * self.SIZE @ turn.T, rtol=1e-9, atol=1e-6)

    def test_lengths_stay_under_a_rotation_before_a_displacement(self) -> None:
        arguments = {"sigma_range": [4.0, 5.0], "magnitude_range": [0.0, 0.0], "rotate_range": [3.0, 3.0, 3.0]}
        drawn = self.split("Rand3DElasticd", **arguments).draw(np.random.default_rng(1))
        offsets = np.random.default_rng(0).uniform(-4, 4, (50, 3))
        found, asked = (np.linalg.norm(at * self.SIZE, axis=1) for at in (drawn(offsets), offsets))
        np.testing.assert_allclose(found, asked, rtol=1e-6)

    def test_no_draw_goes_beyond_the_reach(self) -> None:
        augmentor = self.split(
            "RandAffined",
            rotate_range=[0.6, 0.6, 0.6], shear_range=[0.2] * 6, translate_range=[2, 3, 4], scale_range=[0.1] * 3,
        )  # fmt: skip
        reach = augmentor.reach((16, 24, 32))
        bounds = [
            np.abs(augmentor.draw(np.random.default_rng(seed)).bounds((16, 24, 32))).max(0) for seed in range(300)
        ]
        assert (np.max(bounds, axis=0) <= reach + 1e-9).all()
        assert (np.max(bounds, axis=0) > 0.4 * reach).all()

    def test_a_quarter_turn_needs_voxels_as_long_on_both_axes(self) -> None:
        def split(planes: list[list[int]]) -> SpatialAugmentor | None:
            config = {"RandRotate90d": {**BOTH, "spatial_axes": planes}}
            return SpatialAugmentor.split(config, (16, 16, 16), voxel_size=(30.0, 8.0, 8.0))[0]

        assert split([[1, 2]]) is not None
        with pytest.raises(ConfigError, match=r"rotates axes \(0, 1\), whose voxels are 30 and 8 nm long"):
            split([[1, 2], [0, 1]])

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [("RandAffined", {"rotate_range": [0.1], "mode": ["nearest", "nearest"]}), ("RandRotated", {"range_x": 0.1})],
    )
    def test_transforms_that_turn_in_voxels_are_refused(self, name: str, arguments: dict[str, Any]) -> None:
        config = {name: {**BOTH, "prob": 1.0, **arguments}}
        assert PatchAugmentor.of(config, (16, 16, 16), voxel_size=(8.0, 8.0, 8.0)) is not None
        with pytest.raises(ConfigError, match=r"rotates or shears in voxels, .* it rotates in nm"):
            PatchAugmentor.of(config, (16, 16, 16), voxel_size=(30.0, 8.0, 8.0))
