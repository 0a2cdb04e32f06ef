"""Labels of one class of a crop that are drawn by hand: read a section, write a rectangle of one.

Every rectangle goes to disk at once, chunk by chunk; a killed process leaves each chunk as it was before or after. The
first one marks the array as unfinished and removes its voxel counts; `EditableLabels.finish` counts again and builds
the coarser levels, now or, if the process is killed, when the crop is opened for drawing again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation, Kind
from connectomics.cellmap.catalog import LabelArray
from connectomics.cellmap.classes import is_instance_class
from connectomics.errors import InputError, MetadataError, MissingError, as_write_error
from connectomics.geometry import Index, VoxelGrid
from connectomics.io.artifacts import ATTRIBUTE, Provenance, about, publish
from connectomics.io.location import local_path
from connectomics.io.replacing import unfinished_folder, write_json
from connectomics.io.store import read_json
from connectomics.io.write import ArrayWriter, build_levels, create_multiscale, ensure_group, update_attrs

_CHUNKS = (16, 128, 128)  # flat, since sections are drawn
_BLOCK = (64, 512, 512)  # voxels held at a time
_PRESENT = 1
_DRAWN = "annotated"  # the artifact kind of labels that were drawn here


class EditableLabels:
    """The labels of one class, open for drawing. One process at a time, one thread at a time.

    Attributes:
        name: the class. kind: ``semantic`` or ``instance``. grid: where its voxels are. dtype: of stored values.
        absent: stored value for "annotated, not this class".
        unknown: stored value for "not annotated"; None if every value may be an object.
        largest: largest instance ID so far; 0 for a semantic class.
    """

    def __init__(self, label: LabelArray) -> None:
        """Open the labels; finish what a killed process left.

        Raises `MetadataError` if they have no value for absent, no annotation, or another type than uint8, uint16 and
        uint32; `WriteError` for labels on S3.
        """
        self._place, self._label = Path(local_path(label.location)), label
        found = label.annotation
        if found.unknown == found.absent:
            raise MetadataError(f"{label.location}: its encoding has no value for absent, so nothing can be erased")
        self.name, self.kind, self.absent = label.class_name, found.kind, found.absent
        self.grid, self.dtype = label.grid, label.source.levels[0].dtype.newbyteorder("=")
        if self.dtype not in (np.uint8, np.uint16, np.uint32):
            raise MetadataError(f"{label.location} holds {self.dtype}; only uint8, uint16 and uint32 can be drawn")
        self._writer: ArrayWriter | None = None
        self.unknown, self.largest = found.unknown, 0
        self._survey()
        self.widen(self.largest)
        if about(self._place).get("complete") is False:
            self._writer = self._open()
            self.finish()

    @classmethod
    def create(cls, place: Path, name: str, grid: VoxelGrid, kind: Kind | None = None) -> EditableLabels:
        """Create labels on ``grid`` in which nothing is known: uint8, or uint32 if the class has instances.

        Args:
            place: ``.../labels/groundtruth/{crop}/{class}``, which is free.
            kind: None: ``instance`` for the challenge's instance classes.
        """
        kind = kind or ("instance" if is_instance_class(name) else "semantic")
        dtype: np.dtype[Any] = np.dtype(np.uint32 if kind == "instance" else np.uint8)
        unknown = int(np.iinfo(dtype).max)
        counts = {"absent": 0, "unknown": grid.size}
        annotation = Annotation(name, kind, 0, unknown, counts)
        attrs = {**annotation.to_attrs(with_counts=False), ATTRIBUTE: _attribute(complete=True)}
        ensure_group(place.parent)
        with unfinished_folder(place) as folder:
            create_multiscale(folder, [grid], dtype, chunks=_CHUNKS, attrs=attrs, name=name, fill_value=unknown)
            update_attrs(folder / "s0", annotation.to_attrs())
            with as_write_error(f"cannot create {place}"):
                folder.rename(place)
        return cls(LabelArray(name, str(place)))

    def widen(self, largest: int) -> None:
        """Turn to uint32, from the next first stroke on, if IDs up to ``largest`` fill half of a narrower type."""
        if self.kind == "instance" and self._writer is None and largest > np.iinfo(self.dtype).max // 2:
            self.dtype = np.dtype(np.uint32)

    def read(self, z: int) -> NDArray[Any]:
        """Return section ``z`` as stored, (H, W)."""
        self._check(z, 0, 0, (1, 1))
        return self.block((z, 0, 0), (1, *self.grid.shape[1:]))[0]

    def block(self, begin: Index, shape: Index) -> NDArray[Any]:
        """Return a block within the labels as stored, (d, h, w)."""
        read = self._label.read_stored if self._writer is None else self._writer.read
        return read(begin, shape).astype(self.dtype, copy=False)

    def write(self, z: int, y: int, x: int, values: NDArray[Any]) -> None:
        """Write (h, w) values of the array's dtype into section ``z``, with the first one at row ``y``, column ``x``.

        Raises:
            InputError: the rectangle is not inside, or a value means nothing in this class; nothing is written then.
            WriteError: disk full, no permission.
        """
        self._check(z, y, x, values.shape)
        if values.dtype != self.dtype:
            raise InputError(f"{self.name} holds {self.dtype}, got {values.dtype}")
        if self.kind == "semantic":
            allowed = [self.absent, _PRESENT, *([] if self.unknown is None else [self.unknown])]
            if not np.isin(values, allowed).all():
                raise InputError(f"{self.name}: expected the values {allowed}, got {np.unique(values)[:5].tolist()}")
        if self._writer is None:
            self._writer = self._begin()
        self._writer.write((z, y, x), values[None])
        if self.kind == "instance":
            self.largest = max(self.largest, self._largest(values))

    def finish(self) -> None:
        """Count the voxels by state and build the coarser levels, if anything was drawn."""
        if self._writer is None:
            return
        counts = {"absent": 0, "unknown": 0}
        for begin, block in self.grid.blocks(_BLOCK):
            values = self._writer.read(begin, block.shape)
            for state, value in (("absent", self.absent), ("unknown", self.unknown)):
                counts[state] += int(np.count_nonzero(values == value))  # no voxel is None
        build_levels(self._place, len(self._label.source.levels), "label")
        self._annotate(counts)
        update_attrs(self._place, {ATTRIBUTE: _attribute(complete=True)})
        self._writer = None
        self._label = LabelArray(self.name, str(self._place))

    # -- before the first stroke ---------------------------------------------------------------------------------------
    def _survey(self) -> None:
        """Find the largest ID, and a value for unknown voxels that no object has if the annotation gives none."""
        free = {255, int(np.iinfo(self.dtype).max)} if self.unknown is None else set()
        for attrs in (self._label._finest_attrs(), self._label.source.attrs):
            kind = attrs.get("cellmap", {}).get("annotation", {}).get("annotation_type") or {}
            free |= {int(kind["encoding"]["unknown"])} if free and "unknown" in kind.get("encoding", {}) else set()
        free = {value for value in free if 0 <= value <= np.iinfo(self.dtype).max}
        for begin, block in self.grid.blocks(_BLOCK):
            values = self._label.read_stored(begin, block.shape)
            free = {value for value in free if not (values == value).any()}
            if self.kind == "instance":
                self.largest = max(self.largest, self._largest(values))
        self.unknown = min(free - {self.absent, _PRESENT}, default=self.unknown)

    def _largest(self, values: NDArray[Any]) -> int:
        return int(values.max(initial=0, where=True if self.unknown is None else values != self.unknown))

    def _begin(self) -> ArrayWriter:
        """Mark the labels as unfinished: until `finish` there are no counts that the drawn voxels could contradict."""
        writer = self._open()
        update_attrs(self._place, {ATTRIBUTE: _attribute(complete=False)})
        self._annotate(None)
        return writer

    def _open(self) -> ArrayWriter:
        """A writer for the array; one of another format is first written again with the same values."""
        path = self._place / self._label.source.levels[0].path
        try:
            writer = ArrayWriter.open(path)
        except (MetadataError, MissingError):
            pass
        else:
            if path.name == "s0" and writer.grid == self.grid and writer.dtype.newbyteorder("=") == self.dtype:
                return writer
        with unfinished_folder(self._place) as folder:
            attrs = {k: v for k, v in self._label.source.attrs.items() if k != "multiscales"}
            (copy,) = create_multiscale(folder, [self.grid], self.dtype, attrs=attrs, name=self.name)
            for begin, block in self.grid.blocks(_BLOCK):
                copy.write(begin, self._label.read_stored(begin, block.shape).astype(self.dtype, copy=False))
            update_attrs(folder / "s0", self._label.annotation.to_attrs())
            build_levels(folder, len(self._label.source.levels), "label")
            publish(folder, self._place)
        self._label = LabelArray(self.name, str(self._place))
        return ArrayWriter.open(self._place / "s0")

    def _annotate(self, counts: dict[str, int] | None) -> None:
        """Write what the values mean to the array and to its group, with or without counts; keep other attributes."""
        new = Annotation(self.name, self.kind, self.absent, self.unknown, counts or {}).to_attrs()["cellmap"]
        for place in (self._place / "s0", self._place):
            attrs = read_json(place / ".zattrs") or {}
            old = attrs.get("cellmap") or {}
            annotation = {**(old.get("annotation") or {}), **new["annotation"]}
            if counts is None or place == self._place:
                del annotation["complement_counts"]
            write_json(place / ".zattrs", {**attrs, "cellmap": {**old, "annotation": annotation}})

    def _check(self, z: int, y: int, x: int, shape: Index | tuple[int, ...]) -> None:
        begin, size = (z, y, x), (1, *shape)
        inside = len(size) == 3 and all(
            b >= 0 and n > 0 and b + n <= m for b, n, m in zip(begin, size, self.grid.shape, strict=True)
        )
        if not inside:
            raise InputError(f"{self.name} has {self.grid.shape} voxels; {tuple(shape)} at {begin} are not inside")


def _attribute(*, complete: bool) -> dict[str, Any]:
    return {"artefact": _DRAWN, "complete": complete, **Provenance().to_dict()}
