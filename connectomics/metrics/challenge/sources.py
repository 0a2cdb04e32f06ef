"""Open a submission (a zip, a folder, or a folder of decoded labels) and the ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError, MissingError, unknown_name
from connectomics.geometry import VoxelGrid, index
from connectomics.io.artifacts import marks, require_complete
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.io.store import is_array as is_local_array
from connectomics.metrics.challenge.align import Readable, Source, source_of
from connectomics.metrics.challenge.zarr_v2 import FolderStore, Store, ZarrArray, ZipStore, is_array

if TYPE_CHECKING:
    from connectomics.cellmap.crop_table import CropTable

_MASK = "_mask"


# -- submissions -------------------------------------------------------------------------------------------------------
class GroupSubmission:
    """A Zarr v2 group in a zip or a folder; only plain arrays directly under a crop count."""

    def __init__(self, store: Store) -> None:
        self._store, self.location = store, store.location

    def crops(self) -> list[str]:
        """Return the folder names of the crops."""
        return self._store.folders()

    def classes(self, crop: str) -> list[str]:
        """Return the classes of a crop."""
        return [name for name in self._store.folders(crop) if is_array(self._store, f"{crop}/{name}")]

    def unseen(self, crop: str) -> list[str]:
        """Return the folders of a crop that the scorer does not see, because they are not plain arrays."""
        return [name for name in self._store.folders(crop) if not is_array(self._store, f"{crop}/{name}")]

    def label(self, crop: str, class_name: str) -> Source:
        """Open one label."""
        array = ZarrArray(self._store, f"{crop}/{class_name}")
        return source_of(array, array.attrs)

    def close(self) -> None:
        """Close open files."""
        self._store.close()


class PredictionFolder:
    """Labels as ``decode`` writes them, ``{dataset}.zarr/{crop}/{class}/s0``, scored as if they were packed.

    `label` raises `InputError` for probabilities and `IncompleteError` for incomplete labels.
    """

    def __init__(self, root: Path) -> None:
        self.location = str(root)
        self._folders: dict[str, Path] = {}
        for dataset in sorted(root.glob("*.zarr")):
            for crop in sorted(p for p in dataset.iterdir() if p.is_dir()):
                if crop.name in self._folders:
                    raise InputError(f"{crop.name} is in {self._folders[crop.name]} and in {crop}; keep one of them")
                self._folders[crop.name] = crop

    def crops(self) -> list[str]:
        return sorted(self._folders)

    def classes(self, crop: str) -> list[str]:
        if crop not in self._folders:
            return []
        return sorted(p.name for p in self._folders[crop].iterdir() if p.is_dir() and not p.name.startswith("."))

    def label(self, crop: str, class_name: str) -> Source:
        location = self._folders[crop] / class_name
        image = Multiscale.open(str(location))
        said, grid = require_complete(location, "labels", foreign=True), image.levels[0].grid
        return Source(_FinestLevel(image, str(location)), grid.voxel_size, grid.translation, marks(said))

    def unseen(self, crop: str) -> list[str]:
        return []

    def close(self) -> None:
        pass


#: Labels by crop and class, as the official scorer sees them.
Submission = GroupSubmission | PredictionFolder


class _FinestLevel(PlainArray):
    """The finest level of a multiscale image as a `Readable`."""

    def __init__(self, image: Multiscale, where: str) -> None:
        super().__init__(image.arrays[0], {})
        self.where = where


def open_submission(location: str | Path) -> Submission:
    """Open a zip, the folder of a Zarr v2 group, or a folder of decoded labels; `MissingError`, `InputError`."""
    path = Path(location)
    if path.is_file():
        return GroupSubmission(ZipStore(path))
    if not path.is_dir():
        raise MissingError(f"no submission at {location}; give a .zip file or a folder")
    inner = sorted(p for p in path.glob("*.zarr") if p.is_dir())
    nodes = (label / name for p in inner for label in p.glob("*/*") for name in (".zattrs", "zarr.json"))
    if not all(is_local_array(node.parent) for node in nodes if node.exists()):
        return PredictionFolder(path)
    if len(inner) == 1 and not (path / ".zgroup").exists():
        path = inner[0]
    return GroupSubmission(FolderStore(path))


def names_in_truth(submission: Submission, truth_crops: Sequence[str]) -> dict[str, str]:
    """Return the submission's folder for each crop of the ground truth that it has.

    If no name matches, every name is tried with the prefix ``crop``; `InputError` if still none matches.
    """
    found = submission.crops()
    for prefix in ("", "crop"):
        names = {f"{prefix}{name}": name for name in found if f"{prefix}{name}" in truth_crops}
        if names:
            return names
    raise InputError(
        f"{submission.location}: expected crops of the ground truth ({', '.join(list(truth_crops)[:5])}, ...), got "
        f"{', '.join(found[:5]) or 'no folders'}; a submission is one Zarr v2 group with arrays crop<N>/<class>"
    )


# -- the truth ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """One (crop, class) to score: its ground truth, the optional mask of what counts, and its grid."""

    crop: str
    class_name: str
    dataset: str
    grid: VoxelGrid
    truth: ZarrArray
    mask: ZarrArray | None


def read_targets(
    truth: str | Path,
    table: CropTable | str | Path | None,
    crop_names: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[list[Target], list[str]]:
    """Return what to score, in the table's order (or sorted), and the names of all crops of the ground truth.

    Without a table every plain array of the ground truth counts, on the grid of its own attributes. ``crop_names``
    (``crop7`` or ``7``) and ``classes`` select some. Raises `MissingError` for an entry of the table without ground
    truth, `InputError` for another shape, `UnknownNameError` for an unknown name.
    """
    store = FolderStore(truth)
    if table is None:
        arrays = {crop: GroupSubmission(store).classes(crop) for crop in store.folders()}
        targets = [
            _target(store, crop, name, "", None)
            for crop, there in arrays.items()
            for name in there
            if not (name.endswith(_MASK) and name.removesuffix(_MASK) in there)
        ]
    else:
        from connectomics.cellmap.crop_table import CropTable

        rows = CropTable.resolve(table).select(crops=crop_names, classes=classes)
        targets = [_target(store, e.crop_name, e.class_name, e.dataset, e.grid) for e in rows]
    if not targets:
        raise MissingError(f"{truth}: no ground truth found; expected a Zarr v2 group with arrays crop<N>/<class>")
    crops = {t.crop for t in targets}
    known = {t.class_name for t in targets}
    asked = crops
    if crop_names is not None:
        asked = {c if c in crops or c.startswith("crop") else f"crop{c}" for c in map(str, crop_names)}
    asked_classes = known if classes is None else set(classes)
    for what, names, there in (("crop", asked, crops), ("class", asked_classes, known)):
        for name in sorted(names - there):
            raise unknown_name(what, name, there, str(truth))
    chosen = [t for t in targets if t.crop in asked and t.class_name in asked_classes]
    if not chosen:
        raise InputError(f"{truth}: none of the crops {sorted(asked)} has the classes {sorted(asked_classes)}")
    return chosen, store.folders()


def _target(store: Store, crop: str, class_name: str, dataset: str, grid: VoxelGrid | None) -> Target:
    path = f"{crop}/{class_name}"
    if not is_array(store, path):
        raise MissingError(f"no ground truth at {store.where(path)}, although the crop table lists it")
    array = ZarrArray(store, path)
    if len(array.shape) != 3 or math.prod(array.shape) == 0:
        raise InputError(f"{array.where}: expected three dimensions (z y x), got shape {array.shape}")
    shape = index(array.shape)
    if grid is None:
        own = source_of(array, array.attrs)
        if own.voxel_size is None:
            raise MetadataError(f"{array.where}: attribute voxel_size is absent; give a crop table")
        grid = VoxelGrid(own.voxel_size, own.translation or (0.0, 0.0, 0.0), shape)
    elif grid.shape != shape:
        raise InputError(f"{array.where}: the crop table expects shape {grid.shape}, got {shape}")
    mask = ZarrArray(store, path + _MASK) if is_array(store, path + _MASK) else None
    return Target(crop, class_name, dataset, grid, array, mask)


class Masked:
    """A `Readable` that is 0 where a mask is 0 (regions that are not scored)."""

    def __init__(self, array: Readable, mask: Readable) -> None:
        self._array, self._mask = array, mask
        self.shape, self.dtype, self.where = array.shape, array.dtype, array.where

    def read(self, begin: Any = None, shape: Any = None) -> NDArray[Any]:
        where = {} if begin is None else {"begin": begin, "shape": shape}
        values = self._array.read(**where)
        return np.where(self._mask.read(**where) != 0, values, np.zeros((), values.dtype))
