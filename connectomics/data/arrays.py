"""One crop's raw and label codes as plain arrays on one lattice: what the spatial pass samples from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates
from connectomics.geometry import Index


@dataclass(frozen=True)
class CropArrays:
    """Raw and labels of (a part of) a crop; lattice index 0 is the first voxel of the crop's own grid, z y x.

    Attributes:
        raw: uint8 (D, H, W). raw_begin: lattice index of ``raw[0, 0, 0]``.
        inside: bool, as ``raw``: False where there is no raw; None where there is raw everywhere in the block.
        codes: uint8, uint16 or uint32 (d, h, w), rows of ``states``. codes_begin: lattice index of ``codes[0, 0, 0]``.
        states: what the codes mean. Beyond ``codes`` everything is unknown (state 0); beyond ``raw`` there is no raw.
    """

    raw: NDArray[np.uint8]
    raw_begin: Index
    inside: NDArray[np.bool_] | None
    codes: NDArray[np.unsignedinteger]
    codes_begin: Index
    states: LabelStates
