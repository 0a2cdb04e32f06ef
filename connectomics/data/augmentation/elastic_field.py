"""Random displacement fields with the statistics of MONAI's `Rand3DElastic`, drawn on a coarse control grid.

MONAI smooths noise u, uniform in [-1, 1) at every voxel, with a separable Gaussian kernel k of sigma voxels (integrated
over voxels, truncated at three sigma, not normalized), times a magnitude. Such a field is nearly normal, with

    standard deviation = magnitude * sqrt(1/3) * (sum_i k_i^2)^(3/2)     (1/3: the variance of u; one k per axis)
    correlation over r voxels = exp(-r^2 / (4 sigma^2))                  (a Gaussian convolved with itself)

Here it is drawn on control points every h = sigma / 2 voxels (at least one), smoothed with a kernel of sigma / h
points (the same correlation) and scaled to the same standard deviation. Linear interpolation between control points of
correlation rho lowers the variance on average to 2/3 + rho/3 per axis; the scale corrects for that. Unlike MONAI's
field, this one does not fade towards the patch border, where MONAI pads with zeros.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from connectomics.data.augmentation.coordinate_map import Displacement, Floats
from connectomics.geometry import Triple

#: standard deviations: displacements are clipped here, so that the reach of a patch is known (1 in 5e8 is clipped)
LIMIT = 6.0
_TRUNCATED = 3.0  # sigmas, as in MONAI
_UNIFORM_VARIANCE = 1 / 3


def gaussian_kernel(sigma: float) -> Floats:
    """Return MONAI's kernel (`gaussian_1d`, "erf", truncated at three sigma); float64 (2 tail + 1,)."""
    tail = int(max(sigma * _TRUNCATED, 0.5) + 0.5)
    edges = [math.erf((i - 0.5) / (sigma * math.sqrt(2))) for i in range(-tail, tail + 2)]
    return np.diff(edges) / 2


def standard_deviation(sigma: float, magnitude: float) -> float:
    """Return the standard deviation of one component of the displacement, voxels."""
    return abs(magnitude) * math.sqrt(_UNIFORM_VARIANCE) * float((gaussian_kernel(sigma) ** 2).sum()) ** 1.5


def largest_displacement(sigma: float, magnitude: float) -> float:
    """Return the largest displacement along an axis that `draw_field` gives, voxels."""
    return min(abs(magnitude), LIMIT * standard_deviation(sigma, magnitude))


def draw_field(rng: np.random.Generator, sigma: float, magnitude: float, half: Floats) -> Displacement:
    """Draw a field for offsets up to ``half`` (3,) voxels from the center; ``sigma``, ``magnitude`` as in MONAI."""
    field, spacing = smooth_field(rng, np.full(3, sigma), half)
    limit = np.float32(largest_displacement(sigma, magnitude))
    scale = np.float32(standard_deviation(sigma, magnitude))
    return Displacement(np.clip(field * scale, -limit, limit), spacing)


def smooth_field(rng: np.random.Generator, sigma: Floats, half: Floats) -> tuple[NDArray[np.float32], Triple]:
    """Draw a field (3, nz, ny, nx) of standard deviation 1 for offsets up to ``half`` (3,) voxels from the center, and
    return it with the voxels between its control points, z y x.

    The correlation over r voxels along an axis is exp(-r^2 / (4 sigma^2)) with its ``sigma`` (3,), voxels.
    """
    from connectomics.data.augmentation.warp_kernels import smooth

    spacing = np.maximum(1.0, sigma / 2)
    kernels = [gaussian_kernel(s) for s in (sigma / spacing).tolist()]
    count = np.maximum(2, np.ceil(2 * half / spacing - 1e-9).astype(int) + 1)
    drawn = [n + len(kernel) - 1 for n, kernel in zip(count.tolist(), kernels, strict=True)]
    field = rng.random((3, *drawn), np.float32) * np.float32(2) - np.float32(1)
    variance = _UNIFORM_VARIANCE
    for axis, (kernel, step) in enumerate(zip(kernels, spacing, strict=True), start=1):
        power = float((kernel**2).sum())
        variance *= power * (2 / 3 + float((kernel[1:] * kernel[:-1]).sum()) / power / 3 if step > 1 else 1.0)
        shape = list(field.shape)
        shape[axis] = count[axis - 1]
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        smoothed = np.empty((before, shape[axis] * after), np.float32)
        smooth(field.reshape(before, -1), kernel.astype(np.float32), after, smoothed)
        field = smoothed.reshape(shape)
    z, y, x = spacing.tolist()
    return field * np.float32(1 / math.sqrt(variance)), (z, y, x)
