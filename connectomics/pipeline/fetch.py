"""The crops and raw grids that a run configuration reads from a public source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.crop_table import CropTable
from connectomics.config.schema import RunConfig
from connectomics.data.dataset.build import patch_options, run_dataset
from connectomics.data.dataset.dataset_cellmap import Mode
from connectomics.geometry import Box, Triple, VoxelGrid


@dataclass
class Needs:
    """Crops whose labels are needed, and the grids (nm) that must be readable, by raw group."""

    crops: list[Crop]
    raw: dict[str, list[VoxelGrid]] = field(default_factory=dict)

    def add(self, location: str, grid: VoxelGrid) -> None:
        """Add a grid on a raw group."""
        if grid.size:
            self.raw.setdefault(location, []).append(grid)

    def add_around(self, boxes: Iterable[tuple[str, Box]], voxel_sizes: Sequence[Triple], context: float) -> None:
        """Add raw at each of ``voxel_sizes`` (nm, z y x) in boxes (see `boxes_of_crops`) and ``context`` nm around."""
        for location, box in boxes:
            for size in voxel_sizes:
                self.add(location, VoxelGrid.covering(box.grow(context), size))


def needs_of_config(config: RunConfig, catalog: Catalog) -> Needs:
    """Return everything that training and validating ``config`` on ``catalog`` can read.

    That is patches including the margin that augmentation needs, further inputs, and validation windows, each at its
    voxel size.
    """
    chosen = config.dataset
    crops = catalog.crops(chosen.datasets, chosen.crops, chosen.classes)
    options = replace(patch_options(config), allow_missing_raw=True, cache="none")
    found = Needs(crops)
    modes: tuple[Mode, ...] = ("train", "val")
    for mode in modes:
        for volume in run_dataset(config, crops, mode, options).all_volumes:
            found.add(volume.crop.raw, volume.cached_raw_grid)
    return found


def boxes_of_crops(crops: Sequence[Crop]) -> list[tuple[str, Box]]:
    """Return (raw group, box in nm) for crops of a catalog."""
    return [(crop.raw, crop.box) for crop in crops]


def boxes_of_table(catalog: Catalog, table: CropTable) -> list[tuple[str, Box]]:
    """Return (raw group, box in nm) for every crop of a table of crops without labels."""
    return [
        (catalog.raw_location(rows[0].dataset), reduce(Box.hull, [row.grid.box for row in rows]))
        for rows in table.crops().values()
    ]
