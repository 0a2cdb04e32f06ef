"""What a run configuration reads of a public source: which crops, and which raw grids around them."""

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

_MODES: tuple[Mode, ...] = ("train", "val")


@dataclass
class Needs:
    """Crops whose labels are wanted, and by raw group the grids (nm) that must be readable."""

    crops: list[Crop]
    raw: dict[str, list[VoxelGrid]] = field(default_factory=dict)

    def add(self, location: str, grid: VoxelGrid) -> None:
        """One more grid on a raw group."""
        if grid.size:
            self.raw.setdefault(location, []).append(grid)

    def add_around(self, boxes: Iterable[tuple[str, Box]], voxel_sizes: Sequence[Triple], context: float) -> None:
        """Raw at each of ``voxel_sizes`` (nm, z y x) in boxes (see `boxes_of_crops`) and ``context`` nm around them."""
        for location, box in boxes:
            for size in voxel_sizes:
                self.add(location, VoxelGrid.covering(box.grow(context), size))


def needs_of_config(config: RunConfig, catalog: Catalog) -> Needs:
    """Everything that training and validating ``config`` on ``catalog`` can look at: patches as far as augmentation
    moves them, further views, and the windows of validation, each at its voxel size."""
    chosen = config.dataset
    crops = catalog.crops(chosen.datasets, chosen.crops, chosen.classes)
    options = replace(patch_options(config), allow_missing_raw=True, cache="none")
    found = Needs(crops)
    for mode in _MODES:
        for volume in run_dataset(config, crops, mode, options).all_volumes:
            found.add(volume.crop.raw, volume.cached_raw_grid)
    return found


def boxes_of_crops(crops: Sequence[Crop]) -> list[tuple[str, Box]]:
    """(raw group, box in nm) of crops of a catalog."""
    return [(crop.raw, crop.box) for crop in crops]


def boxes_of_table(catalog: Catalog, table: CropTable) -> list[tuple[str, Box]]:
    """(raw group, box in nm) of every crop of a table, whose labels nobody has."""
    return [
        (catalog.raw_location(rows[0].dataset), reduce(Box.hull, [row.grid.box for row in rows]))
        for rows in table.crops().values()
    ]
