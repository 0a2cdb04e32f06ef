"""A patch in pictures: its slices through z with labels and unknown voxels, in the report's slice viewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.pages import colors, figures, page
from connectomics.pages.inspect.data import SeenPatch
from connectomics.pages.report.slice_viewer import slice_positions

_MOST_SLICES = 24
_LONGEST = 256  # pixels a side of a slice
_PERIOD = 10  # pixels between stripes
_STRIPE_WIDTH = 2


def viewers(patch: SeenPatch, classes: Sequence[str], anchor: str) -> Markup:
    """Return the images of a patch side by side, each with a slider; labels are over the first. ``anchor``: for IDs."""
    # the class that the patch was drawn for, else the one with most voxels; the slice with most of it
    drawn_for = patch.drawn_by.removeprefix("class ")
    most = int(np.argmax([patch.labels.present[name] for name in classes]))
    chosen = classes.index(drawn_for) if drawn_for in classes else most
    layers = slice_positions(patch.codes.shape[0], _MOST_SLICES)
    there = (patch.present[chosen] & patch.known[chosen]).take(patch.codes[layers]).sum(axis=(1, 2))
    first = int(np.argmax(there)) if there.any() else len(layers) // 2
    defs, uses = _label_layers(patch, layers, anchor)
    # all images have one center: the others open at the slice nearest to that of the first
    above = (layers[first] - (patch.codes.shape[0] - 1) / 2) * patch.voxel_sizes[0][0]
    panes = [_pane(patch, 0, layers, first)]
    for number, image in enumerate(patch.images[1:], start=1):
        positions = slice_positions(image.shape[0], _MOST_SLICES)
        wanted = above / patch.voxel_sizes[number][0] + (image.shape[0] - 1) / 2
        panes.append(_pane(patch, number, positions, int(np.argmin(np.abs(np.subtract(positions, wanted))))))
    options = [_option(patch, name) for name in classes]
    return page.render(
        "inspect/viewers", patch=patch, panes=panes, defs=defs, uses=uses, options=options, chosen=chosen
    )


def _label_layers(
    patch: SeenPatch, layers: Sequence[int], anchor: str
) -> tuple[dict[str, NDArray[np.uint8]], list[tuple[str, int, str]]]:
    """Return pictures by ID, and (kind, class number, ID) of each class: present voxels and unknown voxels."""
    shape = _slice_shape(patch.codes.shape[1:])
    codes = np.stack([figures.resize(patch.codes[z], shape, "nearest") for z in layers])
    ids: dict[bytes, str] = {}
    pictures: dict[str, NDArray[np.uint8]] = {}
    uses = []
    for number in range(len(patch.known)):
        there, known = (table[number].take(codes) for table in (patch.present, patch.known))
        for kind, mask, draw in (("unknown", ~known, _hatched), ("label", there & known, _filled)):
            if not mask.any():
                continue
            key = kind.encode() + np.packbits(mask).tobytes()
            if key not in ids:  # classes of one crop are often known in the same voxels
                ids[key] = f"{anchor}-{len(ids)}"
                pictures[ids[key]] = np.concatenate(list(draw(mask)))
            uses.append((kind, number, ids[key]))
    return pictures, uses


def _pane(patch: SeenPatch, number: int, layers: Sequence[int], first: int) -> dict[str, Any]:
    """Return what the template shows of one image; a frame marks the part that the first image covers."""
    image, size = patch.images[number], patch.voxel_sizes[number]
    (height, width), (inner_height, inner_width) = (
        np.multiply(patch.images[k].shape, patch.voxel_sizes[k])[1:].tolist() for k in (number, 0)
    )
    shape = _slice_shape(image.shape[1:])
    slices = [figures.resize(figures.to_gray(image[z], (0.0, 1.0)), shape, "linear") for z in layers]
    return {
        "name": f"image_{number}" if number else "image",
        "picture": np.concatenate(slices),
        "positions": [z * size[0] for z in layers],
        "first": first,
        "height": height,
        "width": width,
        "shape": image.shape,
        "voxel_size": size,
        "values": patch.values[number],
        "frame": (inner_height, inner_width) if inner_height < height and inner_width < width else None,
    }


def _option(patch: SeenPatch, name: str) -> str:
    known, present = patch.labels.known[name], patch.labels.present[name]
    if not known:
        return f"{name}: unknown"
    return f"{name}: {page.percent(present / known)}" if present else f"{name}: absent"


def _slice_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the pixels of a slice's picture: one pixel per voxel, at most 256."""
    scale = min(1.0, _LONGEST / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.stack([figures.label_layer(layer, colors.TRUTH) for layer in mask])


def _hatched(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    factor = max(1, _LONGEST // max(mask.shape[1:]))  # stripes of one voxel of a small patch would be coarse
    mask = mask.repeat(factor, axis=1).repeat(factor, axis=2)
    rows, columns = np.ogrid[: mask.shape[1], : mask.shape[2]]
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = colors.UNKNOWN_VEIL
    layer[mask & ((rows + columns) % _PERIOD < _STRIPE_WIDTH)] = colors.UNKNOWN_STRIPE
    return layer
