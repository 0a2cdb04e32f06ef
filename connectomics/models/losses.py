"""Losses over known voxels.

An unannotated class says nothing about a voxel, so every loss takes a mask of what is known. Each class is an
independent sigmoid channel. For a batch of B samples and the run's C classes, the value of a loss is

    1 / (B C)  sum over samples b and classes c of  r_bc * loss_bc,    r_bc = min(1, 64 n_bc / N)

where loss_bc is computed from the n_bc known voxels of class c in sample b, and N is the number of voxels of a sample.
So an unknown class contributes 0 and leaves the other classes unchanged; the gradients of a batch are the mean of those
of its parts (accumulation and data-parallel training give what one large batch gives, unless a loss is ``pooled``); and
what stands at an unknown voxel, even NaN, has no influence. If nothing is known, the loss is zero with zero gradients,
still part of the graph. ``model.class_weights`` multiplies the r_bc of a class (see `class_weights`).

For deep supervision, labels become the *fraction* of the fine voxels that is labeled: a threshold would erase membranes
thinner than a coarse voxel. The formulas equal the usual ones for 0/1 labels and have their minimum at prediction =
target for fractions. docs/labels.md explains all of this.

To add a loss, write a frozen dataclass whose fields are its options, and register it with `register_loss`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.values import read
from connectomics.errors import ConfigError, InputError, require_known
from connectomics.geometry import Triple
from connectomics.models.boxes import box_maximum, box_steps
from connectomics.models.masked_loss import ClassLoss, KnownVoxels, LossResult, MaskedLoss, downsample

log = logging.getLogger(__name__)

__all__ = [
    "LOSSES",
    "ClassLoss",
    "KnownVoxels",
    "LossResult",
    "MaskedLoss",
    "build_loss",
    "downsample",
    "register_loss",
]

NotNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]


@dataclass(frozen=True)
class TverskyLoss(ClassLoss):
    """1 - TP / (TP + alpha FP + beta FN) (arXiv:1706.05721).

    With probability p and target y, TP is the mean over known voxels of min(p, y), FP of p - min(p, y), FN of
    y - min(p, y) (arXiv:2303.16296). ``smooth``, a share of the known voxels, is added to numerator and denominator.
    In a sample without the class, the loss is 1 - smooth / (alpha P + smooth) for the mean probability P: with the
    default it stays near 1 until P is far below 1e-4; a larger ``smooth`` counts few false positives for less.

    ``pooled`` takes the means over all samples of a batch, as "batch Dice" of nnU-Net (arXiv:1809.10486) does: steadier
    for rare classes, but then a batch split over processes or accumulated steps is not what one large batch is.
    """

    alpha: NotNegative = 0.3
    beta: NotNegative = 0.7
    smooth: Positive = 1e-4
    pooled: bool = False

    def __call__(self, batch: KnownVoxels) -> Tensor:
        probability = torch.sigmoid(batch.logits) * batch.known
        tp = batch.mean(torch.minimum(probability, batch.target), self.pooled)
        fp = batch.mean(probability, self.pooled) - tp
        fn = batch.mean(batch.target, self.pooled) - tp
        return 1 - (tp + self.smooth) / (tp + self.alpha * fp + self.beta * fn + self.smooth)


@dataclass(frozen=True)
class DiceLoss(ClassLoss):
    """1 - 2 TP / (2 TP + FP + FN): `TverskyLoss` with alpha = beta = 1/2, and its ``smooth`` and ``pooled``.

    ``squared`` is the form of V-Net (arXiv:1606.04797): 1 - 2 S / (mean p^2 + mean y^2), S the mean of p y. It has no
    kink at p = y, and its minimum there for fractions, too.
    """

    smooth: Positive = 1e-4
    squared: bool = False
    pooled: bool = False

    def __call__(self, batch: KnownVoxels) -> Tensor:
        if not self.squared:
            return TverskyLoss(0.5, 0.5, self.smooth, self.pooled)(batch)
        p, y = torch.sigmoid(batch.logits) * batch.known, batch.target
        both, sizes = batch.mean(p * y, self.pooled), batch.mean(p * p + y * y, self.pooled)
        return 1 - (both + self.smooth) / (sizes / 2 + self.smooth)


@dataclass(frozen=True)
class BCEWithLogitsLoss(ClassLoss):
    """Binary cross entropy, mean over known voxels; ``pos_weight`` is the weight of present voxels."""

    pos_weight: Positive = 1.0

    def __call__(self, batch: KnownVoxels) -> Tensor:
        weight = None if self.pos_weight == 1.0 else batch.logits.new_full((), self.pos_weight)
        return batch.mean(batch.cross_entropy(weight) * batch.known)


@dataclass(frozen=True)
class BalancedBCELoss(ClassLoss):
    """Binary cross entropy in which present and absent voxels have the same total weight.

    Present voxels have the weight 1 / (2 s), absent ones 1 / (2 (1 - s)), where s is the present share of the known
    voxels, clamped to [``least``, 1 - ``least``], so that a few voxels do not outweigh everything.
    """

    least: Annotated[float, Field(strict=True, gt=0, le=0.5)] = 0.05

    def __call__(self, batch: KnownVoxels) -> Tensor:
        y = batch.target
        share = batch.mean(y).clamp(self.least, 1 - self.least)[:, None]
        weight = y / (2 * share) + (1 - y) / (2 * (1 - share))
        return batch.mean(batch.cross_entropy() * weight * batch.known)


@dataclass(frozen=True)
class BoundaryBCELoss(ClassLoss):
    """Binary cross entropy in which voxels near a boundary of the class weigh more, a weighted mean over known voxels.

    As in U-Net (arXiv:1505.04597, formula 2), so that thin gaps and membranes count, but with the same weight in a band
    instead of one that falls off. A voxel is in the band if a voxel of the other state is known within ``width_nm`` of
    its center along each axis (a box, found by max pooling on the device). Voxels in the band have the weight
    ``boundary_weight``, others 1; a fraction y that differs from all around it by less than 1 has a weight in between.

    ``width_nm`` None stands for two of the smallest voxel side, at each size of deep supervision.
    """

    boundary_weight: Annotated[float, Field(strict=True, ge=1)] = 5.0
    width_nm: Positive | None = None

    def __call__(self, batch: KnownVoxels) -> Tensor:
        weight = self.weights(batch)
        total = weight.sum(1).clamp(min=torch.finfo(weight.dtype).tiny)
        return (batch.cross_entropy() * weight).sum(1) / total

    def weights(self, batch: KnownVoxels) -> Tensor:
        """Return the weight of every voxel (rows, N), 0 where it is unknown."""
        width = 2 * min(batch.voxel_size) if self.width_nm is None else self.width_nm
        states = torch.stack([batch.target, batch.known - batch.target], 1).unflatten(2, batch.shape)
        states = box_maximum(states, box_steps(width, batch.voxel_size))
        near = (2 * states.amin(1)).clamp(max=1).flatten(1)  # 1 where both states are near
        return (1 + (self.boundary_weight - 1) * near) * batch.known


@dataclass(frozen=True)
class MSELoss(ClassLoss):
    """(probability - target)^2, mean over known voxels: for continuous targets (distances)."""

    def __call__(self, batch: KnownVoxels) -> Tensor:
        return batch.mean((torch.sigmoid(batch.logits) - batch.target).square() * batch.known)


@dataclass(frozen=True)
class FocalLoss(ClassLoss):
    """|y - p|^gamma times binary cross entropy, mean over known voxels.

    For 0/1 labels this is the focal loss (arXiv:1708.02002); for fractions its quality form (arXiv:2006.04388).
    Present voxels have the weight alpha and absent ones 1 - alpha; with ``alpha`` None both have the weight 1.
    """

    gamma: NotNegative = 2.0
    alpha: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None

    def __call__(self, batch: KnownVoxels) -> Tensor:
        y = batch.target
        distance = (y - torch.sigmoid(batch.logits)).abs()
        # powers below 1 have an infinite slope at |y - p| = 0, which the clamp avoids
        value = batch.cross_entropy() * distance.clamp(min=1e-6).pow(self.gamma)
        if self.alpha is not None:
            value = value * (self.alpha * y + (1 - self.alpha) * (1 - y))
        return batch.mean(value * batch.known)


@dataclass(frozen=True)
class DiceCELoss(ClassLoss):
    """``lambda_dice`` times `DiceLoss`, with its options, plus ``lambda_ce`` times `BCEWithLogitsLoss`."""

    lambda_dice: NotNegative = 1.0
    lambda_ce: NotNegative = 1.0
    smooth: Positive = 1e-4
    squared: bool = False
    pooled: bool = False

    def __call__(self, batch: KnownVoxels) -> Tensor:
        dice = DiceLoss(self.smooth, self.squared, self.pooled)(batch)
        return self.lambda_dice * dice + self.lambda_ce * BCEWithLogitsLoss()(batch)


LOSSES: dict[str, type[ClassLoss]] = {
    kind.__name__: kind
    for kind in (
        DiceLoss, FocalLoss, BCEWithLogitsLoss, BalancedBCELoss, BoundaryBCELoss, MSELoss, DiceCELoss, TverskyLoss,
    )
}  # fmt: skip


def register_loss(kind: type[ClassLoss]) -> type[ClassLoss]:
    """Register a loss under the name of its class, for ``model.loss_functions``; also usable as a decorator.

    Call it in a module that the configuration names in ``plugins``. A loss registered before under the same name is
    replaced.

    Args:
        kind: a frozen dataclass derived from `ClassLoss`. Its fields are the options (``model.loss_options``).

    Raises:
        InputError: not such a class, or the name is that of a loss of this package.
    """
    if not (isinstance(kind, type) and issubclass(kind, ClassLoss) and is_dataclass(kind)):
        raise InputError(f"expected a dataclass derived from ClassLoss, got {kind!r}")
    there = LOSSES.get(kind.__name__)
    if there is not None and there.__module__ == __name__:
        raise InputError(f"loss {kind.__name__!r} is a loss of this package; register yours under another name")
    LOSSES[kind.__name__] = kind
    return kind


def build_loss(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    voxel_size: Triple = (1.0, 1.0, 1.0),
) -> MaskedLoss:
    """Return a `MaskedLoss` of names of `LOSSES`, a weight for each (default 1), and options by name.

    ``voxel_size``: of the labels, nm, z y x, for losses whose options are lengths.

    Raises:
        UnknownNameError: a loss is unknown, or has options but is not used.
        InputError: no loss is given, one is given twice, the weights do not fit, or an option is unknown or bad.
    """
    given = dict(options or {})
    factors = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    if not names or len(set(names)) != len(names):
        raise InputError(f"model.loss_functions must name at least one loss and none twice, got {list(names)}")
    if len(factors) != len(names):
        raise InputError(f"model.loss_weights has {len(factors)} numbers for {len(names)} losses {list(names)}")
    if not all(math.isfinite(w) and w >= 0 for w in factors) or max(factors) <= 0:
        raise InputError(f"model.loss_weights must be finite, >= 0 and not all 0, got {factors}")
    require_known("loss", names, LOSSES, "model.loss_functions")
    require_known("loss", given, names, "model.loss_options (only losses of model.loss_functions)")
    built = {n: read(LOSSES[n], given.get(n) or {}, f"model.loss_options.{n}", InputError) for n in names}
    return MaskedLoss(built, dict(zip(names, factors, strict=True)), voxel_size)


def class_weights(
    given: Mapping[str, float] | str, cap: float, classes: Sequence[str], present: Mapping[str, float]
) -> dict[str, float]:
    """Return the weight of every class in the loss, from ``model.class_weights``.

    A mapping gives weights by class (default 1). "inverse_frequency" gives weights in proportion to 1 / f, where f is
    the present share of the known voxels of the training crops, at most ``cap`` times the smallest, with the mean 1
    (arXiv:1411.4734 scales by the median of f instead). A class that is never present has the weight 1.

    Args:
        given, cap: ``model.class_weights`` and ``model.class_weight_cap``.
        present: f by class, 0 to 1; only read for "inverse_frequency".

    Raises:
        UnknownNameError: a mapping has a class that is not one of ``classes``.
    """
    if not isinstance(given, str):
        require_known("class", given, classes, "model.class_weights (of dataset.classes)")
        return {name: float(given.get(name, 1.0)) for name in classes}
    inverse = {name: 1 / present[name] for name in classes if present.get(name, 0) > 0}
    most = cap * min(inverse.values(), default=1.0)
    capped = {name: min(value, most) for name, value in inverse.items()}
    mean = sum(capped.values()) / max(1, len(capped))
    return {name: capped[name] / mean if name in capped else 1.0 for name in classes}


def weigh_classes(loss: MaskedLoss, config: RunConfig, present: Mapping[str, float] | None = None) -> None:
    """Set the weights of classes in a loss as ``model.class_weights`` says.

    ``present``: the present share of each class in the training crops; None before training, when weights that depend
    on it are not set. Raises as `class_weights`, and `ConfigError` if the shares are needed and there are none.
    """
    given = config.model.class_weights
    if not given or (present is None and isinstance(given, str)):
        return
    if isinstance(given, str) and not present:
        raise ConfigError(
            f"model.class_weights={given} needs a data module with present_shares, as CellMapDataModule has; give "
            "numbers by class"
        )
    weights = class_weights(given, config.model.class_weight_cap, config.dataset.classes, present or {})
    loss.class_weights = torch.tensor(list(weights.values()), dtype=torch.float32)
    if present:
        log.info("weights of classes in the loss: %s", ", ".join(f"{n} {w:.3g}" for n, w in weights.items()))
