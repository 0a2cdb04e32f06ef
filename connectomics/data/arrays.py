"""One crop's raw and label codes as plain arrays on one lattice: what the spatial pass samples from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates
from connectomics.geometry import Index, index
from connectomics.io.mirror import Extent, take


@dataclass(frozen=True)
class CropArrays:
    """Raw and labels of (a part of) a crop; lattice index 0 is the first voxel of the crop's own grid, z y x.

    Beyond ``codes`` everything is unknown (state 0); beyond ``raw`` there is no raw.
    """

    raw: NDArray[np.uint8]  # (D, H, W)
    raw_begin: Index  # lattice index of raw[0, 0, 0]
    inside: NDArray[np.bool_] | None  # (D, H, W), whether a voxel has raw; None if all have
    codes: NDArray[np.unsignedinteger]  # uint8, uint16 or uint32 (d, h, w), rows of states
    codes_begin: Index  # lattice index of codes[0, 0, 0]
    states: LabelStates  # what the codes mean
    fill: float = 0.0  # image value, on the unit scale, of voxels without raw: the mean of tissue

    def mirrored(self, extent: Extent, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
        """Return arrays whose raw covers lattice indices ``lo`` to ``hi`` (exclusive), mirrored where the volume ends.

        Codes are not mirrored; those beyond the raw volume are dropped.

        Args:
            extent: the raw volume on the lattice, not empty. ``raw`` must hold the voxels that are mirrored.
        """
        if extent.holds(lo, hi):
            return self
        places = extent.mirrored(lo, hi)
        first, last = list(self.codes_begin), [b + n for b, n in zip(self.codes_begin, self.codes.shape, strict=True)]
        if not extent.holds(first, last):  # labels beyond the raw: keep the requested part
            low = [max(a, b) for a, b in zip(extent.low, lo, strict=True)]
            high = [min(a, b) for a, b in zip(extent.high, hi, strict=True)]
            first = [min(max(b, f), e) for b, f, e in zip(first, low, last, strict=True)]
            last = [max(f, min(e, h)) for f, e, h in zip(first, last, high, strict=True)]
        kept = tuple(slice(f - b, e - b) for f, e, b in zip(first, last, self.codes_begin, strict=True))
        return replace(
            self,
            raw=take(self.raw, self.raw_begin, places),
            raw_begin=index(lo),
            inside=None if self.inside is None else take(self.inside, self.raw_begin, places),
            codes=self.codes[kept],
            codes_begin=index(first),
        )
