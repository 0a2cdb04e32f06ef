"""What is segmented block by block: where a class is, without the walls between its objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.probabilities import OnGrid, above, open_probabilities, read_block
from connectomics.decoding.watershed.heads import StoredHead
from connectomics.io import store
from connectomics.io.multiscale import Multiscale


@dataclass(frozen=True, eq=False)
class Foreground:
    """The opened probabilities of a class and, where there are any, of the walls between its objects at the same
    voxels: of the class beside it that ``parameters.boundary`` names, or of its head of boundaries."""

    source: Multiscale
    walls: OnGrid | None
    threshold: float

    @classmethod
    def open(cls, location: str, parameters: DecodeParameters) -> Self:
        """``location``: of the class's probabilities, ``.../{crop}/{class}``; what `open_probabilities` and
        `StoredHead.open` raise."""
        source, walls = open_probabilities(location), None
        if parameters.boundary:
            beside = store.join(location.rstrip("/").rpartition("/")[0], parameters.boundary)
            walls = OnGrid(open_probabilities(beside), source.levels[0].grid)
        elif parameters.has_walls:
            walls = OnGrid(StoredHead.open(source, "boundary").source, source.levels[0].grid)
        return cls(source, walls, parameters.threshold)

    def mask(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[np.bool_]:
        """Where the class is, walls and all."""
        return above(read_block(self.source, begin, shape), self.threshold)

    def heights(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """The probability of a wall, as it is stored."""
        assert self.walls is not None  # asked for by those who have seen the parameters
        return self.walls.read(begin, shape)

    def cores(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[np.bool_]:
        """Where the class is and no wall: what is taken apart."""
        mask = self.mask(begin, shape)
        if self.walls is not None and mask.any():
            mask &= ~above(self.walls.read(begin, shape), self.threshold)
        return mask
