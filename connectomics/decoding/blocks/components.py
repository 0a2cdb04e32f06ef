"""Connected components of volumes of any size, equal to those of the whole array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.blocks.stitched import Labelled, StitchedTask
from connectomics.decoding.cellmap_postprocess import components
from connectomics.errors import ConfigError


@dataclass(frozen=True)
class ComponentsTask(StitchedTask):
    """Connected components of one class's probabilities, or the mask of those that are kept (method ``threshold``).

    The labels are those of `connectomics.decoding.decode.decode_class` (`decode_between` with a boundary class) on the
    whole array, number by number, whatever the blocks.

    Raises:
        ConfigError: another method.
    """

    kind: ClassVar[str] = "components"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters.method not in ("cc3d", "threshold"):
            raise ConfigError(
                f"components of {self.class_name}: expected method cc3d or threshold, found {self.parameters.method}"
            )

    def open_labeller(self) -> Callable[[int], Labelled]:
        foreground, lattice = self.open_foreground(), self.lattice
        least = self.parameters.min_voxels(foreground.source.levels[0].grid.voxel_size)

        def label(number: int) -> Labelled:
            begin, shape = lattice.region(number)
            labels = components(foreground.cores(begin, shape), self.parameters.connectivity).astype(
                np.uint32, copy=False
            )
            n = int(labels.max())
            if self.parameters.fill_holes:  # also small ones may hold a cavity, or lie in one
                return Labelled(labels, n)
            pieces = Pieces.measured(labels, n, begin, lattice.shape)
            small = pieces.inside(begin, shape, lattice.shape) & (pieces.sizes < least)
            if small.any():  # whole and too small: no other block has a say in it
                n -= int(small.sum())
                table = np.zeros(len(small) + 1, np.uint32)
                table[1:][~small] = np.arange(1, n + 1)
                for plane in labels:  # in place
                    plane[...] = table[plane]
            return Labelled(labels, n)

        return label
