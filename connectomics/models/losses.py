"""Losses over known voxels.

An unannotated class says nothing about a voxel, so every loss takes a mask of what is known. Each class is an
independent sigmoid channel. For a batch of B samples and the run's C classes, the value of a loss is

    1 / (B C)  sum over samples b and classes c of  r_bc * loss_bc,    r_bc = min(1, 64 n_bc / N)

where loss_bc is computed from the n_bc known voxels of class c in sample b, and N is the number of voxels of a sample.
So an unknown class contributes 0 and leaves the other classes unchanged; the gradients of a batch are the mean of those
of its parts (accumulation and data-parallel training give what one large batch gives); and what stands at an unknown
voxel, even NaN, has no influence. If nothing is known, the loss is zero with zero gradients, still part of the graph.

For deep supervision, labels become the *fraction* of the fine voxels that is labeled: a threshold would erase membranes
thinner than a coarse voxel. The formulas equal the usual ones for 0/1 labels and have their minimum at prediction =
target for fractions. docs/labels.md explains all of this.

To add a loss, write a frozen dataclass whose fields are its options, and register it with `register_loss`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from connectomics.config.values import STRICT_KEYS, read
from connectomics.errors import InputError, unknown_name
from connectomics.models.batch_labels import Labels

_LOGITS_ON_GPU = 2**24  # logits of several classes that are processed together: about 1.5 GB of intermediate values
_FULL_WEIGHT = 1 / 64  # known share of a sample from which a class has its full weight

NotNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]


@dataclass(frozen=True)
class LossResult:
    """Value of a loss: ``total`` for the backward pass, and by loss name the unweighted, detached parts."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class KnownVoxels:
    """Classes of samples at one size: each row holds the N voxels of one class in one sample, zero where unknown."""

    logits: Tensor  # float32 (rows, N)
    target: Tensor  # float32 (rows, N), 0..1
    known: Tensor  # float32 (rows, N), 0 or 1
    count: Tensor  # (rows,), number of known voxels

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over known voxels (rows,), 0 if none is known; ``values`` (rows, N) are zero if unknown."""
        return values.sum(1) / self.count.clamp(min=1)

    def cross_entropy(self, pos_weight: Tensor | None = None) -> Tensor:
        """Return the binary cross entropy of every voxel (rows, N), known or not."""
        return functional.binary_cross_entropy_with_logits(
            self.logits, self.target, reduction="none", pos_weight=pos_weight
        )


@dataclass(frozen=True)
class ClassLoss(ABC):
    """A loss with its options."""

    __pydantic_config__ = STRICT_KEYS

    @abstractmethod
    def __call__(self, batch: KnownVoxels) -> Tensor:
        """Return one value per row, (rows,): from the known voxels of one class in one sample."""


@dataclass(frozen=True)
class TverskyLoss(ClassLoss):
    """1 - TP / (TP + alpha FP + beta FN) (arXiv:1706.05721).

    With probability p and target y, TP is the mean over known voxels of min(p, y), FP of p - min(p, y), FN of
    y - min(p, y) (arXiv:2303.16296). ``smooth``, a share of the known voxels, is added to numerator and denominator.
    """

    alpha: NotNegative = 0.3
    beta: NotNegative = 0.7
    smooth: Positive = 1e-4

    def __call__(self, batch: KnownVoxels) -> Tensor:
        probability = torch.sigmoid(batch.logits) * batch.known
        tp = batch.mean(torch.minimum(probability, batch.target))
        fp = batch.mean(probability) - tp
        fn = batch.mean(batch.target) - tp
        return 1 - (tp + self.smooth) / (tp + self.alpha * fp + self.beta * fn + self.smooth)


@dataclass(frozen=True)
class DiceLoss(ClassLoss):
    """1 - 2 TP / (2 TP + FP + FN): `TverskyLoss` with alpha = beta = 1/2 (arXiv:1606.04797)."""

    smooth: Positive = 1e-4

    def __call__(self, batch: KnownVoxels) -> Tensor:
        return TverskyLoss(0.5, 0.5, self.smooth)(batch)


@dataclass(frozen=True)
class BCEWithLogitsLoss(ClassLoss):
    """Binary cross entropy, mean over known voxels; ``pos_weight`` is the weight of present voxels."""

    pos_weight: Positive = 1.0

    def __call__(self, batch: KnownVoxels) -> Tensor:
        weight = None if self.pos_weight == 1.0 else batch.logits.new_tensor(self.pos_weight)
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
    """``lambda_dice`` times `DiceLoss` plus ``lambda_ce`` times `BCEWithLogitsLoss`."""

    lambda_dice: NotNegative = 1.0
    lambda_ce: NotNegative = 1.0
    smooth: Positive = 1e-4

    def __call__(self, batch: KnownVoxels) -> Tensor:
        return self.lambda_dice * DiceLoss(self.smooth)(batch) + self.lambda_ce * BCEWithLogitsLoss()(batch)


LOSSES: dict[str, type[ClassLoss]] = {
    kind.__name__: kind
    for kind in (DiceLoss, FocalLoss, BCEWithLogitsLoss, BalancedBCELoss, MSELoss, DiceCELoss, TverskyLoss)
}


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


class MaskedLoss(nn.Module):
    """A weighted sum of losses over known voxels, with deep supervision.

    Coarser outputs have the weights 1/2, 1/4, ... relative to the full size (as in nnU-Net). For each class and sample
    the weights are divided by their sum over the sizes at which the class has known voxels, so that a small known
    region, which fills no coarse voxel, counts as much as the others.

    Classes are processed one after another (on a GPU several at once), so that labels are unpacked for one class at a
    time. The gradient of a class is computed along with its value: the backward pass needs 4 bytes per voxel and
    class, instead of about 20 for two losses. There is no second derivative.
    """

    def __init__(self, losses: Mapping[str, ClassLoss], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.losses = dict(losses)
        self.weights = dict(weights)
        self.at_once: int | None = None  # classes that are processed together; None: one, and several on a GPU

    def forward(self, logits: Tensor | Sequence[Tensor], labels: Labels) -> LossResult:
        """Return the loss of a batch, computed in float32 also under autocast.

        Args:
            logits: (B, C, D, H, W), or a sequence of them, full size first, each side dividing the one before.
            labels: of the same B, C, D, H, W; for tensors, `DenseLabels(label, known)`.

        Raises:
            InputError: the shapes do not fit each other.
        """
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        if not outputs or tuple(outputs[0].shape) != labels.shape:
            found = tuple(outputs[0].shape) if outputs else "none"
            raise InputError(
                f"logits and labels must have one shape (B, C, D, H, W), got logits {found}, labels {labels.shape}"
            )
        wanted = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
        # float32 also for half precision: the gradient scale that keeps halves from vanishing applies only in backward
        gradients = [torch.empty_like(output, dtype=torch.float32) for output in outputs] if wanted else []
        factors = outputs[0].new_tensor([self.weights[name] for name in self.losses], dtype=torch.float32)
        factors = factors / labels.channels
        means = torch.zeros_like(factors)
        together = self.at_once or _classes_at_once(labels)
        with torch.autocast(labels.device.type, enabled=False):
            for first in range(0, labels.channels, together):
                some = slice(first, min(first + together, labels.channels))
                label, known = _labels_of(labels, some)
                with torch.set_grad_enabled(wanted):
                    leaves = [output.detach()[:, some].float().requires_grad_(wanted) for output in outputs]
                    values = self._of_classes(leaves, label, known)
                    if wanted:
                        slopes = torch.autograd.grad((values * factors).sum(), leaves)
                        for gradient, slope in zip(gradients, slopes, strict=True):
                            gradient[:, some] = slope
                means = means + values.detach()
            total = (means * factors).sum()
        if wanted:
            total = _WithGradients.apply(total, len(gradients), *gradients, *outputs)
        return LossResult(total, dict(zip(self.losses, means / labels.channels, strict=True)))

    def _of_classes(self, logits: Sequence[Tensor], label: Tensor, known: Tensor) -> Tensor:
        """Return per loss (L,) the mean over samples of the weighted losses of some classes, summed over these.

        ``logits`` by level, label and known: (B, K, D, H, W).
        """
        samples = len(label)
        levels = []
        for level in logits:
            if level.shape[2:] != label.shape[2:]:
                label, known = downsample(label, known, level.shape[2:])
            # `where` instead of a product: NaN times zero is NaN, in the value and in the gradient
            rows, target = (torch.where(known, values, 0.0).flatten(0, 1).flatten(1) for values in (level, label))
            mask = known.flatten(0, 1).flatten(1)
            levels.append(KnownVoxels(rows, target, mask.float(), mask.sum(1)))
        share = (levels[0].count / (levels[0].known.shape[1] * _FULL_WEIGHT)).clamp(max=1)
        # known on a coarse level implies known on the finest
        weight = torch.stack([(level.count > 0).float() * 0.5**n for n, level in enumerate(levels)])
        weight = weight / weight.sum(0).clamp(min=torch.finfo(weight.dtype).tiny)
        values = torch.stack([torch.stack([loss(level) for level in levels]) for loss in self.losses.values()])
        return (values * weight * share).sum((1, 2)) / samples


def _classes_at_once(labels: Labels) -> int:
    """Return how many classes are processed together on the device of the labels."""
    if labels.device.type == "cpu":
        return 1
    return max(1, _LOGITS_ON_GPU // (labels.batch * math.prod(labels.shape[2:])))


def _labels_of(labels: Labels, some: slice) -> tuple[Tensor, Tensor]:
    """Return label and known of some classes, (B, K, D, H, W)."""
    label, known = zip(*(labels.of(channel) for channel in range(some.start, some.stop)), strict=True)
    if len(label) == 1:  # no copy
        return label[0][:, None], known[0][:, None]
    return torch.stack(label, 1), torch.stack(known, 1)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are already computed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        """``tensors``: ``count`` gradients, then the ``count`` tensors that they belong to."""
        ctx.save_for_backward(*tensors[:count])
        ctx.dtypes = [tensor.dtype for tensor in tensors[count:]]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients times the upstream gradient, in the dtype of the tensors."""
        gradients = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 + len(gradients) :]
        results: list[Tensor | None] = []
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, wanted, strict=True):
            into = torch.empty_like(gradient, dtype=dtype) if needed else None
            results.append(None if into is None else torch.mul(gradient, upstream, out=into))
        return (None, None, *[None] * len(gradients), *results)


def downsample(label: Tensor, known: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Downsample label (B, C, D, H, W) float and known (bool) to ``size`` (d, h, w).

    The label becomes the mean of the fine voxels, and a coarse voxel is known if all of its fine voxels are.
    Raises `InputError` if ``size`` does not divide the size of the label.
    """
    full = label.shape[2:]
    if any(n % m for n, m in zip(full, size, strict=True)):
        raise InputError(f"a deep-supervision output of {tuple(size)} voxels does not divide the label's {tuple(full)}")
    factor = tuple(n // m for n, m in zip(full, size, strict=True))
    clean = torch.where(known, label, 0.0)
    coarse_unknown = functional.max_pool3d((~known).to(clean.dtype), factor, factor)
    return functional.avg_pool3d(clean, factor, factor), coarse_unknown == 0


def build_loss(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> MaskedLoss:
    """Return a `MaskedLoss` of names of `LOSSES`, a weight for each (default 1), and options by name.

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
    for name in names:
        if name not in LOSSES:
            raise unknown_name("loss", name, LOSSES, "model.loss_functions")
    for name in given:
        if name not in names:
            raise unknown_name("loss", name, names, "model.loss_options (only losses of model.loss_functions)")
    built = {n: read(LOSSES[n], given.get(n) or {}, f"model.loss_options.{n}", InputError) for n in names}
    return MaskedLoss(built, dict(zip(names, factors, strict=True)))
