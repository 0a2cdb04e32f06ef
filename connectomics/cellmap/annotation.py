"""What the numbers in a label array mean: present, absent or unknown.

CellMap label arrays carry ``attrs["cellmap"]["annotation"]``: the kind of annotation and its ``encoding``, which names
the stored value of ``absent`` and ``unknown`` (and, for semantic arrays, ``present``) freely per array;
``complement_counts`` counts the voxels of the states that are not objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import MetadataError

Kind = Literal["semantic", "instance"]

_KINDS: dict[str, Kind] = {"semantic_segmentation": "semantic", "instance_segmentation": "instance"}


@dataclass(frozen=True)
class Annotation:
    """How one label array is to be read.

    Attributes:
        class_name: the class that was annotated.
        kind: ``semantic`` (present or not) or ``instance`` (ids).
        absent: the stored value that means "looked at, not there".
        unknown: the stored value that means "not looked at", or None where no value does.
        counts: voxels of the finest level by state, as far as the file says (``absent``, ``unknown``).
    """

    class_name: str
    kind: Kind
    absent: int
    unknown: int | None
    counts: Mapping[str, int]

    def decode(self, values: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Stored values (any shape) as two masks of that shape: present, and known (present or absent)."""
        known = np.ones(values.shape, bool) if self.unknown is None else values != self.unknown
        return (values != self.absent) & known, known

    @property
    def fully_known(self) -> bool:
        """Whether the file says that no voxel of the array is unknown."""
        return self.unknown is None or self.counts.get("unknown") == 0

    @classmethod
    def from_attrs(cls, group: Mapping[str, Any], array: Mapping[str, Any], where: str) -> Annotation:
        """Read from the attributes of a class's group and of its finest array (which has the counts).

        Raises `MetadataError` where the ``cellmap`` attributes are absent or make no sense: without them a zero could
        mean absent or unknown, and guessing would train on it.
        """
        found = [_annotation(attrs, where) for attrs in (group, array)]
        merged: dict[str, Any] = {}
        for part in found:
            merged.update({k: v for k, v in part.items() if v is not None})
        if not merged:
            raise MetadataError(
                f"{where}: no attrs['cellmap']['annotation'], so 0 could mean absent or unknown; "
                "add the annotation attributes (encoding, type, class_name) or leave the class out"
            )
        annotation_type = merged.get("annotation_type")
        if not isinstance(annotation_type, Mapping):
            raise MetadataError(
                f"{where}: attrs['cellmap']['annotation'] has no annotation_type; found {sorted(merged)}"
            )
        kind = _KINDS.get(str(annotation_type.get("type")))
        if kind is None:
            raise MetadataError(
                f"{where}: annotation type {annotation_type.get('type')!r} is not one of {', '.join(_KINDS)}"
            )
        encoding = _numbers(annotation_type.get("encoding"), "encoding", where)
        counts = _numbers(merged.get("complement_counts") or {}, "complement_counts", where)
        unknown = encoding.get("unknown")
        if "absent" not in encoding and unknown != 0:
            raise MetadataError(
                f"{where}: the encoding {encoding} names no value for absent, so 0 could mean anything; add it"
            )
        if kind == "instance" and merged.get("complement_counts") and counts.get("unknown", 0) == 0:
            unknown = None  # nothing is unknown, so a voxel with that number is an object that happens to have it
        return cls(
            class_name=str(merged.get("class_name", where.rsplit("/", 1)[-1])),
            kind=kind,
            absent=encoding.get("absent", 0),
            unknown=unknown,
            counts=counts,
        )

    def to_attrs(self, *, with_counts: bool = True) -> dict[str, Any]:
        """The ``cellmap`` attribute that `from_attrs` reads back."""
        encoding = {"absent": self.absent}
        if self.unknown is not None:
            encoding["unknown"] = self.unknown
        if self.kind == "semantic":
            encoding["present"] = 1
        annotation: dict[str, Any] = {
            "annotation_type": {"encoding": encoding, "type": f"{self.kind}_segmentation"},
            "class_name": self.class_name,
        }
        if with_counts:
            annotation["complement_counts"] = dict(self.counts)
        return {"cellmap": {"annotation": annotation}}


def _annotation(attrs: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The annotation part of ``attrs``; empty where there is none, an error where it is not a mapping."""
    part: Any = attrs
    for key in ("cellmap", "annotation"):
        if key not in part:
            return {}
        part = part[key]
        if not isinstance(part, Mapping):
            raise MetadataError(f"{where}: attrs[{key!r}] must be a mapping, found {type(part).__name__}")
    return part


def _numbers(part: Any, name: str, where: str) -> dict[str, int]:
    if not isinstance(part, Mapping):
        raise MetadataError(f"{where}: {name} must map states to numbers, found {part!r}")
    try:
        return {str(k): int(v) for k, v in part.items()}
    except (TypeError, ValueError) as error:
        raise MetadataError(f"{where}: {name} must map states to whole numbers, found {dict(part)!r}") from error
