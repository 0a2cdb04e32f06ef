"""Data roots for the benchmarks of the data path: pieces of the phantom, in CellMap's layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from connectomics.cellmap.phantom import PHANTOM_CLASSES, write
from connectomics.cellmap.phantom.layout import CropPlan, DatasetPlan
from connectomics.cellmap.phantom.scene import Tone
from connectomics.geometry import Box, VoxelGrid

#: Fourteen classes as a run would have them: instances, groups, membranes and lumina.
FOURTEEN = (
    "mito", "nuc", "er", "ld", "lyso", "endo", "golgi", "ves", "pm", "ecs", "cyto", "mito_mem", "er_mem", "chrom",
)  # fmt: skip
THREE = FOURTEEN[:3]


def one_large_crop(out: Path, raw_nm: float = 2000.0, crop_nm: float = 1320.0) -> Path:
    """A root with one data set of 4 nm raw and in its middle one crop at 4 nm that has all 48 classes; patches of 128
    voxels of 8 nm lie within it. Made once."""
    if not (out / ".complete").is_file():
        shutil.rmtree(out, ignore_errors=True)
        raw = VoxelGrid.covering(Box((-2.0,) * 3, (raw_nm - 2.0,) * 3), (4.0,) * 3)
        plan = DatasetPlan("phantom-bench", raw, Tone(1.0, 0.0, 10.0), 0, 1)
        begin = round((raw_nm - crop_nm) / 8)
        grid = raw.crop((begin,) * 3, (round(crop_nm / 4),) * 3)
        scene = plan.scene()
        write.write_training_crop(out, plan, scene, CropPlan(1, False, dict.fromkeys(PHANTOM_CLASSES, grid)))
        write.write_raw(out, plan, scene)
        (out / ".complete").touch()
    return out
