"""The page of proposals: a picture of each box, its place, and why it was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.io.replacing import write_file
from connectomics.pages import colors, figures, page

_LONGEST = 360  # pixels of the longest side of a section


def section_picture(
    raw: NDArray[np.float32], labels: Mapping[str, NDArray[Any]], voxel_size: Sequence[float]
) -> figures.Picture:
    """Return the middle section of a box, raw and raw with labels side by side, RGB.

    Args:
        raw: (D, H, W). labels: (D, H, W) of each class, 0 background; a class has the color of `color_of` its number.
        voxel_size: nm, z y x.
    """
    middle = raw.shape[0] // 2
    height, width = (n * size for n, size in zip(raw.shape[1:], voxel_size[1:], strict=True))
    scale = _LONGEST / max(height, width)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    gray = figures.resize(figures.to_gray(raw[middle]), shape, "linear")
    shown = gray
    for number, values in enumerate(labels.values()):
        flat = figures.resize(values[middle], shape, "nearest")
        shown = figures.overlay(shown, figures.label_layer(flat, color_of(number)))
    return figures.side_by_side([figures.scale_bar(gray, 1 / scale), shown])


def color_of(number: int) -> Any:
    """Return the color of a class, by its number from 0."""
    return colors.OBJECT_COLORS[1 + number % (len(colors.OBJECT_COLORS) - 1)]


def write_page(
    path: Path,
    title: str,
    proposals: Sequence[Any],
    pictures: Sequence[str],
    classes: Sequence[str],
    facts: Mapping[str, Any],
) -> Path:
    """Write a self-contained page; raise `WriteError` if it cannot be written.

    Args:
        proposals: of `connectomics.pipeline.proposals`. pictures: a ``data:`` address for each.
        classes: in the order of their colors. facts: what was asked for, by name.
    """
    legend = [(name, "rgb({}, {}, {})".format(*color_of(number))) for number, name in enumerate(classes)]
    rows = list(zip(proposals, pictures, strict=True))
    header = page.render("proposals/header", title=title, facts=facts)
    body = page.render("proposals/boxes", rows=rows, legend=legend)
    whole = page.document(title, header, [page.Section("boxes", "Boxes", body)], "This page is one file.")
    write_file(path, whole.encode())
    return path
