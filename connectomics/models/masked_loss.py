"""A weighted sum of losses over the known voxels of a batch, with deep supervision and weights by class.

`connectomics.models.losses` says what the value is, and has the losses themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from connectomics.config.values import STRICT_KEYS
from connectomics.errors import InputError
from connectomics.geometry import Index, Triple, index, triple
from connectomics.models.batch_labels import Labels

_LOGITS_ON_GPU = 2**24  # logits of several classes that are processed together: about 1.5 GB of intermediate values
_FULL_WEIGHT = 1 / 64  # known share of a sample from which a class has its full weight


@dataclass(frozen=True)
class LossResult:
    """Value of a loss: ``total`` for the backward pass, by loss name the detached parts (not multiplied by the weights
    of the losses), and the detached total of each sample (B,), whose mean is ``total``."""

    total: Tensor
    parts: dict[str, Tensor]
    samples: Tensor | None = None


@dataclass(frozen=True)
class KnownVoxels:
    """Classes of samples at one size: each row holds the N voxels of one class in one sample, zero where unknown.

    The rows are the classes of the first sample, then those of the second, ...
    """

    logits: Tensor  # float32 (rows, N)
    target: Tensor  # float32 (rows, N), 0..1
    known: Tensor  # float32 (rows, N), 0 or 1
    count: Tensor  # (rows,), number of known voxels
    samples: int = 1
    shape: Index = (1, 1, 1)  # of the N voxels, z y x
    voxel_size: Triple = (1.0, 1.0, 1.0)  # nm, at this size

    def mean(self, values: Tensor, pooled: bool = False) -> Tensor:
        """Return the mean over known voxels (rows,), 0 if none is known; ``values`` (rows, N) are zero if unknown.

        ``pooled``: the mean over all samples, the same in all rows of a class.
        """
        sums, count = values.sum(1), self.count
        if pooled:
            sums, count = (
                v.view(self.samples, -1).sum(0, keepdim=True).expand(self.samples, -1).reshape(-1)
                for v in (sums, count)
            )
        return sums / count.clamp(min=1)

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


class MaskedLoss(nn.Module):
    """A weighted sum of losses over known voxels, with deep supervision.

    Coarser outputs have the weights 1/2, 1/4, ... relative to the full size (as in nnU-Net). For each class and sample
    the weights are divided by their sum over the sizes at which the class has known voxels, so that a small known
    region, which fills no coarse voxel, counts as much as the others.

    Classes are processed one after another (on a GPU several at once), so that labels are unpacked for one class at a
    time. The gradient of a class is computed along with its value: the backward pass needs 4 bytes per voxel and
    class, instead of about 20 for two losses. There is no second derivative.

    Attributes:
        class_weights: (C,) float32, factor of each class; None: 1.
    """

    class_weights: Tensor | None

    def __init__(
        self, losses: Mapping[str, ClassLoss], weights: Mapping[str, float], voxel_size: Triple = (1.0, 1.0, 1.0)
    ) -> None:
        """``voxel_size``: of the full size, nm, z y x."""
        super().__init__()
        self.losses = dict(losses)
        self.weights = dict(weights)
        self.voxel_size = voxel_size
        self.register_buffer("class_weights", None, persistent=False)
        self.at_once: int | None = None  # classes that are processed together; None: one, and several on a GPU

    def forward(self, logits: Tensor | Sequence[Tensor], labels: Labels) -> LossResult:
        """Return the loss of a batch, computed in float32 also under autocast.

        Args:
            logits: (B, C, D, H, W), or a sequence of them, full size first, each side dividing the one before.
            labels: of the same B, C, D, H, W; for tensors, `DenseLabels(label, known)`.

        Raises:
            InputError: the shapes, or ``class_weights``, do not fit each other.
        """
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        if not outputs or tuple(outputs[0].shape) != labels.shape:
            found = tuple(outputs[0].shape) if outputs else "none"
            raise InputError(
                f"logits and labels must have one shape (B, C, D, H, W), got logits {found}, labels {labels.shape}"
            )
        by_class = self.class_weights
        if by_class is not None and len(by_class) != labels.channels:
            raise InputError(f"class weights of {labels.channels} classes must be as many numbers, got {len(by_class)}")
        wanted = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
        # float32 also for half precision: the gradient scale that keeps halves from vanishing applies only in backward
        gradients = [torch.empty_like(output, dtype=torch.float32) for output in outputs] if wanted else []
        # not a copy of numbers, for which each step would wait for a GPU
        factors = torch.stack([outputs[0].new_full((), self.weights[n], dtype=torch.float32) for n in self.losses])
        factors = factors / labels.channels
        by_sample = factors.new_zeros((len(factors), labels.batch))
        together = self.at_once or _classes_at_once(labels)
        with torch.autocast(labels.device.type, enabled=False):
            for first in range(0, labels.channels, together):
                some = slice(first, min(first + together, labels.channels))
                label, known = _labels_of(labels, some)
                with torch.set_grad_enabled(wanted):
                    leaves = [output.detach()[:, some].float().requires_grad_(wanted) for output in outputs]
                    values = self._of_classes(leaves, label, known, None if by_class is None else by_class[some])
                    if wanted:
                        slopes = torch.autograd.grad((values.mean(1) * factors).sum(), leaves)
                        for gradient, slope in zip(gradients, slopes, strict=True):
                            gradient[:, some] = slope
                by_sample = by_sample + values.detach()
            means = by_sample.mean(1)
            total = (means * factors).sum()
            samples = factors @ by_sample
        if wanted:
            total = _WithGradients.apply(total, len(gradients), *gradients, *outputs)
        return LossResult(total, dict(zip(self.losses, means / labels.channels, strict=True)), samples)

    def _of_classes(self, logits: Sequence[Tensor], label: Tensor, known: Tensor, by_class: Tensor | None) -> Tensor:
        """Return per loss and sample (L, B) the weighted losses of some classes, summed over these.

        ``logits`` by level, label and known: (B, K, D, H, W); ``by_class``: (K,).
        """
        samples = len(label)
        full = label.shape[2:]
        levels = []
        for level in logits:
            if level.shape[2:] != label.shape[2:]:
                label, known = downsample(label, known, level.shape[2:])
            # `where` instead of a product: NaN times zero is NaN, in the value and in the gradient
            rows, target = (torch.where(known, values, 0.0).flatten(0, 1).flatten(1) for values in (level, label))
            mask = known.flatten(0, 1).flatten(1)
            shape = index(level.shape[2:])
            size = triple([side * (n // m) for side, n, m in zip(self.voxel_size, full, shape, strict=True)])
            levels.append(KnownVoxels(rows, target, mask.float(), mask.sum(1), samples, shape, size))
        share = (levels[0].count / (levels[0].known.shape[1] * _FULL_WEIGHT)).clamp(max=1)
        # known on a coarse level implies known on the finest
        weight = torch.stack([(level.count > 0).float() * 0.5**n for n, level in enumerate(levels)])
        weight = weight / weight.sum(0).clamp(min=torch.finfo(weight.dtype).tiny)
        values = torch.stack([torch.stack([loss(level) for level in levels]) for loss in self.losses.values()])
        if by_class is not None:
            share = share * by_class.repeat(samples)
        return (values * weight * share).sum(1).view(len(values), samples, -1).sum(2)


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
