"""Draw labels of a crop in a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from connectomics.cellmap.annotation import class_and_kind
from connectomics.cellmap.catalog import GROUND_TRUTH, Catalog, LabelArray, box_of
from connectomics.decoding.prediction import find_arrays
from connectomics.errors import InputError, MissingError, UnknownNameError, unknown_name
from connectomics.geometry import Triple, VoxelGrid
from connectomics.io.location import DEFAULT_OPTIONS, local_path
from connectomics.io.multiscale import Multiscale
from connectomics.tasks.lock import leading

if TYPE_CHECKING:
    from connectomics.cellmap.editing import EditableLabels
    from connectomics.pages.annotate import DrawingServer

_OPTIONS = replace(DEFAULT_OPTIONS, cache_bytes=256 << 20, threads=4)  # the chunks behind a large section of raw


class Annotating:
    """A page on which a crop is drawn. Close it, or use it in a ``with`` block.

    Attributes:
        url: its address, for a browser on this machine.
        labels: class -> labels that are drawn.
        left_out: classes of the crop on another grid, which need a page of their own.
    """

    def __init__(self, server: DrawingServer, open_files: ExitStack, left_out: Sequence[str]) -> None:
        self._server, self._open, self.left_out = server, open_files, tuple(left_out)
        self.url, self.labels = f"{server.url}/", server.labels

    def close(self) -> None:
        """Stop serving, count the drawn voxels and build the coarser levels."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def annotate(
    root: str | Path,
    dataset: str | None = None,
    crop: str | int | None = None,
    *,
    classes: Sequence[str] | None = None,
    box: str | None = None,
    voxel_size: Triple | None = None,
    labels: str | Path | None = None,
    raw: str | Path | None = None,
    edits: str | Path | None = None,
    port: int = 0,
) -> Annotating:
    """Serve a page that draws labels of a crop, to this machine only. Every stroke is on disk at once.

    A class that the crop does not have yet starts as unknown everywhere. Call it again to resume.

    Args:
        root: local data root.
        dataset: its data set; None: that of the box, or the only one.
        crop: ``crop234`` or 234.
        classes: classes to draw (``CLASS:instance`` or ``CLASS:semantic`` says what a new one holds); None: all of the
            crop that are on its finest grid.
        box: ``DATASET:z0,y0,x0:z1,y1,x1`` (faces, nm): where a new crop is, on the voxels of the raw that touch it.
        voxel_size: of a new crop, nm z y x; None: that of the raw.
        labels: folder that `decode` wrote: the page shows its labels where voxels are unknown, to accept them.
        raw: data root with the raw, if ``root`` has labels only.
        port: of the page; 0: any free port.
        edits: log of `apply_edits`: the page also merges, splits and deletes instances of ``labels``, a line for each.

    Raises:
        InputError: an option is missing or does not fit, classes are on different grids, or the port is not available.
        MissingError, UnknownNameError: a folder, data set, crop or class.
        WriteError: another process draws this crop, or it cannot be written.
    """
    from connectomics.pages.annotate import DrawingServer, EditLog, PredictedLabels

    place = local_path(root)
    catalog = Catalog.open(str(place), _OPTIONS)
    source = catalog if raw is None else Catalog.open(str(raw), _OPTIONS)
    named, region = (None, None) if box is None else box_of(box)
    if named is not None and dataset not in (None, named):
        raise InputError(f"--dataset {dataset} and --box {box} name different data sets; leave --dataset out")
    dataset = dataset or named or (catalog.datasets[0] if len(catalog.datasets) == 1 else None)
    if dataset is None or crop is None:
        raise InputError(f"name the data set ({', '.join(catalog.datasets[:8])}) and the crop, such as --crop 1")
    name = f"crop{crop}" if str(crop).isdigit() else str(crop)
    if not re.fullmatch(r"crop\d{1,9}", name):
        raise InputError(f"a crop's name is crop and a number, as crop1, got {crop!r}")
    folder = _inside(place, Path(catalog.location(dataset)) / GROUND_TRUTH / name)
    volume = Multiscale.open(source.raw_location(dataset), _OPTIONS)
    wanted = None
    if region is not None:
        wanted = _new_grid(volume, VoxelGrid.covering(region, voxel_size or volume.grid.voxel_size))
    elif voxel_size is not None:
        raise InputError("--voxel-size is for a new crop; give its --box, too")
    with ExitStack() as stack:
        stack.enter_context(leading(folder))
        drawn, left_out = _open_labels(catalog, dataset, name, folder, volume, wanted, classes)
        predicted = {}
        if labels is not None:
            there = {found for _, _, found in find_arrays(labels)}
            predicted = {n: PredictedLabels(Path(labels), dataset, e) for n, e in drawn.items() if n in there}
            if not predicted:
                raise MissingError(f"{labels} has no labels of {', '.join(drawn)}; give a folder that decode wrote")
        if edits is not None and labels is None:
            raise InputError("--edits corrects instances of a prediction; give its folder with --labels")
        log = None if edits is None else EditLog(local_path(edits), predicted)
        server = DrawingServer(f"{dataset} {name}", volume, drawn, predicted, port, log)
        stack.callback(server.close)
        return Annotating(server, stack.pop_all(), left_out)


def _open_labels(
    catalog: Catalog, dataset: str, name: str, folder: Path, raw: Multiscale, wanted: VoxelGrid | None,
    classes: Sequence[str] | None,
) -> tuple[Mapping[str, EditableLabels], list[str]]:  # fmt: skip
    """Open the labels of the classes, creating those that are missing; also name classes on another grid."""
    from connectomics.cellmap.editing import EditableLabels

    asked, there = dict(map(class_and_kind, classes or ())), dict[str, LabelArray]()
    known = catalog.crop_names(dataset)
    if name in known:
        crop = catalog.crop(dataset, name, raw.location)
        there = crop.labels
    elif wanted is None:
        error = unknown_name("crop", name, known, f"data set {dataset} of {catalog.root}")
        raise UnknownNameError(f"{error}; give --box to make a new crop")
    if there:
        first = next(iter(asked), "")
        grid = there[first].grid if first in there else crop.grid
        if wanted is not None and not _same(grid, wanted):
            raise InputError(f"{name} exists with {grid}, not {wanted}; leave out --box, or give another --crop")
    elif wanted is not None:
        grid = wanted
    else:
        raise MissingError(f"{folder} has no labels; give --box and --class to start them")
    chosen = list(asked) or [n for n in sorted(there) if _same(there[n].grid, grid)]
    if not chosen:
        raise InputError("a new crop needs its classes: give --class, which may be repeated")
    if other := [n for n in chosen if n in there and not _same(there[n].grid, grid)]:
        raise InputError(f"{', '.join(other)} and {chosen[0]} are on different grids; draw them one after the other")
    found = {}
    for one in chosen:
        place, kind = _inside(local_path(catalog.root), folder / one), asked.get(one)
        found[one] = EditableLabels(there[one]) if one in there else EditableLabels.create(place, one, grid, kind)
        if kind not in (None, found[one].kind):
            raise InputError(f"labels of {one} in {name} are {found[one].kind}, not {kind}; leave out :{kind}")
    return found, sorted(set(there) - set(found)) if not asked else []


def _new_grid(raw: Multiscale, asked: VoxelGrid) -> VoxelGrid:
    """The grid of a new crop: within the raw, and on its voxels if they have the same size."""
    if np.allclose(asked.voxel_size, raw.grid.voxel_size, rtol=1e-6):
        part = raw.grid.slices(asked.box)
        grid = raw.grid.crop([s.start for s in part], [s.stop - s.start for s in part])
    else:
        grid = VoxelGrid.covering(asked.box.intersect(raw.grid.box), asked.voxel_size)
    if grid.size == 0:
        raise InputError(f"the box {asked.box} lies outside the raw, {raw.grid.box}; give another --box")
    return grid


def _same(one: VoxelGrid, other: VoxelGrid) -> bool:
    return one.shape == other.shape and one.same_lattice(other) and np.allclose(
        one.translation, other.translation, atol=1e-3 * min(one.voxel_size)
    )  # fmt: skip


def _inside(root: Path, place: Path) -> Path:
    """Return ``place``; raise `InputError` if a link leads out of the data root."""
    if not place.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{place} leads out of {root}; give the data root that really holds it")
    return place
