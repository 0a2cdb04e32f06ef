"""Which object a voxel of any grid belongs to: ids of an instance array, voted as its mask is.

Ids cannot be averaged, but they can be voted: a voxel gets the object that fills most of it, of the very source voxels
whose shares decide that the class is present there (`connectomics.cellmap.labels`). The id at the voxel's centre would
be cheaper, but at a coarser voxel size every other voxel of an object's rim is present with its centre outside: it
would have no object, just where boundaries and affinities are learnt. Where voxel sizes are equal the vote is a copy;
where the grid is finer it is the voxel that holds most of it, the nearest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import LabelArray
from connectomics.geometry import VoxelGrid
from connectomics.io import resample


def vote_ids(label: LabelArray, grid: VoxelGrid) -> NDArray[np.uint64]:
    """The id that fills most of every voxel of ``grid``, as stored, uint64 (D, H, W); 0 where no object reaches.

    From the array's finest level. What is absent or unknown has no vote: an object that fills a tenth of a voxel gets
    it if no other does, and whether the class is present there is for the caller to say. Of two that are alike, to
    rounding, the one met first (z, y, x) is taken.

    Args:
        label: an array of ids (``annotation.kind`` is ``instance``).
        grid: any; memory is that of the source voxels below it.
    """
    out = np.zeros(grid.shape, np.uint64)
    part = label.grid.slices(grid.box)
    begin, shape = [s.start for s in part], [s.stop - s.start for s in part]
    if min(shape) == 0 or out.size == 0:
        return out
    values = label.read_stored(begin, shape)
    present, _ = label.annotation.decode(values)
    if not present.any():
        return out
    from connectomics.cellmap.label_kernels import vote

    (z, y, x), _ = resample.overlap_tables(label.grid.crop(begin, shape), grid)
    vote(
        np.ascontiguousarray(values), present,
        *(z.first, z.count, z.weights), *(y.first, y.count, y.weights), *(x.first, x.count, x.weights), out,
    )  # fmt: skip
    return out
