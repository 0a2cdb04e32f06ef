"""What a prediction leaves on disk or S3: its groups, how values are stored, and what the attributes say.

Under the output folder::

    {class}/s0           the probabilities, in an OME-NGFF multiscale group (`connectomics.io.sharded.Storage`); with a
                         pyramid s1, s2, ... too
    {class}/uncertainty  the class's uncertainty if requested, a multiscale group like its parent
    task.json            the task, with the same id and made_from as the groups (`connectomics.io.artifacts`)
    .done-{stage}        one byte per block (`connectomics.tasks.DoneMap`)

Attributes: a stored value times ``scale`` is the probability (the uncertainty). ``complete`` is false until the last
block is written, and only then the coarser levels are named. Complete groups also say what is missing: ``missing_raw``
and ``unknown``, see `connectomics.inference.gaps`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import connectomics
from connectomics.errors import InputError, MetadataError, WriteError
from connectomics.geometry import VoxelGrid, slices_of
from connectomics.inference.augmented import LARGEST
from connectomics.inference.layout import Layout
from connectomics.inference.probability_values import require_probabilities
from connectomics.io import resample, store
from connectomics.io.artifacts import Provenance, about
from connectomics.io.metadata import names_levels, parse_multiscales
from connectomics.io.place import output_place
from connectomics.io.write import (
    ArrayWriter,
    create_multiscale,
    ensure_group,
    multiscales_attrs,
    update_attrs,
    write_multiscale,
)
from connectomics.tasks import TASK_FILE, BlockTask
from connectomics.tasks.pyramid import Pyramid, pyramid_grids

log = logging.getLogger(__name__)

UNCERTAINTY = "uncertainty"  # the kind of artifact, and the name of its group below that of the class
UNITS = {"uint8": 1 / 255, "float16": 1.0}  # value = stored * unit, by dtype
_PIECE = 128  # target voxels written at a time along each axis: float32 copies stay small beside a block


@dataclass(frozen=True)
class Group:
    """One multiscale group that a prediction writes: the probabilities of a channel, or their uncertainty.

    Attributes:
        place: its folder.
        channel: of the network.
        uncertainty: the kind, or "" for probabilities.
        dtype: uint8 or float16.
        pyramid: whether there are levels beyond s0.
        about: what its attributes say besides ``artefact`` and ``complete``.
    """

    place: Path
    layout: Layout
    channel: int
    uncertainty: str
    dtype: str
    pyramid: bool
    about: Mapping[str, Any] = field(hash=False)

    @property
    def levels(self) -> Pyramid:
        """Its levels."""
        grids = tuple(pyramid_grids(self.layout.target, self.pyramid))
        return Pyramid(self.place, grids, "raw", self.dtype, **self._stored)

    @property
    def is_made(self) -> bool:
        """Whether its finest array is complete on disk: the group's attributes are written last."""
        return store.is_group(self.place) and names_levels(store.read_attrs(str(self.place)))

    @property
    def has_levels(self) -> bool:
        """Whether its attributes name all levels that it should have."""
        named = parse_multiscales(store.read_attrs(str(self.place)), str(self.place))
        return len(named) >= len(self.levels.grids)

    @property
    def _stored(self) -> dict[str, Any]:
        """How its arrays are stored: arguments of `create_array`."""
        return {"chunks": self.layout.chunks, "shards": self.layout.shards}

    def make(self) -> None:
        """Create the group with its finest array, empty; replaces what is there."""
        attrs, grid = {"connectomics": self.attributes(None)}, self.layout.target
        if self.place.parent.suffix != ".zarr":
            ensure_group(self.place.parent, zarr_format=self.layout.storage.zarr_format)
        name = self.place.name
        create_multiscale(self.place, [grid], self.dtype, attrs=attrs, name=name, overwrite=True, **self._stored)

    def array(self) -> ArrayWriter:
        """Open its finest array."""
        return ArrayWriter.open(self.place / "s0")

    def close(self, provenance: Provenance, gaps: Mapping[str, Any]) -> None:
        """Record that it is complete, with its provenance, its gaps (`connectomics.inference.gaps`) and all levels."""
        levels = multiscales_attrs(self.levels.grids, self.place.name, self.layout.storage.zarr_format)
        update_attrs(self.place, {**levels, "connectomics": {**self.attributes(provenance), **gaps}})

    def attributes(self, provenance: Provenance | None) -> dict[str, Any]:
        """Return the ``connectomics`` attribute; None: of a group that is not complete yet."""
        largest = LARGEST.get(self.uncertainty, 1.0)
        attrs = {**common_attributes(provenance), **self.about, "scale": largest * UNITS[self.dtype]}
        return {**attrs, "artefact": UNCERTAINTY, "kind": self.uncertainty} if self.uncertainty else attrs


def common_attributes(provenance: Provenance | None) -> dict[str, Any]:
    """Return the attributes that every group of a prediction has; None: it is not complete yet."""
    made = {} if provenance is None else provenance.to_dict()
    return {"artefact": "probability", "complete": bool(made), "version": connectomics.__version__, **made}


def as_before(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a task as earlier versions had them, if the output is the same: done-maps name them."""
    found = {**settings, "pyramid": False}  # was not free
    if found["block_size"] is None and found["blending"] != "crop":
        found["block_size"] = [256] * 3
    if found["multiple"] is None:  # windows did not shrink
        del found["multiple"]
    z, *others = found["overlap"]
    if z and others == [z, z]:  # it was one number; with 0 there was a context
        found["overlap"] = z
    return found


def require_own_output(task: BlockTask, overwrite: bool) -> bool:
    """Return whether an output of this task (with ``overwrite``: of any) exists; `WriteError` for anything else."""
    there = [] if not task.folder.exists() else [p for p in task.folder.iterdir() if ".part-" not in p.name]
    if not there:
        return False
    if not (task.folder / TASK_FILE).exists():
        raise WriteError(
            f"{task.folder} exists and was not written by a prediction: remove it, or choose another output folder"
        )
    if overwrite:
        foreign = [
            p for p in there
            if not p.name.startswith(".") and p.name not in (TASK_FILE, "zarr.json")
            and about(p).get("artefact") in (None, "labels")
        ]  # fmt: skip
        if foreign:
            raise WriteError(
                f"{foreign[0]} lies in the prediction to be replaced but was not written by predict; move it "
                "elsewhere, or choose another output folder"
            )
        return True
    try:
        other = str(task.difference(task.folder / TASK_FILE) or "")
    except MetadataError as error:
        other = f"whose task cannot be read ({error})"
    if other:
        raise WriteError(f"{task.folder} holds a prediction {other}; overwrite it, or choose another output folder")
    return True


def write_probability(
    layout: Layout, number: int, probability: NDArray[Any], writer: ArrayWriter, absent: NDArray[np.bool_] | None = None
) -> None:
    """Resample one class of a block (values on its region of the network's lattice) and store it in the array's dtype:
    uint8 as round(255 p), float16 as p; 0 at the block's voxels that are ``absent``. uint8 is stored as it is."""
    start, block = layout.blocks[number]
    origin, stored = layout.regions[number][0], probability
    if probability.dtype != np.uint8:
        require_probabilities(float(probability.min()), float(probability.max()))
        stored = np.empty(block.shape, writer.dtype)  # written at once: a block may be a single shard
        if writer.dtype == np.uint8 and not layout.same_voxels:
            resample.linear(probability, layout.model.crop(origin, probability.shape), block, stored)
        else:
            for offset, piece in block.blocks((_PIECE,) * 3):
                begin, shape = layout.region(piece)
                values = probability[slices_of(np.subtract(begin, origin), shape)]
                if not layout.same_voxels:
                    values = resample.linear(values, layout.model.crop(begin, shape), piece)
                values = np.clip(values, 0, 1)
                if writer.dtype == np.uint8:
                    values *= np.float32(255)
                    np.rint(values, out=values)
                stored[slices_of(offset, piece.shape)] = values
    if absent is not None:
        stored[absent] = 0
    writer.write(start, stored)


def save_cellmap_predictions(
    predictions: ArrayLike, output_path: str | Path, classes: Sequence[str], grid: VoxelGrid | None = None
) -> list[Path]:
    """Write the probabilities of a whole crop, for `pytc decode`: one group per class, uint8 ``round(255 p)``.

    Args:
        predictions: (C, D, H, W) or (1, C, D, H, W), in [0, 1], one channel per class.
        output_path: ``{out}/{dataset}.zarr/{crop}``; existing groups of these classes are replaced.
        classes: class names in channel order.
        grid: where the voxels lie, nm; None: voxels of 1 nm from 0, with a warning.

    Returns:
        The groups written.

    Raises:
        InputError: number of channels or axes, or grid, do not fit, or values are not probabilities (apply a sigmoid).
    """
    values = np.asarray(predictions)
    values = values[0] if values.ndim == 5 and len(values) == 1 else values
    if values.ndim != 4 or len(values) != len(classes) or values.size == 0:
        raise InputError(
            f"predictions of {len(classes)} classes must have shape ({len(classes)}, D, H, W), got {values.shape}"
        )
    if grid is None:
        log.warning("%s: no grid was given, so place and voxel size are unknown; writing 1 nm voxels", output_path)
        grid = VoxelGrid((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), values.shape[1:])
    if tuple(grid.shape) != values.shape[1:]:
        raise InputError(f"predictions have {values.shape[1:]} voxels, but the grid has {grid.shape}")
    require_probabilities(float(values.min()), float(values.max()))
    place = output_place(output_path)
    ensure_group(place)
    for name, channel in zip(classes, values, strict=True):
        stored = np.rint(np.clip(channel, 0, 1) * np.float32(255)).astype(np.uint8)
        attrs = {"connectomics": {**common_attributes(Provenance()), "class_name": name, "scale": UNITS["uint8"]}}
        write_multiscale(place / name, stored, grid, attrs=attrs, overwrite=True)
    return [place / name for name in classes]
