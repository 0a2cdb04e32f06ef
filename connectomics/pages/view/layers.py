"""The layers of the viewer: raw, truth, known voxels, probabilities, labels, uncertainty.

Every class of every crop is a layer, unless that would be too many: then each crop has one layer for the truth and one
for each result, in which the classes are segments (`connectomics.pages.view.class_maps`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.labels import LabelVolume, read_instances, read_labels
from connectomics.errors import InputError, MissingError, require_known
from connectomics.geometry import Box, VoxelGrid
from connectomics.io import store
from connectomics.io.metadata import names_levels
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import TASK_FILE
from connectomics.io.store import is_s3
from connectomics.morphology.label_volume import LabelVolume as Measured
from connectomics.pages.colors import CLASS_COLORS, KNOWN_COLOR
from connectomics.pages.view import segment_properties
from connectomics.pages.view.class_maps import class_numbers, in_bytes, known_share, result_map, truth_map
from connectomics.pages.view.volume_server import Made, MadeVolume

_WRITERS = {"predictions": "predict", "labels": "decode"}  # command that writes the folder of an option
_MOST_LAYERS = 24  # of the truth, and of each result, if every class has its own
_MOST_CROPS = 8  # crops with truth, or with a result, that are shown if none is named


@dataclass(frozen=True)
class Layer:
    """One layer of the viewer: probabilities are 0 to 255, masks 0 and 1.

    Attributes:
        what: truth, known, labels, probability, ... crop: its crop; "": all. class_name: its class; "": several, each a
            segment or a part of the value.
        address: ``files/{name}/...`` or ``made/{name}/...`` of a `VolumeServer`, or an s3:// URL.
        more: addresses of the properties and the meshes of its segments.
    """

    what: str
    kind: Literal["raw", "probability", "mask", "ids"]
    address: str
    class_name: str = ""
    crop: str = ""
    color: str = "#ffffff"
    visible: bool = True
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in the viewer, ``mito truth crop1``."""
        return " ".join(filter(None, (self.class_name, self.what, self.crop)))


@dataclass(frozen=True)
class ViewSources:
    """What to show; at least one of data root (local or s3://), predictions and labels.

    ``dataset`` None: the only one. ``crops`` (with truth, results, or in the table of test crops) and ``classes`` None:
    all. ``tables``: folder that measure wrote; ``meshes``: folder that mesh wrote in a format of neuroglancer.
    """

    data_root: str | None = None
    predictions: Path | None = None
    labels: Path | None = None
    dataset: str | None = None
    crops: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    tables: Path | None = None
    meshes: Path | None = None


@dataclass
class Layers:
    """The layers of one data set; the first view of ``extent`` nm is at ``position``, nm, z y x.

    Attributes:
        boxes: the box of each crop. notes: what was left out or joined, and how to see it.
    """

    dataset: str
    layers: list[Layer] = field(default_factory=list)
    roots: dict[str, Path] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    boxes: dict[str, Box] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    extent: float = 1000.0


@dataclass(frozen=True)
class _Stored:
    """One array of a result, with what its attributes say."""

    crop: str
    class_name: str
    path: Path
    about: Mapping[str, Any]


def collect_layers(sources: ViewSources) -> Layers:
    """Find the layers of one data set: at most a few dozen, unless more crops are named.

    Raises:
        InputError: no source is given, labels are given as predictions (or the reverse), or there are several data
        sets and ``dataset`` is None. MissingError, UnknownNameError: a folder, data set, crop or class is missing.
    """
    places = {"predictions": sources.predictions, "labels": sources.labels}
    if sources.data_root is None and not any(places.values()):
        raise InputError("nothing to look at: give a data root, --predictions or --labels")
    for option, folder in (("--tables", sources.tables), ("--meshes", sources.meshes)):
        if folder is not None and not folder.is_dir():
            raise MissingError(f"{option}: there is no folder {folder}; give one that measure (mesh) wrote")
    catalog = None if sources.data_root is None else Catalog.open(sources.data_root)
    found = Layers(_data_set(sources, catalog))
    if catalog is not None and found.dataset not in catalog.datasets:  # the results may be of another root
        catalog = None
    results = {name: _stored(found, name, place, sources) for name, place in places.items() if place is not None}
    of_results = list(dict.fromkeys(item.crop for items in results.values() for item in items))
    truth = [] if catalog is None else catalog.crop_names(found.dataset)
    tests = {} if sources.data_root is None else _test_boxes(sources.data_root, found.dataset)
    named = _named(sources.crops, [*truth, *of_results, *tests])
    focus: list[Box] = []
    if catalog is not None:
        predicted = {item.class_name for items in results.values() for item in items}
        chosen = _first(found, "truth", [name for name in of_results if name in truth], truth, named)
        focus += _of_root(found, catalog, sources, chosen, predicted)
    for name, items in results.items():
        chosen = _first(found, name, [], list(dict.fromkeys(item.crop for item in items)), named)
        boxes = _of_result(found, name, [item for item in items if item.crop in chosen], sources)
        focus = [*boxes, *focus]
    if named is not None:
        found.boxes |= {name: tests[name] for name in named if name in tests and name not in found.boxes}
    if not found.layers:
        raise MissingError(f"nothing of {found.dataset} to look at: found no raw, no labels and no predictions")
    _look_at(found, focus, named)
    return found


def _look_at(found: Layers, focus: Sequence[Box], named: Sequence[str] | None) -> None:
    """Set the first view: the first named crop, or the largest result, or the first crop with truth."""
    wanted = [found.boxes[name] for name in named or () if name in found.boxes] or list(focus)
    if wanted:
        found.position = wanted[0].center
        found.extent = max(wanted[0].extent)


def _test_boxes(root: str, dataset: str) -> dict[str, Box]:
    return {crop: box for (name, crop), box in CropTable.of_root(root).boxes().items() if name == dataset}


def _named(wanted: Sequence[str] | None, there: Sequence[str]) -> list[str] | None:
    """Return the names of the wanted crops (7 means crop7), None for all; `UnknownNameError` if one is nowhere."""
    if wanted is None:
        return None
    names = [f"crop{name}" if name.isdigit() else name for name in wanted]
    require_known("crop", names, there)
    return names


def _first(
    found: Layers, what: str, before: Sequence[str], there: Sequence[str], named: Sequence[str] | None
) -> list[str]:
    """Return the crops to show of those that are ``there``: the named ones, else the first few, ``before`` first."""
    if named is not None:
        return [name for name in there if name in named]
    order = list(dict.fromkeys([*before, *there]))
    if len(order) > _MOST_CROPS:
        left = len(order) - _MOST_CROPS
        found.notes.append(f"{what}: {left} more crops are not shown; name them by --crop")
    return order[:_MOST_CROPS]


def _data_set(sources: ViewSources, catalog: Catalog | None) -> str:
    of_root = set() if catalog is None else set(catalog.datasets)
    of_results: set[str] = set()
    for place in filter(None, (sources.predictions, sources.labels)):
        if not place.is_dir():
            raise MissingError(f"nothing at {place}; give a folder that predict or decode wrote")
        of_results |= {n.removesuffix(".zarr") for n in store.list_groups(str(place)) if n.endswith(".zarr")}
    if sources.dataset is not None:
        require_known("data set", [sources.dataset], of_root | of_results)
        return sources.dataset
    names = sorted(of_results or of_root)  # of the many data sets of a root, the predicted ones are meant
    if not names:
        places = ", ".join(str(p) for p in (sources.data_root, sources.predictions, sources.labels) if p is not None)
        raise MissingError(f"no data set in {places}: expected folders NAME.zarr, as predict and decode write")
    if len(names) != 1:
        raise InputError(f"found several data sets ({', '.join(names[:8])}): name one with --dataset")
    return names[0]


def _of_root(
    found: Layers, catalog: Catalog, sources: ViewSources, crops: Sequence[str], predicted: set[str]
) -> list[Box]:
    """Add raw and the truth of some crops: of the predicted classes, if none are named. Return the crops' boxes."""
    add_raw(found, catalog.raw_location(found.dataset))
    opened = [catalog.crop(found.dataset, name) for name in crops]
    there = {name for crop in opened for name in crop.labels}
    wanted = sources.classes or sorted(predicted & there) or None
    shown = {}
    for crop in opened:
        classes = _chosen("class", wanted, sorted(crop.labels), may_be_missing=len(opened) > 1 or bool(predicted))
        shown[crop] = [name for name in classes if crop.labels[name].grid.size]
        found.boxes[crop.name] = crop.grid.box
    if not predicted and opened:  # predictions may have classes without truth
        _chosen("class", sources.classes, sorted(there))
    number = sum(len(classes) for classes in shown.values())
    if 2 * number > _MOST_LAYERS:
        found.notes.append(
            f"truth: {number} arrays are one layer per crop, with the classes as segments; name classes by --class "
            "(and crops by --crop) to see each alone, with its instances"
        )
    for crop, classes in shown.items():
        if 2 * number > _MOST_LAYERS and classes:
            _add_truth_map(found, crop, classes, visible=crop is opened[0])
            continue
        for class_name, color in zip(classes, cycle(CLASS_COLORS), strict=False):
            _add_truth(found, crop, class_name, color, visible=crop is opened[0])
    return [found.boxes[name] for name in crops]


def add_raw(found: Layers, location: str, root: str = "raw") -> None:
    """Add the raw at a location; ``root``: the name that it is served by, if it is on this machine."""
    if not is_s3(location):
        found.roots[root] = Path(location)
    found.layers.append(Layer("raw", "raw", location if is_s3(location) else f"files/{root}"))


def _add_truth_map(found: Layers, crop: Crop, classes: Sequence[str], *, visible: bool) -> None:
    """Add the truth of a crop as one layer, and the share of classes that are known."""
    more = _names(found, f"{crop.name}-names", classes)
    found.made |= {f"{crop.name}-truth": truth_map(crop, classes), f"{crop.name}-known": known_share(crop, classes)}
    found.layers.append(Layer("truth", "ids", f"made/{crop.name}-truth", crop=crop.name, visible=visible, more=(more,)))
    found.layers.append(
        Layer("known", "probability", f"made/{crop.name}-known", "", crop.name, KNOWN_COLOR, visible=False)
    )


def _names(found: Layers, address: str, classes: Sequence[str]) -> str:
    """Add the names of the segments of a map of classes; return the address."""
    found.made[address] = segment_properties.of_classes(class_numbers(classes))
    return f"made/{address}"


def _add_truth(found: Layers, crop: Crop, class_name: str, color: str, *, visible: bool) -> None:
    """Add the truth of a class (IDs or a mask) and the mask of known voxels."""
    label = crop.labels[class_name]
    wide = np.uint64 if label.source.levels[0].dtype.itemsize > 4 else np.uint32

    def mask(part: VoxelGrid) -> LabelVolume:
        return read_labels(crop, [class_name], part)

    def add(what: str, key: str, values: Callable[[VoxelGrid], NDArray[Any]], color: str, visible: bool) -> None:
        address = f"{crop.name}-{class_name}-{key}"
        found.made[address] = MadeVolume(label.grid, wide if key == "ids" else np.uint8, values)
        kind: Literal["ids", "mask"] = "ids" if key == "ids" else "mask"
        found.layers.append(Layer(what, kind, f"made/{address}", class_name, crop.name, color, visible))

    if label.annotation.kind == "instance":
        add("truth", "ids", lambda part: read_instances(crop, class_name, part)[0], color, visible)
    else:
        add("truth", "present", lambda part: mask(part).present_of(class_name), color, visible)
    add("known", "known", lambda part: mask(part).known_of(class_name), KNOWN_COLOR, False)


def _stored(found: Layers, name: str, folder: Path, sources: ViewSources) -> list[_Stored]:
    """Find the arrays of the chosen classes in predictions or labels, as they describe themselves."""
    root = folder / f"{found.dataset}.zarr"
    if not root.is_dir():
        return []
    found.roots[name] = root
    arrays = []
    for crop in store.list_groups(str(root)):
        for class_name in store.list_groups(str(root / crop)):
            if sources.classes is not None and class_name not in sources.classes:
                continue
            for path, about in _artifacts(root / crop / class_name):
                kind = str(about.get("artefact"))
                if (kind == "labels") != (name == "labels"):  # would look like a bad result
                    other = "labels" if kind == "labels" else "predictions"
                    raise InputError(
                        f"{path} holds {kind}: give {folder} by --{other}, and by --{name} a folder of "
                        f"'pytc {_WRITERS[name]}'"
                    )
                arrays.append(_Stored(crop, class_name, path, about))
    return arrays


def _of_result(found: Layers, name: str, arrays: Sequence[_Stored], sources: ViewSources) -> list[Box]:
    """Add a result, array by array or as one layer per crop; return the boxes of its crops, the largest first."""
    crops: dict[str, list[_Stored]] = {}
    for item in arrays:
        crops.setdefault(item.crop, []).append(item)
    for crop, items in crops.items():
        grids = [VoxelGrid.from_dict(item.about["grid"]) for item in items if item.about.get("grid")]
        grids = grids or [Multiscale.open(items[0].path).grid]
        found.boxes[crop] = max(grids, key=lambda grid: math.prod(grid.box.extent)).box
    joined = len(arrays) > _MOST_LAYERS
    if joined:
        found.notes.append(
            f"{name}: {len(arrays)} arrays are one layer per crop, with the classes as segments; name classes by "
            "--class (and crops by --crop) to see each alone"
        )
    for crop, items in crops.items():
        main = {item.class_name: item.path for item in items if item.about.get("artefact") in ("labels", "probability")}
        if joined and main:
            more = _names(found, f"{crop}-{name}-names", list(main))
            found.made[f"{crop}-{name}"] = result_map(main)
            found.layers.append(Layer(name, "ids", f"made/{crop}-{name}", crop=crop, more=(more,)))
            continue
        colors = dict(zip(dict.fromkeys(item.class_name for item in items), cycle(CLASS_COLORS), strict=False))
        found.layers += [_layer_of(found, name, item, colors[item.class_name], sources) for item in items]
    return sorted((found.boxes[crop] for crop in crops), key=lambda box: -math.prod(box.extent))


def _artifacts(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a class's group and those below it (uncertainty, affinities) with their attributes."""
    attrs = store.read_attrs(str(place))
    about = attrs.get("connectomics")
    if isinstance(about, dict) and names_levels(attrs):
        yield place, about
    for name in store.list_groups(str(place)):
        if store.is_group(place / name):
            yield from _artifacts(place / name)


def _layer_of(found: Layers, name: str, item: _Stored, color: str, sources: ViewSources) -> Layer:
    address = f"files/{name}/{os.path.relpath(item.path, found.roots[name])}"
    artifact = str(item.about.get("artefact"))
    if artifact == "labels":
        instances = item.about.get("kind") == "instance"
        more = _of_instances(found, item, sources) if instances else ()
        kind: Literal["ids", "mask"] = "ids" if instances else "mask"
        return Layer("labels", kind, address, item.class_name, item.crop, color, more=more)
    if artifact == "affinity":
        artifact = f"affinity {tuple(item.about.get('offset', ()))}"
    source = Multiscale.open(item.path)
    if source.levels[0].dtype == np.float16:  # which viewers do not read
        key = address.removeprefix("files/").replace("/", "-")
        found.made[key], address = in_bytes(source), f"made/{key}"
    return Layer(artifact, "probability", address, item.class_name, item.crop, color, visible=False)


def _of_instances(found: Layers, item: _Stored, sources: ViewSources) -> tuple[str, ...]:
    """Add what there is of the instances in labels: their properties and their meshes; return the addresses."""
    more = []
    place = (found.dataset, item.crop, item.class_name)
    properties = segment_properties.of_instances(item.path, sources.tables, *place)
    if properties is not None:
        address = f"{item.crop}-{item.class_name}-instances"
        found.made[address] = properties
        more.append(f"made/{address}")
    if sources.meshes is not None and sources.meshes.joinpath(*place, "info").exists():
        found.roots["meshes"] = sources.meshes
        more.append("/".join(("files/meshes", *place)))
    if more and (sources.tables or sources.meshes):
        _name_others(found, item, sources, "/".join(place))
    return tuple(more)


def _name_others(found: Layers, item: _Stored, sources: ViewSources, name: str) -> None:
    """Note tables and meshes that were made from other labels of a class than those that are shown."""
    shown = Measured.open(found.dataset, item.crop, str(item.path)).stamp
    summaries = sources.tables.glob("*.summary.json") if sources.tables else ()
    marks = [("measure", sources.tables, (store.read_json(file) or {}).get("made_from", {})) for file in summaries]
    task = store.read_json(sources.meshes / name / TASK_FILE) if sources.meshes else None
    marks.append(("mesh", sources.meshes, {name: (task or {}).get("artifact", {}).get("made_from", {}).get("labels")}))
    for verb, folder in dict.fromkeys((v, f) for v, f, made in marks if made.get(name) not in (None, shown)):
        found.notes.append(f"{name}: {folder} is of other labels than {sources.labels} holds now; run {verb} again")


def _chosen(
    what: str, wanted: Sequence[str] | None, there: Sequence[str], *, may_be_missing: bool = False
) -> list[str]:
    """Return the wanted names that exist, None for all; `UnknownNameError` for one that does not."""
    if wanted is None:
        return list(there)
    if not may_be_missing:
        require_known(what, wanted, there)
    return [name for name in there if name in wanted]
