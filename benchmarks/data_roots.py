"""Data roots for the benchmarks: pieces of the phantom, in CellMap's layout.

    python benchmarks/data_roots.py data/rare

makes the `annotated_volume` of active_learning.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from math import pi
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import connectomics as cx
from connectomics.geometry import Box, Index, VoxelGrid, slices_of
from connectomics.phantom import PHANTOM_CLASSES, write
from connectomics.phantom.layout import CropPlan, DatasetPlan
from connectomics.phantom.scene import Scene, Tone, class_mask

#: Fourteen classes as a run would have them: instances, groups, membranes and lumina.
FOURTEEN = (
    "mito", "nuc", "er", "ld", "lyso", "endo", "golgi", "ves", "pm", "ecs", "cyto", "mito_mem", "er_mem", "chrom",
)  # fmt: skip
THREE = FOURTEEN[:3]
#: Two frequent classes, and three that fill less than 1 % of the cell.
RARE = ("mito", "er", "ld", "lyso", "endo")
#: Flips and a rotation by any angle about every axis in every patch.
AUGMENTED: dict[str, Any] = {
    **{f"RandFlipd_{a + 2}": {"keys": ["image", "label"], "prob": 0.5, "spatial_axis": a} for a in range(3)},
    "RandAffined": {
        "keys": ["image", "label"],
        "prob": 1.0,
        "rotate_range": [pi, pi, pi],
        "mode": ["bilinear", "nearest"],
    },
}


def one_large_crop(out: Path, raw_nm: float = 2000.0, crop_nm: float = 1320.0, voxel_nm: float = 4.0) -> Path:
    """A root with one data set of 4 nm raw and in its middle one crop at 4 nm that has all 48 classes; patches of 128
    voxels of 8 nm lie within it. Made once. ``voxel_nm``: another voxel size of both."""
    if not (out / ".complete").is_file():
        shutil.rmtree(out, ignore_errors=True)
        raw = VoxelGrid.covering(Box((-voxel_nm / 2,) * 3, (raw_nm - voxel_nm / 2,) * 3), (voxel_nm,) * 3)
        plan = DatasetPlan("phantom-bench", raw, Tone(1.0, 0.0, 10.0), 0, 1)
        begin = round((raw_nm - crop_nm) / 2 / voxel_nm)
        grid = raw.crop((begin,) * 3, (round(crop_nm / voxel_nm),) * 3)
        scene = plan.scene()
        write.write_training_crop(out, plan, scene, CropPlan(1, False, dict.fromkeys(PHANTOM_CLASSES, grid)))
        write.write_raw(out, plan, scene)
        (out / ".complete").touch()
    return out


def forty_crops(out: Path, crops: int = 40, raw_nm: float = 2400.0) -> Path:
    """A root with one data set of 8 nm raw and crops of 100 to 150 voxels of 8 nm a side with all 48 classes, at places
    of their own. Four of them are rendered, the others are these moved (their labels lie elsewhere in the raw, which
    matters to nobody who measures memory). Made once."""
    if not (out / ".complete").is_file():
        shutil.rmtree(out, ignore_errors=True)
        raw = VoxelGrid.covering(Box((0.0,) * 3, (raw_nm,) * 3), (8.0,) * 3)
        plan = DatasetPlan("phantom-forty", raw, Tone(1.0, 0.0, 10.0), 0, 1)
        scene = plan.scene()
        sides = (100, 112, 130, 150)
        rng = np.random.default_rng(0)
        for number, side in enumerate(sides, start=1):
            grid = raw.crop((50,) * 3, (side,) * 3)
            write.write_training_crop(out, plan, scene, CropPlan(number, False, dict.fromkeys(PHANTOM_CLASSES, grid)))
        groundtruth = write.recon(out, plan.name) / "labels" / "groundtruth"
        for number in range(len(sides) + 1, crops + 1):
            model = (number - 1) % len(sides) + 1
            shutil.copytree(groundtruth / f"crop{model}", groundtruth / f"crop{number}", copy_function=os.link)
            free = raw.shape[0] - sides[model - 1]
            _move(groundtruth / f"crop{number}", [8.0 * (int(n) - 50) for n in rng.integers(0, free, 3)])
        write.write_raw(out, plan, scene)
        (out / ".complete").touch()
    return out


def annotated_volume(out: Path, classes: Sequence[str] = RARE, shape: Index = (256, 288, 288), seed: int = 11) -> Path:
    """A root with one data set of 8 nm raw, all of which is annotated, as crop1. Made once."""
    if not out.exists():
        grid = VoxelGrid((8.0, 8.0, 8.0), (4.0, 4.0, 4.0), shape)
        scene = Scene.build(seed, grid.box, lattice=grid)
        raw, atoms = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        for begin, block in grid.blocks((32, *shape[1:])):
            part, where = scene.render(block), slices_of(begin, block.shape)
            raw[where], atoms[where] = part.raw, part.atoms
        with TemporaryDirectory() as folder:
            files = {name: Path(folder, f"{name}.npy") for name in ("raw", *classes)}
            np.save(files["raw"], raw)
            for name in classes:
                np.save(files[name], class_mask(atoms, name).view(np.uint8))
            labels = {f"{name}:semantic": str(files[name]) for name in classes}
            cx.ingest(out, "phantom", raw=str(files["raw"]), labels=labels, voxel_size=(8.0, 8.0, 8.0))
    return out


def _move(crop: Path, by: list[float]) -> None:
    """Shift every multiscale of a crop by nm, z y x."""
    for file in crop.glob("*/.zattrs"):
        attrs = json.loads(file.read_text(encoding="utf-8"))
        for level in attrs["multiscales"][0]["datasets"]:
            for transform in level["coordinateTransformations"]:
                if transform["type"] == "translation":
                    transform["translation"] = [t + b for t, b in zip(transform["translation"], by, strict=True)]
        file.unlink()  # it is a link to that of the crop it was copied from
        file.write_text(json.dumps(attrs), encoding="utf-8")


if __name__ == "__main__":
    annotated_volume(Path(sys.argv[1]))
