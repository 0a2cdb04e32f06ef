"""Intensity and EM augmentations: each does what it says, in bounds, and depends on the sample's seed alone."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.schema import InputConfig
from connectomics.data.augmentation import KINDS, BatchAugmentor, IntensityAugmentor, recognize
from connectomics.data.augmentation import intensity_operations as operations
from connectomics.errors import ConfigError, InputError, UnknownNameError

NM = (8.0, 8.0, 8.0)
ALL = {name: {"prob": 1} for name in KINDS}


def texture(shape: tuple[int, ...] = (24, 32, 40), seed: int = 0) -> Tensor:
    """A patch (1, D, H, W) with structure at several scales, values well inside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 1, *(max(1, n // 6) for n in shape)), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]
    return 0.25 + 0.4 * smooth + 0.1 * torch.rand((1, *shape), generator=generator)


def batch(size: int = 3, shape: tuple[int, ...] = (24, 32, 40), channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.stack([texture(shape, i).expand(channels, *shape) for i in range(size)])
    codes = torch.randint(1, 9, (size, *shape), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return image, codes, torch.arange(11, 11 + size)


def augmentor(**intensity: Any) -> IntensityAugmentor:
    found = IntensityAugmentor.from_config(intensity, NM)
    assert found is not None
    return found


def apply(image: Tensor, name: str, seed: int = 7, voxel_size: tuple[float, ...] = NM, **arguments: Any) -> Tensor:
    """One patch (C, D, H, W) through one kind, always applied."""
    made = IntensityAugmentor.from_config({name: {"prob": 1, **arguments}}, voxel_size)
    assert made is not None
    codes = torch.ones((1, *image.shape[1:]), dtype=torch.uint8)
    return made(image[None], codes, torch.tensor([seed]))[0][0]


def drawn(name: str, seed: int = 7, shape: tuple[int, int, int] = (24, 32, 40), **arguments: Any) -> dict[str, Any]:
    ((_, _, numbers),) = augmentor(**{name: {"prob": 1, **arguments}}).drawn(seed, shape)
    return numbers


# --- all kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_defaults_change_a_patch_and_stay_in_bounds(name: str) -> None:
    image, codes, seeds = batch()
    given, given_codes = image.clone(), codes.clone()
    result, moved = augmentor(**{name: {"prob": 1}})(image, codes, seeds)
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    assert not result.requires_grad
    assert torch.isfinite(result).all()
    assert result.min() >= 0
    assert result.max() <= 1
    assert all((result[i] != image[i]).any() for i in range(3))
    assert moved is not None
    assert moved.dtype == codes.dtype
    assert torch.equal(image, given)
    assert torch.equal(codes, given_codes)
    if not KINDS[name].moves:
        assert torch.equal(moved, codes)


@pytest.mark.parametrize("name", KINDS)
def test_probability_zero_is_the_identity(name: str) -> None:
    image, codes, seeds = batch()
    result, moved = augmentor(**{name: {"prob": 0}})(image, codes, seeds)
    assert torch.equal(result, image)
    assert moved is not None
    assert torch.equal(moved, codes)


@pytest.mark.parametrize("name", KINDS)
def test_extreme_patches_stay_finite_and_in_bounds(name: str) -> None:
    for shape in ((1, 5, 7), (3, 1, 1), (6, 6, 6)):
        for image in (torch.zeros(1, *shape), torch.ones(1, *shape), torch.rand(1, *shape)):
            result = apply(image, name)
            assert result.shape == image.shape
            assert torch.isfinite(result).all()
            assert result.min() >= 0
            assert result.max() <= 1


def test_a_kind_is_applied_as_often_as_it_says() -> None:
    made = augmentor(noise={"prob": 0.3}, gamma={"prob": 0.3})
    names = [[name for name, _, _ in made.drawn(seed, (4, 4, 4))] for seed in range(4000)]
    noise, gamma = (np.array([name in found for found in names]) for name in ("noise", "gamma"))
    # four standard deviations of a share of 4000
    assert noise.mean() == pytest.approx(0.3, abs=0.029)
    assert gamma.mean() == pytest.approx(0.3, abs=0.029)
    assert (noise & gamma).mean() == pytest.approx(0.09, abs=0.018)  # independently of each other


def test_a_sample_does_not_depend_on_its_batch() -> None:
    image, codes, seeds = batch()
    made = augmentor(**ALL)
    together, moved = made(image, codes, seeds)
    assert moved is not None
    for order in ([2, 0, 1], [1], [0, 2]):
        again, codes_again = made(image[order], codes[order], seeds[order])
        assert torch.equal(again, together[order])
        assert codes_again is not None
        assert torch.equal(codes_again, moved[order])
    assert not torch.equal(made(image, codes, seeds + 1)[0], together)


def test_a_kind_draws_the_same_whatever_else_is_configured() -> None:
    alone = list(augmentor(drift={"prob": 1}).drawn(5, (8, 8, 8)))
    among = [found for found in augmentor(**ALL).drawn(5, (8, 8, 8)) if found[0] == "drift"]
    assert np.array_equal(alone[0][2]["curve"], among[0][2]["curve"])


def test_the_order_in_the_configuration_does_not_matter() -> None:
    image, codes, seeds = batch()
    backwards = {name: ALL[name] for name in reversed(ALL)}
    assert torch.equal(augmentor(**ALL)(image, codes, seeds)[0], augmentor(**backwards)(image, codes, seeds)[0])
    assert [name for name, _ in augmentor(**backwards).kinds] == list(KINDS)


def test_global_random_state_is_left_alone() -> None:
    image, codes, seeds = batch()
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.random.get_rng_state().clone(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = augmentor(**ALL)(image, codes, seeds)[0]
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[arg-type]
    torch.manual_seed(4)
    assert torch.equal(augmentor(**ALL)(image, codes, seeds)[0], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_does_not_reach_in(dtype: torch.dtype) -> None:
    image, codes, seeds = batch()
    expected = augmentor(**ALL)(image, codes, seeds)[0]
    with torch.autocast("cpu", dtype):
        assert torch.equal(augmentor(**ALL)(image, codes, seeds)[0], expected)
        half = augmentor(**ALL)(image.to(dtype), codes, seeds)[0]
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()


def test_channels_share_what_is_drawn() -> None:
    image, codes, seeds = batch(channels=2)
    for name in set(KINDS) - {"noise", "poisson", "cutout", "gamma", "contrast"}:
        result, _ = augmentor(**{name: {"prob": 1}})(image, codes, seeds)
        assert torch.equal(result[:, 0], result[:, 1]), name
    noisy, _ = augmentor(noise={"prob": 1})(image, codes, seeds)
    assert not torch.equal(noisy[:, 0], noisy[:, 1])  # each detector has noise of its own


def test_image_from_a_transposed_view_is_taken_as_it_is() -> None:
    image, codes, seeds = batch(shape=(16, 16, 16))
    turned = image.transpose(2, 4)
    assert torch.equal(
        augmentor(**ALL)(turned, codes, seeds)[0], augmentor(**ALL)(turned.contiguous(), codes, seeds)[0]
    )


def test_any_int64_is_a_seed() -> None:
    image, codes, _ = batch(2)
    seeds = torch.tensor([-1, 2**63 - 1])
    result = augmentor(**ALL)(image[:1].repeat(2, 1, 1, 1, 1), codes, seeds)[0]
    assert not torch.equal(result[0], result[1])


# --- optics ------------------------------------------------------------------------------------------------------


def test_blur_of_an_impulse_has_the_width_asked_for_on_each_axis() -> None:
    image = torch.zeros(1, 41, 41, 41)
    image[0, 20, 20, 20] = 1
    sigma = (0.7, 1.5, 3.0)
    result = apply(image, "blur", sigma=[[s, s] for s in sigma])[0].double()
    assert float(result.sum()) == pytest.approx(1, abs=1e-5)
    position = torch.arange(41) - 20.0
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        variance = float((result.sum(others) * position**2).sum())
        # a Gaussian integrated over voxels, as wide as both together; four sigma hold all but a thousandth of it
        assert variance == pytest.approx(sigma[axis] ** 2 + 1 / 12, rel=2e-3)


def test_blur_keeps_the_mean_and_a_flat_patch_to_the_border() -> None:
    image = texture((12, 20, 16))
    assert float(apply(image, "blur", sigma=3).mean()) == pytest.approx(float(image.mean()), abs=1e-5)
    flat = torch.full((1, 12, 20, 16), 0.4)
    assert torch.allclose(apply(flat, "blur", sigma=3), flat, atol=1e-6)


def test_banded_blocks_give_what_the_whole_matrix_gives() -> None:
    image = torch.rand(2, 70, 3, 150)
    for axis, n in ((0, 70), (1, 3), (2, 150)):
        matrix = operations.gaussian_matrix(n, 2.3)
        expected = torch.tensordot(image.double(), torch.from_numpy(matrix), ([axis + 1], [1])).movedim(-1, axis + 1)
        assert torch.allclose(operations.along(image, axis, matrix).double(), expected, atol=1e-6)


def test_resolution_halved_keeps_slow_waves_and_loses_fast_ones() -> None:
    x = torch.arange(64.0)
    for axis in range(3):
        shape = [1, 1, 1, 1]
        shape[axis + 1] = 64
        whole = [1, 4, 4, 4]
        whole[axis + 1] = 64
        factor = [[1, 1]] * 3
        factor[axis] = [2, 2]

        def amplitude(
            period: float,
            shape: list[int] = shape,
            whole: list[int] = whole,
            factor: list[list[int]] = factor,
        ) -> float:
            wave = 0.5 + 0.4 * torch.cos(2 * torch.pi * (x + 0.5) / period)
            result = apply(wave.view(shape).expand(whole).contiguous(), "resolution", factor=factor)
            return float((result - 0.5).square().mean().sqrt() / (0.4 / 2**0.5))

        assert amplitude(2) < 1e-5  # one wave per coarse voxel: gone
        assert amplitude(4) < 0.5  # at the coarse voxels' own limit
        assert amplitude(32) > 0.95


def test_resolution_of_one_is_the_identity_and_means_are_kept() -> None:
    image = texture()
    assert torch.equal(apply(image, "resolution", factor=1), image)
    assert float(apply(image, "resolution", factor=2).mean()) == pytest.approx(float(image.mean()), abs=3e-3)
    block = operations.resolution_matrix(8, 8.0)
    assert np.allclose(block, 1 / 8)  # one coarse voxel: its mean everywhere


# --- the detector ------------------------------------------------------------------------------------------------


def test_noise_has_the_deviation_drawn() -> None:
    image = torch.full((1, 40, 50, 60), 0.5)
    added = apply(image, "noise", std=[0.05, 0.05], mean=0.02) - image
    n = added.numel()
    assert float(added.mean()) == pytest.approx(0.02, abs=5 * 0.05 / n**0.5)
    assert float(added.std()) == pytest.approx(0.05, rel=5 / (2 * n) ** 0.5)
    neighbours = added.flatten()[1:] * added.flatten()[:-1]
    assert abs(float((neighbours - 0.02**2).mean())) < 5 * 0.05**2 / n**0.5 + 1e-5  # white


def test_shot_noise_has_a_variance_of_value_over_dose() -> None:
    for value in (0.2, 0.5, 0.8):
        image = torch.full((1, 40, 50, 60), value)
        added = apply(image, "poisson", dose=200) - image
        assert abs(float(added.mean())) < 5 * (value / 200 / added.numel()) ** 0.5
        assert float(added.var()) == pytest.approx(value / 200, rel=0.03)


def test_gain_contrast_and_brightness_are_linear() -> None:
    image = texture()
    assert torch.allclose(apply(image, "gain", factor=0.8), image * 0.8, atol=1e-6)
    assert torch.allclose(apply(image, "brightness", shift=-0.1), image - 0.1, atol=1e-6)
    mean = image.mean()
    result = apply(image, "contrast", factor=0.5)
    assert torch.allclose(result, mean + 0.5 * (image - mean), atol=1e-6)
    assert float(result.mean()) == pytest.approx(float(mean), abs=1e-6)


def test_gamma_keeps_the_extremes_and_the_order() -> None:
    image = texture()
    result = apply(image, "gamma", exponent=1.5)
    assert torch.allclose(torch.stack(result.aminmax()), torch.stack(image.aminmax()), atol=1e-5)
    order = image.flatten().argsort()
    assert (result.flatten()[order].diff() >= -1e-6).all()
    assert (result <= image + 1e-6).all()


def test_drift_is_one_value_a_section_and_smooth() -> None:
    image = texture((64, 20, 20))
    added = apply(image, "drift", amplitude=0.1, length=80) - image
    curve = added.mean((0, 2, 3))
    assert torch.allclose(added, curve.view(1, -1, 1, 1).expand_as(added), atol=1e-6)  # constant in a section
    assert float(curve.abs().max()) == pytest.approx(0.1, abs=1e-5)
    assert abs(float(curve.mean())) < 1e-5
    # slopes of a curve that is smooth over 10 voxels: far below the peak a voxel
    assert float(curve.diff().abs().max()) < 0.1 / 3


def test_drift_is_faster_where_voxels_are_larger() -> None:
    def slope(voxel: float) -> float:
        found = [
            apply(torch.full((1, 64, 2, 2), 0.5), "drift", seed, (voxel, 8, 8), amplitude=0.1, length=160)
            for seed in range(20)
        ]
        return float(np.mean([f[0, :, 0, 0].diff().abs().mean().item() for f in found]))

    assert slope(40) > 2.5 * slope(8)  # its length is nanometres


# --- the sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "dim"), [("y", 2), ("x", 3)])
def test_stripes_are_constant_along_their_axis(axis: str, dim: int) -> None:
    image = texture()
    added = apply(image, "stripes", axis=axis, amplitude=0.2) - image
    across = 5 - dim
    assert float(added.std(dim).max()) < 1e-6
    assert float(added.std(across).max()) > 0.01
    assert float(added.abs().max()) == pytest.approx(0.2, abs=1e-5)


def test_stripes_stay_over_the_sections_they_should() -> None:
    flat = torch.full((1, 64, 4, 64), 0.5)
    for persistence, alike in ((1.0, False), (1e5, True)):
        added = (apply(flat, "stripes", axis="y", persistence=persistence) - flat)[0, :, 0]
        similar = float(torch.corrcoef(added[::20])[0, 1:].abs().min())
        assert (similar > 0.99) == alike


def test_charging_is_a_spot_of_the_radius_asked_for() -> None:
    flat = torch.full((1, 61, 61, 61), 0.2)
    numbers: dict[str, Any] = {"radii": [[2.0, 5.0, 5.0]], "halo": [1.0], "heights": [0.5], "centers": [[30, 30, 30]]}
    added = (KINDS["charging"].apply(flat.clone(), **numbers) - flat)[0].double()
    assert float(added.max()) == pytest.approx(0.5, abs=1e-6) == float(added[30, 30, 30])
    position = torch.arange(61) - 30.0
    for axis, radius in enumerate((2.0, 5.0, 5.0)):
        profile = added.sum([a for a in range(3) if a != axis])
        variance = float((profile * position**2).sum() / profile.sum())
        assert variance == pytest.approx(radius**2, rel=5e-3)  # cut at four sigma


def test_charging_is_bright_or_dark_as_configured() -> None:
    image = texture()
    assert (apply(image, "charging", sign="bright") >= image - 1e-6).all()
    assert (apply(image, "charging", sign=["dark"]) <= image + 1e-6).all()
    for seed in range(20):
        numbers = drawn("charging", seed, spots=[2, 3], radius=40, depth=16)
        assert len(numbers["centers"]) in (2, 3)
        assert all(r == [2.0, 5.0, 5.0] for r in numbers["radii"])  # nm over voxels of 8 nm


# --- sections and boxes ------------------------------------------------------------------------------------------


def test_missing_sections_are_as_many_as_drawn_and_whole() -> None:
    image = texture()
    mean = float(image.mean())
    for fill, value in (("black", 0.0), ("white", 1.0), ("mean", mean)):
        for seed in range(5):
            result = apply(image, "missing_sections", seed, sections=[2, 4], fill=fill)
            lost = [z for z in range(24) if not torch.equal(result[0, z], image[0, z])]
            assert 2 <= len(lost) <= 4
            assert torch.allclose(result[0, lost], torch.tensor(value), atol=1e-6)


def test_missing_sections_may_be_copies_of_the_nearest_left() -> None:
    image = texture()
    result = KINDS["missing_sections"].apply(image.clone(), [0, 5, 6, 7], "copy")
    for at, source in ((0, 1), (5, 4), (6, 4), (7, 8)):
        assert torch.equal(result[:, at], image[:, source])
    kept = [z for z in range(24) if z not in (0, 5, 6, 7)]
    assert torch.equal(result[:, kept], image[:, kept])
    # one is always left
    assert len(drawn("missing_sections", shape=(3, 8, 8), sections=50)["sections"]) == 2


def test_shifted_sections_keep_image_and_codes_registered() -> None:
    """A marker written into both: wherever something is known, the image there is what was known there."""
    shape = (24, 32, 40)
    marker = torch.randint(1, 250, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        for seed in range(12):
            made = augmentor(shifted_sections={"prob": 1, "sections": [1, 6], "displacement": [1, 9]})
            ((_, _, numbers),) = made.drawn(seed, shape)
            image, codes = made((marker.float() / 255)[None, None], marker.to(dtype)[None], torch.tensor([seed]))
            assert codes is not None
            assert codes.dtype == dtype
            known = codes[0] != 0
            value = (image[0, 0] * 255).round().to(dtype)
            assert torch.equal(value[known], codes[0][known])
            dy, dx = numbers["displacement"]
            run = slice(numbers["first"], numbers["first"] + numbers["sections"])
            assert max(abs(dy), abs(dx)) >= 1
            assert (dy**2 + dx**2) ** 0.5 <= 9 + 0.71
            # the whole run has moved by that, and only what came into view is unknown
            assert int((~known).sum()) == numbers["sections"] * (32 * 40 - (32 - abs(dy)) * (40 - abs(dx)))
            source = marker[run, max(0, -dy) : 32 - max(0, dy), max(0, -dx) : 40 - max(0, dx)]
            assert torch.equal(
                codes[0][run, max(0, dy) : 32 + min(0, dy), max(0, dx) : 40 + min(0, dx)], source.to(dtype)
            )
            rest = [z for z in range(24) if z not in range(*run.indices(24))]
            assert torch.equal(codes[0][rest], marker[rest].to(dtype))


def test_vacated_voxels_repeat_the_edge() -> None:
    image = texture()
    result = KINDS["shifted_sections"].apply(image.clone(), 3, 2, (4, -5))
    assert torch.equal(result[0, 3, :4, 0], image[0, 3, 0, 5].expand(4))
    assert torch.equal(result[0, 4, 10, -5:], image[0, 4, 6, -1].expand(5))


def test_without_codes_nothing_moves() -> None:
    """A view whose labels are elsewhere must not move against them."""
    image, _codes, seeds = batch()
    made = augmentor(shifted_sections={"prob": 1})
    result, none = made(image, None, seeds)
    assert none is None
    assert torch.equal(result, image)


def test_cutout_fills_the_boxes_drawn_and_nothing_else() -> None:
    shape = (24, 32, 40)
    image = texture(shape)
    for seed in range(8):
        numbers = drawn("cutout", seed, boxes=1, size=[[4, 6], [8, 8], [99, 99]])
        ((z, y, x),) = numbers["boxes"]
        assert 4 <= z[1] - z[0] <= 6
        assert y[1] - y[0] == 8
        assert x == (0, 40)
        result = apply(image, "cutout", seed, boxes=1, size=[[4, 6], [8, 8], [99, 99]], fill="mean")
        changed = result != image
        assert int(changed.sum()) == pytest.approx((z[1] - z[0]) * 8 * 40, abs=2)  # by chance a voxel is the mean
        assert torch.allclose(result[changed], image.mean(), atol=1e-6)


def test_cutout_with_noise_has_the_patch_s_mean_and_deviation() -> None:
    image = texture((32, 32, 32))
    result = apply(image, "cutout", boxes=1, size=28, fill="noise")
    changed = result[result != image]
    assert changed.numel() > 0.99 * 28**3
    assert float(changed.mean()) == pytest.approx(float(image.mean()), abs=5e-3)
    assert float(changed.std()) == pytest.approx(float(image.std()), rel=0.03)


# --- configuration -----------------------------------------------------------------------------------------------


def test_nothing_configured_is_none() -> None:
    assert IntensityAugmentor.from_config({}, NM) is None
    assert IntensityAugmentor.from_config({"noise": None}, NM) is None


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_s_defaults_are_instantiated(name: str) -> None:
    ((found, kind),) = augmentor(**{name: {}}).kinds
    assert found == name
    assert 0 < kind.prob < 1
    numbers = kind.draw(np.random.default_rng(0), (16, 16, 16), NM)
    assert set(numbers) == set(inspect.signature(kind.apply).parameters) - {"image"}


def test_a_kind_may_be_named_twice() -> None:
    made = augmentor(noise_2={"prob": 1, "std": 0.1}, noise={"prob": 1, "std": 0.01})
    (_, _, first), (_, _, second) = made.drawn(0, (4, 4, 4))
    assert first["std"] == 0.01
    assert second["std"] == 0.1
    assert first["seed"] != second["seed"]


@pytest.mark.parametrize(
    ("intensity", "message"),
    [
        ({"nois": {}}, "unknown augmentation 'nois' in data.intensity; did you mean 'noise'?"),
        ({"noise_x": {}}, "unknown augmentation 'noise_x'"),
    ],
)
def test_an_unknown_name_has_its_nearest(intensity: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown") as error:
        IntensityAugmentor.from_config(intensity, NM)
    assert str(error.value).startswith(message)


def test_an_unknown_argument_has_its_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.intensity\.blur: unknown key 'sigmas'; did you mean 'sigma'?"):
        IntensityAugmentor.from_config({"blur": {"sigmas": 1}}, NM)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("noise", "prob", 1.5),
        ("noise", "prob", True),
        ("noise", "std", [0.2, 0.1]),
        ("noise", "std", [-0.1, 0.1]),
        ("noise", "std", [0.1, 0.2, 0.3]),
        ("noise", "std", "0.1"),
        ("noise", "mean", [0, 1]),
        ("gamma", "exponent", 0),
        ("gamma", "exponent", float("nan")),
        ("blur", "sigma", [[0, 1], [0, 1]]),
        ("blur", "sigma", [[0, 1], [0, 1], [2, 1]]),
        ("resolution", "factor", [0.5, 2]),
        ("missing_sections", "sections", [0, 2]),
        ("missing_sections", "sections", 1.5),
        ("missing_sections", "fill", "grey"),
        ("missing_sections", "fill", []),
        ("shifted_sections", "displacement", [0, 3]),
        ("stripes", "axis", "z"),
        ("cutout", "size", [[4, 8], [4, 8], [4.5, 8]]),
        ("charging", "radius", [0, 10]),
    ],
)
def test_a_bad_value_is_named_in_one_line(name: str, argument: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        IntensityAugmentor.from_config({name: {argument: value}}, NM)
    assert str(error.value).startswith(f"data.intensity.{name}: {argument} must be")
    assert "\n" not in str(error.value)
    assert ", got " in str(error.value)


def test_arguments_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"data\.intensity\.noise: .* must be keys and values"):
        IntensityAugmentor.from_config({"noise": 0.1}, NM)


def test_shapes_must_fit() -> None:
    image, codes, seeds = batch()
    made = augmentor(noise={})
    with pytest.raises(InputError, match="codes"):
        made(image, codes[:, 1:], seeds)
    with pytest.raises(InputError, match="expected image"):
        made(image, codes, seeds[:2])


def test_no_monai_is_needed() -> None:
    code = "import sys, connectomics.data.augmentation; print([m for m in ('monai', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- documentation -----------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _said(value: Any) -> str:
    """A default as the page's table writes it."""
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return f"{value[0][0]:g} to {value[0][1]:g} by axis"
    if isinstance(value, tuple):
        return ", ".join(value) if isinstance(value[0], str) else f"{value[0]:g} to {value[1]:g}"
    return f"{value:g}"


@pytest.mark.parametrize("name", KINDS)
def test_the_page_has_every_argument_with_its_default_and_a_picture(name: str) -> None:
    page = (DOCS / "augmentations.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \[`{name}`\]\(#{name}\) .*$", page, re.M)
    for argument in fields(KINDS[name]):
        assert f"`{argument.name}` ({_said(getattr(KINDS[name](), argument.name))})" in row
    assert f"(images/augmentations-{name}.png)" in page
    assert (DOCS / f"images/augmentations-{name}.png").stat().st_size < 150_000


def test_the_page_s_example_is_a_configuration() -> None:
    page = (DOCS / "augmentations.md").read_text(encoding="utf-8")
    for example in re.findall(r"```yaml\n(.*?)```", page, re.S):
        assert len(augmentor(**yaml.safe_load(example)["data"]["intensity"]).kinds) == 4


# --- MONAI -------------------------------------------------------------------------------------------------------

FLIP = {"keys": ["image", "label"], "prob": 0.5}


def test_monai_transforms_of_the_image_alone_are_recognised() -> None:
    additions, remaining = recognize(
        {
            "RandFlipd": FLIP,
            "RandGaussianNoised": {"keys": ["image"], "prob": 0.2, "mean": 0.0, "std": 0.1},
            "RandGaussianSmoothd": {"keys": ["image"], "sigma_x": [0.5, 1.0], "sigma_z": [0.5, 2.0]},
            "RandScaleIntensityd": {"keys": "image", "factors": 0.3},
            "RandShiftIntensityd": {"keys": ["image"], "offsets": [0.1, -0.2], "prob": 1.0},
            "RandAdjustContrastd": {"keys": ["image"], "gamma": 2.0},
            "RandGaussianNoised_2": {"keys": ["image"], "sample_std": False},
        }
    )
    assert remaining == {"RandFlipd": FLIP}
    made = augmentor(**additions, noise={})  # their names clash with none of ours
    kinds = dict(made.kinds)
    assert len(kinds) == 7
    assert kinds["noise_monai"] == KINDS["noise"](prob=0.2, std=(0.0, 0.1))  # type: ignore[call-arg]
    assert kinds["noise_monai_2"] == KINDS["noise"](prob=0.1, std=(0.1, 0.1))  # type: ignore[call-arg]
    # MONAI's x is the first array axis: z here
    assert kinds["blur_monai"] == KINDS["blur"](sigma=((0.5, 1), (0.25, 1.5), (0.5, 2)))  # type: ignore[call-arg]
    assert kinds["gain_monai"] == KINDS["gain"](factor=(0.7, 1.3))  # type: ignore[call-arg]
    assert kinds["brightness_monai"] == KINDS["brightness"](prob=1.0, shift=(-0.2, 0.1))  # type: ignore[call-arg]
    assert kinds["gamma_monai"] == KINDS["gamma"](prob=0.1, exponent=(0.5, 2.0))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("RandGaussianNoised", {"keys": ["image", "label"]}),
        ("RandGaussianNoised", {"keys": ["image"], "dtype": "float16"}),
        ("RandGaussianNoised", {"keys": ["image"], "std": -1}),
        ("RandGaussianNoised", {"keys": ["image"], "prob": 2}),
        ("RandGaussianNoised", {"keys": ["image"], "sd": 1}),
        ("RandGaussianNoised", {}),
        ("RandGaussianSmoothd", {"keys": ["image"], "approx": "sampled"}),
        ("RandGaussianSmoothd", {"keys": ["image"], "sigma_x": 1.0}),
        ("RandScaleIntensityd", {"keys": ["image"], "factors": 0.3, "channel_wise": True}),
        ("RandScaleIntensityd", {"keys": ["image"], "factors": 3}),
        ("RandScaleIntensityd", {"keys": ["image"]}),
        ("RandShiftIntensityd", {"keys": ["image"], "offsets": 0.1, "factor_key": "max"}),
        ("RandShiftIntensityd", {"keys": ["image"], "offsets": 0.1, "safe": True}),
        ("RandAdjustContrastd", {"keys": ["image"], "invert_image": True}),
        ("RandAdjustContrastd", {"keys": ["image"], "retain_stats": True}),
        ("RandAdjustContrastd", {"keys": ["image"], "gamma": 0.4}),
        ("RandGibbsNoised", {"keys": ["image"]}),
    ],
)
def test_what_has_no_exact_counterpart_stays_with_monai(name: str, arguments: dict[str, Any]) -> None:
    assert recognize({name: arguments}) == ({}, {name: arguments})


def test_only_what_comes_last_is_taken_and_only_where_values_stay_in_bounds() -> None:
    noise = {"keys": ["image"]}
    before = {"RandGaussianNoised": noise, "RandFlipd": FLIP}  # MONAI moves the noise with the image
    assert recognize(before) == ({}, before)
    normalised = {"NormalizeIntensityd": noise, "RandGaussianNoised": noise}  # must not be clamped to [0, 1]
    assert recognize(normalised) == ({}, normalised)
    additions, remaining = recognize({"NormalizeIntensityd": None, "RandGaussianNoised": noise})
    assert list(additions) == ["noise_monai"]
    assert remaining == {"NormalizeIntensityd": None}


def test_what_the_fused_pass_takes_first_changes_nothing() -> None:
    """The device asks with all transforms, the loader with those that its spatial pass left: both must agree."""
    both = {"keys": ["image", "label"], "prob": 0.5}
    fused = {
        n: both for n in ("RandFlipd", "RandRotate90d", "RandAffined", "RandZoomd", "Rand3DElasticd", "RandFlipd_2")
    }
    rest = {"RandGaussianNoised": {"keys": ["image"]}, "RandAdjustContrastd": {"keys": ["image"]}}
    assert recognize({**fused, **rest})[0] == recognize(rest)[0]
    assert set(recognize(rest)[0]) == {"noise_monai", "gamma_monai"}


def test_smoothing_is_monai_s_away_from_the_border() -> None:
    from monai.transforms import GaussianSmooth

    image, sigma = texture((40, 40, 40)), (0.4, 1.0, 1.6)
    theirs = torch.as_tensor(np.asarray(GaussianSmooth(sigma=sigma, approx="erf")(image)))
    ours = apply(image, "blur", sigma=list(sigma))
    inside = (slice(None), *(slice(8, -8),) * 3)
    assert torch.allclose(ours[inside], theirs[inside], atol=1e-3)
    assert float(theirs[0, 0, 0, 0]) < 0.5 * float(ours[0, 0, 0, 0])  # MONAI pads with zeros


def test_pointwise_transforms_are_monai_s() -> None:
    from monai.transforms import AdjustContrast, ScaleIntensity, ShiftIntensity

    image = texture()
    for theirs, ours in (
        (AdjustContrast(gamma=1.7)(image), apply(image, "gamma", exponent=1.7)),
        (ScaleIntensity(minv=None, maxv=None, factor=0.2)(image), apply(image, "gain", factor=1.2)),
        (ShiftIntensity(offset=-0.1)(image), apply(image, "brightness", shift=-0.1)),
    ):
        assert torch.allclose(ours, torch.as_tensor(np.asarray(theirs)).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "measure"),
    [
        ("RandGaussianNoised", {"prob": 0.6, "std": 0.1, "mean": 0.05}, lambda r, i: (r - i).std()),
        ("RandGaussianNoised", {"prob": 0.6, "std": 0.1, "sample_std": False}, lambda r, i: (r - i).std()),
        ("RandScaleIntensityd", {"prob": 0.5, "factors": [-0.3, 0.2]}, lambda r, i: r.mean() / i.mean()),
        ("RandShiftIntensityd", {"prob": 0.5, "offsets": 0.2}, lambda r, i: (r - i).mean()),
        ("RandAdjustContrastd", {"prob": 0.5, "gamma": [0.5, 2.0]}, lambda r, i: r.mean()),
        ("RandGaussianSmoothd", {"prob": 0.5, "sigma_x": [0.3, 1.5]}, lambda r, i: r[:, 4:-4, 4:-4, 4:-4].std()),
    ],
)
def test_random_draws_are_distributed_as_monai_s(name: str, arguments: dict[str, Any], measure: Any) -> None:
    """Two samples of 200 draws, compared by Kolmogorov and Smirnov at one in ten thousand."""
    import monai.transforms
    from scipy.stats import ks_2samp

    image = 0.2 + 0.6 * texture((12, 12, 12))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    theirs = getattr(monai.transforms, name)(keys=["image"], **given)
    theirs.set_random_state(0)
    additions, remaining = recognize({name: {"keys": ["image"], **arguments}})
    assert not remaining
    ours = augmentor(**additions)
    n = 200
    seeds = torch.arange(n)
    images, _ = ours(image.expand(n, *image.shape), None, seeds)
    a = [float(measure(torch.as_tensor(np.asarray(theirs({"image": image})["image"])), image)) for _ in range(n)]
    b = [float(measure(images[i], image)) for i in range(n)]
    assert ks_2samp(np.round(a, 5), np.round(b, 5)).pvalue > 1e-4


# -- whole batches ---------------------------------------------------------------------------------------------------
class TestBatches:
    """`BatchAugmentor`: what the training step applies to a packed batch."""

    def config(self, **intensity: Any) -> RunConfig:
        config = RunConfig()
        config.data.inputs = [InputConfig([32.0] * 3, [6, 6, 6])]
        config.data.intensity = intensity
        return config

    def batch(self) -> dict[str, torch.Tensor]:
        image = torch.full((2, 1, 8, 8, 8), 0.5)
        codes = torch.ones((2, 8, 8, 8), dtype=torch.uint8)
        image[:, :, :2], codes[:, :2] = 0.0, 0  # no raw there
        view = torch.full((2, 1, 6, 6, 6), 0.5)
        view[..., 0] = 0.0
        return {"image": image, "image_1": view, "codes": codes, "seed": torch.tensor([3, 4])}

    def test_nothing_to_do(self) -> None:
        assert BatchAugmentor.of(RunConfig()) is None

    def test_every_view_is_augmented_and_what_has_no_raw_stays_so(self) -> None:
        augmentor = BatchAugmentor.of(self.config(brightness={"prob": 1.0, "shift": [0.2, 0.2]}))
        assert augmentor is not None
        batch = self.batch()
        found = augmentor(batch)
        assert (found["image"][:, :, :2] == 0).all()
        assert (found["image_1"][..., 0] == 0).all()
        torch.testing.assert_close(found["image"][:, :, 2:], torch.full((2, 1, 6, 8, 8), 0.7))
        torch.testing.assert_close(found["image_1"][..., 1:], torch.full((2, 1, 6, 6, 5), 0.7))
        assert (batch["image"][:, :, 2:] == 0.5).all()  # what was given stays
        assert found["seed"] is batch["seed"]

    def test_lengths_in_nm_are_those_of_each_view(self) -> None:
        augmentor = BatchAugmentor.of(self.config(charging={}))
        assert augmentor is not None
        assert [a.voxel_size for a in (augmentor.own, *augmentor.inputs)] == [(8.0,) * 3, (32.0,) * 3]
