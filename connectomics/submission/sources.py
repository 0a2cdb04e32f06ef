"""What a submission is made from: labels or probabilities of one crop and class, in a Zarr folder or as ``.npy``."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.decoding.prediction import find_arrays
from connectomics.decoding.probabilities import DTYPES, read_block, unit_of
from connectomics.errors import CorruptDataError, InputError, MetadataError
from connectomics.geometry import VoxelGrid, slices_of
from connectomics.io.artifacts import require_complete
from connectomics.io.fingerprint import fingerprint
from connectomics.io.location import is_s3
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import array_place

_SLAB_BYTES = 64 << 20


@dataclass
class ZarrSource:
    """``{dataset}.zarr/{crop}/{class}``: a multiscale group of which the finest level is read.

    Attributes:
        location: its path. form: ``labels`` (0 background) or ``probability`` (0 to ``scale``).
        grid: where it lies, nm. scale: the value that stands for probability 1 (255 or 1).
        about: its ``connectomics`` attribute, {} if it has none.
        largest_id: the largest label, if it is known without reading; else None.
    """

    location: str
    form: str
    grid: VoxelGrid
    about: dict[str, Any]
    largest_id: int | None
    volume: Multiscale
    scale: float = 255.0

    @classmethod
    def open(cls, location: Path) -> ZarrSource:
        """`IncompleteError` where it is half written, `MetadataError` where it is neither labels nor probabilities."""
        volume = Multiscale.open(str(location))
        about = require_complete(location, "labels", "probability", foreign=True)
        form, level = about.get("artefact", "labels"), volume.levels[0]
        if level.dtype not in DTYPES if form == "probability" else level.dtype.kind not in "biu":
            need = "uint8 (value/255) or float16" if form == "probability" else "integers"
            raise MetadataError(f"{location}: {form} must be {need}, found {level.dtype}")
        numbered = form == "labels" and "edits" not in about.get("made_from", {})  # else IDs may have gaps
        largest = about.get("objects") if numbered else None
        return cls(str(location), form, level.grid, about, largest, volume, unit_of(level.dtype))

    def read(self, begin: tuple[int, int, int], shape: tuple[int, int, int]) -> NDArray[Any]:
        """A block of the finest level. An absent chunk is empty in labels and a lost one in probabilities."""
        if self.form == "probability":
            return read_block(self.volume, begin, shape)
        return self.volume.read_level(0, begin, shape, absent_is_missing=False)[0]

    def fingerprint(self) -> str:
        """Of metadata, attributes and the chunks' sizes and times; not of where it lies."""
        return digest([self.form, fingerprint(self.volume, with_location=False)])


class NpySource:
    """``{dataset}/crop234_mito.npy``, memory-mapped; it has no grid of its own and must fill the crop's.

    Integers and bool are labels. Floats that are all whole numbers are labels too, other floats probabilities in
    [0, 1]. NaN is background, counted in a warning.
    """

    def __init__(self, path: Path, grid: VoxelGrid) -> None:
        """`InputError` where the shape is not the grid's or the values are neither labels nor probabilities."""
        self.location, self.grid, self.about = str(path), grid, dict[str, Any]()
        self.path = path
        try:
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise CorruptDataError(f"{path} cannot be read as an array ({error}); save it again") from error
        if self.array.shape != grid.shape:
            raise InputError(
                f"{path} has shape {self.array.shape}, but the crop table says {grid.shape} (z, y, x); "
                "predict on the table's grid, or keep predictions in a Zarr with its voxel size"
            )
        self.scale = 1.0
        self.form = "labels"
        self.largest_id = self._inspect()

    def _inspect(self) -> int | None:
        """Set the form; the largest label."""
        kind = self.array.dtype.kind
        if kind not in "biuf":
            raise InputError(f"{self.path} holds {self.array.dtype}; expected labels or probabilities")
        low, high, whole, missing = 0, 0, True, 0
        thick = max(1, _SLAB_BYTES // max(1, self.array[:1].nbytes))
        for z in range(0, len(self.array), thick):
            slab = np.asarray(self.array[z : z + thick])
            if kind == "f":
                bad = np.isnan(slab)
                missing += int(bad.sum())
                slab = np.where(bad, 0, slab)
                whole = whole and bool(np.all(slab == np.rint(slab)))
            low, high = min(low, slab.min(initial=0).item()), max(high, slab.max(initial=0).item())
        if missing:
            warnings.warn(f"{self.path}: {missing} voxels are NaN and count as background", stacklevel=3)
        if low < 0:
            raise InputError(f"{self.path} holds negative values ({low:.6g}); labels and probabilities are at least 0")
        if kind != "f" or (whole and high < 2**53):
            return int(high)
        self.form = "probability"
        if high > 1.0 + 1e-6:
            raise InputError(f"{self.path} holds values up to {high:.6g}; expected probabilities in [0, 1] or labels")
        return None

    def read(self, begin: tuple[int, int, int], shape: tuple[int, int, int]) -> NDArray[Any]:
        """A block; whole-number floats as uint64, NaN as 0."""
        block = np.asarray(self.array[slices_of(begin, shape)])
        if block.dtype.kind != "f":
            return block
        block = np.nan_to_num(block, nan=0.0)
        return block.astype(np.uint64) if self.form == "labels" else block

    def fingerprint(self) -> str:
        """Of the file's size and time; not of where it lies."""
        status = self.path.stat()
        return digest([status.st_size, status.st_mtime_ns, self.grid.to_dict()])


#: A volume that is read block by block.
Source = ZarrSource | NpySource


def find_source(predictions_dir: Path, entry: TableEntry) -> Source | None:
    """The source of one row of the crop table, None where there is none. Zarr goes before ``.npy``."""
    group = array_place(predictions_dir, entry.dataset, entry.crop_name, entry.class_name)
    if group.is_dir():
        return ZarrSource.open(group)
    flat = predictions_dir / entry.dataset / f"{entry.crop_name}_{entry.class_name}.npy"
    return NpySource(flat, entry.grid) if flat.is_file() else None


def list_sources(predictions_dir: Path) -> Iterator[tuple[str, str, str]]:
    """(data set, crop, class) of all that a folder holds in either layout."""
    yield from find_arrays(predictions_dir)
    for path in [] if is_s3(predictions_dir) else sorted(predictions_dir.glob("*/crop*_*.npy")):
        if path.parent.suffix != ".zarr":
            crop, _, class_name = path.stem.partition("_")
            yield path.parent.name, crop, class_name


def own_table(predictions_dir: Path, datasets: Collection[str], data_root: str | None) -> CropTable | None:
    """A table of what a folder holds of data sets, on its own grids; those of ``.npy`` are the crops' in ``data_root``,
    the class's own where it is annotated. None where there is nothing of them. `InputError` for ``.npy`` without."""
    entries, owners = [], dict[str, str]()
    for dataset, crop, name in list_sources(predictions_dir):
        if dataset not in datasets or not crop.removeprefix("crop").isdigit():
            continue
        if (other := owners.setdefault(crop, dataset)) != dataset:
            raise InputError(
                f"{crop} is in {other} and in {dataset}, and crops in a submission have no data set; export one data "
                f"set at a time (--dataset {other})"
            )
        group = array_place(predictions_dir, dataset, crop, name)
        if group.is_dir():
            grid = Multiscale.open(str(group)).grid
        elif data_root is not None:
            there = Catalog.open(data_root).crop(dataset, crop)
            grid = there.labels[name].grid if name in there.labels else there.grid
        else:
            raise InputError(
                f"{predictions_dir / dataset / f'{crop}_{name}.npy'} does not say where it lies, and the challenge's "
                f"table has no crop of {dataset}; give --data_root ROOT with that crop, or a table by --crops"
            )
        entries.append(TableEntry(int(crop.removeprefix("crop")), dataset, name, grid))
    return CropTable(tuple(entries)) if entries else None


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
