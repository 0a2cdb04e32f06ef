"""The layers of the viewer: raw, truth, known voxels, probabilities, labels, uncertainty."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.labels import LabelVolume, read_instances, read_labels
from connectomics.errors import InputError, MissingError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.metadata import names_levels
from connectomics.io.store import is_s3
from connectomics.pages.colors import CLASS_COLORS, KNOWN_COLOR
from connectomics.pages.view.volume_server import MadeVolume

_WRITERS = {"predictions": "predict", "labels": "decode"}  # command that writes the folder of an option


@dataclass(frozen=True)
class Layer:
    """One layer of the viewer: probabilities are 0 to 255, masks 0 and 1.

    ``address``: ``files/{name}/...`` or ``made/{name}/...`` of a `VolumeServer`, or an s3:// URL.
    """

    name: str
    kind: Literal["raw", "probability", "mask", "ids"]
    address: str
    color: str = "#ffffff"
    visible: bool = True


@dataclass(frozen=True)
class ViewSources:
    """What to show; at least one of data root (local or s3://), predictions and labels.

    ``dataset`` None: the only one. ``crops`` and ``classes`` None: all.
    """

    data_root: str | None = None
    predictions: Path | None = None
    labels: Path | None = None
    dataset: str | None = None
    crops: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None


@dataclass
class Layers:
    """The layers of one data set; the first view of ``extent`` nm is at ``position``, nm, z y x."""

    dataset: str
    layers: list[Layer] = field(default_factory=list)
    roots: dict[str, Path] = field(default_factory=dict)
    made: dict[str, MadeVolume] = field(default_factory=dict)
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    extent: float = 1000.0


def collect_layers(sources: ViewSources) -> Layers:
    """Find the layers of one data set.

    Raises:
        InputError: no source is given, labels are given as predictions (or the reverse), or there are several data
        sets and ``dataset`` is None. MissingError, UnknownNameError: a folder, data set, crop or class is missing.
    """
    places = {"predictions": sources.predictions, "labels": sources.labels}
    if sources.data_root is None and not any(places.values()):
        raise InputError("nothing to look at: give a data root, --predictions or --labels")
    catalog = None if sources.data_root is None else Catalog.open(sources.data_root)
    found = Layers(_data_set(sources, catalog))
    boxes: list[VoxelGrid] = []
    if catalog is not None and found.dataset in catalog.datasets:
        boxes += _of_root(found, catalog, sources)
    for name, place in places.items():
        if place is not None:
            boxes += _of_folder(found, name, place, sources)
    if not found.layers:
        raise MissingError(f"nothing of {found.dataset} to look at: found no raw, no labels and no predictions")
    if boxes:
        box = min(boxes, key=lambda grid: grid.size).box
        found.position = box.center
        found.extent = max(e - b for b, e in zip(box.begin, box.end, strict=True))
    return found


def _data_set(sources: ViewSources, catalog: Catalog | None) -> str:
    of_root = set() if catalog is None else set(catalog.datasets)
    of_results: set[str] = set()
    for place in filter(None, (sources.predictions, sources.labels)):
        if not place.is_dir():
            raise MissingError(f"nothing at {place}; give a folder that predict or decode wrote")
        of_results |= {n.removesuffix(".zarr") for n in store.list_groups(str(place)) if n.endswith(".zarr")}
    if sources.dataset is not None:
        if sources.dataset not in of_root | of_results:
            raise unknown_name("data set", sources.dataset, of_root | of_results)
        return sources.dataset
    names = sorted(of_results or of_root)  # of the many data sets of a root, the predicted ones are meant
    if not names:
        places = ", ".join(str(p) for p in (sources.data_root, sources.predictions, sources.labels) if p is not None)
        raise MissingError(f"no data set in {places}: expected folders NAME.zarr, as predict and decode write")
    if len(names) != 1:
        raise InputError(f"found several data sets ({', '.join(names[:8])}): name one with --dataset")
    return names[0]


def _of_root(found: Layers, catalog: Catalog, sources: ViewSources) -> list[VoxelGrid]:
    """Add raw and the truth of the crops; return the grids of the crops."""
    location = catalog.raw_location(found.dataset)
    if is_s3(location):
        found.layers.append(Layer("raw", "raw", location))
    else:
        found.roots["raw"] = Path(location)
        found.layers.append(Layer("raw", "raw", "files/raw"))
    wanted = _chosen("crop", sources.crops, catalog.crop_names(found.dataset))
    grids, there = [], set[str]()
    for name in wanted:
        crop = catalog.crop(found.dataset, name)
        there |= set(crop.labels)
        classes = _chosen("class", sources.classes, sorted(crop.labels), may_be_missing=len(wanted) > 1)
        grids.append(crop.grid)
        for class_name, color in zip(classes, cycle(CLASS_COLORS), strict=False):
            _add_truth(found, crop, class_name, color, visible=name == wanted[0])
    if sources.predictions is None and sources.labels is None:  # predictions may have classes without truth
        _chosen("class", sources.classes, sorted(there))
    return grids


def _add_truth(found: Layers, crop: Crop, class_name: str, color: str, *, visible: bool) -> None:
    """Add the truth of a class (IDs or a mask) and the mask of known voxels."""
    label = crop.labels[class_name]
    if label.grid.size == 0:
        return

    def mask(part: VoxelGrid) -> LabelVolume:
        return read_labels(crop, [class_name], part)

    def add(what: str, key: str, values: Callable[[VoxelGrid], NDArray[Any]], color: str, visible: bool) -> None:
        address = f"{crop.name}-{class_name}-{key}"
        found.made[address] = MadeVolume(label.grid, np.uint32 if key == "ids" else np.uint8, values)
        kind: Literal["ids", "mask"] = "ids" if key == "ids" else "mask"
        found.layers.append(Layer(f"{class_name} {what} {crop.name}", kind, f"made/{address}", color, visible))

    if label.annotation.kind == "instance":
        add("truth", "ids", lambda part: read_instances(crop, class_name, part)[0], color, visible)
    else:
        add("truth", "present", lambda part: mask(part).present_of(class_name), color, visible)
    add("known", "known", lambda part: mask(part).known_of(class_name), KNOWN_COLOR, False)


def _of_folder(found: Layers, name: str, folder: Path, sources: ViewSources) -> list[VoxelGrid]:
    """Add predictions or labels, as the arrays describe themselves; return the grids of the classes."""
    root = folder / f"{found.dataset}.zarr"
    if not root.is_dir():
        return []
    found.roots[name] = root
    grids = []
    for crop in store.list_groups(str(root)):
        if sources.crops is not None and crop not in sources.crops:
            continue
        classes = store.list_groups(str(root / crop))
        chosen = [c for c in classes if sources.classes is None or c in sources.classes]
        for class_name, color in zip(chosen, cycle(CLASS_COLORS), strict=False):
            for path, about in _artifacts(root / crop / class_name):
                kind = str(about.get("artefact"))
                if (kind == "labels") != (name == "labels"):  # would look like a bad result
                    other = "labels" if kind == "labels" else "predictions"
                    raise InputError(
                        f"{path} holds {kind}: give {folder} by --{other}, and by --{name} a folder of "
                        f"'pytc {_WRITERS[name]}'"
                    )
                title, address = f"{class_name} {{}} {crop}", f"files/{name}/{os.path.relpath(path, root)}"
                found.layers.append(_layer_of(title, about, address, color))
            if grid := store.read_attrs(str(root / crop / class_name)).get("connectomics", {}).get("grid"):
                grids.append(VoxelGrid.from_dict(grid))
    return grids


def _artifacts(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a class's group and those below it (uncertainty, affinities) with their attributes."""
    attrs = store.read_attrs(str(place))
    about = attrs.get("connectomics")
    if isinstance(about, dict) and names_levels(attrs):
        yield place, about
    for name in store.list_groups(str(place)):
        if store.is_group(place / name):
            yield from _artifacts(place / name)


def _layer_of(title: str, about: dict[str, Any], address: str, color: str) -> Layer:
    artifact = str(about.get("artefact"))
    if artifact == "labels":
        return Layer(title.format("labels"), "ids" if about.get("kind") == "instance" else "mask", address, color)
    if artifact == "affinity":
        artifact = f"affinity {tuple(about.get('offset', ()))}"
    return Layer(title.format(artifact), "probability", address, color, visible=False)


def _chosen(
    what: str, wanted: Sequence[str] | None, there: Sequence[str], *, may_be_missing: bool = False
) -> list[str]:
    """Return the wanted names that exist, None for all; `UnknownNameError` for one that does not."""
    if wanted is None:
        return list(there)
    for name in wanted:
        if name not in there and not may_be_missing:
            raise unknown_name(what, name, there)
    return [name for name in there if name in wanted]
