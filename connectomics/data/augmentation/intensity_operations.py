"""What is done to one patch: plain functions of an image (C, D, H, W) float32 and a few numbers.

They own the image that they are handed: it may be overwritten, and what they return is the result. Values may leave
[0, 1] on the way; `IntensityAugmentor` clamps once at the end. Numbers come from the host, so nothing here waits for a
GPU. Axes are z, y, x; lengths are voxels.

Linear filters that work axis by axis are matrices (n, n) applied along an axis, in blocks of their band: on one CPU
core that is seven times faster than `torch.nn.functional.conv3d` on a single channel, whatever the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
_ROWS = 64  # rows of a banded matrix applied at once


# --- filters -----------------------------------------------------------------------------------------------------


def gaussian_matrix(n: int, sigma: float) -> NDArray[np.float64]:
    """(n, n): a Gaussian of ``sigma`` voxels integrated over each voxel, cut at four sigma, mirrored at the ends.

    The weights are MONAI's "erf" kernel (`monai.networks.layers.GaussianFilter`), normalised to sum 1: their variance
    is sigma^2 + 1/12. MONAI pads with zeros instead, which darkens the border of a patch.
    """
    if sigma <= 0:
        return np.eye(n)
    tail = int(max(4.0 * sigma, 0.5) + 0.5)
    edges = (np.arange(-tail, tail + 2) - 0.5) / (sigma * math.sqrt(2.0))
    weights = np.diff([math.erf(e) for e in edges])
    weights /= weights.sum()
    matrix = np.zeros((n, n))
    rows = np.arange(n)
    for offset, weight in zip(range(-tail, tail + 1), weights, strict=True):
        columns = (rows + offset) % (2 * n)
        matrix[rows, np.where(columns < n, columns, 2 * n - 1 - columns)] += weight
    return matrix


def resolution_matrix(n: int, factor: float) -> NDArray[np.float64]:
    """(n, n): to round(n / factor) voxels, each the mean of what it covers, and back by linear interpolation."""
    coarse = max(1, round(n / factor))
    if coarse >= n:
        return np.eye(n)
    size = n / coarse
    begin, fine = np.arange(coarse)[:, None] * size, np.arange(n)[None, :]
    down = np.clip(np.minimum(begin + size, fine + 1) - np.maximum(begin, fine), 0, None) / size
    position = np.clip((np.arange(n) + 0.5) / size - 0.5, 0, coarse - 1)
    left = np.minimum(position.astype(int), max(0, coarse - 2))
    share = (position - left)[:, None]
    right = np.minimum(left + 1, coarse - 1)
    result: NDArray[np.float64] = (1 - share) * down[left] + share * down[right]
    return result


def along(image: Tensor, axis: int, matrix: NDArray[np.float64]) -> Tensor:
    """The image with ``matrix`` applied along ``axis`` (0 z, 1 y, 2 x); skipped where it is the identity."""
    n = image.shape[axis + 1]
    if np.array_equal(matrix, np.eye(n)):
        return image
    weights = torch.from_numpy(matrix.astype(np.float32)).to(image.device)
    before = math.prod(image.shape[: axis + 1])
    source = image.reshape(-1, n) if axis == 2 else image.reshape(before, n, -1)
    result = torch.empty_like(source)
    for first in range(0, n, _ROWS):
        rows = slice(first, min(n, first + _ROWS))
        used = np.flatnonzero(matrix[rows].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        part = weights[rows, columns]
        if axis == 2:
            result[:, rows] = source[:, columns] @ part.T
        else:
            result[:, rows] = torch.matmul(part, source[:, columns])
    return result.reshape(image.shape)


def blur(image: Tensor, sigma: Sequence[float]) -> Tensor:
    """Gaussian of ``sigma`` voxels along z, y, x (see `gaussian_matrix`)."""
    for axis, width in enumerate(sigma):
        image = along(image, axis, gaussian_matrix(image.shape[axis + 1], width))
    return image


def resolution(image: Tensor, factor: Sequence[float]) -> Tensor:
    """Voxels ``factor`` times as large along z, y, x, interpolated back (see `resolution_matrix`)."""
    for axis, times in enumerate(factor):
        image = along(image, axis, resolution_matrix(image.shape[axis + 1], times))
    return image


# --- the detector ------------------------------------------------------------------------------------------------


def normal(image: Tensor, seed: int) -> Tensor:
    """Standard normal numbers of the image's shape, from a stream of its own on the image's device."""
    generator = torch.Generator(device=image.device).manual_seed(seed)
    return torch.randn(image.shape, generator=generator, device=image.device, dtype=torch.float32)


def noise(image: Tensor, mean: float, std: float, seed: int) -> Tensor:
    """Add Gaussian noise, each voxel and channel on its own."""
    added = normal(image, seed).mul_(std)
    return added.add_(image).add_(mean) if mean else added.add_(image)


def poisson(image: Tensor, dose: float, seed: int) -> Tensor:
    """Shot noise of ``dose`` electrons a voxel at value 1: variance value / dose.

    The normal approximation of the Poisson law, good from about ten electrons: exact counts take fifteen times as long.
    """
    deviation = image.clamp(min=0).mul_(1.0 / dose).sqrt_()
    return image.addcmul_(deviation, normal(image, seed))


def gain(image: Tensor, factor: float) -> Tensor:
    """Multiply."""
    return image.mul_(factor)


def contrast(image: Tensor, factor: float) -> Tensor:
    """Multiply the distance from the patch's mean."""
    return image.lerp_(image.mean(), 1.0 - factor)


def brightness(image: Tensor, shift: float) -> Tensor:
    """Add."""
    return image.add_(shift)


def gamma(image: Tensor, exponent: float) -> Tensor:
    """``((x - min) / (max - min)) ** exponent * (max - min) + min`` with the patch's extremes.

    The formula of `monai.transforms.AdjustContrast`.
    """
    low, high = image.aminmax()
    extent = high - low
    return image.sub_(low).div_(extent + 1e-7).clamp_(min=0).pow_(exponent).mul_(extent).add_(low)


def drift(image: Tensor, curve: NDArray[np.float64]) -> Tensor:
    """Add ``curve`` (D,), one value a section."""
    return image.add_(_like(curve, image)[:, None, None])


# --- the sample --------------------------------------------------------------------------------------------------


def stripes(image: Tensor, profile: NDArray[np.float64], axis: str) -> Tensor:
    """Add ``profile`` (D, n), constant along ``axis`` ("y": n is W; "x": n is H)."""
    added = _like(profile, image)
    return image.add_(added[:, None, :] if axis == "y" else added[:, :, None])


def charging(
    image: Tensor,
    centers: Sequence[Sequence[float]],
    radii: Sequence[Sequence[float]],
    halo: Sequence[float],
    heights: Sequence[float],
) -> Tensor:
    """Add spots: a Gaussian core of ``radii`` (z, y, x) and a halo ``halo`` times as wide in y, x and 0.4 as high.

    ``centers`` are voxel positions, ``heights`` the value added in the middle (negative: dark).
    """
    shape = image.shape[1:]
    for center, radius, wide, height in zip(centers, radii, halo, heights, strict=True):
        for share, times in ((0.6, 1.0), (0.4, wide)):
            reach = [radius[0], radius[1] * times, radius[2] * times]
            slices, factors = [], []
            for axis in range(3):
                low = max(0, math.floor(center[axis] - 4 * reach[axis]))
                high = min(shape[axis], math.ceil(center[axis] + 4 * reach[axis]) + 1)
                distance = (np.arange(low, high) - center[axis]) / reach[axis]
                slices.append(slice(low, high))
                factors.append(_like(np.exp(-0.5 * distance**2), image))
            z, y, x = factors
            spot = (z * (height * share))[:, None, None] * y[:, None] * x
            image[:, slices[0], slices[1], slices[2]] += spot
    return image


# --- sections and boxes ------------------------------------------------------------------------------------------


def missing_sections(image: Tensor, sections: Sequence[int], fill: str) -> Tensor:
    """Lose whole sections: ``black`` 0, ``white`` 1, ``mean`` of the patch, ``copy`` of the nearest that is left."""
    lost = sorted(sections)
    if not lost:
        return image
    if fill == "copy":
        kept = [z for z in range(image.shape[1]) if z not in set(lost)]
        nearest = [min(kept, key=lambda z, at=at: (abs(z - at), z)) for at in lost]  # type: ignore[misc]
        for at, source in zip(lost, nearest, strict=True):
            image[:, at] = image[:, source]
        return image
    value = {"black": 0.0, "white": 1.0, "mean": image.mean() if fill == "mean" else 0.0}[fill]
    for at in lost:
        image[:, at] = value
    return image


def shift_image(image: Tensor, first: int, sections: int, displacement: tuple[int, int]) -> Tensor:
    """Move a run of sections by ``displacement`` voxels (y, x): what was at (y, x) is at (y + dy, x + dx) then.

    Vacated voxels get the value of the edge that moved away.
    """
    run = slice(first, first + sections)
    image[:, run] = _moved(image[:, run], displacement)
    return image


def shift_codes(codes: Tensor, first: int, sections: int, displacement: tuple[int, int], vacated: int = 0) -> Tensor:
    """`shift_image` for codes (D, H, W) of any integer type; vacated voxels get 0, the code of what is unknown, or what
    stands for unknown in ``codes``."""
    run = slice(first, first + sections)
    moved = _moved(codes[run], displacement)
    for axis, move in zip((1, 2), displacement, strict=True):
        n = moved.shape[axis]
        moved.narrow(axis, 0 if move > 0 else n + move, abs(move)).fill_(vacated)
    codes[run] = moved
    return codes


def _moved(volume: Tensor, displacement: tuple[int, int]) -> Tensor:
    """The last two axes moved, the edge repeated where nothing came."""
    for axis, move in zip((-2, -1), displacement, strict=True):
        n = volume.shape[axis]
        source = (torch.arange(n, device=volume.device) - move).clamp_(0, n - 1)
        volume = volume.index_select(axis, source)
    return volume


def cutout(image: Tensor, boxes: Sequence[Box], fill: str, seed: int) -> Tensor:
    """Fill boxes with the patch's ``mean``, or with Gaussian ``noise`` of its mean and standard deviation."""
    mean = image.mean()
    deviation = image.std(correction=0) if fill == "noise" else None
    for number, box in enumerate(boxes):
        inside = image[(slice(None), *(slice(low, high) for low, high in box))]
        if deviation is None:
            inside.copy_(mean.expand_as(inside))
        else:
            inside.copy_(normal(inside, seed + number).mul_(deviation).add_(mean))
    return image


# --- random curves (numpy: few numbers, the same on every device) -----------------------------------------------------


def smooth_rows(n: int, sigma: float) -> NDArray[np.float64]:
    """(n, n): makes white noise smooth (Gaussian of ``sigma`` voxels) and leaves its variance 1 at each place."""
    if sigma <= 0:
        return np.eye(n)
    width = min(sigma, 4.0 * n)  # wider than the patch by far is as good as constant
    rows = np.exp(-0.5 * (np.subtract.outer(np.arange(n), np.arange(n)) / width) ** 2)
    result: NDArray[np.float64] = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return result


def product(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a @ b`` without BLAS, whose threads would be woken for a millisecond's work and would sum in another order."""
    result: NDArray[np.float64] = np.einsum("ij,jk->ik", a, b)
    return result


def to_peak(curve: NDArray[np.float64], amplitude: float) -> NDArray[np.float64]:
    """The curve scaled so that its largest absolute value is ``amplitude``."""
    peak = float(np.abs(curve).max(initial=0.0))
    return curve * (amplitude / peak) if peak > 1e-12 else np.zeros_like(curve)


def _like(values: NDArray[np.float64], image: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(image.device)
