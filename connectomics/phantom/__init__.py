"""Phantom: a seeded data root in CellMap's layout whose ground truth is a function of world position.

`make_phantom` writes one; `connectomics.phantom.scene.Scene` is its world, which can be rendered on any grid.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from connectomics.phantom.options import PHANTOM_CLASSES, PRESETS, CropInfo, PhantomInfo, PhantomOptions

__all__ = ["PHANTOM_CLASSES", "PRESETS", "CropInfo", "PhantomInfo", "PhantomOptions", "make_phantom"]


def make_phantom(
    out: str | Path, options: PhantomOptions | None = None, progress: Callable[[str], None] | None = None
) -> PhantomInfo:
    """Write a phantom to the folder ``out``; see `connectomics.phantom.write.make_phantom`."""
    from connectomics.phantom.write import make_phantom as make  # compiled kernels are imported only when used

    return make(out, options, progress)
