"""What the kinds of `intensity_kinds` are built from: filters, noise, smooth random curves and shifted sections.

Axes are z, y, x; lengths are voxels.

Separable linear filters are matrices (n, n), applied along an axis in blocks of their band: seven times faster than
`torch.nn.functional.conv3d` on one CPU core.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_ROWS = 64  # rows of a banded matrix that are applied at once


# -- filters ---------------------------------------------------------------------------------------------------------
def gaussian_matrix(n: int, sigma: float) -> Floats:
    """Return (n, n): a Gaussian of ``sigma`` voxels integrated over voxels, cut at four sigma, mirrored at the ends.

    The weights are those of MONAI's "erf" kernel (`monai.networks.layers.GaussianFilter`), normalized to sum 1; their
    variance is sigma^2 + 1/12. MONAI pads with zeros instead, which darkens the border of a patch.
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


def resolution_matrix(n: int, factor: float) -> Floats:
    """Return (n, n): the mean over each of round(n / factor) larger voxels, interpolated back linearly."""
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
    result: Floats = (1 - share) * down[left] + share * down[right]
    return result


def along(image: Tensor, axis: int, matrix: Floats) -> Tensor:
    """Return the image (C, D, H, W) with ``matrix`` applied along ``axis`` (0 z, 1 y, 2 x)."""
    n = image.shape[axis + 1]
    if np.array_equal(matrix, np.eye(n)):
        return image
    weights = on_device(matrix, image)
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


# -- noise and curves ------------------------------------------------------------------------------------------------
def normal(image: Tensor, seed: int) -> Tensor:
    """Return standard normal numbers of the image's shape on its device, from their own random stream."""
    generator = torch.Generator(device=image.device).manual_seed(seed)
    return torch.randn(image.shape, generator=generator, device=image.device, dtype=torch.float32)


def smooth_rows(n: int, sigma: float) -> Floats:
    """Return (n, n): smooths white noise (Gaussian of ``sigma`` voxels) and keeps its variance 1 everywhere."""
    if sigma <= 0:
        return np.eye(n)
    width = min(sigma, 4.0 * n)  # much wider than the patch is as good as constant
    rows = np.exp(-0.5 * (np.subtract.outer(np.arange(n), np.arange(n)) / width) ** 2)
    result: Floats = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return result


def product(a: Floats, b: Floats) -> Floats:
    """Return ``a @ b`` without BLAS, whose threads would start for a millisecond of work and sum in another order."""
    result: Floats = np.einsum("ij,jk->ik", a, b)
    return result


def to_peak(curve: Floats, amplitude: float) -> Floats:
    """Return the curve scaled so that its largest absolute value is ``amplitude``."""
    peak = float(np.abs(curve).max(initial=0.0))
    return curve * (amplitude / peak) if peak > 1e-12 else np.zeros_like(curve)


def on_device(values: Floats, image: Tensor) -> Tensor:
    """Return the values as a float32 tensor on the device of the image, without waiting for a GPU: pageable memory is
    copied before the call returns, whatever becomes of it."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(image.device, non_blocking=True)


# -- shifted sections ------------------------------------------------------------------------------------------------
def shifted(volume: Tensor, displacement: tuple[int, int]) -> Tensor:
    """Return the volume with its last two axes shifted by (dy, dx) voxels; the edge is repeated in vacated voxels."""
    for axis, move in zip((-2, -1), displacement, strict=True):
        n = volume.shape[axis]
        source = (torch.arange(n, device=volume.device) - move).clamp_(0, n - 1)
        volume = volume.index_select(axis, source)
    return volume


def shift_codes(codes: Tensor, first: int, sections: int, displacement: tuple[int, int], vacated: int = 0) -> Tensor:
    """Shift sections of codes (D, H, W) in place, as `ShiftedSections.apply` shifts the image.

    Vacated voxels get ``vacated``: 0 is the code of unknown voxels.
    """
    run = slice(first, first + sections)
    moved = shifted(codes[run], displacement)
    for axis, move in zip((1, 2), displacement, strict=True):
        n = moved.shape[axis]
        moved.narrow(axis, 0 if move > 0 else n + move, abs(move)).fill_(vacated)
    codes[run] = moved
    return codes
