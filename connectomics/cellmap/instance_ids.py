"""Which object a voxel of any grid belongs to: ids of an instance array, voted as its mask is.

Ids cannot be averaged, but they can be voted: a voxel gets the object that fills most of it, of the very source voxels
whose shares decide that the class is present there (`connectomics.cellmap.labels`). The id at the voxel's centre would
be cheaper, but at a coarser voxel size every other voxel of an object's rim is present with its centre outside: it
would have no object, just where boundaries and affinities are learnt. Where voxel sizes are equal the vote is a copy;
where the grid is finer it is the voxel that holds most of it, the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid
from connectomics.io import resample


def vote_ids(
    values: NDArray[Any], present: NDArray[np.bool_], source: VoxelGrid, target: VoxelGrid
) -> NDArray[np.uint64]:
    """The id that fills most of every voxel of ``target``, uint64 (D, H, W); 0 where no object reaches.

    What is absent or unknown has no vote: an object that fills a tenth of a voxel gets it if no other does, and whether
    the class is present there is for the caller to say. Of two that are alike, to rounding, the one met first (in the
    order z, y, x) is taken.

    Args:
        values: ids (d, h, w) on the grid ``source``, of any unsigned type. present: where they are objects.
    """
    out = np.zeros(target.shape, np.uint64)
    if out.size == 0 or not present.any():
        return out
    from connectomics.cellmap.label_kernels import vote

    (z, y, x), _ = resample.overlap_tables(source, target)
    vote(
        np.ascontiguousarray(values), present,
        *(z.first, z.count, z.weights), *(y.first, y.count, y.weights), *(x.first, x.count, x.weights), out,
    )  # fmt: skip
    return out
