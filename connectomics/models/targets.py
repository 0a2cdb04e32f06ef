"""Targets of heads: affinities, boundaries, distances and shape descriptors, computed from instance ids on the device.

Every function takes ``ids``, int32 (B, D, H, W): 0 is known background, -1 unknown, a positive number an object. It
returns targets, float32 from 0 to 1, and where they are known, bool. What lies beyond the patch is unknown. A target
is known only if nothing unknown could change it, so an object cut by a face of the patch gives no wrong target.

Apply spatial augmentations to the ids first: a flip changes an affinity along with its offset.

Lengths are nm, axes z, y, x. The targets are not differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from connectomics.config.heads import Head
from connectomics.errors import InputError
from connectomics.geometry import Index, Triple, index, overlapping
from connectomics.models.batch_labels import DenseLabels, Labels

DISTANCE_REACH = 3.0  # scales at which distances are clipped: tanh(3) is 0.995
_UNIT = 1 << 26  # square of the largest distance in fixed point; the sum of three, doubled, fits 32 bits
_WINDOW = 3.0  # standard deviations at which the Gaussian of descriptors is truncated
_UNSEEN = 0.01  # share of a Gaussian's weight that may lie on unknown voxels
_THIN = 1e-4  # of sigma^2, added to variances, which are divisors and 0 for a sheet of one voxel


def head_labels(head: Head, ids: Tensor) -> Labels:
    """Return the targets of a head for the ids (B, D, H, W) of its class, as the losses take them."""
    if ids.ndim != 4 or ids.dtype != torch.int32:
        raise InputError(f"ids of a class must be int32 (B, D, H, W), got {ids.dtype} {tuple(ids.shape)}")
    if head.kind == "affinities":
        return AffinityLabels(ids, head.offsets)
    with torch.autocast(ids.device.type, enabled=False):  # sums over many voxels need float32
        if head.kind == "boundary":
            target, known = boundary(ids, head.voxel_size, head.scale_nm)
        elif head.kind == "distance":
            target, known = distance(ids, head.voxel_size, head.scale_nm)
        else:
            descriptors, known = shape_descriptors(ids, head.voxel_size, head.scale_nm)
            return DenseLabels(descriptors, known[:, None].expand(descriptors.shape))
    return DenseLabels(target[:, None], known[:, None])


def reach(head: Head) -> Index:
    """Return how far (voxels, z y x) around a voxel its target depends on ids: the margin in which it is unknown."""
    if head.kind == "affinities":
        return index(max(abs(offset[axis]) for offset in head.offsets) for axis in range(3))
    far = {"boundary": 1.0, "distance": DISTANCE_REACH, "lsd": _WINDOW}[head.kind] * head.scale_nm
    return index(math.ceil(far / side) + 1 for side in head.voxel_size)


# -- affinities ------------------------------------------------------------------------------------------------------
def affinity(ids: Tensor, offset: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return 1 at p if ``ids`` at p and at p + ``offset`` (voxels, z y x) are the same object, else 0.

    Known if both lie in the patch and are known. Returns two (B, D, H, W), float32 and bool.
    """
    target = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    known = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    here, there = overlapping(ids.shape, (0, *offset))
    a, b = ids[here], ids[there]
    target[here] = ((a == b) & (a > 0)).float()
    known[here] = (a >= 0) & (b >= 0)
    return target, known


def affinities(ids: Tensor, offsets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return `affinity` for each of K ``offsets``: float32 and bool (B, K, D, H, W)."""
    dense = AffinityLabels(ids, tuple((int(z), int(y), int(x)) for z, y, x in offsets)).dense()
    return dense.label, dense.known


@dataclass(frozen=True, eq=False)
class AffinityLabels(Labels):
    """Affinities computed one offset at a time, when a loss reads them: 5 bytes per voxel instead of 5 K."""

    ids: Tensor  # int32 (B, D, H, W)
    offsets: tuple[Index, ...]  # voxels, z y x, one per channel

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, D, H, W)."""
        return len(self.ids), len(self.offsets), *self.ids.shape[1:]

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Return target and known for one offset, (B, D, H, W)."""
        return affinity(self.ids, self.offsets[channel])


# -- distances -------------------------------------------------------------------------------------------------------
def boundary(ids: Tensor, voxel_size: Triple, width_nm: float) -> tuple[Tensor, Tensor]:
    """Return 1 if the center of a voxel lies within ``width_nm`` of an object border, on either side, else 0.

    A border lies between two objects or an object and background. Known if nothing unknown is nearer than the border,
    or within the width. Returns two (B, D, H, W), float32 and bool.
    """
    nearest, known = border_distance(ids, voxel_size, width_nm * (1 + 1e-6))  # a border at the width is within it
    return (nearest <= width_nm * (1 + 1e-7)).float(), known


def distance(ids: Tensor, voxel_size: Triple, scale_nm: float) -> tuple[Tensor, Tensor]:
    """Return 1/2 + tanh(d / ``scale_nm``) / 2 for the signed distance d from a voxel center to the nearest border.

    d is positive in an object (its border may be that to another object) and negative in the background; it is exact
    up to three scales, and clipped there. Known if nothing unknown is nearer than the border. Returns two
    (B, D, H, W), float32 and bool.
    """
    nearest, known = border_distance(ids, voxel_size, DISTANCE_REACH * scale_nm)
    signed = torch.where(ids > 0, nearest, -nearest)
    return torch.tanh_(signed.div_(scale_nm)).mul_(0.5).add_(0.5), known


def border_distance(ids: Tensor, voxel_size: Triple, reach_nm: float) -> tuple[Tensor, Tensor]:
    """Return the distance (nm) from each voxel center to the nearest voxel box with another id, up to a reach.

    Known if neither an unknown voxel nor a face of the patch is nearer; in a patch of one plane (D = 1) only what lies
    in the plane counts. Returns two (B, D, H, W), float32 and bool.

    The squared distance is computed axis by axis, as in Felzenszwalb and Huttenlocher (Theory of Computing 8, 2012),
    but with ids instead of two sets: a voxel s steps away with the same id adds the s steps to its best distance so
    far, one with another id counts the s steps only. Numbers are fixed point, doubled, and odd if the nearest voxel is
    unknown, so that at the same distance the known voxel wins.
    """
    unknown = (ids < 0).int()
    best = torch.full_like(ids, 2 * _UNIT)
    for axis in _axes(ids):
        best = _along(best, ids, unknown, axis, voxel_size[axis], reach_nm)
    far = best >= 2 * _UNIT
    known = (ids >= 0) & (far | (best % 2 == 0))
    squared = (best // 2).clamp_(max=_UNIT).double().mul_(reach_nm**2 / _UNIT)
    return squared.sqrt_().float(), known


def _axes(ids: Tensor) -> tuple[int, ...]:
    """Return the axes along which targets look: not z in patches of one plane, which say nothing about it."""
    return (0, 1, 2) if ids.shape[1] > 1 else (1, 2)


def _fixed(gap_nm: float, reach_nm: float) -> int:
    """Return the square of a distance along one axis, doubled, in fixed point, clipped at the reach."""
    return 2 * min(_UNIT, round((gap_nm / reach_nm) ** 2 * _UNIT))


def _along(best: Tensor, ids: Tensor, unknown: Tensor, axis: int, side: float, reach_nm: float) -> Tensor:
    """Update the best distances along one axis, in both directions, with its two faces as unknown voxels."""
    n = ids.shape[1 + axis]
    ends = [_fixed((min(i, n - 1 - i) + 0.5) * side, reach_nm) + 1 for i in range(n)]
    faces = torch.tensor(ends, dtype=torch.int32).view([-1 if a == axis else 1 for a in range(3)])
    faces = faces.to(ids.device, non_blocking=True)
    result = torch.minimum(best, faces)
    for steps in range(1, min(n - 1, math.floor(reach_nm / side + 0.5)) + 1):
        cost = _fixed((steps - 0.5) * side, reach_nm)
        low, high = (0, n - steps), (steps, n - steps)  # begin and length
        same = ids.narrow(1 + axis, *low) == ids.narrow(1 + axis, *high)
        for here, there in ((low, high), (high, low)):
            found = torch.where(same, best.narrow(1 + axis, *there), unknown.narrow(1 + axis, *there)).add_(cost)
            part = result.narrow(1 + axis, *here)
            torch.minimum(part, found, out=part)
    return result


# -- shape descriptors -----------------------------------------------------------------------------------------------
def shape_descriptors(ids: Tensor, voxel_size: Triple, sigma_nm: float) -> tuple[Tensor, Tensor]:
    """Return local shape descriptors (Sheridan et al., Nature Methods 20, 2023): object statistics around a voxel.

    Weighted by a Gaussian around the voxel (up to three sigma), over the voxels of its own object: the mean offset
    from the voxel, the covariance of the offsets, and the object's share of the total weight. Channels, clipped to
    0..1: offset z, y, x (1/2 + offset / (2 sigma)); variance zz, yy, xx (over sigma^2); correlation zy, zx, yx (1/2 is
    no correlation); size.

    Known in whole objects, and in other objects where at most 1 % of the weight lies on unknown voxels. Returns
    float32 (B, 10, D, H, W), 0 outside of objects, and bool (B, D, H, W).
    """
    result = torch.zeros((ids.shape[0], 10, *ids.shape[1:]), dtype=torch.float32, device=ids.device)
    kernels = [_moments(n, side, sigma_nm, ids.device) for n, side in zip(ids.shape[1:], voxel_size, strict=True)]
    seen = (ids >= 0).float()
    for axis in _axes(ids):
        seen = _apply(seen, kernels[axis][0], axis)
    known = seen >= 1 - _UNSEEN
    edge = functional.pad((ids < 0).float()[:, None], (1,) * 4, value=1.0)
    edge = functional.pad(edge, (0, 0, 0, 0, 1, 1), value=float(ids.shape[1] > 1))
    cut = functional.max_pool3d(edge, 3, 1)[:, 0] > 0  # next to something unknown
    for sample in range(ids.shape[0]):
        for number, box in _objects(ids[sample]):
            mask = ids[sample][box] == number
            found = _describe(mask.float(), kernels, sigma_nm)
            result[sample][:, *box] += found.mul_(mask)
            whole = ~(cut[sample][box] & mask).any()
            known[sample][box] |= mask & whole
    return result, known & (ids > 0)


def _moments(n: int, side: float, sigma_nm: float, device: torch.device) -> Tensor:
    """Return (3, n, n): Gaussian weights around each voxel of a row, times the offset (nm) to the power 0, 1, 2.

    A matrix product is faster than a convolution with a kernel that is as long as the row.
    """
    place = torch.arange(n, dtype=torch.float64) * side
    offset = place[None] - place[:, None]
    steps = torch.arange(-math.floor(_WINDOW * sigma_nm / side), math.floor(_WINDOW * sigma_nm / side) + 1)
    total = torch.exp(-((steps * side / sigma_nm) ** 2) / 2).sum()
    weight = torch.exp(-((offset / sigma_nm) ** 2) / 2) * (offset.abs() <= _WINDOW * sigma_nm * (1 + 1e-9)) / total
    return torch.stack([weight, weight * offset, weight * offset**2]).float().to(device, non_blocking=True)


def _apply(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Apply ``matrix`` (n, n) along one of the last three axes of (..., d, h, w)."""
    rows = values.movedim(axis - 3, -1).contiguous()  # one large product instead of many small ones
    return functional.linear(rows, matrix).movedim(-1, axis - 3)


def _objects(ids: Tensor) -> list[tuple[int, tuple[slice, ...]]]:
    """Return the objects of a sample (D, H, W) with their bounding boxes."""
    at = (ids > 0).nonzero()
    numbers, which = ids[tuple(at.T)].unique(return_inverse=True)
    which = which[:, None].expand(-1, 3)
    begin = torch.zeros((len(numbers), 3), dtype=at.dtype, device=at.device)
    end = begin.scatter_reduce(0, which, at + 1, "amax", include_self=False)
    begin = begin.scatter_reduce(0, which, at, "amin", include_self=False)
    boxes = zip(begin.tolist(), end.tolist(), strict=True)
    return [(number, tuple(map(slice, *box))) for number, box in zip(numbers.tolist(), boxes, strict=True)]


def _describe(mask: Tensor, kernels: Sequence[Tensor], sigma_nm: float) -> Tensor:
    """Return the descriptors (10, d, h, w) of one object, float32 (d, h, w), in its box; valid only in the object."""
    moments: dict[tuple[int, ...], Tensor] = {(): mask}
    for axis in (2, 1, 0):
        n = mask.shape[axis]
        moments = {
            (order, *orders): _apply(values, kernels[axis][order, :n, :n], axis)
            for orders, values in moments.items()
            for order in range(3 - sum(orders))
        }
    size = moments[0, 0, 0]
    inverse = 1 / size.clamp(min=torch.finfo(size.dtype).tiny)
    unit = [tuple(int(a == axis) for a in range(3)) for axis in range(3)]
    mean = [moments[axis] * inverse for axis in unit]

    def covariance(a: int, b: int) -> Tensor:
        both = tuple(p + q for p, q in zip(unit[a], unit[b], strict=True))
        return (moments[both] * inverse - mean[a] * mean[b]) / sigma_nm**2

    variance = [covariance(a, a).clamp(min=0) for a in range(3)]
    correlation = [
        covariance(a, b) / ((variance[a] + _THIN) * (variance[b] + _THIN)).sqrt() for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    parts = [*(m / (2 * sigma_nm) + 0.5 for m in mean), *variance, *(c / 2 + 0.5 for c in correlation), size]
    return torch.stack(parts).clamp_(0, 1)
