"""A picture of every kind of intensity augmentation, for docs/augmentations.md.

``python docs/make_augmentation_pictures.py OUT [--root DATA_ROOT --dataset NAME]`` writes a PNG
``OUT/augmentations-KIND.png`` for each kind: a slice without and with the augmentation at three strengths. One row
shows a new phantom; with a data root in CellMap's layout, another row shows its raw. 0 is black and 1 white.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.data.augmentation import KINDS, IntensityAugmentor
from connectomics.geometry.grid import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_file
from connectomics.pages import colors, figures
from connectomics.phantom import PhantomOptions, make_phantom

EDGE = 128  # voxels and pixels of a picture's edge
_GRAYS = 32  # gray levels: noise does not compress, and the eye sees no difference
_HEAD = 16  # pixels above a picture for its title
_SEED = 4


@dataclass(frozen=True)
class Sheet:
    """How to show a kind: three strengths (title, arguments), the axis normal to the slice (0: xy, 1: xz), and whether
    to show the slice that changes most (else the middle one).
    """

    strengths: tuple[tuple[str, dict[str, Any]], ...]
    cut: int = 0
    seek: bool = False


def _of(argument: str, *values: Any, **others: Any) -> Sheet:
    """Return a sheet with one argument at three strengths, the others fixed."""
    steps = tuple((f"{argument} {v if isinstance(v, str) else _text(v)}", {argument: v, **others}) for v in values)
    return Sheet(steps)


def _text(value: Any) -> str:
    return " / ".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value:g}"


SHEETS: dict[str, Sheet] = {
    "charging": Sheet(
        tuple(
            (f"{sign} {height:g}", {"amplitude": height, "sign": sign, "spots": 3, "radius": 40, "depth": 30})
            for sign, height in (("bright", 0.3), ("bright", 0.7), ("dark", 0.5))
        ),
        seek=True,
    ),
    "stripes": _of("amplitude", 0.05, 0.12, 0.25, axis="y", width=8),
    "blur": _of("sigma", 0.7, 1.2, [0, 2.0, 0.3]),
    "resolution": _of("factor", 1.5, 2.5, [1, 4, 1]),
    "poisson": _of("dose", 300, 100, 30),
    "gain": _of("factor", 0.85, 1.1, 1.3),
    "contrast": _of("factor", 0.6, 0.8, 1.4),
    "brightness": _of("shift", -0.15, 0.08, 0.15),
    "gamma": _of("exponent", 0.6, 1.3, 1.7),
    "invert": Sheet((("inverted", {}),)),
    "drift": Sheet(tuple((f"amplitude {a:g}", {"amplitude": a, "length": 80}) for a in (0.05, 0.1, 0.2)), 1),
    "noise": _of("std", 0.02, 0.05, 0.1),
    "shifted_sections": Sheet(
        tuple((f"{n} by {d} voxels", {"sections": n, "displacement": d}) for n, d in ((1, 4), (4, 6), (8, 8))), 1
    ),
    "missing_sections": Sheet(
        tuple((f"{n}, {fill}", {"sections": n, "fill": fill}) for n, fill in ((1, "black"), (2, "mean"), (3, "copy"))),
        1,
    ),
    "cutout": Sheet(
        tuple(
            (f"{n} {fill}", {"boxes": n, "size": [12, 32], "fill": fill})
            for n, fill in ((1, "mean"), (3, "mean"), (4, "noise"))
        ),
        seek=True,
    ),
}


def read_patch(root: Path, dataset: str) -> tuple[NDArray[np.float32], tuple[float, float, float]]:
    """Return the middle `EDGE`^3 voxels of a data set's raw, (D, H, W) in [0, 1], and their size in nm."""
    raw = Multiscale.open(root / dataset / f"{dataset}.zarr" / "recon-1" / "em" / "fibsem-uint8")
    whole = raw.grid
    begin = [(n - EDGE) // 2 for n in whole.shape]
    corner = np.asarray(whole.translation) + np.asarray(begin) * np.asarray(whole.voxel_size)
    values, _ = raw.read_raw(VoxelGrid(whole.voxel_size, tuple(corner), (EDGE,) * 3))
    z, y, x = (float(v) for v in whole.voxel_size)
    return values / np.float32(255), (z, y, x)


def draw(kind: str, patch: NDArray[np.float32], voxel_size: Sequence[float]) -> figures.Picture:
    """Return one row: the patch without and with the kind at three strengths, RGB; unknown voxels are tinted."""
    import torch

    sheet = SHEETS[kind]
    image = torch.from_numpy(patch)[None, None]
    codes = torch.ones((1, *patch.shape), dtype=torch.uint8)
    volumes, known = [patch], [codes[0].numpy()]
    for _, arguments in sheet.strengths:
        augmentor = IntensityAugmentor.from_config({kind: {"prob": 1, **arguments}}, voxel_size)
        assert augmentor is not None
        result, moved = augmentor(image, codes, torch.tensor([_SEED]))
        assert moved is not None
        volumes.append(result[0, 0].numpy())
        known.append(moved[0].numpy())
    others = tuple(a for a in range(3) if a != sheet.cut)
    at = EDGE // 2
    if sheet.seek:
        at = int(np.argmax(sum((np.abs(v - patch) > 0.05).mean(others) for v in volumes[1:])))
    pictures = []
    for title, volume, sure in zip(("before", *(t for t, _ in sheet.strengths)), volumes, known, strict=True):
        slice_ = np.round(volume.take(at, sheet.cut) * (_GRAYS - 1)) / (_GRAYS - 1)
        gray = figures.to_gray(slice_, (0.0, 1.0))
        layer = figures.label_layer(sure.take(at, sheet.cut) == 0, colors.PREDICTION)
        picture = figures.overlay(gray, layer)
        if volume is patch:
            picture = figures.scale_bar(picture, float(voxel_size[2]))
        head = np.zeros((_HEAD, EDGE, 3), np.uint8)
        pictures.append(np.concatenate([figures.letter(head, title, (3, 1), 11), picture]))
    return figures.side_by_side(pictures)


def write_pictures(out: Path, root: Path | None, dataset: str) -> list[Path]:
    """Write the picture of every kind to ``out``; see the module."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        phantom = make_phantom(Path(folder) / "root", PhantomOptions(preset="tiny"))
        patches = [read_patch(phantom.root, phantom.datasets[0])]
    if root is not None:
        patches.insert(0, read_patch(root, dataset))
    written = []
    for kind in KINDS:
        rows = [draw(kind, patch, voxel_size) for patch, voxel_size in patches]
        stream = io.BytesIO()
        picture = Image.fromarray(np.concatenate(rows)).quantize(48, dither=Image.Dither.NONE)
        picture.save(stream, "PNG", optimize=True)
        path = out / f"augmentations-{kind}.png"
        write_file(path, stream.getvalue())
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(prog="python docs/make_augmentation_pictures.py", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--root", type=Path, help="data root in CellMap's layout: a row of pictures from its raw")
    parser.add_argument("--dataset", default="fib25-medulla", help="which of its data sets (%(default)s)")
    given = parser.parse_args(arguments)
    for path in write_pictures(given.out, given.root, given.dataset):
        print(path)


if __name__ == "__main__":
    main()
