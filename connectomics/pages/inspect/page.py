"""The page of ``pytc inspect``: warnings, every patch in slices, the numbers, the loader, the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.io.location import local_path
from connectomics.io.replacing import contains, require_own
from connectomics.io.write import write_file
from connectomics.pages import colors, figures, page
from connectomics.pages.inspect.data import Augmentations, Inspection, SeenPatch, as_text, pooled_known
from connectomics.pages.inspect.numbers import by_class
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


# -- the page ----------------------------------------------------------------------------------------------------------
_MOST_PICTURES = 16  # patches with pictures; the numbers are over all patches
#: Template and heading of each section.
_SECTIONS = (
    ("warnings", "What looks wrong"), ("patches", "Patches"), ("classes", "Classes"),
    ("values", "Values of the images"), ("loader", "Loader and memory"), ("missing_raw", "Missing raw"),
    ("configuration", "Configuration of the data"),
)  # fmt: skip


def check_out(out: str | Path, *, overwrite: bool = False) -> Path:
    """Return the path of the page, before the work starts.

    Raises:
        InputError: it is no ``.html`` file. WriteError: it is not our page, or it exists and ``overwrite`` is False.
    """
    path = local_path(out)
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"expected a .html file for the page, got {path}")
    return require_own(path, contains(page.GENERATOR), "inspect", overwrite=overwrite)


def write_page(out: str | Path, inspection: Inspection, *, overwrite: bool = False) -> Path:
    """Write the page atomically and return its path; errors as `check_out`."""
    path = check_out(out, overwrite=overwrite)
    title = f"What the network gets: {inspection.name}"
    values: dict[str, Any] = {
        "inspection": inspection,
        "speed": inspection.speed,
        "warnings": inspection.warnings(),
        "classes": by_class([p.labels for p in inspection.patches]),
        "patches": [_patch(patch, inspection.classes) for patch in inspection.patches[:_MOST_PICTURES]],
        "keys": {key: as_text(value) for key, value in inspection.configuration.items()},
    }
    sections = [page.Section(name, heading, page.render(f"inspect/{name}", **values)) for name, heading in _SECTIONS]
    header = page.render("inspect/header", title=title, known=pooled_known(inspection.patches), **values)
    whole = page.document(title, header, sections, "This page is one file.", styles=["inspect.css"])
    write_file(path, whole.encode("utf-8"))
    return path


def _patch(patch: SeenPatch, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return what the template shows of one patch."""
    anchor = f"b{patch.batch + 1}p{patch.number + 1}"
    begin, end = patch.grid.box.begin, patch.grid.box.end
    spans = [f"{axis} {page.number(b)} to {page.number(e)}" for axis, b, e in zip("zyx", begin, end, strict=True)]
    no_raw = "not measured (a MONAI transform moves the patch)"
    if patch.raw is not None:
        no_raw = ", ".join(f"image_{k} " * (k > 0) + page.percent(share.none) for k, share in enumerate(patch.raw))
    facts = {
        "crop": patch.crop,
        "drawn for": patch.drawn_by or "a plain index",
        "some class known": page.percent(patch.labels.anything / patch.labels.voxels),
        "no raw": no_raw,
        "combinations of classes": patch.labels.states,
        "seed on the device": patch.seed,
        "position, nm": ", ".join(spans),
        "spatial augmentation": _augmentations(patch.spatial),
        "intensity augmentation": _augmentations(patch.intensity),
    }
    return {"anchor": anchor, "patch": patch, "facts": facts, "viewers": viewers(patch, classes, anchor)}


def _augmentations(done: Augmentations) -> str:
    described = (" ".join([name, *(f"{k} {as_text(v)}" for k, v in given.items())]) for name, given in done)
    return "; ".join(described) or "none"
