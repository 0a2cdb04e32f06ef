"""Labels against annotated crops, over known voxels only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.decoding.decode import find_arrays
from connectomics.errors import IncompleteError, MissingError
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.metrics.cellmap_metrics import evaluate_instance
from connectomics.metrics.evaluate import Counts, bootstrap_interval

_BLOCK = (128, 128, 128)


def evaluate_labels(labels: str | Path, root: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare every label array below ``labels`` that has annotated truth in the data root, on the label's own grid.

    Voxel counts are pooled over crops: ``classes`` (with a bootstrap interval of Dice over crops), ``datasets`` (per
    data set and class) and ``crops`` (each crop and class; instance classes with adapted Rand error and VOI). Crops or
    classes without truth are left out. `MissingError` where nothing can be compared, `IncompleteError` for half-written
    labels.
    """
    catalog = Catalog.open(root)
    per_crop: list[dict[str, Any]] = []
    for dataset, name, class_name in find_arrays(labels):
        if classes is not None and class_name not in classes:
            continue
        if dataset not in catalog.datasets or name not in catalog.crop_names(dataset):
            continue
        location = store.join(str(labels), f"{dataset}.zarr", name, class_name)
        if not store.read_attrs(location).get("connectomics", {}).get("complete", False):
            raise IncompleteError(f"{location} is only half written; run decode again to finish it")
        row = _compare(Multiscale.open(location), catalog.crop(dataset, name), class_name)
        if row is not None:
            per_crop.append({"dataset": dataset, "crop": name, "class": class_name, **row})
    if not per_crop:
        raise MissingError(f"none of the labels in {labels} has annotated truth in {root}; nothing to compare")
    by_class = {c: [r for r in per_crop if r["class"] == c] for c in sorted({r["class"] for r in per_crop})}
    by_set = {
        d: {c: _pool([r for r in rows if r["dataset"] == d]) for c, rows in by_class.items()}
        for d in sorted({r["dataset"] for r in per_crop})
    }
    return {
        "classes": {c: _pool(rows) for c, rows in by_class.items()},
        "datasets": {d: {c: v for c, v in found.items() if v["crops"]} for d, found in by_set.items()},
        "crops": [{k: v for k, v in r.items() if k != "counts"} | r["counts"].to_dict() for r in per_crop],
    }


def _compare(prediction: Multiscale, crop: Crop, class_name: str) -> dict[str, Any] | None:
    """Counts of one class in one crop, None where nothing of it is known."""
    grid = prediction.levels[0].grid
    counts = Counts()
    for begin, block in grid.blocks(_BLOCK):
        truth = read_labels(crop, [class_name], block)
        found, _ = prediction.read_level(0, begin, block.shape)
        counts = counts + Counts.of(found > 0, truth.present_of(class_name), truth.known_of(class_name))
    if counts.known == 0:
        return None
    row: dict[str, Any] = {"counts": counts}
    if is_instance_class(class_name) and class_name in crop.labels:
        ids, known = read_instances(crop, class_name, grid)
        found, _ = prediction.read_level(0, (0, 0, 0), grid.shape)
        row |= evaluate_instance(found, ids, known)
    return row


def _pool(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One class over several crops: pooled counts, plain means of the instance measures."""
    counts = sum((r["counts"] for r in rows), Counts())
    pooled: dict[str, Any] = {"crops": len(rows), **counts.to_dict()}
    for name in ("rand_error", "voi_split", "voi_merge"):
        values = [r[name] for r in rows if name in r]
        if values:
            pooled[name] = float(np.mean(values))
    if len(rows) > 1:
        pooled["dice_interval"] = list(bootstrap_interval([r["counts"] for r in rows], lambda c: c.dice))
    return pooled
