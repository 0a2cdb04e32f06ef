"""Pictures of slices from plain arrays."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from connectomics.errors import InputError
from connectomics.pages import colors, figures

SQUARE = np.zeros((8, 10), np.uint8)
SQUARE[2:6, 3:8] = 1


def test_an_error_map_says_of_every_voxel_what_became_of_it() -> None:
    truth = np.array([[0, 0, 1, 1, 1, 1]])
    found = np.array([[0, 1, 0, 1, 1, 1]])
    known = np.array([[True, True, True, True, True, False]])
    wrong = np.array([[True, True, True, False, True, True]])
    assert figures.error_map(truth, found, known, wrong).tolist() == [
        [colors.NEITHER, colors.FP, colors.FN, colors.TP, colors.WRONG, colors.NOT_KNOWN]
    ]
    with pytest.raises(InputError, match="one shape"):
        figures.error_map(truth, found[:, 1:])


def test_nothing_unknown_is_ever_an_error() -> None:
    rng = np.random.default_rng(0)
    truth, found, known = (rng.integers(0, 2, (20, 20)) for _ in range(3))
    errors = figures.error_map(truth, found, known)
    assert set(np.unique(errors[known == 0])) == {colors.NOT_KNOWN}
    assert not np.any(errors[known == 1] == colors.NOT_KNOWN)


def test_truth_prediction_agreement_and_wrong_objects_have_different_colours() -> None:
    different = {tuple(c) for c in colors.ERROR_COLORS[:, :3].tolist()}
    assert len(different) == len(colors.ERROR_COLORS)


def test_regions_are_filled_faintly_and_edged_opaquely() -> None:
    layer = figures.label_layer(SQUARE, colors.TRUTH)
    assert layer[0, 0].tolist() == [0, 0, 0, 0]
    assert layer[2, 3].tolist() == [*colors.TRUTH, 255]
    assert 0 < layer[4, 5, 3] < 255
    touching = np.array([[1, 1, 2, 2]])
    assert figures.edges(touching).tolist() == [[False, True, True, False]]


def test_objects_next_to_each_other_in_number_differ_in_colour() -> None:
    table = figures.object_colors(np.arange(30))
    assert table[0].tolist() == [0, 0, 0]
    assert all((table[i] != table[i + 1]).any() for i in range(1, 29))
    assert figures.object_colors(np.array([0, 2**64 - 1], np.uint64)).any(axis=1).tolist() == [False, True]


def test_an_overlay_of_full_opacity_shows_the_layer_and_of_none_the_picture() -> None:
    gray = np.full(SQUARE.shape, 100, np.uint8)
    layer = figures.label_layer(SQUARE, colors.PREDICTION, fill=255)
    assert figures.overlay(gray, layer)[4, 5].tolist() == list(colors.PREDICTION)
    assert np.all(figures.overlay(gray, layer, opacity=0) == 100)
    with pytest.raises(InputError, match="H, W, 4"):
        figures.overlay(gray, layer[:4])


@pytest.mark.parametrize(("extent", "length"), [(1000, 200), (800, 200), (750, 200), (64, 10), (17000, 5000)])
def test_scale_bars_have_round_lengths(extent: float, length: float) -> None:
    assert figures.scale_bar_length(extent) == length


def test_a_scale_bar_is_as_long_as_it_says() -> None:
    marked = figures.scale_bar(np.zeros((200, 250), np.uint8), pixel_nm=4.0, text=False)
    white = np.count_nonzero(marked[..., 0] == 255, axis=1)
    assert white.max() == figures.scale_bar_length(1000) / 4
    assert figures.length_text(500) == "500 nm"
    assert figures.length_text(2000) == "2 µm"


def test_grey_values_are_stretched_between_percentiles_of_what_is_there() -> None:
    values = np.linspace(0, 255, 1001).reshape(7, 143)
    inside = values > 50
    low, high = figures.contrast_limits(values, inside, cut=0)
    assert low == pytest.approx(values[inside].min(), rel=1e-6)
    gray = figures.to_gray(values, (low, high))
    assert gray.min() == 0
    assert gray.max() == 255
    assert figures.contrast_limits(np.zeros(0)) == (0.0, 1.0)
    assert np.all(figures.to_gray(np.full((3, 3), 7.0)) < 255)


def test_an_overlay_shows_three_slices_in_true_proportions() -> None:
    raw = np.random.default_rng(0).random((10, 40, 60), dtype=np.float32)
    labels = np.zeros(raw.shape, np.uint16)
    labels[4:6, 10:30, 20:40] = 7
    shown = figures.overlay_picture(raw, labels, (24.0, 8.0, 8.0), longest=120).astype(int)
    assert shown.shape == (80, 120 + 4 + 120 + 4 + 80, 3)  # xy 40 x 60, xz and yz 30 pixels of 8 nm high
    colored = np.abs(shown - shown.mean(axis=2, keepdims=True)).max(axis=2) > 20
    rows, columns = np.flatnonzero(colored[:, :120].any(1)), np.flatnonzero(colored[:, :120].any(0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (20, 60, 40, 80)
    assert (shown[60:, 124:] == 255).all()  # xz and yz are 60 pixels high


def test_an_overlay_takes_masks_positions_and_unknown_voxels() -> None:
    raw = np.zeros((8, 64, 64), np.uint8)
    mask = np.zeros(raw.shape, bool)
    mask[2] = True
    plain = figures.overlay_picture(raw)
    crossed = figures.overlay_picture(raw, mask)  # through the middle of the mask
    assert np.array_equal(crossed, figures.overlay_picture(raw, mask, at=(2, 32, 32)))
    assert crossed[200, 160].tolist() == pytest.approx([c * colors.FILL / 255 for c in colors.PREDICTION], abs=1)
    unknown = figures.overlay_picture(raw, mask, known=np.zeros_like(mask))
    assert not np.array_equal(unknown, plain)
    assert not np.array_equal(unknown, crossed)
    with pytest.raises(InputError, match="one shape"):
        figures.overlay_picture(raw, mask[:4])
    with pytest.raises(InputError, match="position"):
        figures.overlay_picture(raw, at=(8, 0, 0))


def test_an_overlay_figure_can_be_saved_with_its_title() -> None:
    stream = io.BytesIO()
    raw = np.random.default_rng(0).random((8, 20, 30))
    figure = figures.overlay_figure(raw, raw > 0.9, title="mito")
    figure.savefig(stream, format="png")
    height, width = figures.overlay_picture(raw).shape[:2]
    assert Image.open(stream).size == (width, height + 28)


@pytest.mark.parametrize("kind", ["labels", "probability"])
def test_transparent_pictures_survive_encoding(kind: str) -> None:
    rng = np.random.default_rng(0)
    layer = (
        figures.heat_layer(rng.random((30, 20))) if kind == "probability" else figures.label_layer(SQUARE, (1, 2, 3))
    )
    mime, data = figures.encode(layer)
    assert mime == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")), layer)


def test_pictures_of_many_colours_survive_encoding_too() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 4), dtype=np.uint8)
    _, data = figures.encode(picture)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)
    assert figures.encode(picture[..., :3])[0] == "image/jpeg"


def test_the_figures_need_neither_torch_nor_matplotlib() -> None:
    code = "import sys, connectomics.pages.figures; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "monai", "numba", "skimage"} & set(loaded)
