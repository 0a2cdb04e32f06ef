"""Strides and kernels of the stages of a U-Net for anisotropic voxels."""

from __future__ import annotations

from collections.abc import Sequence

from connectomics.errors import InputError
from connectomics.geometry import Index, index

_NEAR = 2.0  # an axis takes part if its voxel is smaller than this many times the smallest
_LEAST_EDGE = 4  # voxels along an axis of the coarsest level


def stages_for(
    voxel_size: Sequence[float], patch_size: Sequence[int], most: int = 6
) -> tuple[list[Index], list[Index]]:
    """Return strides and kernels (z, y, x) of the stages of a U-Net, finest first, by nnU-Net's rules.

    A stage halves the axes whose voxels, at its level, are less than twice as large as the smallest, so that voxels
    become isotropic; a kernel is 3 along an axis once its voxel is that near, else 1. An axis is halved as long as its
    edge stays even and at least 4 (Isensee et al., Nature Methods 18, 2021, supplementary note 2).

    Args:
        voxel_size: nm, z y x. patch_size: voxels, z y x. most: largest number of stages.

    Returns:
        For each stage its stride (that of the first is 1 everywhere) and its kernel.

    Raises:
        InputError: ``voxel_size`` or ``patch_size`` are not three positive numbers, or no stage fits.
    """
    size, edge = [float(v) for v in voxel_size], [int(n) for n in patch_size]
    if len(size) != 3 or len(edge) != 3 or min(size) <= 0 or min(edge) < 1:
        raise InputError(
            f"voxel_size and patch_size must be three positive numbers (z, y, x), got {list(voxel_size)} and "
            f"{list(patch_size)}"
        )
    strides, kernels, kernel = [(1, 1, 1)], [], [1, 1, 1]
    while True:
        kernel = [3 if v < _NEAR * min(size) else k for v, k in zip(size, kernel, strict=True)]
        kernels.append(index(kernel))
        can = [n >= 2 * _LEAST_EDGE and n % 2 == 0 for n in edge]
        least = min((v for v, fits in zip(size, can, strict=True) if fits), default=0.0)
        halved = [fits and v < _NEAR * least for v, fits in zip(size, can, strict=True)]
        if len(strides) == most or not any(halved):
            break
        strides.append(index(2 if half else 1 for half in halved))
        size = [v * s for v, s in zip(size, strides[-1], strict=True)]
        edge = [n // s for n, s in zip(edge, strides[-1], strict=True)]
    if len(strides) < 2:
        raise InputError(
            f"patch_size {list(patch_size)} is too small for a U-Net: expected an even edge of at least "
            f"{2 * _LEAST_EDGE} voxels along the axis of the smallest voxels"
        )
    return strides, kernels
