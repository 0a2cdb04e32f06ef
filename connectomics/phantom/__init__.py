"""Phantom: a seeded data root in CellMap's layout whose ground truth is a function of world position.

`make_phantom` writes one; `connectomics.phantom.scene.Scene` is its world, which can be rendered on any grid.
"""

from connectomics.phantom.options import PHANTOM_CLASSES, PRESETS, CropInfo, PhantomInfo, PhantomOptions
from connectomics.phantom.write import make_phantom

__all__ = ["PHANTOM_CLASSES", "PRESETS", "CropInfo", "PhantomInfo", "PhantomOptions", "make_phantom"]
