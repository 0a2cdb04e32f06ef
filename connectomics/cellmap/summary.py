"""A data root in numbers: what `pytc describe` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from connectomics.cellmap.catalog import Catalog, Crop, LabelArray
from connectomics.errors import MetadataError, MissingError
from connectomics.geometry import Triple, VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import is_s3


def summarize(
    root: str,
    datasets: Sequence[str] | None = None,
    crops: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    voxel_size: Triple | None = None,
) -> dict[str, Any]:
    """Return data sets with raw levels and crops, and the annotated volume of each class by state (cubic micrometers).

    Only the classes' own arrays are counted, not what other classes imply. A crop without an array of the class counts
    as unknown with its whole box. ``not_annotated``: groups without an annotation, which are no classes -> their crops.
    ``raw_chunks`` counts all and the missing raw chunks under each crop, on the level that a run at ``voxel_size`` (nm,
    z y x; None: the finest) reads. Unless crops or classes are given, local data sets without labels are listed, too.
    """
    catalog = Catalog.open(root)
    chosen = datasets or catalog.datasets
    bare = [] if crops or classes or is_s3(root) else [name for name in chosen if not catalog.crop_names(name)]
    found = catalog.crops(datasets, crops, classes) if len(bare) < len(chosen) else []
    there = [_annotated(crop) for crop in found]
    names = sorted({n for labels in there for n in labels if classes is None or n in classes})
    others = Counter(n for crop in found for n in crop.not_annotated)
    others.update(n for crop, labels in zip(found, there, strict=True) for n in crop.labels if n not in labels)
    return {
        "root": catalog.root,
        "n_crops": len(found),
        "datasets": [
            _dataset(catalog, name, [c for c in found if c.dataset == name], voxel_size)
            for name in catalog.datasets
            if name in bare or any(c.dataset == name for c in found)
        ],
        "classes": {name: _class(name, found, there) for name in names},
        "not_annotated": dict(sorted(others.items())),
    }


def _annotated(crop: Crop) -> dict[str, LabelArray]:
    """The crop's label arrays with an annotation; a broken annotation raises `MetadataError`."""
    found = {}
    for name, label in crop.labels.items():
        try:
            _ = label.annotation
        except (MetadataError, MissingError):
            if label.is_annotated:
                raise
        else:
            found[name] = label
    return found


def _dataset(catalog: Catalog, name: str, crops: Sequence[Crop], voxel_size: Triple | None) -> dict[str, Any]:
    raw = Multiscale.open(catalog.raw_location(name), catalog.options)
    chunks = [_raw_chunks(crop, voxel_size) for crop in crops]
    return {
        "name": name,
        "raw_chunks": {key: sum(count[key] for count in chunks) for key in ("missing", "total")},
        "raw": {
            "location": raw.location,
            "dtype": str(raw.levels[0].dtype),
            "levels": [{"path": level.path, **level.grid.to_dict()} for level in raw.levels],
        },
        "crops": [
            {
                "name": crop.name,
                "begin_nm": list(crop.box.begin),
                "extent_nm": list(crop.box.extent),
                "voxel_size": list(crop.grid.voxel_size),
                "shape": list(crop.grid.shape),
                "classes": sorted(crop.labels),
                "raw_chunks": count,
            }
            for crop, count in zip(crops, chunks, strict=True)
        ],
    }


def _raw_chunks(crop: Crop, voxel_size: Triple | None) -> dict[str, Any]:
    """Raw chunks under the crop: ``missing``, ``total``, ``first_missing`` (such as s0/3/4/5, or None)."""
    raw = crop.raw_source
    if voxel_size is None:
        _, grid = raw.grid.part(crop.box)
    else:
        grid = VoxelGrid.covering(crop.box, voxel_size)
    missing, total, first = raw.missing_chunks(grid)
    name = None if first is None else first.removeprefix(f"{raw.location}/")
    return {"missing": missing, "total": total, "first_missing": name}


def _class(name: str, crops: Sequence[Crop], labels: Sequence[Mapping[str, LabelArray]]) -> dict[str, Any]:
    total = {"present_um3": 0.0, "absent_um3": 0.0, "unknown_um3": 0.0}
    kinds = set()
    n_crops = 0
    for crop, there in zip(crops, labels, strict=True):
        label = there.get(name)
        if label is None:
            total["unknown_um3"] += float(np.prod(crop.box.extent)) / 1e9
            continue
        n_crops += 1
        kinds.add(label.annotation.kind)
        voxel = float(np.prod(label.grid.voxel_size)) / 1e9
        for state, count in label_counts(label).items():
            total[f"{state}_um3"] += count * voxel
    return {"kind": " and ".join(sorted(kinds)), "crops": n_crops, **total}


def label_counts(label: LabelArray, part: VoxelGrid | None = None, level: int = 0) -> dict[str, int]:
    """Count the ``present``, ``absent`` and ``unknown`` voxels of a level, in bounded memory.

    Args:
        part: the part of the level's grid to count; None: all of it.
    """
    present = known = voxels = 0
    for block in label.blocks(part, level):
        present += int(block.present.sum())
        known += int(block.known.sum())
        voxels += block.grid.size
    return {"present": present, "absent": known - present, "unknown": voxels - known}
