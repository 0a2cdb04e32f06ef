"""Losses look at known voxels only, and do not depend on how many there are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from connectomics.errors import InputError, UnknownNameError
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
    value = loss(plain, label, known).total
    value.backward()
    spoiled = torch.where(known, logits, junk).requires_grad_()
    other = loss(spoiled, torch.where(known, label, junk), known).total
    other.backward()
    assert torch.equal(value, other)
    assert plain.grad is not None
    assert spoiled.grad is not None
    assert torch.equal(plain.grad, spoiled.grad)
    assert not plain.grad[~known].any()


@pytest.mark.parametrize("name", ALL)
def test_more_unknown_volume_changes_nothing(name: str) -> None:
    logits, label, known = a_batch(1)
    loss = build_loss([name])
    nowhere = torch.zeros_like(known)
    twice = loss(torch.cat([logits, logits]), torch.cat([label, label]), torch.cat([known, nowhere]))
    torch.testing.assert_close(twice.total, loss(logits, label, known).total, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_the_same_volume_known_twice_changes_nothing(name: str) -> None:
    logits, label, known = a_batch(2)
    loss = build_loss([name])
    twice = loss(torch.cat([logits, logits]), torch.cat([label, label]), torch.cat([known, known]))
    torch.testing.assert_close(twice.total, loss(logits, label, known).total, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.01, 1))
@pytest.mark.parametrize("name", ALL)
def test_on_a_homogeneous_volume_the_known_share_does_not_matter(name: str, seed: int, share: float) -> None:
    logits, label = torch.full(SHAPE, 0.7), torch.ones(SHAPE)
    known = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < share
    known[0, :, 0, 0, 0] = True
    loss = build_loss([name])
    whole = loss(logits, label, torch.ones_like(known)).total
    torch.testing.assert_close(loss(logits, label, known).total, whole, rtol=1e-5, atol=1e-6)


def test_a_random_known_subset_estimates_the_same_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, 1, 32, 32, 32), generator=generator)
    label = (torch.rand(logits.shape, generator=generator) < 0.2).float()
    loss = build_loss(["BCEWithLogitsLoss"])
    whole = loss(logits, label, torch.ones_like(label).bool()).total
    values = [loss(logits, label, torch.rand(label.shape, generator=generator) < 0.05).total for _ in range(40)]
    spread = torch.stack(values).std() / math.sqrt(len(values))
    assert abs(torch.stack(values).mean() - whole) < 4 * spread


@pytest.mark.parametrize("name", ALL)
def test_classes_weigh_alike_and_unknown_classes_are_left_out(name: str) -> None:
    logits, label, known = a_batch(4)
    known[:, 0] = False
    known[:, 1, 2:] = False  # a quarter as much known as in class 2
    loss = build_loss([name])
    alone = [loss(logits[:, [c]], label[:, [c]], known[:, [c]]).total for c in (1, 2)]
    torch.testing.assert_close(loss(logits, label, known).total, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("names", [[name] for name in ALL] + [ALL])
def test_nothing_known_is_zero_with_a_graph_and_zero_gradients(names: list[str]) -> None:
    logits, label, known = a_batch(5)
    logits[0, 0, 0, 0, 0] = math.inf
    logits.requires_grad_()
    result = build_loss(names)(logits, torch.full_like(label, math.nan), torch.zeros_like(known))
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
        torch.testing.assert_close(build_loss(["BCEWithLogitsLoss"])(logits, label, known).total, expected)

    def test_entropy_with_pos_weight(self) -> None:
        logits, label, known = a_batch(6, 1.1)
        expected = functional.binary_cross_entropy_with_logits(logits, label, pos_weight=torch.tensor(3.0))
        loss = build_loss(["BCEWithLogitsLoss"], options={"BCEWithLogitsLoss": {"pos_weight": 3.0}})
        torch.testing.assert_close(loss(logits, label, known).total, expected)

    def test_dice(self) -> None:
        from monai.losses import DiceLoss

        logits, label, known = a_batch(7, 1.1)
        smooth = 1e-6  # ours is per voxel, MONAI's is for the sum
        theirs = DiceLoss(sigmoid=True, batch=True, smooth_nr=0, smooth_dr=1e-9)(logits, label)
        ours = build_loss(["DiceLoss"], options={"DiceLoss": {"smooth": smooth}})(logits, label, known).total
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_tversky(self) -> None:
        from monai.losses import TverskyLoss

        logits, label, known = a_batch(8, 1.1)
        theirs = TverskyLoss(sigmoid=True, batch=True, alpha=0.2, beta=0.8, smooth_nr=0, smooth_dr=1e-9)(logits, label)
        options = {"TverskyLoss": {"alpha": 0.2, "beta": 0.8, "smooth": 1e-6}}
        ours = build_loss(["TverskyLoss"], options=options)(logits, label, known).total
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("alpha", [None, 0.25])
    def test_focal(self, alpha: float | None) -> None:
        from monai.losses import FocalLoss

        logits, label, known = a_batch(9, 1.1)
        theirs = FocalLoss(gamma=2.0, alpha=alpha)(logits, label)
        ours = build_loss(["FocalLoss"], options={"FocalLoss": {"gamma": 2.0, "alpha": alpha}})(logits, label, known)
        torch.testing.assert_close(ours.total, theirs, rtol=1e-4, atol=1e-6)

    def test_dice_ce_is_their_sum_and_weights_apply(self) -> None:
        logits, label, known = a_batch(10)
        apart = build_loss(["DiceLoss", "BCEWithLogitsLoss"], [2.0, 0.5])(logits, label, known)
        options = {"DiceCELoss": {"lambda_dice": 2.0, "lambda_ce": 0.5}}
        together = build_loss(["DiceCELoss"], options=options)(logits, label, known)
        torch.testing.assert_close(apart.total, together.total)
        expected = 2.0 * apart.parts["DiceLoss"] + 0.5 * apart.parts["BCEWithLogitsLoss"]
        torch.testing.assert_close(apart.total.detach(), expected)

    @pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "BCEWithLogitsLoss"])
    def test_the_minimum_lies_at_the_target_also_for_fractions(self, name: str) -> None:
        target = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95]).reshape(1, 1, 5, 1, 1)
        known = torch.ones_like(target).bool()
        loss = build_loss([name])
        best = loss(torch.logit(target), target, known).total
        for shift in (-0.5, -0.05, 0.05, 0.5):
            assert loss(torch.logit(target) + shift, target, known).total > best

    def test_an_absent_and_unpredicted_class_costs_nothing(self) -> None:
        logits, label, known = torch.full(SHAPE, -40.0), torch.zeros(SHAPE), torch.ones(SHAPE).bool()
        for name in ALL:
            assert build_loss([name])(logits, label, known).total.abs() < 1e-6


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
        torch.testing.assert_close(loss(outputs, label, known).total, expected)
        # With one unknown voxel in each coarsest voxel, the coarsest output says nothing and takes no weight.
        known[..., ::4, ::4, ::4] = False
        expected = (entropy[0] + entropy[1] / 2) / 1.5
        torch.testing.assert_close(loss(outputs, label, known).total, expected)

    def test_outputs_of_the_full_size_are_taken_as_they_are(self) -> None:
        logits, label, known = a_batch(11)
        loss = build_loss(["DiceLoss"])
        torch.testing.assert_close(loss([logits, logits], label, known).total, loss(logits, label, known).total)

    def test_a_size_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(InputError, match="does not divide"):
            downsample(torch.zeros(1, 1, 9, 8, 8), torch.ones(1, 1, 9, 8, 8).bool(), (4, 4, 4))

    def test_unknown_labels_have_no_influence_at_any_size(self) -> None:
        logits, label, known = a_batch(12, 0.97)
        coarse = torch.randn(2, 3, 4, 4, 4)
        loss = build_loss(["DiceLoss", "FocalLoss"])
        spoiled = torch.where(known, label, math.nan)
        assert torch.equal(loss([logits, coarse], label, known).total, loss([logits, coarse], spoiled, known).total)


def test_it_computes_in_float32_under_autocast() -> None:
    logits, label, known = a_batch(13)
    loss = build_loss(ALL)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(logits.bfloat16(), label, known).total
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(logits.bfloat16().float(), label, known).total)


class TestRefusals:
    def test_an_unknown_loss_names_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'DiceLoss'"):
            build_loss(["DiceLos"])

    def test_an_unknown_argument_names_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'gamma'"):
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
            (["DiceLoss"], [-1], "must be >= 0"),
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
        ],
    )
    def test_bad_arguments_name_their_key(self, name: str, options: dict[str, object]) -> None:
        with pytest.raises(InputError, match=f"model.loss_options.{name}"):
            build_loss([name], options={name: options})

    def test_shapes_that_do_not_fit(self) -> None:
        logits, label, known = a_batch(14)
        with pytest.raises(InputError, match="one shape"):
            build_loss(["DiceLoss"])(logits[:, :2], label, known)
