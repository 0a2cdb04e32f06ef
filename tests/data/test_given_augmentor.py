"""MONAI transforms as the plan writes them, with the keys image and label: known goes wherever label goes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai import transforms as monai

from connectomics.data.augmentation import GivenAugmentor
from connectomics.data.dataset.dataset_cellmap import CellMapDataset, CellMapMultiClassDataset
from connectomics.errors import InputError
from tests.cellmap.roots import grid_of, write_label, write_raw

BOTH = ["image", "label"]
ALWAYS = {"keys": BOTH, "prob": 1.0}
SPATIAL = {
    "flip": monai.RandFlipd(**ALWAYS, spatial_axis=0),
    "axis flip": monai.RandAxisFlipd(**ALWAYS),
    "turn": monai.RandRotate90d(**ALWAYS, spatial_axes=(1, 2)),
    "rotate": monai.RandRotated(**ALWAYS, range_x=0.5, mode=["bilinear", "nearest"]),
    "affine": monai.RandAffined(
        **ALWAYS, rotate_range=[0.3] * 3, scale_range=[0.2] * 3, mode=["bilinear", "nearest"], padding_mode="zeros"
    ),
    "affine, one mode": monai.RandAffined(**ALWAYS, rotate_range=[0.3] * 3, translate_range=[3] * 3, mode="nearest"),
    "zoom": monai.RandZoomd(**ALWAYS, min_zoom=0.7, max_zoom=1.4, mode=["area", "nearest"]),
    "elastic": monai.Rand3DElasticd(
        **ALWAYS, sigma_range=(2, 3), magnitude_range=(20, 40), mode=["bilinear", "nearest"]
    ),
    "distortion": monai.RandGridDistortiond(**ALWAYS, mode=["bilinear", "nearest"]),
    "crop": monai.RandSpatialCropd(keys=BOTH, roi_size=(12, 12, 12), random_size=False),
    "one of": monai.OneOf([monai.RandFlipd(**ALWAYS, spatial_axis=1), monai.RandRotate90d(**ALWAYS)]),
    "dropout": monai.RandCoarseDropoutd(**ALWAYS, holes=3, spatial_size=4, fill_value=0),
}  # fmt: skip


def sample_of(seed: int) -> dict[str, Any]:
    """Label and known of one pattern: whatever moves the one must move the other."""
    rng = np.random.default_rng(seed)
    pattern = rng.random((2, 16, 16, 16)) > 0.4
    image = rng.random((1, 16, 16, 16), np.float32)
    return {"image": image, "label": pattern.astype(np.float32), "known": pattern}


@pytest.mark.parametrize("name", sorted(SPATIAL))
@pytest.mark.parametrize("copied", [False, True])
def test_known_goes_where_label_goes(name: str, copied: bool) -> None:
    """With nearest for label, so that both come out alike to the voxel; also after a way to a loader worker."""
    augmentor = GivenAugmentor(monai.Compose([SPATIAL[name]]))
    if copied:
        augmentor = pickle.loads(pickle.dumps(augmentor))
    augmentor.given.set_random_state(seed=3)  # type: ignore[attr-defined]
    moved_at_all = False
    for seed in range(4):
        sample = sample_of(seed)
        moved = augmentor(sample, (), ("a", "b"))
        label, known = np.asarray(moved["label"]), np.asarray(moved["known"])
        assert known.dtype == bool
        assert np.array_equal(label > 0, known)
        moved_at_all |= not np.array_equal(label, sample_of(seed)["label"])
    assert moved_at_all


def test_it_draws_what_it_would_draw_for_image_and_label_alone() -> None:
    chain = [SPATIAL["affine"], SPATIAL["crop"], monai.RandGaussianNoised(keys=["image"], prob=0.5)]
    plain, ours = monai.Compose(pickle.loads(pickle.dumps(chain))), monai.Compose(chain)
    augmentor = GivenAugmentor(ours)
    for seed in range(3):
        plain.set_random_state(seed=seed)
        ours.set_random_state(seed=seed)
        sample = sample_of(seed)
        moved = augmentor(sample, (), ("a", "b"))
        expected = plain({name: sample[name] for name in BOTH})
        assert np.array_equal(np.asarray(moved["image"]), np.asarray(expected["image"]))
        assert np.array_equal(np.asarray(moved["label"]), np.asarray(expected["label"]) >= 0.5)


def test_interpolated_labels_are_voted_and_what_touches_unknown_is_unknown() -> None:
    sample = sample_of(0)
    sample["known"] = np.ones_like(sample["known"])
    sample["known"][:, :4] = False
    turned = monai.RandAffined(**ALWAYS, rotate_range=[(0.4, 0.4)], mode="bilinear", padding_mode="zeros")
    moved = GivenAugmentor(turned)(sample, (), ("a", "b"))
    label, known = np.asarray(moved["label"]), np.asarray(moved["known"])
    assert set(np.unique(label)) == {0.0, 1.0}
    assert 0 < known.mean() < 0.75  # a quarter was unknown, and corners came in from outside


def test_crops_around_labels_stay_in_register() -> None:
    """A transform that looks for its place by label: known must not look for one of its own."""
    around = monai.RandCropByPosNegLabeld(BOTH, "label", (8, 8, 8), pos=1, neg=0, num_samples=3)
    sample = sample_of(0)
    sample["known"], sample["label"] = sample["known"][:1], np.zeros((1, 16, 16, 16), np.float32)
    sample["label"][0, 3:5, 10:13, 6] = 1
    sample["image"] = np.where(sample["known"], 1, 0).astype(np.float32)
    parts = GivenAugmentor(around)(sample, (), ("a",))
    assert len(parts) == 3
    for part in parts:
        assert np.asarray(part["label"]).any()
        assert np.array_equal(np.asarray(part["known"]), np.asarray(part["image"]) > 0)


def test_objects_go_along_by_nearest() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 5, (1, 16, 16, 16)).astype(np.int32)
    sample = {**sample_of(1), "label": (ids > 0).astype(np.float32), "known": np.ones(ids.shape, bool), "ids": ids}
    turned = monai.RandRotate90d(**ALWAYS, spatial_axes=(1, 2))
    moved = GivenAugmentor(monai.Compose([turned]))(sample, ("mito",), ("mito",))
    there = np.asarray(moved["ids"])
    assert there.dtype == np.int32
    assert any(np.array_equal(there[0], np.rot90(ids[0], k, (1, 2))) for k in (1, 2, 3))
    bent = monai.RandAffined(**ALWAYS, rotate_range=[(0.4, 0.4)], mode="bilinear", padding_mode="zeros")
    moved = GivenAugmentor(bent)(sample, ("mito",), ("mito",))
    there, known = np.asarray(moved["ids"]), np.asarray(moved["known"])
    assert set(np.unique(there)) <= {-1, 0, 1, 2, 3, 4}
    assert (there[~known] == -1).all()


@pytest.mark.parametrize(
    "transform",
    [monai.DeleteItemsd(["label"]), monai.AsDiscreted("label", to_onehot=2), monai.Resized("image", (8, 8, 8))],
)
def test_what_tears_label_and_known_apart_is_refused(transform: Any) -> None:
    augmentor = GivenAugmentor(monai.Compose([transform]))
    sample = {name: value[:1] for name, value in sample_of(0).items()}
    if isinstance(transform, monai.Resized):
        assert augmentor(sample, (), ("a",))["image"].shape == (1, 8, 8, 8)  # of the image alone: the user's business
        return
    with pytest.raises(InputError, match="augmentor gives label") as error:
        augmentor(sample, (), ("a",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [CellMapDataset, CellMapMultiClassDataset])
def test_a_data_set_with_the_plan_s_augmentor(kind: Any, tmp_path: Path) -> None:
    """Half of the crop is annotated: flipped along z, the other half is known, and nothing of it was made up."""
    rng = np.random.default_rng(0)
    write_raw(tmp_path, "set-a", rng.integers(0, 255, (32, 32, 32), dtype=np.uint8), grid_of((32, 32, 32)))
    values = np.full((32, 32, 32), 255, np.uint8)
    values[:12] = rng.integers(0, 2, (12, 32, 32))
    write_label(tmp_path, "set-a", "crop1", "mito", values, grid_of((32, 32, 32)), unknown=255)
    flip = monai.Compose([monai.RandFlipd(keys=BOTH, prob=1.0, spatial_axis=[0])])
    made = kind(str(tmp_path), ["set-a"], classes=["mito"], mode="val", patch_size=(32, 32, 32), augmentor=flip)
    plain = kind(str(tmp_path), ["set-a"], classes=["mito"], mode="val", patch_size=(32, 32, 32))
    for _ in range(2):
        moved, before = made[0], plain[0]
        assert 0.1 < before["known"].mean() < 0.4
        for name in ("image", "label", "known"):
            assert np.array_equal(np.asarray(moved[name]), before[name][:, ::-1]), name


def test_a_function_of_one_s_own_gets_all_of_the_sample(tmp_path: Path) -> None:
    write_raw(tmp_path, "set-a", np.zeros((16, 16, 16), np.uint8), grid_of((16, 16, 16)))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((16, 16, 16), np.uint8), grid_of((16, 16, 16)))
    made = CellMapDataset(
        str(tmp_path),
        ["set-a"],
        classes=["mito"],
        patch_size=(8, 8, 8),
        augmentor=lambda sample: {"got": sorted(sample)},
    )
    assert made[0] == {"got": ["image", "known", "label"]}
