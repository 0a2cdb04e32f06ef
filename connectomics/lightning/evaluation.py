"""Labels against annotated crops, over known voxels only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.decoding.decode import find_arrays
from connectomics.errors import IncompleteError, MissingError, unknown_name
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.metrics.counts import Counts
from connectomics.metrics.evaluate import LabelEvaluation, evaluate_label, summarize

_BLOCK = (128, 128, 128)


def evaluate_labels(labels: str | Path, root: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare every label array below ``labels`` that has annotated truth in the data root, on the label's own grid.

    Gives rows of pooled measures (`connectomics.metrics.evaluate.summarize`): ``classes`` with bootstrap intervals over
    crops, ``datasets`` (by data set and class), and ``crops`` (one row a crop and class). What has no truth is left
    out. `MissingError` where nothing can be compared, `IncompleteError` for half-written labels, `UnknownNameError` for
    a class of ``classes`` that no label has.
    """
    catalog = Catalog.open(root)
    found = list(find_arrays(labels))
    for name in classes or ():
        if name not in {c for _, _, c in found}:
            raise unknown_name("class", name, {c for _, _, c in found}, str(labels))
    rows: list[LabelEvaluation] = []
    for dataset, crop, name in found:
        if classes is not None and name not in classes:
            continue
        if dataset not in catalog.datasets or crop not in catalog.crop_names(dataset):
            continue
        location = store.join(str(labels), f"{dataset}.zarr", crop, name)
        if not store.read_attrs(location).get("connectomics", {}).get("complete", False):
            raise IncompleteError(f"{location} is only half written; run decode again to finish it")
        row = _compare(Multiscale.open(location), catalog.crop(dataset, crop), name)
        if row is not None:
            rows.append(row)
    if not rows:
        raise MissingError(f"none of the labels in {labels} has annotated truth in {root}; nothing to compare")
    return {
        "classes": summarize(rows, ("class",)),
        "datasets": summarize(rows, ("dataset", "class")),
        "crops": [row.to_dict() for row in rows],
    }


def _compare(prediction: Multiscale, crop: Crop, name: str) -> LabelEvaluation | None:
    """One class in one crop, None where nothing of it is known.

    Semantic classes are counted block by block; instances need whole volumes (about 20 bytes a voxel).
    """
    grid = prediction.levels[0].grid
    if is_instance_class(name) and name in crop.labels and crop.labels[name].annotation.kind == "instance":
        ids, known = read_instances(crop, name, grid)
        found, _ = prediction.read_level(0, (0, 0, 0), grid.shape)
        return evaluate_label(
            found,
            ids,
            known,
            voxel_size=grid.voxel_size,
            dataset=crop.dataset,
            crop=crop.name,
            class_name=name,
        )
    counts = Counts()
    for begin, block in grid.blocks(_BLOCK):
        truth = read_labels(crop, [name], block)
        found, _ = prediction.read_level(0, begin, block.shape)
        counts = counts + Counts.of(found, truth.present_of(name), truth.known_of(name))
    return LabelEvaluation(crop.dataset, crop.name, name, counts) if counts.known else None
