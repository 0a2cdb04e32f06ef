"""Volumes of known instances with the artefacts that a prediction of them would leave on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from connectomics.decoding.affinities.segment import segment
from connectomics.decoding.cellmap_postprocess import finished
from connectomics.decoding.parameters import DecodeParameters
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import ensure_group, write_multiscale
from connectomics.metrics.cellmap_metrics import evaluate_instance

SIZE = (8.0, 8.0, 8.0)
#: as heads have them: one, three and nine voxels along each axis
OFFSETS = np.array([[reach * (axis == k) for axis in range(3)] for reach in (1, 3, 9) for k in range(3)])


def cells(shape: tuple[int, int, int], number: int, reach: float, seed: int = 0) -> np.ndarray:
    """Instances that touch along flat faces: the part of each Voronoi cell that is within ``reach`` of its centre."""
    rng = np.random.default_rng(seed)
    centers = rng.random((number, 3)) * shape
    nearest, ids = np.full(shape, np.inf), np.zeros(shape, np.uint32)
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    for i, center in enumerate(centers, start=1):
        distance = sum((a - c) ** 2 for a, c in zip(axes, center, strict=True))
        closer = distance < np.minimum(nearest, reach**2)
        ids[closer], nearest[closer] = i, distance[closer]
    return ids


def affinities_of(ids: np.ndarray, offsets: ArrayLike) -> np.ndarray:
    """Return the affinities of instance labels; the plain definition.

    Args:
        ids: (D, H, W), 0 background.
        offsets: (K, 3) whole voxels, z y x.

    Returns:
        (K, D, H, W) uint8: 255 where ``ids[p] == ids[p + o] != 0``, else 0, also where p + o is outside.
    """
    steps = np.asarray(offsets, np.int64)
    found = np.zeros((len(steps), *ids.shape), np.uint8)
    for channel, offset in zip(found, steps, strict=True):
        here = tuple(slice(max(0, -o), max(0, min(n, n - o))) for o, n in zip(offset, ids.shape, strict=True))
        there = tuple(slice(max(0, o), max(0, min(n, n + o))) for o, n in zip(offset, ids.shape, strict=True))
        channel[here] = 255 * ((ids[here] == ids[there]) & (ids[here] != 0))
    return found


def instances(affinities, offsets, mask=None, method="mutex_watershed", *, min_size=0, **more) -> np.ndarray:
    """The numbered instances of `segment`; ``more``: other parameters."""
    found = segment(affinities, offsets, mask, DecodeParameters(method=method, **more))
    return finished(found.labels, min_size, 26, fill_holes=False)


def noisy(ids: np.ndarray, offsets: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    """Affinities as of a network that is unsure: noise on the logits of 4 and -4, the same over about three voxels."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    exact = affinities_of(ids, offsets)
    for channel in exact:
        field = gaussian_filter(rng.standard_normal(ids.shape), 1.5)
        logits = 8 * (channel / 255 - 0.5) + noise * field / field.std()
        channel[:] = np.rint(255 / (1 + np.exp(-logits)))
    return exact


def write_prediction(
    folder: Path,
    probability: np.ndarray,
    affinities: np.ndarray,
    offsets: np.ndarray,
    size: tuple[float, float, float] = SIZE,
    class_name: str = "mito",
    translation: tuple[float, float, float] = (100.0, 200.5, 300.0),
) -> str:
    """What predict leaves of one class and its affinities, below ``folder``; returns the location of the class."""
    place = folder / "jrc_a.zarr" / "crop1" / class_name
    grid = VoxelGrid(size, translation, probability.shape)
    about = {"artefact": "probability", "class_name": class_name, "complete": True}
    ensure_group(place.parent)
    write_multiscale(place, probability, grid, attrs={"connectomics": about}, overwrite=True)
    ensure_group(place / "affinities")
    for k, (values, offset) in enumerate(zip(affinities, offsets, strict=True)):
        ours = {
            **about,
            "artefact": "affinity",
            "offset": offset.tolist(),
            "offset_nm": [float(o * s) for o, s in zip(offset, size, strict=True)],
        }
        channel = place / "affinities" / str(k)
        write_multiscale(channel, values, grid, attrs={"connectomics": ours}, overwrite=True)
    return str(place)


def read_labels(location: str | Path) -> np.ndarray:
    volume = Multiscale.open(str(location))
    return volume.read_level(0, (0, 0, 0), volume.grid.shape)[0]


@dataclass(frozen=True)
class Difference:
    """Labels compared with reference labels of the same volume.

    Attributes:
        voi_split, voi_merge: bits; conditional entropies of the variation of information over the labeled voxels of
            the reference: for split and for merged objects.
        faces: share of the pairs of neighboring voxels, labeled in both, that are one object in only one of them.
        objects, reference: numbers of objects.
    """

    voi_split: float
    voi_merge: float
    faces: float
    objects: int
    reference: int


def difference(labels: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare the ids (D, H, W) of a volume, 0 background, with reference ids; only the partition matters."""
    voi = evaluate_instance(labels, reference)
    differing = pairs = 0
    both = (labels > 0) & (reference > 0)
    for axis in range(labels.ndim):
        first, last = (slice(None),) * axis + (slice(None, -1),), (slice(None),) * axis + (slice(1, None),)
        inside = both[first] & both[last]
        differs = (labels[first] == labels[last]) != (reference[first] == reference[last])
        pairs += int(np.count_nonzero(inside))
        differing += int(np.count_nonzero(inside & differs))
    return Difference(
        voi["voi_split"],
        voi["voi_merge"],
        differing / max(1, pairs),
        len(np.unique(labels[labels > 0])),
        len(np.unique(reference[reference > 0])),
    )
