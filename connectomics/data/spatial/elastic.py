"""Random displacement fields with the statistics of MONAI's `Rand3DElastic`, drawn on a coarse control grid.

MONAI draws independent noise u, uniform in [-1, 1), for every voxel and axis, smooths it with a separable Gaussian
kernel k of standard deviation sigma voxels (the integral of the Gaussian over each voxel, cut at three sigma, not
normalised) and multiplies it by a magnitude. Such a field is nearly normal, with

    standard deviation = magnitude * sqrt(1/3) * (sum_i k_i^2)^(3/2)     (1/3: the variance of u; one k for each axis)
    correlation over r voxels = exp(-r^2 / (4 sigma^2))                  (a Gaussian folded with itself)

A field that smooth needs no noise at every voxel. It is drawn on control points every h = sigma / 2 voxels (no closer
than one voxel), smoothed with the same kernel of sigma / h control points, which gives the same correlation, and
scaled to the same standard deviation. Linear interpolation over a share t between two control points of correlation
rho lowers the variance to t^2 + (1 - t)^2 + 2 t (1 - t) rho, on average over t to 2/3 + rho/3 for each axis; the scale
makes up for that. Unlike MONAI's, the field does not fade towards the patch's border, where MONAI's kernel meets zeros.
"""

from __future__ import annotations

import math

import numpy as np

from connectomics.data.spatial.mapping import Displacement, Floats

#: in standard deviations: no displacement is larger, so that it is known how far a patch can reach (1 in 5e8 is cut)
LIMIT = 6.0
_TRUNCATED = 3.0  # sigmas, as in MONAI
_UNIFORM_VARIANCE = 1 / 3


def gaussian_kernel(sigma: float) -> Floats:
    """MONAI's kernel (`gaussian_1d`, "erf", truncated at three sigma); float64 (2 tail + 1,)."""
    tail = int(max(sigma * _TRUNCATED, 0.5) + 0.5)
    edges = [math.erf((i - 0.5) / (sigma * math.sqrt(2))) for i in range(-tail, tail + 2)]
    return np.diff(edges) / 2


def standard_deviation(sigma: float, magnitude: float) -> float:
    """Of one component of the displacement, voxels."""
    return abs(magnitude) * math.sqrt(_UNIFORM_VARIANCE) * float((gaussian_kernel(sigma) ** 2).sum()) ** 1.5


def largest(sigma: float, magnitude: float) -> float:
    """The largest displacement along an axis that `draw_field` gives, voxels."""
    return min(abs(magnitude), LIMIT * standard_deviation(sigma, magnitude))


def draw_field(rng: np.random.Generator, sigma: float, magnitude: float, half: Floats) -> Displacement:
    """A field for offsets up to ``half`` (3,) voxels from the centre; ``sigma`` and ``magnitude`` as MONAI's."""
    from connectomics.data.spatial.warp_kernels import smooth

    spacing = max(1.0, sigma / 2)
    kernel = gaussian_kernel(sigma / spacing)
    count = np.maximum(2, np.ceil(2 * half / spacing - 1e-9).astype(int) + 1)
    field = rng.random((3, *(count + len(kernel) - 1)), np.float32) * np.float32(2) - np.float32(1)
    power = float((kernel**2).sum())
    between = 1.0
    if spacing > 1:
        between = 2 / 3 + float((kernel[1:] * kernel[:-1]).sum()) / power / 3
    wanted = standard_deviation(sigma, magnitude)
    scale = wanted / (math.sqrt(_UNIFORM_VARIANCE) * (power * between) ** 1.5)
    for axis in (1, 2, 3):
        shape = list(field.shape)
        shape[axis] = count[axis - 1]
        after = math.prod(shape[axis + 1 :])
        before = math.prod(shape[:axis])
        smoothed = np.empty((before, shape[axis] * after), np.float32)
        smooth(field.reshape(before, -1), kernel.astype(np.float32), after, smoothed)
        field = smoothed.reshape(shape)
    limit = np.float32(largest(sigma, magnitude))
    return Displacement(np.clip(field * np.float32(scale), -limit, limit), (spacing, spacing, spacing))
