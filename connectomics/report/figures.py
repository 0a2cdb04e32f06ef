"""Pictures of slices, as plain numpy: contrast, overlays, error maps, scale bars, panels.

A slice is (H, W); pictures are uint8 (H, W, 3) RGB or (H, W, 4) RGBA. Colours are chosen to stay apart for
colour-blind eyes and in grey print (Okabe and Ito, "Color Universal Design", 2008; Tol, "Colour schemes", 2021): truth
is blue and prediction orange everywhere, and errors take the colour of the side that stands alone.

Nothing here reads files. Encoding and lettering use Pillow, imported when they are called.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError

Rgb = tuple[int, int, int]
Picture = NDArray[np.uint8]

TRUTH: Rgb = (86, 180, 233)  # sky blue
PREDICTION: Rgb = (230, 159, 0)  # orange
AGREEMENT: Rgb = (0, 158, 115)  # bluish green
WRONG_OBJECT: Rgb = (204, 121, 167)  # reddish purple
UNKNOWN: Rgb = (110, 110, 110)
NO_PARTNER: Rgb = (235, 235, 235)  # predicted objects that meet no true one

# Values of an error map (`error_map`).
NEITHER, TP, FP, FN, WRONG, NOT_KNOWN = range(6)
#: RGBA by value of an error map; agreement is fainter than errors, so that these are what one sees.
ERROR_COLORS: NDArray[np.uint8] = np.array(
    [(0, 0, 0, 0), (*AGREEMENT, 110), (*PREDICTION, 215), (*TRUTH, 215), (*WRONG_OBJECT, 215), (*UNKNOWN, 170)],
    np.uint8,
)
ERROR_NAMES = ("neither", "agreement", "predicted only", "truth only", "wrong object", "not annotated")

#: Colours of objects, taken in turn by id; row 0 is background.
OBJECT_COLORS: NDArray[np.uint8] = np.array(
    [
        (0, 0, 0),
        (86, 180, 233),
        (230, 159, 0),
        (0, 158, 115),
        (240, 228, 66),
        (213, 94, 0),
        (204, 121, 167),
        (0, 114, 178),
        (153, 221, 255),
        (221, 204, 119),
        (170, 68, 153),
        (68, 187, 153),
        (238, 136, 102),
    ],
    np.uint8,
)

_FILL = 95  # alpha (0 to 255) inside a coloured region; its edge is opaque
_DARK = (24, 24, 24)


# -- grey values -------------------------------------------------------------------------------------------------------
def contrast_limits(values: ArrayLike, inside: ArrayLike | None = None, cut: float = 0.5) -> tuple[float, float]:
    """The grey values that become black and white: the percentiles ``cut`` and 100 - ``cut`` of what is inside.

    Args:
        values: raw, any shape and range. inside: bool, same shape; None for all.
    """
    data = np.asarray(values, np.float32)
    data = data[np.asarray(inside, bool)] if inside is not None else data.ravel()
    if data.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(data, [cut, 100 - cut]))
    return (low, high) if high > low else (low, low + 1.0)


def to_gray(values: ArrayLike, limits: tuple[float, float] | None = None) -> Picture:
    """Raw as uint8 of the same shape, ``limits`` stretched to 0 and 255 (default: `contrast_limits`)."""
    data = np.asarray(values, np.float32)
    low, high = contrast_limits(data) if limits is None else limits
    return np.clip((data - low) * (255.0 / max(high - low, 1e-9)) + 0.5, 0, 255).astype(np.uint8)


def to_rgb(picture: NDArray[Any]) -> Picture:
    """(H, W) grey or (H, W, 3) as a new (H, W, 3) uint8 array."""
    if picture.ndim == 3 and picture.shape[2] == 3:
        return picture.astype(np.uint8, copy=True)
    if picture.ndim != 2:
        raise InputError(f"a picture must be (H, W) or (H, W, 3), found shape {picture.shape}")
    return np.repeat(picture.astype(np.uint8)[..., None], 3, axis=2)


# -- labels ------------------------------------------------------------------------------------------------------------
def object_colors(ids: ArrayLike) -> Picture:
    """RGB (..., 3) of object ids (any shape): `OBJECT_COLORS` in turn, black for 0."""
    values = np.asarray(ids).astype(np.int64)
    rows = np.where(values > 0, (values - 1) % (len(OBJECT_COLORS) - 1) + 1, 0)
    return OBJECT_COLORS[rows]


def edges(labels: ArrayLike) -> NDArray[np.bool_]:
    """The pixels of every region that touch another value above, below, left or right, (H, W)."""
    values = np.asarray(labels)
    found = np.zeros(values.shape, bool)
    down = values[1:] != values[:-1]
    right = values[:, 1:] != values[:, :-1]
    found[1:] |= down
    found[:-1] |= down
    found[:, 1:] |= right
    found[:, :-1] |= right
    return found & (values != 0)


def label_layer(labels: ArrayLike, colors: ArrayLike, fill: int = _FILL) -> Picture:
    """A transparent picture (H, W, 4) of regions: filled with alpha ``fill``, their edges opaque.

    Args:
        labels: (H, W), bool or integer, 0 background; neighbouring values are kept apart by their edges.
        colors: one RGB for all, or (H, W, 3) per pixel (see `object_colors`).
    """
    values = np.asarray(labels)
    if values.ndim != 2:
        raise InputError(f"labels of a slice must be (H, W), found shape {values.shape}")
    layer = np.zeros((*values.shape, 4), np.uint8)
    layer[..., :3] = np.asarray(colors, np.uint8)
    layer[..., 3] = np.where(values != 0, np.where(edges(values), 255, fill), 0)
    layer[values == 0] = 0
    return layer


def error_map(
    truth: ArrayLike,
    prediction: ArrayLike,
    known: ArrayLike | None = None,
    wrong_object: ArrayLike | None = None,
) -> NDArray[np.uint8]:
    """What became of every voxel: `NEITHER`, `TP`, `FP`, `FN`, `WRONG` or `NOT_KNOWN`; any shape.

    Args:
        truth, prediction: foreground where not 0.
        known: where the truth says anything (default everywhere).
        wrong_object: where both are foreground but belong to objects that are not each other's match (splits, merges).
    """
    true, found = np.asarray(truth) != 0, np.asarray(prediction) != 0
    if true.shape != found.shape:
        raise InputError(f"truth and prediction must have one shape, found {true.shape} and {found.shape}")
    out = np.zeros(true.shape, np.uint8)
    out[true & found] = TP
    out[~true & found] = FP
    out[true & ~found] = FN
    if wrong_object is not None:
        out[true & found & np.asarray(wrong_object, bool)] = WRONG
    if known is not None:
        out[~np.asarray(known, bool)] = NOT_KNOWN
    return out


def error_layer(errors: ArrayLike) -> Picture:
    """The transparent picture (..., 4) of an error map."""
    return ERROR_COLORS[np.asarray(errors)]


def heat_layer(probability: ArrayLike) -> Picture:
    """A transparent picture (H, W, 4) of probabilities in [0, 1]: orange, as opaque as the network is sure."""
    values = np.clip(np.asarray(probability, np.float32), 0, 1)
    layer = np.zeros((*values.shape, 4), np.uint8)
    layer[..., :3] = PREDICTION
    layer[..., 3] = (values * 225 + 0.5).astype(np.uint8)
    layer[layer[..., 3] == 0] = 0
    return layer


def overlay(picture: NDArray[Any], layer: NDArray[np.uint8], opacity: float = 1.0) -> Picture:
    """A transparent ``layer`` (H, W, 4) laid over a grey or RGB ``picture``; RGB."""
    base = to_rgb(picture)
    if layer.shape != (*base.shape[:2], 4):
        raise InputError(f"the layer must be (H, W, 4) for a picture of {base.shape[:2]}, found {layer.shape}")
    alpha = layer[..., 3:].astype(np.float32) * (opacity / 255.0)
    return (base * (1 - alpha) + layer[..., :3] * alpha + 0.5).astype(np.uint8)


# -- scale -------------------------------------------------------------------------------------------------------------
def scale_bar_length(extent: float, share: float = 0.3) -> float:
    """The largest of 1, 2, 5 x 10^k nm that is at most ``share`` of ``extent`` (nm)."""
    if not extent > 0:
        raise InputError(f"a scale bar needs a positive extent in nm, found {extent}")
    most = extent * share
    power = 10.0 ** np.floor(np.log10(most))
    return float(next(step * power for step in (5.0, 2.0, 1.0) if step * power <= most * (1 + 1e-9)))


def length_text(nanometres: float) -> str:
    """``500 nm``, ``2 µm``."""
    return f"{nanometres / 1000:g} µm" if nanometres >= 1000 else f"{nanometres:g} nm"


def scale_bar(picture: NDArray[Any], pixel_nm: float, text: bool = True) -> Picture:
    """A white scale bar with a dark rim, bottom left, with its length written above where there is room.

    Args:
        picture: (H, W) or (H, W, 3). pixel_nm: width of a pixel, nm.
    """
    out = to_rgb(picture)
    height, width = out.shape[:2]
    if min(height, width) < 12:
        return out
    length = scale_bar_length(width * pixel_nm)
    margin, thick = max(3, width // 32), max(2, height // 90)
    end, top = margin + max(2, round(length / pixel_nm)), height - margin - thick
    out[top - 1 : top + thick + 1, margin - 1 : end + 1] = _DARK
    out[top : top + thick, margin:end] = 255
    size = max(9, width // 24)
    if text and height > 6 * size:
        out = letter(out, length_text(length), (margin, top - size - 4), size)
    return out


def letter(picture: NDArray[Any], text: str, at: tuple[int, int], size: int = 12) -> Picture:
    """White lettering with a dark rim; ``at`` is the left and top pixel (x, y), ``size`` in pixels."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(to_rgb(picture))
    draw = ImageDraw.Draw(image)
    draw.text(at, text, font=ImageFont.load_default(size), fill=(255, 255, 255), stroke_width=1, stroke_fill=_DARK)
    return np.asarray(image)


# -- panels ------------------------------------------------------------------------------------------------------------
def resize(picture: NDArray[Any], shape: tuple[int, int], how: Literal["linear", "nearest"]) -> NDArray[Any]:
    """A picture or labels brought to ``shape`` (H, W); linear for grey and colour, nearest for labels and layers."""
    if picture.shape[:2] == shape:
        return picture
    if how == "nearest":
        rows, columns = (
            np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
            for n, m in zip(shape, picture.shape, strict=False)
        )
        return picture[rows][:, columns]
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture.astype(np.uint8)))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, reducing_gap=2.0))


def true_shape(shape: Sequence[int], pixel_nm: Sequence[float], longest: int) -> tuple[int, int]:
    """Height and width in square pixels of a slice with oblong ones, its longer side ``longest`` pixels.

    Args:
        shape: (H, W) pixels. pixel_nm: height and width of one, nm.
    """
    height, width = shape[0] * pixel_nm[0], shape[1] * pixel_nm[1]
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def panel(
    raw: NDArray[Any],
    truth: NDArray[Any],
    prediction: NDArray[Any],
    pixel_nm: Sequence[float],
    *,
    known: NDArray[np.bool_] | None = None,
    instances: bool = False,
    longest: int = 256,
    titles: bool = True,
) -> Picture:
    """Raw, truth, prediction and error map of one slice side by side, one picture for a document or a log.

    Args:
        raw: (H, W), any range. truth, prediction: (H, W) labels, 0 background.
        pixel_nm: height and width of a pixel, nm; the pictures keep the true proportions.
        known: where the truth says anything. instances: colour objects by id (else truth blue, prediction orange).
        longest: pixels of the longer side of each picture. titles: write what each is.
    """
    shape = true_shape(raw.shape, pixel_nm, longest)
    gray = resize(to_gray(raw), shape, "linear")
    true, found = (resize(np.asarray(v), shape, "nearest") for v in (truth, prediction))
    mask = None if known is None else resize(np.asarray(known), shape, "nearest")
    true_colors, found_colors = (object_colors(true), object_colors(found)) if instances else (TRUTH, PREDICTION)
    pictures = [
        scale_bar(gray, raw.shape[1] * pixel_nm[1] / shape[1]),
        overlay(gray, label_layer(true, true_colors)),
        overlay(gray, label_layer(found, found_colors)),
        overlay(gray, error_layer(error_map(true, found, mask))),
    ]
    if titles:
        names = ("raw", "truth", "prediction", "errors")
        size = max(10, longest // 20)
        pictures = [letter(p, name, (5, 3), size) for p, name in zip(pictures, names, strict=True)]
    return side_by_side(pictures)


def side_by_side(pictures: Sequence[NDArray[Any]], gap: int = 4) -> Picture:
    """Pictures of one height in a row with white gaps between them, RGB."""
    space = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for p in pictures for part in (to_rgb(p), space)][:-1]
    return np.concatenate(parts, axis=1)


# -- encoding ----------------------------------------------------------------------------------------------------------
def encode(picture: NDArray[np.uint8], quality: int = 85) -> tuple[str, bytes]:
    """(MIME type, bytes): opaque pictures as JPEG, transparent ones as PNG (palette where 256 colours are enough)."""
    from PIL import Image

    stream = io.BytesIO()
    if picture.ndim == 2 or picture.shape[2] == 3:
        Image.fromarray(np.ascontiguousarray(picture)).save(stream, "JPEG", quality=quality, optimize=True)
        return "image/jpeg", stream.getvalue()
    rgba = Image.fromarray(np.ascontiguousarray(picture))
    found = rgba.getcolors(maxcolors=256)
    if found is None:
        rgba.save(stream, "PNG", optimize=True)
        return "image/png", stream.getvalue()
    table = np.array([color for _, color in found], np.uint8)
    packed = np.ascontiguousarray(picture).view(np.uint32)[..., 0]
    index = np.zeros(packed.shape, np.uint8)
    for k, color in enumerate(table.view(np.uint32)[:, 0]):  # a few colours: faster than sorting the pixels
        index[packed == color] = k
    image = Image.fromarray(index, "P")
    image.putpalette(table[:, :3].tobytes())
    image.save(stream, "PNG", optimize=True, transparency=table[:, 3].tobytes())
    return "image/png", stream.getvalue()
