"""A patch in pictures: its slices through z with labels and what is not known, in the report's slice viewer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Triple
from connectomics.report import figures, page
from connectomics.report.inspect.data import SeenPatch
from connectomics.report.pictures import scale_bar

_MOST_SLICES = 24
_LONGEST = 256  # pixels a side of a slice

#: What is not known is veiled lightly and hatched: to be told from dark raw and from labels without colour.
_VEIL = (*figures.UNKNOWN, 70)
_STRIPE = (230, 230, 230, 150)
_PERIOD = 10  # pixels between stripes
_STRIPE_WIDTH = 2
_FINE = _LONGEST  # pixels that a hatched slice has at least: stripes of one voxel of a small patch would be coarse


def viewers(patch: SeenPatch, classes: Sequence[str], anchor: str) -> str:
    """The views of a patch side by side, each with its own slider; labels lie over the first. ``anchor``: of ids."""
    chosen = chosen_class(patch, classes)
    layers = slice_positions(patch.codes.shape[0])
    first = _first_slice(patch, layers, chosen)
    parts = [_labelled(patch, classes, anchor, chosen, first)]
    # all views have one middle: the others open at the slice nearest to the first one's
    above = (layers[first] - (patch.codes.shape[0] - 1) / 2) * patch.voxel_sizes[0][0]
    for number in range(1, len(patch.images)):
        parts.append(_plain(patch, number, above))
    return f'<div class="views">{"".join(parts)}</div>'


def _labelled(patch: SeenPatch, classes: Sequence[str], anchor: str, chosen: int, first: int) -> str:
    """The run's own view: image, and of each class where it is present and where it is not known."""
    layers = slice_positions(patch.codes.shape[0])
    shape = _slice_shape(patch.codes.shape[1:])
    codes = np.stack([figures.resize(patch.codes[z], shape, "nearest") for z in layers])
    height_nm, width_nm = _extent(patch.images[0].shape, patch.voxel_sizes[0])
    images = [_image(page.data_uri(_gray(patch.images[0], layers), 80), width_nm, height_nm * len(layers))]
    masks: dict[bytes, str] = {}
    defs = []
    for number in range(len(classes)):
        hidden = "" if number == chosen else " hidden"
        there, known = (table[number].take(codes) for table in (patch.present, patch.known))
        there &= known
        kinds = (("unknown", ~known, _hatched), ("label", there, _filled))
        for kind, mask, draw in kinds:
            if not mask.any():
                continue
            key = kind.encode() + np.packbits(mask).tobytes()
            if key not in masks:  # classes of one crop are often known in the same voxels
                masks[key] = f"{anchor}-{len(masks)}"
                uri = page.data_uri(np.concatenate(list(draw(mask))))
                defs.append(_image(uri, width_nm, height_nm * len(layers), f' id="{masks[key]}"'))
            use = f'class="over" data-kind="{kind}" data-class="{number}"{hidden}'
            images.append(f'<use {use} href="#{masks[key]}"/>')
    names = [_option(patch, name) for name in classes]
    options = "".join(
        f'<option value="{k}"{" selected" * (k == chosen)}>{page.text(name)}</option>' for k, name in enumerate(names)
    )
    extra = f'<label>class <select aria-label="class">{options}</select></label>{_toggle("label")}{_toggle("unknown")}'
    content = f"<defs>{''.join(defs)}</defs>{''.join(images)}"
    return _figure(patch, 0, layers, first, content, extra)


def _plain(patch: SeenPatch, number: int, above: float) -> str:
    """A further view, opened ``above`` nm above its middle; a frame shows what the first one covers."""
    image = patch.images[number]
    layers = slice_positions(image.shape[0])
    wanted = above / patch.voxel_sizes[number][0] + (image.shape[0] - 1) / 2
    first = int(np.argmin(np.abs(np.subtract(layers, wanted))))
    height, width = _extent(image.shape, patch.voxel_sizes[number])
    content = _image(page.data_uri(_gray(image, layers), 80), width, height * len(layers))
    inner_height, inner_width = _extent(patch.images[0].shape, patch.voxel_sizes[0])
    frame = ""
    if inner_height < height and inner_width < width:
        frame = (
            f'<rect class="cut frame" x="{(width - inner_width) / 2:.6g}" y="{(height - inner_height) / 2:.6g}" '
            f'width="{inner_width:.6g}" height="{inner_height:.6g}"/>'
        )
    return _figure(patch, number, layers, first, content, "", frame)


def _figure(
    patch: SeenPatch, number: int, layers: Sequence[int], first: int, content: str, extra: str, fixed: str = ""
) -> str:
    size = patch.voxel_sizes[number]
    shape = patch.images[number].shape
    height, width = _extent(shape, size)
    positions = ",".join(page.number(z * size[0]) for z in layers)
    name = f"image_{number}" if number else "image"
    slider = f'<input type="range" class="z" aria-label="slice" min="0" max="{len(layers) - 1}" value="{first}">'
    label = f'role="img" aria-label="slices of {page.text(patch.name)}, {name}"'
    window = f"0 {first * height:.6g} {width:.6g} {height:.6g}"
    still = f'<g class="fixed" transform="translate(0 {first * height:.6g})">{fixed}{scale_bar(width, height, 0.5)}</g>'
    values = patch.values[number]
    about = (
        f"<b>{name}</b> {' × '.join(map(str, shape))} voxels of {page.nm(size)} nm, values "
        f"{values.low:.3g} to {values.high:.3g}"
    )
    return (
        f'<figure class="viewer" data-z="{positions}" data-height="{height:.6g}" data-width="{width:.6g}">'
        f"<p>{about}</p>"
        f'<svg viewBox="{window}" {label}>{content}{still}</svg>'
        f"<figcaption><label>slice {slider}</label><output>z = {page.number(layers[first] * size[0])} nm</output>"
        f"{extra}</figcaption></figure>"
    )


def chosen_class(patch: SeenPatch, classes: Sequence[str]) -> int:
    """The class that is shown first: the one that the patch was drawn for, else the one with most voxels."""
    for number, name in enumerate(classes):
        if patch.drawn_by == f"class {name}":
            return number
    return int(np.argmax([patch.labels.present[name] for name in classes]))


def slice_positions(n: int) -> list[int]:
    """At most 24 layers of ``n``, evenly spread over the middle of equal parts."""
    wanted = min(n, _MOST_SLICES)
    return [int((k + 0.5) * n / wanted) for k in range(wanted)]


def legend() -> str:
    """What is seen."""
    blue, grey = (f"rgb{color}" for color in (figures.TRUTH, figures.UNKNOWN))
    stripes = f"repeating-linear-gradient(135deg,{grey} 0 4px,#ddd 4px 6px)"
    return (
        '<ul class="legend">'
        f'<li><i style="background:{blue}"></i>label: the class is present</li>'
        f'<li><i style="background:{stripes}"></i>unknown: nobody says whether it is, and no loss counts it</li>'
        "<li>neither: known to be absent</li></ul>"
    )


def _first_slice(patch: SeenPatch, layers: Sequence[int], number: int) -> int:
    """Which of the layers has most of a class, else the middle one."""
    there = (patch.present[number] & patch.known[number]).take(patch.codes[list(layers)]).sum(axis=(1, 2))
    return int(np.argmax(there)) if there.any() else len(layers) // 2


def _option(patch: SeenPatch, name: str) -> str:
    known, present = patch.labels.known[name], patch.labels.present[name]
    if not known:
        return f"{name}: unknown"
    return f"{name}: {page.percent(present / known)}" if present else f"{name}: absent"


def _slice_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Pixels of a slice's picture: a pixel a voxel, at most 256."""
    scale = min(1.0, _LONGEST / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _gray(image: NDArray[np.float32], layers: Sequence[int]) -> NDArray[np.uint8]:
    """The slices one below the other; 0 is black and 1 white, whatever the patch holds."""
    shape = _slice_shape(image.shape[1:])
    gray = [figures.to_gray(image[z], (0.0, 1.0)) for z in layers]
    return np.concatenate([figures.resize(g, shape, "linear") for g in gray])


def _extent(shape: Sequence[int], voxel_size: Triple) -> tuple[float, float]:
    """Height and width of a slice, nm."""
    return shape[1] * voxel_size[1], shape[2] * voxel_size[2]


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.stack([figures.label_layer(layer, figures.TRUTH) for layer in mask])


def _hatched(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    factor = max(1, _FINE // max(mask.shape[1:]))
    mask = mask.repeat(factor, axis=1).repeat(factor, axis=2)
    rows, columns = np.ogrid[: mask.shape[1], : mask.shape[2]]
    stripes = (rows + columns) % _PERIOD < _STRIPE_WIDTH
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = _VEIL
    layer[mask & stripes] = _STRIPE
    return layer


def _toggle(kind: str) -> str:
    return f'<label><input type="checkbox" data-kind="{kind}" checked> {kind}</label>'


def _image(uri: str, width: float, height: float, attributes: str = "") -> str:
    return f'<image{attributes} width="{width:.6g}" height="{height:.6g}" preserveAspectRatio="none" href="{uri}"/>'
