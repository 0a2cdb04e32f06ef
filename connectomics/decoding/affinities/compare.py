"""How far two labellings of one volume differ: what stitching has changed, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.metrics.cellmap_metrics import evaluate_instance


@dataclass(frozen=True)
class Difference:
    """One labelling against another.

    Attributes:
        voi_split, voi_merge: bits; conditional entropies of the variation of information over the voxels that the
            reference labels: its objects that were cut, and its objects that were put together.
        faces: share of the pairs of neighbouring voxels, both labelled in both, that one labelling has in one object
            and the other in two.
        objects, reference: numbers of objects.
    """

    voi_split: float
    voi_merge: float
    faces: float
    objects: int
    reference: int


def difference(labels: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Compare the ids (D, H, W) of a volume with other ids of it, 0 background; numbers do not matter.

    Raises:
        InputError: shapes that differ.
    """
    if labels.shape != reference.shape:
        raise InputError(f"labels of one shape are needed, found {labels.shape} and {reference.shape}")
    voi = evaluate_instance(labels, reference)
    differing = pairs = 0
    both = (labels > 0) & (reference > 0)
    for axis in range(labels.ndim):
        here = tuple(slice(None, -1) if a == axis else slice(None) for a in range(labels.ndim))
        there = tuple(slice(1, None) if a == axis else slice(None) for a in range(labels.ndim))
        inside = both[here] & both[there]
        one, other = labels[here] == labels[there], reference[here] == reference[there]
        pairs += int(np.count_nonzero(inside))
        differing += int(np.count_nonzero(inside & (one != other)))
    return Difference(
        voi["voi_split"],
        voi["voi_merge"],
        differing / max(1, pairs),
        len(np.unique(labels[labels > 0])),
        len(np.unique(reference[reference > 0])),
    )
