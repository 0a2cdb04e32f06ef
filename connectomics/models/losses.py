"""Losses over known voxels only.

A class that nobody annotated at a voxel says nothing there, so every loss here takes a mask of what is known. Each
class is an independent sigmoid channel. For a batch of B samples and the run's C classes, the value of a loss is

    1 / (B C)  sum over samples b and classes c of  r_bc * loss_bc,    r_bc = min(1, 64 n_bc / N)

where loss_bc is computed from the n_bc known voxels of class c in sample b alone (a mean over them or, for Dice and
Tversky, a ratio of such means), and N is the number of voxels of a sample. So:

- B and C are fixed. An unknown class contributes 0 and leaves the other classes as they are: the gradient of a class
  is the same whether it is the only known class of the batch or all of them are known.
- Everything is a mean over samples, Dice included, which is computed for each sample. The gradients of a batch are
  therefore the mean of the gradients of its parts: accumulation and data-parallel processes give what one large batch
  gives.
- A class weighs the same in every sample of which at least 1/64 is known (a cube with a quarter of the patch's side).
  Below that share its weight falls linearly, so a few known voxels in a corner do not count as much as a full patch.
- A label or logit at an unknown voxel has exactly no influence, on the value or on a gradient, be it NaN. If nothing
  is known, the loss is zero with zero gradients: it still belongs to the graph, so that data-parallel processes stay
  in step.

Deep supervision: label and known are brought to the size of each coarser output together. A coarse voxel is known
where all of its fine voxels are known; its target is the *fraction* of them that is labeled, not a thresholded 0 or 1,
which would erase membranes thinner than a coarse voxel. The formulas below are therefore those that equal the usual
ones for 0/1 labels and have their minimum at prediction = target for fractions.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from connectomics.errors import ConnectomicsError, InputError, unknown_name
from connectomics.models.labels import Labels

_AT_ONCE_ON_GPU = 2**24  # logits of several classes that are looked at together: some 1.5 GB of intermediate values
_FULL_WEIGHT = 1 / 64  # known share of a sample from which a class has its full weight there


@dataclass(frozen=True)
class LossResult:
    """Value of a loss: ``total`` to go backward from, and by loss name the unweighted, detached parts."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class _Known:
    """Classes of samples at one size: each row holds the N voxels of one class in one sample, zero where unknown."""

    logits: Tensor  # float32 (rows, N)
    target: Tensor  # float32 (rows, N), 0..1
    known: Tensor  # float32 (rows, N), 0 or 1
    count: Tensor  # (rows,), number of known voxels

    def mean(self, values: Tensor) -> Tensor:
        """The mean over known voxels (rows,); ``values`` (rows, N) must be zero where unknown. 0 if none is known."""
        return values.sum(1) / self.count.clamp(min=1)


class ClassLoss(nn.Module):
    """A loss that gives one value for each row, (rows,): from the known voxels of one class in one sample."""

    @abstractmethod
    def forward(self, batch: _Known) -> Tensor: ...


class TverskyLoss(ClassLoss):
    """1 - TP / (TP + alpha FP + beta FN) (arXiv:1706.05721).

    With p the probability and y the target, TP is the mean over known voxels of min(p, y), FP of p - min(p, y), FN of
    y - min(p, y): the usual p y for 0/1 labels, and minimal at p = y for fractions (arXiv:2303.16296). ``smooth`` is a
    share of the known voxels, added above and below the fraction line; an absent and unpredicted class has loss 0.
    """

    def __init__(self, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1e-4) -> None:
        super().__init__()
        if alpha < 0 or beta < 0 or smooth <= 0:
            raise InputError(f"alpha and beta must be >= 0 and smooth > 0, found {alpha}, {beta}, {smooth}")
        self.alpha, self.beta, self.smooth = alpha, beta, smooth

    def forward(self, batch: _Known) -> Tensor:
        probability = torch.sigmoid(batch.logits) * batch.known
        tp = batch.mean(torch.minimum(probability, batch.target))
        fp = batch.mean(probability) - tp
        fn = batch.mean(batch.target) - tp
        return 1 - (tp + self.smooth) / (tp + self.alpha * fp + self.beta * fn + self.smooth)


class DiceLoss(TverskyLoss):
    """1 - 2 TP / (2 TP + FP + FN): `TverskyLoss` with alpha = beta = 1/2 (arXiv:1606.04797)."""

    def __init__(self, smooth: float = 1e-4) -> None:
        super().__init__(alpha=0.5, beta=0.5, smooth=smooth)


class BCEWithLogitsLoss(ClassLoss):
    """Binary cross entropy, mean over known voxels; ``pos_weight`` weighs the present voxels."""

    def __init__(self, pos_weight: float = 1.0) -> None:
        super().__init__()
        if pos_weight <= 0:
            raise InputError(f"pos_weight must be > 0, found {pos_weight}")
        self.pos_weight = pos_weight

    def forward(self, batch: _Known) -> Tensor:
        weight = None if self.pos_weight == 1.0 else batch.logits.new_tensor(self.pos_weight)
        entropy = functional.binary_cross_entropy_with_logits(
            batch.logits, batch.target, reduction="none", pos_weight=weight
        )
        return batch.mean(entropy * batch.known)


class BalancedBCELoss(ClassLoss):
    """Binary cross entropy in which present and absent voxels weigh alike, however many there are of each.

    Present voxels are weighted by 1 / (2 s), absent ones by 1 / (2 (1 - s)), s being the share of the known voxels that
    is present (a sum of fractions, for fractions); s is held within ``least`` and 1 - ``least``, so that a few voxels
    do not outweigh everything.
    """

    def __init__(self, least: float = 0.05) -> None:
        super().__init__()
        if not 0 < least <= 0.5:
            raise InputError(f"least must be above 0 and at most 0.5, found {least}")
        self.least = least

    def forward(self, batch: _Known) -> Tensor:
        y = batch.target
        share = batch.mean(y).clamp(self.least, 1 - self.least)[:, None]
        weight = y / (2 * share) + (1 - y) / (2 * (1 - share))
        entropy = functional.binary_cross_entropy_with_logits(batch.logits, y, reduction="none")
        return batch.mean(entropy * weight * batch.known)


class MSELoss(ClassLoss):
    """The square of probability minus target, mean over known voxels: for targets that are no classes (distances)."""

    def forward(self, batch: _Known) -> Tensor:
        return batch.mean((torch.sigmoid(batch.logits) - batch.target).square() * batch.known)


class FocalLoss(ClassLoss):
    """|y - p|^gamma times binary cross entropy, mean over known voxels.

    For 0/1 labels this is the focal loss (arXiv:1708.02002); for fractions its quality form (arXiv:2006.04388).
    ``alpha`` weighs present voxels by alpha and absent ones by 1 - alpha; None weighs both by 1.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = None) -> None:
        super().__init__()
        if gamma < 0 or (alpha is not None and not 0 < alpha < 1):
            raise InputError(f"gamma must be >= 0 and alpha in (0, 1) or null, found {gamma}, {alpha}")
        self.gamma, self.alpha = gamma, alpha

    def forward(self, batch: _Known) -> Tensor:
        y = batch.target
        entropy = functional.binary_cross_entropy_with_logits(batch.logits, y, reduction="none")
        distance = (y - torch.sigmoid(batch.logits)).abs()
        # |y - p| = 0 has an infinite slope under powers below 1; the clamp cuts it off.
        value = entropy * distance.clamp(min=1e-6).pow(self.gamma)
        if self.alpha is not None:
            value = value * (self.alpha * y + (1 - self.alpha) * (1 - y))
        return batch.mean(value * batch.known)


class DiceCELoss(ClassLoss):
    """``lambda_dice`` times `DiceLoss` plus ``lambda_ce`` times `BCEWithLogitsLoss`."""

    def __init__(self, lambda_dice: float = 1.0, lambda_ce: float = 1.0, smooth: float = 1e-4) -> None:
        super().__init__()
        if lambda_dice < 0 or lambda_ce < 0:
            raise InputError(f"lambda_dice and lambda_ce must be >= 0, found {lambda_dice}, {lambda_ce}")
        self.dice, self.entropy = DiceLoss(smooth), BCEWithLogitsLoss()
        self.lambda_dice, self.lambda_ce = lambda_dice, lambda_ce

    def forward(self, batch: _Known) -> Tensor:
        return self.lambda_dice * self.dice(batch) + self.lambda_ce * self.entropy(batch)


LOSSES: dict[str, type[ClassLoss]] = {
    "DiceLoss": DiceLoss,
    "FocalLoss": FocalLoss,
    "BCEWithLogitsLoss": BCEWithLogitsLoss,
    "BalancedBCELoss": BalancedBCELoss,
    "MSELoss": MSELoss,
    "DiceCELoss": DiceCELoss,
    "TverskyLoss": TverskyLoss,
}


class MaskedLoss(nn.Module):
    """A weighted sum of losses over known voxels, with deep supervision.

    Coarser outputs weigh 1/2, 1/4, ... of the full size (as in nnU-Net). For each class and sample the weights are
    divided by their sum over the sizes at which the class has known voxels there, so that a small known region, which
    fills no coarse voxel, counts as much as the others.

    Classes are looked at one after another: labels are unpacked, and intermediate values kept, for one at a time. On a
    GPU, where starting so many small kernels takes longer than they run, several are looked at together. Each class's
    gradient is found along with its value, so that backward needs no more than the gradient itself: 4 bytes a
    voxel and class, where the steps of two losses would keep about 20. There is no second derivative.
    """

    def __init__(self, losses: Mapping[str, ClassLoss], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)
        self.at_once: int | None = None  # classes that are looked at together; None: one, and several on a GPU

    def forward(self, logits: Tensor | Sequence[Tensor], labels: Labels) -> LossResult:
        """The loss of a batch, see the top of this module; computed in float32 whatever the autocast state.

        Args:
            logits: (B, C, D, H, W), or a sequence of them, full size first, each side dividing the one before.
            labels: of the same B, C, D, H, W; tensors at hand are `DenseLabels(label, known)`.

        Raises:
            InputError: the shapes do not fit each other.
        """
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        if not outputs or tuple(outputs[0].shape) != labels.shape:
            found = tuple(outputs[0].shape) if outputs else "none"
            raise InputError(
                f"logits and labels must have one shape (B, C, D, H, W), found logits {found}, labels {labels.shape}"
            )
        wanted = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
        # float32 also for halves: the scale that keeps halves from vanishing comes only with backward
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
        """The mean over samples of the weighted losses of some classes, summed over these, by loss (L,).

        ``logits`` by level, label and known: (B, K, D, H, W).
        """
        samples = len(label)
        levels = []
        for level in logits:
            if level.shape[2:] != label.shape[2:]:
                label, known = downsample(label, known, level.shape[2:])
            # `where` and not a product: NaN times zero is NaN, in the value and in the gradient.
            rows, target = (torch.where(known, values, 0.0).flatten(0, 1).flatten(1) for values in (level, label))
            mask = known.flatten(0, 1).flatten(1)
            levels.append(_Known(rows, target, mask.float(), mask.sum(1)))
        share = (levels[0].count / (levels[0].known.shape[1] * _FULL_WEIGHT)).clamp(max=1)
        # known on a coarse level implies known on the finest
        weight = torch.stack([(level.count > 0).float() * 0.5**n for n, level in enumerate(levels)])
        weight = weight / weight.sum(0).clamp(min=torch.finfo(weight.dtype).tiny)
        values = torch.stack([torch.stack([loss(level) for level in levels]) for loss in self.losses.values()])
        return (values * weight * share).sum((1, 2)) / samples


def _classes_at_once(labels: Labels) -> int:
    """How many classes are looked at together on the labels' device."""
    if labels.device.type == "cpu":
        return 1
    return max(1, _AT_ONCE_ON_GPU // (labels.batch * math.prod(labels.spatial_shape)))


def _labels_of(labels: Labels, some: slice) -> tuple[Tensor, Tensor]:
    """Label and known of some classes, (B, K, D, H, W)."""
    label, known = zip(*(labels.of(channel) for channel in range(some.start, some.stop)), strict=True)
    if len(label) == 1:  # no copy
        return label[0][:, None], known[0][:, None]
    return torch.stack(label, 1), torch.stack(known, 1)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        """``tensors``: ``count`` gradients, then as many tensors that they are the gradients of."""
        ctx.save_for_backward(*tensors[:count])
        ctx.dtypes = [tensor.dtype for tensor in tensors[count:]]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times what comes from above, in the type of the tensors."""
        gradients = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 + len(gradients) :]
        results: list[Tensor | None] = []
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, wanted, strict=True):
            into = torch.empty_like(gradient, dtype=dtype) if needed else None
            results.append(None if into is None else torch.mul(gradient, upstream, out=into))
        return (None, None, *[None] * len(gradients), *results)


def downsample(label: Tensor, known: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Label (B, C, D, H, W) float and known (bool) at ``size`` (d, h, w), which must divide theirs.

    The label becomes the mean of the fine voxels, and a coarse voxel is known where all of its fine voxels are.
    Raises `InputError` where the size does not divide.
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
    """A `MaskedLoss` from names of `LOSSES`, a weight for each (default 1), and by name keyword arguments.

    Raises:
        UnknownNameError: no such loss or argument.
        InputError: no loss, one named twice, weights that do not fit, or an argument that the loss refuses.
    """
    given = {name: dict(arguments or {}) for name, arguments in (options or {}).items()}
    factors = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    if not names or len(set(names)) != len(names):
        raise InputError(f"model.loss_functions must name at least one loss and none twice, found {list(names)}")
    if len(factors) != len(names):
        raise InputError(f"model.loss_weights has {len(factors)} numbers for {len(names)} losses {list(names)}")
    if not all(math.isfinite(w) and w >= 0 for w in factors) or max(factors) <= 0:
        raise InputError(f"model.loss_weights must be finite, >= 0 and not all 0, found {factors}")
    for name in given:
        if name not in names:
            raise unknown_name("loss", name, names, "model.loss_options (only losses of model.loss_functions)")
    built = {name: _build_one(name, given.get(name, {})) for name in names}
    return MaskedLoss(built, dict(zip(names, factors, strict=True)))


def _build_one(name: str, arguments: Mapping[str, Any]) -> ClassLoss:
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES, "model.loss_functions")
    allowed = set(inspect.signature(LOSSES[name].__init__).parameters) - {"self"}
    for key in arguments:
        if key not in allowed:
            raise unknown_name("argument", key, allowed, f"model.loss_options.{name}")
        if isinstance(arguments[key], float) and not math.isfinite(arguments[key]):
            raise InputError(f"model.loss_options.{name}.{key} must be a finite number, found {arguments[key]}")
    try:
        return LOSSES[name](**arguments)
    except ConnectomicsError as error:
        raise InputError(f"model.loss_options.{name}: {error}") from error
    except TypeError as error:
        raise InputError(f"model.loss_options.{name}: a value has the wrong kind, found {dict(arguments)}") from error
