"""Which layers there are: raw, truth, what is known, probabilities, labels, uncertainty."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.errors import InputError, MissingError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.store import is_s3
from connectomics.report.view.server import MadeVolume

#: Okabe and Ito's colours, told apart by colour-blind people, without the black.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


_MAKES = {"predictions": "predict", "labels": "decode"}


@dataclass(frozen=True)
class Layer:
    """One layer of the viewer.

    Attributes:
        name: ``mito truth crop234``. kind: ``raw``, ``probability`` (0 to 255), ``mask`` (0 and 1), ``ids``.
        address: ``files/{name}/...`` or ``made/{name}/...`` of a `VolumeServer`, or an s3:// URL.
        colour: of a probability or a mask. visible: when the page opens.
    """

    name: str
    kind: Literal["raw", "probability", "mask", "ids"]
    address: str
    colour: str = "#ffffff"
    visible: bool = True


@dataclass(frozen=True)
class ViewSources:
    """What is to be looked at; at least one of the places.

    Attributes:
        data_root: in CellMap's layout, local or s3://: raw, and the truth of its crops.
        predictions, labels: folders as predict and as decode write them.
        dataset: which data set (one has one world); None: the only one that there is.
        crops, classes: only these; None: all.
    """

    data_root: str | None = None
    predictions: Path | None = None
    labels: Path | None = None
    dataset: str | None = None
    crops: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None


@dataclass
class Layers:
    """Layers with what a server needs to serve them.

    Attributes:
        position: nm, z y x: where to look first. roots, made: for `VolumeServer`.
    """

    dataset: str
    layers: list[Layer] = field(default_factory=list)
    roots: dict[str, Path] = field(default_factory=dict)
    made: dict[str, MadeVolume] = field(default_factory=dict)
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    extent: float = 1000.0


def collect_layers(sources: ViewSources) -> Layers:
    """Find the layers of one data set.

    Raises:
        InputError: no place given, labels given as predictions (or the other way round), or several data sets and none
        named. MissingError, UnknownNameError: a place, a data
        set, a crop or a class that is not there.
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
        raise MissingError(f"nothing of {found.dataset} to look at: no raw, no labels and no predictions are there")
    if boxes:
        box = min(boxes, key=lambda grid: grid.size).box
        found.position = box.center
        found.extent = max(e - b for b, e in zip(box.begin, box.end, strict=True))
    return found


def _data_set(sources: ViewSources, catalog: Catalog | None) -> str:
    of_root = set() if catalog is None else set(catalog.datasets)
    of_results: set[str] = set()
    for place in (sources.predictions, sources.labels):
        if place is None:
            continue
        if not place.is_dir():
            raise MissingError(f"nothing at {place}; give a folder that predict or decode wrote")
        of_results |= {n.removesuffix(".zarr") for n in store.list_groups(str(place)) if n.endswith(".zarr")}
    if sources.dataset is not None:
        if sources.dataset not in of_root | of_results:
            raise unknown_name("data set", sources.dataset, of_root | of_results)
        return sources.dataset
    names = sorted(of_results or of_root)  # what was predicted says which of a root's many data sets is meant
    if not names:
        places = [str(place) for place in (sources.data_root, sources.predictions, sources.labels) if place is not None]
        raise MissingError(
            f"no data set in {', '.join(places)}: expected folders NAME.zarr, as predict and decode write"
        )
    if len(names) != 1:
        raise InputError(f"there are several data sets ({', '.join(names[:8])}): name one with --dataset")
    return names[0]


def _of_root(found: Layers, catalog: Catalog, sources: ViewSources) -> list[VoxelGrid]:
    location = catalog.raw_location(found.dataset)
    if is_s3(location):
        found.layers.append(Layer("raw", "raw", location))
    else:
        folder = Path(location)
        found.roots["raw"] = folder
        found.layers.append(Layer("raw", "raw", "files/raw"))
    names = catalog.crop_names(found.dataset)
    wanted = _chosen("crop", sources.crops, names)
    grids, there = [], set[str]()
    for name in wanted:
        crop = catalog.crop(found.dataset, name)
        there |= set(crop.labels)
        classes = _chosen("class", sources.classes, sorted(crop.labels), missing_is_fine=len(wanted) > 1)
        grids.append(crop.grid)
        for number, class_name in enumerate(classes):
            _add_truth(found, crop, class_name, COLOURS[number % len(COLOURS)], visible=name == wanted[0])
    if sources.predictions is None and sources.labels is None:  # in which a class may be that has no truth
        _chosen("class", sources.classes, sorted(there))
    return grids


def _add_truth(found: Layers, crop: Crop, class_name: str, colour: str, *, visible: bool) -> None:
    label = crop.labels[class_name]
    grid = label.grid
    if grid.size == 0:
        return
    key = f"{crop.name}-{class_name}"

    def known(part: VoxelGrid) -> NDArray[Any]:
        return read_labels(crop, [class_name], part).known_of(class_name).astype(np.uint8)

    def present(part: VoxelGrid) -> NDArray[Any]:
        return read_labels(crop, [class_name], part).present_of(class_name).astype(np.uint8)

    def ids(part: VoxelGrid) -> NDArray[Any]:
        return read_instances(crop, class_name, part)[0].astype(np.uint32)

    if label.annotation.kind == "instance":
        found.made[f"{key}-ids"] = MadeVolume(grid, np.uint32, ids)
        found.layers.append(Layer(f"{class_name} truth {crop.name}", "ids", f"made/{key}-ids", colour, visible))
    else:
        found.made[f"{key}-present"] = MadeVolume(grid, np.uint8, present)
        found.layers.append(Layer(f"{class_name} truth {crop.name}", "mask", f"made/{key}-present", colour, visible))
    found.made[f"{key}-known"] = MadeVolume(grid, np.uint8, known)
    found.layers.append(Layer(f"{class_name} known {crop.name}", "mask", f"made/{key}-known", "#888888", False))


def _of_folder(found: Layers, name: str, folder: Path, sources: ViewSources) -> list[VoxelGrid]:
    """Layers of predictions or labels, by what the arrays say of themselves."""
    root = folder / f"{found.dataset}.zarr"
    if not root.is_dir():
        return []
    found.roots[name] = root
    crops = store.list_groups(str(root))
    wanted = [c for c in crops if sources.crops is None or c in sources.crops]
    grids = []
    for crop in wanted:
        classes = store.list_groups(str(root / crop))
        chosen = [c for c in classes if sources.classes is None or c in sources.classes]
        for number, class_name in enumerate(chosen):
            colour = COLOURS[number % len(COLOURS)]
            for path, about in _artefacts(root / crop / class_name):
                _refuse_other(name, about, path, folder)
                below = os.path.relpath(path, root)
                layer = _layer_of(f"{class_name} {{}} {crop}", about, f"files/{name}/{below}", colour)
                if layer is not None:
                    found.layers.append(layer)
            if grid := store.read_attrs(str(root / crop / class_name)).get("connectomics", {}).get("grid"):
                grids.append(VoxelGrid.from_dict(grid))
    return grids


def _refuse_other(name: str, about: dict[str, Any], path: Path, folder: Path) -> None:
    """Labels shown as probabilities, or these as labels, would look like a bad result."""
    found = str(about.get("artefact"))
    if (found == "labels") != (name == "labels"):
        other = "labels" if found == "labels" else "predictions"
        raise InputError(f"{path} holds {found}: give {folder} by --{other}, and by --{name} what {_MAKES[name]} wrote")


def _artefacts(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A class's group and those below it (uncertainty, affinities) with what they say of themselves."""
    attrs = store.read_attrs(str(place))
    about = attrs.get("connectomics")
    if isinstance(about, dict) and "multiscales" in attrs:
        yield place, about
    for name in store.list_groups(str(place)):
        if (place / name / ".zgroup").exists():
            yield from _artefacts(place / name)


def _layer_of(title: str, about: dict[str, Any], address: str, colour: str) -> Layer | None:
    artefact = str(about.get("artefact"))
    if artefact == "labels":
        kind: Literal["ids", "mask"] = "ids" if about.get("kind") == "instance" else "mask"
        return Layer(title.format("labels"), kind, address, colour)
    if artefact == "probability":
        return Layer(title.format("probability"), "probability", address, colour, visible=False)
    if artefact == "affinity":
        return Layer(title.format(f"affinity {tuple(about.get('offset', ()))}"), "probability", address, colour, False)
    return Layer(title.format(artefact), "probability", address, colour, visible=False)


def _chosen(
    what: str, wanted: Sequence[str] | None, there: Sequence[str], *, missing_is_fine: bool = False
) -> list[str]:
    if wanted is None:
        return list(there)
    for name in wanted:
        if name not in there and not missing_is_fine:
            raise unknown_name(what, name, there)
    return [name for name in there if name in wanted]
