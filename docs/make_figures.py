"""The figures of docs/coordinates.md, docs/score.md and docs/instances.md, drawn from what the code computes.

``python docs/make_figures.py [OUT]`` writes ``coordinates.png``, ``score.png`` and ``instances.png`` (default:
docs/images).
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from scipy.ndimage import gaussian_filter

from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import DecodeParameters
from connectomics.geometry import Box, VoxelGrid
from connectomics.metrics.challenge import score_instance
from connectomics.pages import colors, figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the test kit
from tests.decoding.affinity_kit import affinities_of

RAW, LABEL, WRONG = (tuple(c / 255 for c in rgb) for rgb in (colors.TRUTH, colors.PREDICTION, colors.WRONG_OBJECT))


def voxels(axis: Axes, grid: VoxelGrid, height: float, color: tuple[float, ...], name: str) -> None:
    """A row of a grid's voxels along x: faces as boxes, centres as dots."""
    size = grid.voxel_size[2]
    for centre in grid.axes()[2]:
        begin = (centre - size / 2, height - 0.3)
        axis.add_patch(Rectangle(begin, size, 0.6, facecolor=(*color, 0.25), edgecolor=color))
        axis.plot(centre, height, "o", color=color, markersize=4)
    axis.text(-0.6, height, name, ha="right", va="center", fontsize=9)


def coordinates(out: Path) -> None:
    """Raw at 4 nm, its next level, labels at 2 nm; and where labels lie for a reader that takes centres for corners."""
    world = Box((0.0, 0.0, 0.0), (4.0, 4.0, 24.0))
    raw, coarse, label = (VoxelGrid.covering(world, (4.0, 4.0, size)) for size in (4.0, 8.0, 2.0))
    first = label.crop((0, 0, 4), (1, 1, 4))  # 4 voxels of 2 nm over raw voxels 2 and 3
    shift = first.voxel_size[2] / 2
    shifted = VoxelGrid(first.voxel_size, (*first.translation[:2], first.translation[2] + shift), first.shape)
    figure, axis = plt.subplots(figsize=(8, 3.4))
    voxels(axis, coarse, 3, RAW, f"raw, 8 nm\ntranslation {coarse.translation[2]:g}")
    voxels(axis, raw, 2, RAW, f"raw, 4 nm\ntranslation {raw.translation[2]:g}")
    voxels(axis, first, 1, LABEL, f"labels, 2 nm\ntranslation {first.translation[2]:g}")
    voxels(axis, shifted, 0, WRONG, f"labels, centre\ntaken for a corner:\n{shift:g} nm off")
    axis.set(xlim=(-0.4, 24.4), ylim=(-0.6, 3.6), xlabel="x, nm (faces are edges, dots are centres)", yticks=[])
    axis.set_xticks(np.arange(0, 25, 4))
    for face in (first.box.begin[2], first.box.end[2]):
        axis.axvline(face, color=LABEL, linewidth=0.8, linestyle=":")
    axis.spines[["left", "right", "top"]].set_visible(False)
    figure.savefig(out / "coordinates.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """A mask."""
    return sum((a - c) ** 2 for a, c in zip(np.indices(shape), centre, strict=True)) < radius**2


def score(out: Path) -> None:
    """Two true objects and six predictions of them, with the score that the code gives each."""
    shape, voxel = (24, 48, 80), (8.0, 8.0, 8.0)
    left, right = ball(shape, (12, 24, 22), 11), ball(shape, (12, 24, 57), 11)
    cut = np.indices(shape)[2] < 22
    bridge = np.zeros(shape, bool)
    bridge[11:14, 22:27, 22:57] = True
    shrunk = ball(shape, (12, 24, 22), 8), ball(shape, (12, 24, 57), 8)
    truth = left.astype(np.uint8) + 2 * right
    cases = {
        "equal": truth,
        "too small": shrunk[0].astype(np.uint8) + 2 * shrunk[1],
        "one missed": left.astype(np.uint8),
        "one split": (left & cut) + 2 * (left & ~cut) + 3 * right.astype(np.uint8),
        "merged": (left | right | bridge).astype(np.uint8),
        "one invented": truth + 3 * ball(shape, (12, 40, 40), 5).astype(np.uint8),
    }
    figure, axes = plt.subplots(2, 3, figsize=(8, 4.4), layout="constrained")
    for axis, (name, labels) in zip(axes.flat, cases.items(), strict=True):
        found = score_instance(labels, truth, voxel)
        axis.imshow(figures.object_colors(labels[12]))
        axis.contour(truth[12] > 0, [0.5], colors="white", linewidths=1, linestyles="--")
        counts = f"tp {found.tp}, fp {found.fp}, fn {found.fn}"
        f1 = 2 * found.tp / (2 * found.tp + found.fp + found.fn)
        distance = found.hausdorff_norm_sum / found.n_hausdorff
        numbers = f"F1 {f1:.2f}, distance {distance:.2f}: {np.sqrt(f1 * distance):.2f}"
        axis.set_title(f"{name} ({counts})\n{numbers}", fontsize=8)
        axis.axis("off")
    figure.savefig(out / "score.png", dpi=110)
    plt.close(figure)


def packed(shape: tuple[int, int, int]) -> np.ndarray:
    """Ids of one object alone, three that touch at necks, and five that touch along wide faces."""
    ids = np.zeros(shape, np.uint8)
    z, y, x = shape[0] // 2, shape[1], shape[2]
    alone_and_necks = [((z, 14, 16), 9.0), ((z, 42, 16), 11.0), ((z, 62, 18), 12.0), ((z, 60, 42), 13.0)]
    for number, (centre, radius) in enumerate(alone_and_necks, start=1):
        ids[ball(shape, centre, radius) & (ids == 0)] = number
    cluster = sum((a - c) ** 2 / r**2 for a, c, r in zip(np.indices(shape), (z, 36, 94), (9, 32, 34), strict=True)) < 1
    centres = [(z, 18, 84), (z - 3, 22, 108), (z + 2, 52, 80), (z, 54, 108), (z, 36, 98)]
    distances = [sum((a - c) ** 2 for a, c in zip(np.indices(shape), centre, strict=True)) for centre in centres]
    ids[cluster] = (5 + np.argmin(distances, axis=0))[cluster]
    return ids[:, :y, :x]


def unsure(values: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """0 or 1 as a network says it that is not sure: uint8 probabilities, with noise that neighbours share."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(values.shape), 1.5)
    logits = 8 * (values - 0.5) + noise * field / field.std()
    return np.rint(255 / (1 + np.exp(-logits))).astype(np.uint8)


def instances(out: Path) -> None:
    """One volume of nine objects, and what each way to instances makes of it; scored as the challenge does."""
    shape, voxel = (24, 76, 132), (8.0, 8.0, 8.0)
    truth = packed(shape)
    probability = unsure((truth > 0).astype(np.float64), 1.5, 0)
    offsets = [[reach * (axis == k) for axis in range(3)] for reach in (1, 3, 9) for k in range(3)]
    exact = affinities_of(truth, offsets) > 0
    affinities = np.stack([unsure(channel.astype(np.float64), 1.5, 1 + n) for n, channel in enumerate(exact)])
    names = {
        "cc3d": "components",
        "mutex_watershed": "affinities: mutex watershed",
        "agglomeration": "affinities: agglomeration",
    }
    found = {}
    for method in ("cc3d", "watershed", "mutex_watershed", "agglomeration"):
        name = names.get(method, method)
        parameters = DecodeParameters(method=method, min_size_nm3=100 * 8.0**3)
        if method in ("cc3d", "watershed"):
            found[name] = decode_class(probability, voxel, parameters)
        else:
            found[name] = decode_class(probability, voxel, parameters, affinities=(affinities, offsets))
    figure, axes = plt.subplots(2, 3, figsize=(8, 4))
    middle = shape[0] // 2
    axes.flat[0].imshow(probability[middle], cmap="gray", vmin=0, vmax=255)
    axes.flat[0].set_title("probability of the class", fontsize=8)
    axes.flat[1].imshow(affinities[5][middle], cmap="gray", vmin=0, vmax=255)
    axes.flat[1].set_title("an affinity, 3 voxels along x", fontsize=8)
    for axis, (name, labels) in zip(axes.flat[2:], found.items(), strict=True):
        made = score_instance(labels, truth, voxel)
        axis.imshow(figures.object_colors(labels[middle]))
        for number in range(1, int(truth.max()) + 1):
            axis.contour(truth[middle] == number, [0.5], colors="white", linewidths=0.8)
        f1, distance = 2 * made.tp / (2 * made.tp + made.fp + made.fn), made.hausdorff_norm_sum / made.n_hausdorff
        numbers = f"{labels.max()} of {truth.max()} objects, score {np.sqrt(f1 * distance):.2f}"
        axis.set_title(f"{name}\n{numbers}", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(out / "instances.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    coordinates(target)
    score(target)
    instances(target)
