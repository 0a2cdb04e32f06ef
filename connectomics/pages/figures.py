"""Pictures of slices, as plain numpy: contrast, overlays, error maps, scale bars, three-plane figures.

A slice is (H, W); pictures are uint8 (H, W, 3) RGB or (H, W, 4) RGBA. The colors are those of
`connectomics.pages.colors`. Nothing here reads files. Pillow and matplotlib are imported on use.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError
from connectomics.geometry import other_axes
from connectomics.pages import colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]
_GAP = 4  # white pixels between pictures side by side


# -- gray values -------------------------------------------------------------------------------------------------------
def contrast_limits(values: ArrayLike, inside: ArrayLike | None = None, cut: float = 0.5) -> tuple[float, float]:
    """Return the gray values to show as black and white: percentiles ``cut`` and 100 - ``cut`` of the values inside."""
    data = np.asarray(values, np.float32)
    data = data[np.asarray(inside, bool)] if inside is not None else data.ravel()
    if data.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(data, [cut, 100 - cut]))
    return (low, high) if high > low else (low, low + 1.0)


def to_gray(values: ArrayLike, limits: tuple[float, float] | None = None) -> Picture:
    """Return raw as uint8 of the same shape, with ``limits`` (default: `contrast_limits`) stretched to 0 and 255."""
    data = np.asarray(values, np.float32)
    low, high = contrast_limits(data) if limits is None else limits
    return np.clip((data - low) * (255.0 / max(high - low, 1e-9)) + 0.5, 0, 255).astype(np.uint8)


def to_rgb(picture: NDArray[Any]) -> Picture:
    """Return (H, W) gray or (H, W, 3) RGB as a new (H, W, 3) uint8 array."""
    if picture.ndim == 3 and picture.shape[2] == 3:
        return picture.astype(np.uint8, copy=True)
    if picture.ndim != 2:
        raise InputError(f"expected a picture of shape (H, W) or (H, W, 3), got {picture.shape}")
    return np.repeat(picture.astype(np.uint8)[..., None], 3, axis=2)


# -- labels ------------------------------------------------------------------------------------------------------------
def object_colors(ids: ArrayLike) -> Picture:
    """Return RGB (..., 3) for object IDs (any shape): `OBJECT_COLORS` in turn, black for 0."""
    values = np.asarray(ids)
    values = values.astype(np.int64 if values.dtype.kind == "i" else np.uint64)
    rows = np.where(values > 0, (values - 1) % (len(colors.OBJECT_COLORS) - 1) + 1, 0).astype(np.intp)
    return colors.OBJECT_COLORS[rows]


def edges(labels: ArrayLike) -> NDArray[np.bool_]:
    """Return the pixels of every region that touch another value above, below, left or right, bool (H, W)."""
    values = np.asarray(labels)
    found = np.zeros(values.shape, bool)
    for v, f in ((values, found), (values.T, found.T)):  # rows, then columns
        differs = v[1:] != v[:-1]
        f[1:] |= differs
        f[:-1] |= differs
    return found & (values != 0)


def label_layer(labels: ArrayLike, color: ArrayLike, fill: int = colors.FILL) -> Picture:
    """Return regions as a transparent picture (H, W, 4): filled with alpha ``fill``, their edges opaque.

    Args:
        labels: (H, W), bool or integer, 0 background; edges separate neighboring values.
        color: one RGB for all, or (H, W, 3) per pixel (see `object_colors`).
    """
    values = np.asarray(labels)
    if values.ndim != 2:
        raise InputError(f"expected labels of shape (H, W), got {values.shape}")
    layer = np.zeros((*values.shape, 4), np.uint8)
    layer[..., :3] = np.asarray(color, np.uint8)
    layer[..., 3] = np.where(values != 0, np.where(edges(values), 255, fill), 0)
    layer[values == 0] = 0
    return layer


def error_map(
    truth: ArrayLike, prediction: ArrayLike, known: ArrayLike | None = None, wrong_object: ArrayLike | None = None
) -> NDArray[np.uint8]:
    """Return the outcome of every voxel, ``NEITHER``, ``TP``, ``FP``, ``FN``, ``WRONG`` or ``NOT_KNOWN`` of `colors`.

    Args:
        truth, prediction: any one shape, foreground where not 0.
        known: where the ground truth is annotated (default: everywhere).
        wrong_object: where both are foreground, but of objects that do not match each other (splits, merges).
    """
    true, found = np.asarray(truth) != 0, np.asarray(prediction) != 0
    if true.shape != found.shape:
        raise InputError(f"truth and prediction must have one shape, got {true.shape} and {found.shape}")
    out = np.zeros(true.shape, np.uint8)
    out[true & found] = colors.TP
    out[~true & found] = colors.FP
    out[true & ~found] = colors.FN
    if wrong_object is not None:
        out[true & found & np.asarray(wrong_object, bool)] = colors.WRONG
    if known is not None:
        out[~np.asarray(known, bool)] = colors.NOT_KNOWN
    return out


def error_layer(errors: ArrayLike) -> Picture:
    """Return an error map as a transparent picture (..., 4)."""
    return colors.ERROR_COLORS[np.asarray(errors)]


def heat_layer(probability: ArrayLike) -> Picture:
    """Return probabilities in [0, 1] as a transparent picture (H, W, 4): orange, more opaque if more probable."""
    values = np.clip(np.asarray(probability, np.float32), 0, 1)
    layer = np.zeros((*values.shape, 4), np.uint8)
    layer[..., :3] = colors.PREDICTION
    layer[..., 3] = (values * 225 + 0.5).astype(np.uint8)
    layer[layer[..., 3] == 0] = 0
    return layer


def overlay(picture: NDArray[Any], layer: NDArray[np.uint8], opacity: float = 1.0) -> Picture:
    """Return a gray or RGB ``picture`` with a transparent ``layer`` (H, W, 4) over it, as RGB."""
    base = to_rgb(picture)
    if layer.shape != (*base.shape[:2], 4):
        raise InputError(f"expected a layer of shape (H, W, 4) for a picture of {base.shape[:2]}, got {layer.shape}")
    alpha = layer[..., 3:].astype(np.float32) * (opacity / 255.0)
    return (base * (1 - alpha) + layer[..., :3] * alpha + 0.5).astype(np.uint8)


# -- scale -------------------------------------------------------------------------------------------------------------
def scale_bar_length(extent: float) -> float:
    """Return the largest of 1, 2, 5 x 10^k nm that is at most 30 % of ``extent`` (nm)."""
    if not extent > 0:
        raise InputError(f"expected a positive extent in nm for a scale bar, got {extent}")
    most = 0.3 * extent
    power = 10.0 ** np.floor(np.log10(most))
    return float(next(step * power for step in (5.0, 2.0, 1.0) if step * power <= most * (1 + 1e-9)))


def length_text(nm: float) -> str:
    """Return ``500 nm``, ``2 µm``."""
    return f"{nm / 1000:g} µm" if nm >= 1000 else f"{nm:g} nm"


def scale_bar(picture: NDArray[Any], pixel_nm: float, text: bool = True) -> Picture:
    """Return the picture with a white scale bar at the bottom left, and its length above if there is room.

    Args:
        picture: (H, W) or (H, W, 3).
        pixel_nm: width of a pixel, nm.
    """
    out = to_rgb(picture)
    height, width = out.shape[:2]
    if min(height, width) < 12:
        return out
    length = scale_bar_length(width * pixel_nm)
    margin, thick = max(3, width // 32), max(2, height // 90)
    end, top = margin + max(2, round(length / pixel_nm)), height - margin - thick
    out[top - 1 : top + thick + 1, margin - 1 : end + 1] = colors.OUTLINE
    out[top : top + thick, margin:end] = 255
    size = max(9, width // 24)
    if text and height > 6 * size:
        out = letter(out, length_text(length), (margin, top - size - 4), size)
    return out


def letter(picture: NDArray[Any], text: str, at: tuple[int, int], size: int = 12) -> Picture:
    """Return the picture with white lettering; ``at`` is the left and top pixel (x, y), ``size`` in pixels."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(to_rgb(picture))
    draw = ImageDraw.Draw(image)
    draw.text(
        at, text, font=ImageFont.load_default(size), fill=(255, 255, 255), stroke_width=1, stroke_fill=colors.OUTLINE
    )
    return np.asarray(image)


# -- panels ------------------------------------------------------------------------------------------------------------
def resize(picture: NDArray[Any], shape: tuple[int, int], how: Literal["linear", "nearest"]) -> NDArray[Any]:
    """Return a picture or labels resized to ``shape`` (H, W); use "linear" for gray and color, "nearest" for labels."""
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


def side_by_side(pictures: Sequence[NDArray[Any]]) -> Picture:
    """Return pictures of one height in a row with white gaps between them, RGB."""
    padded = [np.pad(to_rgb(p), ((0, 0), (0, _GAP), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded, axis=1)[:, :-_GAP]


def overlay_figure(
    raw: ArrayLike,
    labels: ArrayLike | None = None,
    voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    title: str = "",
    **options: Any,
) -> Figure:
    """Return a matplotlib figure of `overlay_picture`, which a notebook shows; see there for the arguments."""
    import matplotlib.pyplot as plt  # also loads the backend by which notebooks show figures
    from matplotlib.figure import Figure

    picture = overlay_picture(raw, labels, voxel_size, **options)
    height, width = picture.shape[:2]
    dpi, top = plt.rcParams["figure.dpi"], 28 if title else 0  # pixels
    figure = Figure(figsize=(width / dpi, (height + top) / dpi))
    axes = figure.add_axes((0, 0, 1, height / (height + top)))
    axes.imshow(picture)
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return figure


def overlay_picture(
    raw: ArrayLike,
    labels: ArrayLike | None = None,
    voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    at: Sequence[int] | None = None,
    known: ArrayLike | None = None,
    instances: bool | None = None,
    longest: int = 320,
) -> Picture:
    """Return three slices of a volume (xy, xz, yz) with labels over raw and a scale bar in each, side by side, RGB.

    Args:
        raw: (D, H, W), any range; the contrast is stretched over all three slices.
        labels: (D, H, W), bool or integer, 0 background; None: raw alone.
        voxel_size: nm, z y x. Slices keep their true proportions.
        at: voxel (z, y, x) that the slices cross; None: the middle of the labels, or of the volume without labels.
        known: (D, H, W), where the labels are annotated; the rest is veiled in gray. None: everywhere.
        instances: color objects by ID, or all labels in one color; None: by ID if there are several IDs.
        longest: pixels of the longest side of a slice.

    Raises:
        InputError: the shapes differ or are not three-dimensional, or ``at`` is outside the volume.
    """
    volume = np.asarray(raw)
    found, sure = (None if part is None else np.asarray(part) for part in (labels, known))
    for part in (volume, found, sure):
        if part is not None and (part.ndim != 3 or part.shape != volume.shape or not part.size):
            raise InputError(f"expected raw, labels and known of one shape (D, H, W), got {volume.shape}, {part.shape}")
    position = _middle(volume.shape if found is None else found != 0) if at is None else [int(p) for p in at]
    if len(position) != 3 or any(not 0 <= p < n for p, n in zip(position, volume.shape, strict=True)):
        raise InputError(f"expected a position (z, y, x) within {volume.shape}, got {tuple(position)}")
    if instances is None:
        instances = found is not None and int(found.max(initial=0)) > 1
    slices = [volume.take(position[axis], axis) for axis in range(3)]
    limits = contrast_limits(np.concatenate([s.ravel() for s in slices]))
    scale = longest / max(n * size for n, size in zip(volume.shape, voxel_size, strict=True))  # pixels per nm
    pictures = []
    for axis, name in enumerate(("xy", "xz", "yz")):
        rows, columns = other_axes(axis)
        height, width = (max(1, round(volume.shape[a] * voxel_size[a] * scale)) for a in (rows, columns))
        picture: Picture = resize(to_gray(slices[axis], limits), (height, width), "linear")
        mask = None if sure is None else resize(sure.take(position[axis], axis), (height, width), "nearest")
        if found is not None:
            shown = resize(found.take(position[axis], axis), (height, width), "nearest")
            shown = shown if mask is None else np.where(mask, shown, 0)
            picture = overlay(picture, label_layer(shown, object_colors(shown) if instances else colors.PREDICTION))
        if mask is not None:
            picture = overlay(picture, error_layer(np.where(mask, 0, colors.NOT_KNOWN)))
        pictures.append(letter(scale_bar(picture, 1 / scale), name, (5, 3), max(10, longest // 20)))
    tallest = max(len(picture) for picture in pictures)
    return side_by_side([np.pad(p, ((0, tallest - len(p)), (0, 0), (0, 0)), constant_values=255) for p in pictures])


def _middle(labels: NDArray[np.bool_] | tuple[int, ...]) -> list[int]:
    """Return the median position of foreground along each axis, or the middle of a shape."""
    if not isinstance(labels, tuple) and labels.any():
        counts = (np.cumsum(labels.sum(axis=other_axes(axis))) for axis in range(3))
        return [int(np.searchsorted(count, count[-1] / 2)) for count in counts]
    return [n // 2 for n in (labels if isinstance(labels, tuple) else labels.shape)]


# -- encoding ----------------------------------------------------------------------------------------------------------
def encode(picture: NDArray[np.uint8], quality: int = 85) -> tuple[str, bytes]:
    """Return (MIME type, bytes): opaque pictures as JPEG, transparent ones as PNG (a palette if 256 colors suffice)."""
    from PIL import Image

    stream = io.BytesIO()
    if picture.ndim == 2 or picture.shape[2] == 3:
        Image.fromarray(np.ascontiguousarray(picture)).save(stream, "JPEG", quality=quality, optimize=True)
        return "image/jpeg", stream.getvalue()
    rgba = Image.fromarray(np.ascontiguousarray(picture))
    found = rgba.getcolors(maxcolors=256)
    if found is None:
        rgba.save(stream, "PNG", optimize=True)
    else:
        table = np.array([color for _, color in found], np.uint8)
        packed = np.ascontiguousarray(picture).view(np.uint32)[..., 0]
        index = np.zeros(packed.shape, np.uint8)
        for k, color in enumerate(table.view(np.uint32)[:, 0]):  # a few colors: faster than sorting the pixels
            index[packed == color] = k
        image = Image.fromarray(index, "P")
        image.putpalette(table[:, :3].tobytes())
        image.save(stream, "PNG", optimize=True, transparency=table[:, 3].tobytes())
    return "image/png", stream.getvalue()
