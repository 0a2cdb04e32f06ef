"""Look at a crop: raw with labels over it, in a notebook or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.labels import read_labels
from connectomics.errors import InputError, require_known, unknown_name
from connectomics.pipeline.results import ArrayFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(
    crop: Crop,
    labels: ArrayFolder | str | Path | None = None,
    class_name: str | None = None,
    *,
    at: Sequence[int] | None = None,
    out: str | Path | None = None,
) -> Figure:
    """Draw the middle slices of a crop along z, y and x, with ground truth or a result over the raw.

    Args:
        crop: of `open_root`, ``cell.crop("phantom-iso", "crop1")``.
        labels: what `decode` or `predict` returned; None: the crop's ground truth.
        class_name: the class; default: the first one of ``labels`` (or of the crop).
        at: voxel (z, y, x) through which the slices go; default: the middle of what is labeled.
        out: also write the figure to this file (PNG, PDF, SVG).

    Returns:
        The figure, which a notebook shows.

    Raises:
        UnknownNameError: the crop or the result does not have the class.
        InputError: the crop has no labeled class.
    """
    from connectomics.decoding.probabilities import above
    from connectomics.pages.figures import overlay_figure

    if labels is None:
        names = sorted(crop.labels)
        if not names:
            raise InputError(f"{crop.key} has no labeled class; give labels=")
        name = class_name or names[0]
        require_known("class", [name], names, crop.key)
        grid = crop.within(crop.labels[name].grid)
        shown = read_labels(crop, [name], grid).present_of(name)
        title = f"{crop.key}: {name}, ground truth"
    else:
        source = ArrayFolder.open(labels)
        there = [n for d, c, n in source.arrays if (d, c) == (crop.dataset, crop.name) and "/" not in n]
        if not there:
            raise unknown_name("crop", crop.key, {f"{d}/{c}" for d, c, _ in source.arrays}, str(source.folder))
        name = class_name or there[0]
        array = source.array(name, crop.name, crop.dataset)
        grid = array.levels[0].grid
        shown, _ = array.read_level(0, (0, 0, 0), grid.shape)
        if array.attrs.get("connectomics", {}).get("artefact") == "probability":
            shown = above(shown, 0.5)
        title = f"{crop.key}: {name}, {source.folder}"
    raw, _ = crop.raw_source.read_raw(grid)
    figure = overlay_figure(raw, shown, grid.voxel_size, at=at, title=title)
    if out is not None:
        figure.savefig(out)
    return figure
