"""Options of losses: pooled and squared Dice, bands along boundaries, weights by class, the loss of each sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from connectomics.errors import InputError
from connectomics.models.batch_labels import DenseLabels
from connectomics.models.losses import BoundaryBCELoss, build_loss, class_weights
from connectomics.models.masked_loss import KnownVoxels

SHAPE = (3, 2, 6, 5, 4)


def a_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=generator)
    label = (torch.rand(SHAPE, generator=generator) < 0.3).float()
    return logits, label, torch.rand(SHAPE, generator=generator) < 0.8


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss"])
@pytest.mark.parametrize("squared", [False, True])
def test_pooled_and_squared_dice_are_monais(name: str, squared: bool) -> None:
    from monai.losses import DiceLoss, TverskyLoss

    logits, label, _ = a_batch()
    options: dict[str, float | bool] = {"pooled": True, "smooth": 1e-7}
    if name == "TverskyLoss":
        theirs = TverskyLoss(sigmoid=True, batch=True, alpha=0.3, beta=0.7, smooth_nr=0, smooth_dr=1e-9)(logits, label)
    else:
        options["squared"] = squared
        theirs = DiceLoss(sigmoid=True, batch=True, squared_pred=squared, smooth_nr=0, smooth_dr=1e-9)(logits, label)
    loss = build_loss([name], options={name: options})
    ours = loss(logits, DenseLabels(label, torch.ones_like(label).bool())).total
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dice_with_cross_entropy_takes_the_options_of_dice() -> None:
    logits, label, known = a_batch()
    dice = {"smooth": 1e-3, "squared": True, "pooled": True}
    apart = build_loss(["DiceLoss", "BCEWithLogitsLoss"], options={"DiceLoss": dice})
    together = build_loss(["DiceCELoss"], options={"DiceCELoss": dice})
    labels = DenseLabels(label, known)
    torch.testing.assert_close(apart(logits, labels).total, together(logits, labels).total)


def test_pooled_dice_counts_known_voxels_of_all_samples_alike() -> None:
    """One sample with few known voxels: the pooled value is that of all known voxels laid side by side."""
    logits, label, known = a_batch(1)
    known[0, :, 1:] = False
    loss = build_loss(["DiceLoss"], options={"DiceLoss": {"pooled": True}})
    beside = [torch.cat(list(values), dim=1)[None] for values in (logits, label, known)]  # (1, 2, 18, 5, 4)
    one = loss(beside[0], DenseLabels(beside[1], beside[2]))
    torch.testing.assert_close(loss(logits, DenseLabels(label, known)).total, one.total)


@pytest.mark.parametrize("squared", [False, True])
def test_dice_has_its_minimum_at_fractions(squared: bool) -> None:
    target = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95]).reshape(1, 1, 5, 1, 1)
    labels = DenseLabels(target, torch.ones_like(target).bool())
    loss = build_loss(["DiceLoss"], options={"DiceLoss": {"squared": squared}})
    best = loss(torch.logit(target), labels).total
    for shift in (-0.5, -0.05, 0.05, 0.5):
        assert loss(torch.logit(target) + shift, labels).total > best


def test_smoothing_limits_what_false_positives_cost_where_a_class_is_absent() -> None:
    label = torch.zeros(1, 1, 8, 8, 8)
    logits = torch.logit(torch.full_like(label, 1e-3))
    for smooth, expected in ((1e-4, 1 - 1e-4 / (5e-4 + 1e-4)), (1e-2, 1 - 1e-2 / (5e-4 + 1e-2))):
        loss = build_loss(["DiceLoss"], options={"DiceLoss": {"smooth": smooth}})
        value = loss(logits, DenseLabels(label, label == 0)).total.item()
        assert math.isclose(value, expected, rel_tol=1e-3)


class TestBoundary:
    def weights(self, target: torch.Tensor, known: torch.Tensor | None = None, **options: float) -> torch.Tensor:
        voxel_size = (30.0, 8.0, 8.0)
        seen = torch.ones_like(target) if known is None else known
        logits, y, known_rows = (v.reshape(1, -1) for v in (torch.zeros_like(target), target * seen, seen))
        d, h, w = target.shape
        batch = KnownVoxels(logits, y, known_rows, known_rows.sum(1), 1, (d, h, w), voxel_size)
        return BoundaryBCELoss(**options).weights(batch).reshape(target.shape)

    def test_a_band_is_as_wide_in_nm_along_every_axis(self) -> None:
        for axis, reach in ((0, 1), (1, 3), (2, 3)):  # 20 nm: centers 15 nm from the face in z; 4, 12, 20 nm in y and x
            target = torch.zeros(12, 12, 12)
            target.narrow(axis, 6, 6).fill_(1)
            line = self.weights(target, boundary_weight=4.0, width_nm=20.0).movedim(axis, 0)[:, 5, 5]
            assert line.tolist() == [1.0] * (6 - reach) + [4.0] * (2 * reach) + [1.0] * (6 - reach)

    def test_an_unknown_voxel_is_no_boundary_and_has_no_weight(self) -> None:
        target, known = torch.zeros(1, 1, 12), torch.ones(1, 1, 12)
        target[..., 6:] = 1
        known[..., 4:8] = 0
        assert self.weights(target, known, width_nm=16.0).flatten().tolist() == [1.0] * 4 + [0.0] * 4 + [1.0] * 4

    def test_a_thin_fraction_counts_by_how_much_it_differs(self) -> None:
        target = torch.zeros(1, 1, 9)
        target[..., 4] = 0.25
        assert self.weights(target, width_nm=8.0).flatten().tolist() == [1.0] * 3 + [3.0] * 3 + [1.0] * 3

    def test_without_a_boundary_it_is_cross_entropy(self) -> None:
        logits, _, known = a_batch()
        labels = DenseLabels(torch.ones(SHAPE), known)
        ours, plain = (build_loss([n])(logits, labels).total for n in ("BoundaryBCELoss", "BCEWithLogitsLoss"))
        torch.testing.assert_close(ours, plain)

    def test_a_length_is_of_the_voxels_of_each_size(self) -> None:
        """Labels at 4 nm and an output at half the size: 8 nm are two fine voxels, or one coarse one."""
        target = torch.zeros(1, 1, 2, 2, 16)
        target[..., 8:] = 1
        known = torch.ones_like(target).bool()
        options = {"BoundaryBCELoss": {"width_nm": 8.0, "boundary_weight": 3.0}}
        loss = build_loss(["BoundaryBCELoss"], options=options, voxel_size=(4.0, 4.0, 4.0))
        fine, coarse = torch.randn(target.shape), torch.randn(1, 1, 1, 1, 8)
        values = []
        for logits, y, near in ((fine, target, slice(6, 10)), (coarse, target[..., ::2, ::2, ::2], slice(3, 5))):
            weight = torch.ones_like(y)
            weight[..., near] = 3
            entropy = functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
            values.append((entropy * weight).sum() / weight.sum())
        expected = (values[0] + values[1] / 2) / 1.5
        torch.testing.assert_close(loss([fine, coarse], DenseLabels(target, known)).total, expected)


class TestClassWeights:
    def test_they_multiply_the_term_of_a_class(self) -> None:
        logits, label, known = a_batch()
        labels, loss = DenseLabels(label, known), build_loss(["DiceLoss", "BCEWithLogitsLoss"], [1.0, 0.5])
        loss.at_once = 2
        alone = [loss(logits[:, [c]], DenseLabels(label[:, [c]], known[:, [c]])).total for c in (0, 1)]
        plain = loss(logits, labels).total
        torch.testing.assert_close(plain, (alone[0] + alone[1]) / 2)
        for at_once in (1, 2):
            loss.at_once = at_once
            loss.class_weights = torch.tensor([0.25, 3.0])
            weighted = loss(logits, labels)
            torch.testing.assert_close(weighted.total, (0.25 * alone[0] + 3 * alone[1]) / 2)
            parts = weighted.parts["DiceLoss"] + 0.5 * weighted.parts["BCEWithLogitsLoss"]
            torch.testing.assert_close(parts, weighted.total)

    def test_as_many_as_classes(self) -> None:
        logits, label, known = a_batch()
        loss = build_loss(["DiceLoss"])
        loss.class_weights = torch.ones(3)
        with pytest.raises(InputError, match="got 3"):
            loss(logits, DenseLabels(label, known))

    def test_inverse_frequency_is_capped_and_has_the_mean_1(self) -> None:
        present = {"a": 0.2, "b": 0.1, "c": 1e-6, "d": 0.0}
        found = class_weights("inverse_frequency", 10.0, tuple(present), present)
        assert math.isclose(found["b"] / found["a"], 2)
        assert math.isclose(found["c"] / found["a"], 10)
        assert math.isclose((found["a"] + found["b"] + found["c"]) / 3, 1)
        assert found["d"] == 1
        assert class_weights({"b": 3.0}, 10.0, ("a", "b"), {}) == {"a": 1.0, "b": 3.0}


def test_the_loss_of_each_sample_is_that_of_the_sample_alone() -> None:
    logits, label, known = a_batch(2)
    known[1, 0] = False
    loss = build_loss(["DiceLoss", "BCEWithLogitsLoss"])
    loss.class_weights = torch.tensor([0.5, 1.5])
    result = loss(logits, DenseLabels(label, known))
    alone = [loss(logits[[n]], DenseLabels(label[[n]], known[[n]])).total for n in range(3)]
    assert result.samples is not None
    torch.testing.assert_close(result.samples, torch.stack(alone))
    torch.testing.assert_close(result.samples.mean(), result.total)
