"""Losses look at known voxels only, and a class weighs the same whatever else is known."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter
from torch import Tensor
from torch.nn import functional

from connectomics.errors import InputError, UnknownNameError
from connectomics.models.batch_labels import DenseLabels, PackedLabels
from connectomics.models.losses import LOSSES, build_loss, downsample

ALL = sorted(LOSSES)
SHAPE = (2, 3, 8, 8, 8)


def a_batch(seed: int, share_known: float = 0.6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=generator)
    label = (torch.rand(SHAPE, generator=generator) < 0.3).float()
    known = torch.rand(SHAPE, generator=generator) < share_known
    return logits, label, known


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), junk=st.sampled_from([0.0, 1.0, -7.0, math.nan, math.inf]))
@pytest.mark.parametrize("name", ALL)
def test_what_stands_at_unknown_voxels_has_exactly_no_influence(
    name: str, seed: int, share: float, junk: float
) -> None:
    logits, label, known = a_batch(seed, share)
    loss = build_loss([name])
    plain = logits.clone().requires_grad_()
    value = loss(plain, DenseLabels(label, known)).total
    value.backward()
    spoiled = torch.where(known, logits, junk).requires_grad_()
    other = loss(spoiled, DenseLabels(torch.where(known, label, junk), known)).total
    other.backward()
    assert torch.equal(value, other)
    assert plain.grad is not None
    assert spoiled.grad is not None
    assert torch.equal(plain.grad, spoiled.grad)
    assert not plain.grad[~known].any()


def gradient(names: list[str], logits: Tensor, label: Tensor, known: Tensor) -> Tensor:
    """The gradient of a loss, shaped like ``logits``."""
    leaf = logits.clone().requires_grad_()
    build_loss(names)(leaf, DenseLabels(label, known)).total.backward()
    assert leaf.grad is not None
    return leaf.grad


class TestWeightOfAClass:
    """It depends on the run's number of classes and on the sample alone."""

    @pytest.mark.parametrize("names", [[name] for name in ALL] + [["DiceLoss", "BCEWithLogitsLoss"]])
    def test_the_gradient_is_the_same_if_1_or_all_48_classes_are_known(self, names: list[str]) -> None:
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn((2, 48, 6, 6, 6), generator=generator)
        label = (torch.rand(logits.shape, generator=generator) < 0.3).float()
        everything = torch.rand(logits.shape, generator=generator) < 0.5
        only = torch.zeros_like(everything)
        only[:, 7] = everything[:, 7]
        alone = gradient(names, logits, label, only)
        assert alone[:, 7].any()
        assert torch.equal(alone[:, 7], gradient(names, logits, label, everything)[:, 7])

    @pytest.mark.parametrize("names", [[name] for name in ALL] + [["DiceLoss", "BCEWithLogitsLoss"]])
    def test_a_batch_is_the_mean_of_its_samples(self, names: list[str]) -> None:
        """So accumulated micro-batches, and processes with a share of the batch each, train as the whole batch does."""
        logits, label, known = a_batch(15, 0.7)
        known[0, 1] = False
        known[1, 2, 1:] = False
        whole = gradient(names, logits, label, known)
        parts = [gradient(names, logits[[n]], label[[n]], known[[n]]) / 2 for n in (0, 1)]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("name", ALL)
    def test_a_few_known_voxels_weigh_less_than_a_full_patch(self, name: str) -> None:
        """Full weight from 1/64 of the patch, that is 64 of 4096 voxels; below it in proportion."""
        logits, label = torch.full((1, 1, 16, 16, 16), 0.7), torch.ones((1, 1, 16, 16, 16))
        values = []
        for voxels in (4096, 64, 32, 1):
            known = torch.arange(4096).reshape(label.shape) < voxels
            values.append(build_loss([name])(logits, DenseLabels(label, known)).total)
        torch.testing.assert_close(torch.stack(values) / values[0], torch.tensor([1, 1, 1 / 2, 1 / 64]))


@pytest.mark.parametrize("name", ALL)
def test_a_sample_without_anything_known_adds_zero_to_the_mean_over_samples(name: str) -> None:
    logits, label, known = a_batch(1)
    loss = build_loss([name])
    nowhere = torch.zeros_like(known)
    twice = loss(torch.cat([logits, logits]), DenseLabels(torch.cat([label, label]), torch.cat([known, nowhere])))
    torch.testing.assert_close(twice.total, loss(logits, DenseLabels(label, known)).total / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_the_same_volume_known_twice_changes_nothing(name: str) -> None:
    logits, label, known = a_batch(2)
    loss = build_loss([name])
    twice = loss(torch.cat([logits, logits]), DenseLabels(torch.cat([label, label]), torch.cat([known, known])))
    torch.testing.assert_close(twice.total, loss(logits, DenseLabels(label, known)).total, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 1))
@pytest.mark.parametrize("name", ALL)
def test_on_a_homogeneous_volume_the_known_share_does_not_matter(name: str, seed: int, share: float) -> None:
    logits, label = torch.full(SHAPE, 0.7), torch.ones(SHAPE)
    known = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < share
    loss = build_loss([name])
    whole = loss(logits, DenseLabels(label, torch.ones_like(known))).total
    torch.testing.assert_close(loss(logits, DenseLabels(label, known)).total, whole, rtol=1e-5, atol=1e-6)


def test_a_random_known_subset_estimates_the_same_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, 1, 32, 32, 32), generator=generator)
    label = (torch.rand(logits.shape, generator=generator) < 0.2).float()
    loss = build_loss(["BCEWithLogitsLoss"])
    whole = loss(logits, DenseLabels(label, torch.ones_like(label).bool())).total
    some = (torch.rand(label.shape, generator=generator) < 0.05 for _ in range(40))
    values = [loss(logits, DenseLabels(label, known)).total for known in some]
    spread = torch.stack(values).std() / math.sqrt(len(values))
    assert abs(torch.stack(values).mean() - whole) < 4 * spread


@pytest.mark.parametrize("name", ALL)
def test_classes_weigh_alike_and_an_unknown_class_adds_zero(name: str) -> None:
    logits, label, known = a_batch(4)
    known[:, 0] = False
    known[:, 1, 2:] = False  # a quarter as much known as in class 2
    loss = build_loss([name])
    alone = [loss(logits[:, [c]], DenseLabels(label[:, [c]], known[:, [c]])).total for c in (1, 2)]
    torch.testing.assert_close(loss(logits, DenseLabels(label, known)).total, (alone[0] + alone[1]) / 3)


@pytest.mark.parametrize("names", [[name] for name in ALL] + [ALL])
def test_nothing_known_is_zero_with_a_graph_and_zero_gradients(names: list[str]) -> None:
    logits, label, known = a_batch(5)
    logits[0, 0, 0, 0, 0] = math.inf
    logits.requires_grad_()
    result = build_loss(names)(logits, DenseLabels(torch.full_like(label, math.nan), torch.zeros_like(known)))
    result.total.backward()
    assert result.total.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert all(value.item() == 0.0 for value in result.parts.values())


class TestFormulas:
    """Against the formulas written out, everything known."""

    def test_entropy(self) -> None:
        logits, label, known = a_batch(6, 1.1)
        expected = functional.binary_cross_entropy_with_logits(logits, label)
        torch.testing.assert_close(build_loss(["BCEWithLogitsLoss"])(logits, DenseLabels(label, known)).total, expected)

    def test_entropy_with_pos_weight(self) -> None:
        logits, label, known = a_batch(6, 1.1)
        expected = functional.binary_cross_entropy_with_logits(logits, label, pos_weight=torch.tensor(3.0))
        loss = build_loss(["BCEWithLogitsLoss"], options={"BCEWithLogitsLoss": {"pos_weight": 3.0}})
        torch.testing.assert_close(loss(logits, DenseLabels(label, known)).total, expected)

    def test_dice(self) -> None:
        from monai.losses import DiceLoss

        logits, label, known = a_batch(7, 1.1)
        smooth = 1e-6  # ours is per voxel, MONAI's is for the sum
        theirs = DiceLoss(sigmoid=True, batch=False, smooth_nr=0, smooth_dr=1e-9)(logits, label)
        ours = build_loss(["DiceLoss"], options={"DiceLoss": {"smooth": smooth}})(
            logits, DenseLabels(label, known)
        ).total
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_tversky(self) -> None:
        from monai.losses import TverskyLoss

        logits, label, known = a_batch(8, 1.1)
        theirs = TverskyLoss(sigmoid=True, batch=False, alpha=0.2, beta=0.8, smooth_nr=0, smooth_dr=1e-9)(logits, label)
        options = {"TverskyLoss": {"alpha": 0.2, "beta": 0.8, "smooth": 1e-6}}
        ours = build_loss(["TverskyLoss"], options=options)(logits, DenseLabels(label, known)).total
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("alpha", [None, 0.25])
    def test_focal(self, alpha: float | None) -> None:
        from monai.losses import FocalLoss

        logits, label, known = a_batch(9, 1.1)
        theirs = FocalLoss(gamma=2.0, alpha=alpha)(logits, label)
        ours = build_loss(["FocalLoss"], options={"FocalLoss": {"gamma": 2.0, "alpha": alpha}})(
            logits, DenseLabels(label, known)
        )
        torch.testing.assert_close(ours.total, theirs, rtol=1e-4, atol=1e-6)

    def test_dice_ce_is_their_sum_and_weights_apply(self) -> None:
        logits, label, known = a_batch(10)
        apart = build_loss(["DiceLoss", "BCEWithLogitsLoss"], [2.0, 0.5])(logits, DenseLabels(label, known))
        options = {"DiceCELoss": {"lambda_dice": 2.0, "lambda_ce": 0.5}}
        together = build_loss(["DiceCELoss"], options=options)(logits, DenseLabels(label, known))
        torch.testing.assert_close(apart.total, together.total)
        expected = 2.0 * apart.parts["DiceLoss"] + 0.5 * apart.parts["BCEWithLogitsLoss"]
        torch.testing.assert_close(apart.total.detach(), expected)

    def test_balanced_entropy_is_the_mean_of_what_the_two_sides_cost(self) -> None:
        logits, label, known = a_batch(13)
        value = build_loss(["BalancedBCELoss"])(logits, DenseLabels(label, known)).total
        entropy = functional.binary_cross_entropy_with_logits(logits, label, reduction="none")
        sides = [
            entropy[b, c][known[b, c] & (label[b, c] == side)].mean()
            for b in range(2)
            for c in range(3)
            for side in (0, 1)
        ]
        torch.testing.assert_close(value, torch.stack(sides).mean())

    def test_mean_square_of_probabilities(self) -> None:
        logits, target, known = a_batch(14)[0], torch.rand(SHAPE), torch.ones(SHAPE).bool()
        value = build_loss(["MSELoss"])(logits, DenseLabels(target, known)).total
        torch.testing.assert_close(value, functional.mse_loss(torch.sigmoid(logits), target))

    @pytest.mark.parametrize(
        "name", ["DiceLoss", "TverskyLoss", "BCEWithLogitsLoss", "BalancedBCELoss", "BoundaryBCELoss", "MSELoss"]
    )
    def test_the_minimum_lies_at_the_target_also_for_fractions(self, name: str) -> None:
        target = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95]).reshape(1, 1, 5, 1, 1)
        known = torch.ones_like(target).bool()
        loss = build_loss([name])
        best = loss(torch.logit(target), DenseLabels(target, known)).total
        for shift in (-0.5, -0.05, 0.05, 0.5):
            assert loss(torch.logit(target) + shift, DenseLabels(target, known)).total > best

    def test_an_absent_and_unpredicted_class_costs_nothing(self) -> None:
        logits, label, known = torch.full(SHAPE, -40.0), torch.zeros(SHAPE), torch.ones(SHAPE).bool()
        for name in ALL:
            assert build_loss([name])(logits, DenseLabels(label, known)).total.abs() < 1e-6


class TestDeepSupervision:
    def test_a_coarse_voxel_is_known_where_all_its_fine_ones_are(self) -> None:
        label = torch.zeros(1, 1, 4, 4, 4)
        label[0, 0, 0, 0, :2] = 1.0
        known = torch.ones_like(label).bool()
        known[0, 0, 3, 3, 3] = False
        label[0, 0, 3, 3, 3] = math.nan
        coarse, coarse_known = downsample(label, known, (2, 2, 2))
        assert coarse[0, 0, 0, 0, 0] == 2 / 8
        assert coarse_known.sum() == 7
        assert not coarse_known[0, 0, 1, 1, 1]

    def test_weights_halve_and_are_normalised(self) -> None:
        label = torch.ones(1, 1, 8, 8, 8)
        known = torch.ones_like(label).bool()
        loss = build_loss(["BCEWithLogitsLoss"])
        outputs = [torch.full((1, 1, n, n, n), v) for n, v in ((8, 0.0), (4, 1.0), (2, 2.0))]
        entropy = [functional.softplus(torch.tensor(-v)) for v in (0.0, 1.0, 2.0)]
        expected = (entropy[0] + entropy[1] / 2 + entropy[2] / 4) / 1.75
        torch.testing.assert_close(loss(outputs, DenseLabels(label, known)).total, expected)
        # With one unknown voxel in each coarsest voxel, the coarsest output says nothing and takes no weight.
        known[..., ::4, ::4, ::4] = False
        expected = (entropy[0] + entropy[1] / 2) / 1.5
        torch.testing.assert_close(loss(outputs, DenseLabels(label, known)).total, expected)

    def test_outputs_of_the_full_size_are_taken_as_they_are(self) -> None:
        logits, label, known = a_batch(11)
        labels = DenseLabels(label, known)
        loss = build_loss(["DiceLoss"])
        torch.testing.assert_close(loss([logits, logits], labels).total, loss(logits, labels).total)

    def test_a_size_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(InputError, match="does not divide"):
            downsample(torch.zeros(1, 1, 9, 8, 8), torch.ones(1, 1, 9, 8, 8).bool(), (4, 4, 4))

    def test_unknown_labels_have_no_influence_at_any_size(self) -> None:
        logits, label, known = a_batch(12, 0.97)
        coarse = torch.randn(2, 3, 4, 4, 4)
        loss = build_loss(["DiceLoss", "FocalLoss"])
        plain, spoiled = DenseLabels(label, known), DenseLabels(torch.where(known, label, math.nan), known)
        assert torch.equal(loss([logits, coarse], plain).total, loss([logits, coarse], spoiled).total)


@dataclass(frozen=True)
class Plain:
    """The definition, every class as an array of its own and float64, with autograd."""

    names: list[str]
    weights: list[float]

    def level(self, name: str, p: Tensor, x: Tensor, y: Tensor, k: Tensor) -> Tensor:
        """By sample and class (B, C): the loss of probabilities p, logits x, targets y and known k, (B, C, D, H, W)."""
        axes = (2, 3, 4)
        n = k.sum(axes).clamp(min=1)
        low = torch.minimum(p * k, y)
        tp, total_p, total_y = (v.sum(axes) / n for v in (low, p * k, y))
        entropy = -(y * functional.logsigmoid(x) + (1 - y) * functional.logsigmoid(-x)) * k

        def tversky(alpha: float, beta: float) -> Tensor:
            return 1 - (tp + 1e-4) / (tp + alpha * (total_p - tp) + beta * (total_y - tp) + 1e-4)

        if name == "FocalLoss":
            return (entropy * (y - p).abs().clamp(min=1e-6) ** 2).sum(axes) / n
        if name == "BalancedBCELoss":
            share = total_y.clamp(0.05, 0.95)[..., None, None, None]
            return (entropy * (y / (2 * share) + (1 - y) / (2 * (1 - share)))).sum(axes) / n
        if name == "BoundaryBCELoss":  # the other state within two voxels along each axis: a box of five voxels
            near = [maximum_filter(state.numpy(), (1, 1, 5, 5, 5), mode="constant") for state in (y * k, (1 - y) * k)]
            w = (1 + 4 * torch.from_numpy(2 * np.minimum(*near)).clamp(max=1)) * k
            return (entropy * w).sum(axes) / w.sum(axes).clamp(min=1e-9)
        if name == "MSELoss":
            return ((p - y) ** 2 * k).sum(axes) / n
        ce, dice = entropy.sum(axes) / n, tversky(0.5, 0.5)
        return {"DiceLoss": dice, "TverskyLoss": tversky(0.3, 0.7), "BCEWithLogitsLoss": ce, "DiceCELoss": dice + ce}[
            name
        ]

    def __call__(self, outputs: list[Tensor], labels: DenseLabels) -> Tensor:
        label, known = labels.label.double(), labels.known
        by_level = []
        for level, output in enumerate(outputs):
            label, known = downsample(label, known, output.shape[2:])
            y, k = torch.where(known, label, 0.0), known.double()
            x = torch.where(known, output.double(), 0.0)
            weight = known.flatten(2).any(2) * 0.5**level
            by_level.append((weight, [self.level(name, torch.sigmoid(x), x, y, k) for name in self.names]))
        weights = torch.stack([weight for weight, _ in by_level])
        weights = weights / weights.sum(0).clamp(min=1e-9)
        share = (labels.known.flatten(2).double().mean(2) * 64).clamp(max=1)
        total = torch.zeros((), dtype=torch.float64)
        for number, factor in enumerate(self.weights):
            by_class = sum(w * values[number] for w, (_, values) in zip(weights, by_level, strict=True))
            total = total + factor * (share * by_class).mean()
        return total


class TestClassByClass:
    """Labels unpacked, and gradients found, one class after another: the same as all classes at once."""

    @settings(max_examples=8, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        states=st.integers(1, 300),
        share_known=st.sampled_from([0.0, 0.4, 0.97, 1.0]),
        sizes=st.sampled_from([(8,), (8, 4), (8, 4, 2)]),
        grain=st.sampled_from([1, 4]),
        scale=st.sampled_from([1.0, 1024.0]),
    )
    @pytest.mark.parametrize("names", [[name] for name in ALL] + [ALL])
    def test_packed_labels_dense_ones_and_the_definition_agree(
        self,
        names: list[str],
        seed: int,
        states: int,
        share_known: float,
        sizes: tuple[int, ...],
        grain: int,
        scale: float,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randint(states, (2, *[8 // grain] * 3), generator=generator)
        codes = functional.interpolate(coarse[:, None].float(), size=(8, 8, 8))[:, 0]
        packed = PackedLabels(
            codes.to(torch.uint8 if states <= 256 else torch.int16),
            torch.rand((2, 3, states), generator=generator) < 0.3,
            torch.rand((2, 3, states), generator=generator) < share_known,
        )
        start = [torch.randn((2, 3, n, n, n), generator=generator) for n in sizes]
        weights = [0.5 + number for number in range(len(names))]
        values, gradients = [], []
        for loss, labels in (
            (Plain(names, weights), packed.dense()),
            (lambda o, y: build_loss(names, weights)(o, y).total, packed.dense()),
            (lambda o, y: build_loss(names, weights)(o, y).total, packed),
        ):
            outputs = [output.clone().requires_grad_() for output in start]
            value = loss(outputs, labels)  # type: ignore[arg-type]
            if value.requires_grad:
                (value * scale).backward()
            values.append(value.detach().float())
            gradients.append([torch.zeros_like(o) if o.grad is None else o.grad / scale for o in outputs])
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(values[1], values[2])
        for definition, dense, unpacked in zip(*gradients, strict=True):
            torch.testing.assert_close(dense, definition, rtol=1e-4, atol=1e-7)
            assert torch.equal(dense, unpacked)

    def test_without_a_gradient_the_value_is_the_same(self) -> None:
        logits, label, known = a_batch(21)
        labels = DenseLabels(label, known)
        with torch.no_grad():
            value = build_loss(ALL)(logits.requires_grad_(), labels).total
        assert not value.requires_grad
        assert torch.equal(value, build_loss(ALL)(logits, labels).total)

    def test_gradients_come_in_the_type_of_the_logits_and_scaled_before_they_are_rounded(self) -> None:
        """As loss scaling needs it: unscaled, a gradient of one voxel in many is below what halves can hold."""
        logits = torch.zeros((1, 1, 32, 64, 64), dtype=torch.float16, requires_grad=True)
        label = torch.ones(logits.shape)
        loss = build_loss(["BCEWithLogitsLoss"])(logits, DenseLabels(label, label.bool())).total
        (loss * 2.0**16).backward()
        assert logits.grad is not None
        assert logits.grad.dtype == torch.float16
        assert torch.equal(logits.grad, torch.full_like(logits, -(2.0**16) / 2 / label.numel()))

    def test_outputs_that_need_no_gradient_get_none(self) -> None:
        logits, label, known = a_batch(22)
        coarse = torch.randn(2, 3, 4, 4, 4)
        build_loss(["DiceLoss"])([logits.requires_grad_(), coarse], DenseLabels(label, known)).total.backward()
        assert logits.grad is not None
        assert logits.grad.any()
        assert coarse.grad is None

    def test_backward_keeps_the_gradient_and_not_the_steps_to_it(self) -> None:
        logits, label, known = a_batch(23)
        kept: list[weakref.ref[Tensor]] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(weakref.ref(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = build_loss(ALL)(logits.requires_grad_(), DenseLabels(label, known)).total
        held = [tensor.numel() for tensor in (reference() for reference in kept) if tensor is not None]
        assert held == [logits.numel()]
        assert len(kept) > 2
        total.backward()


def test_it_computes_in_float32_under_autocast() -> None:
    logits, label, known = a_batch(13)
    labels = DenseLabels(label, known)
    loss = build_loss(ALL)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(logits.bfloat16(), labels).total
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(logits.bfloat16().float(), labels).total)


class TestRefusals:
    def test_an_unknown_loss_names_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'DiceLoss'"):
            build_loss(["DiceLos"])

    def test_an_unknown_argument_names_the_nearest(self) -> None:
        with pytest.raises(InputError, match="unknown key 'gama'; did you mean 'gamma'"):
            build_loss(["FocalLoss"], options={"FocalLoss": {"gama": 1}})

    def test_arguments_for_a_loss_that_is_not_used(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown loss 'FocalLoss'"):
            build_loss(["DiceLoss"], options={"FocalLoss": {"gamma": 1}})

    @pytest.mark.parametrize(
        ("names", "weights", "message"),
        [
            ([], [], "at least one loss"),
            (["DiceLoss", "DiceLoss"], [1, 1], "none twice"),
            (["DiceLoss"], [1, 2], "2 numbers for 1 losses"),
            (["DiceLoss"], [-1], "must be finite, >= 0"),
            (["DiceLoss"], [math.nan], "must be finite"),
            (["DiceLoss", "FocalLoss"], [1, math.nan], "must be finite"),
            (["DiceLoss"], [math.inf], "must be finite"),
        ],
    )
    def test_lists_that_do_not_fit(self, names: list[str], weights: list[float], message: str) -> None:
        with pytest.raises(InputError, match=message):
            build_loss(names, weights)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("FocalLoss", {"gamma": -1}),
            ("FocalLoss", {"gamma": "two"}),
            ("TverskyLoss", {"smooth": 0}),
            ("BCEWithLogitsLoss", {"pos_weight": 0}),
            ("DiceCELoss", {"lambda_ce": -1}),
            ("TverskyLoss", {"alpha": math.nan}),
            ("FocalLoss", {"gamma": math.inf}),
        ],
    )
    def test_bad_arguments_name_their_key(self, name: str, options: dict[str, object]) -> None:
        with pytest.raises(InputError, match=f"model.loss_options.{name}"):
            build_loss([name], options={name: options})

    def test_shapes_that_do_not_fit(self) -> None:
        logits, label, known = a_batch(14)
        with pytest.raises(InputError, match="one shape"):
            build_loss(["DiceLoss"])(logits[:, :2], DenseLabels(label, known))
