"""Phantom: a seeded data root in CellMap's layout whose truth is a function of world position.

`make_phantom` writes one; `Scene` (in `phantom.scene`) is its world, to be asked on any grid. Nothing compiled is
loaded before one of them is used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from connectomics.phantom.options import PHANTOM_CLASSES, PRESETS, CropInfo, PhantomInfo, PhantomOptions

__all__ = ["PHANTOM_CLASSES", "PRESETS", "CropInfo", "PhantomInfo", "PhantomOptions", "make_phantom"]


def make_phantom(
    out: str | Path, options: PhantomOptions | None = None, progress: Callable[[str], None] | None = None
) -> PhantomInfo:
    """Write a phantom to the folder ``out``; see `connectomics.phantom.make.make_phantom`."""
    from connectomics.phantom.make import make_phantom as make

    return make(out, options, progress)
