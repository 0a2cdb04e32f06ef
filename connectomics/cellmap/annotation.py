"""The meaning of stored values in a label array: present, absent or unknown.

CellMap label arrays carry ``attrs["cellmap"]["annotation"]``: the annotation type and its ``encoding``, which names the
stored value of ``absent`` and ``unknown`` (and, for semantic arrays, ``present``) separately for each array;
``complement_counts`` counts the voxels that are not objects, by state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError

Kind = Literal["semantic", "instance"]

_KINDS: dict[str, Kind] = {"semantic_segmentation": "semantic", "instance_segmentation": "instance"}


def class_and_kind(text: str) -> tuple[str, Kind | None]:
    """Return the name of ``CLASS``, ``CLASS:instance`` or ``CLASS:semantic``, and the kind if it is given.

    Raises:
        InputError: another kind, or a name that cannot be a class's.
    """
    name, colon, given = text.partition(":")
    kind = next((known for known in _KINDS.values() if known == given), None)
    if colon and kind is None:
        raise InputError(f"labels of {name}: expected kind instance or semantic, got {given!r}")
    if not re.fullmatch(r"[\w+-]+", name):
        raise InputError(f"a class's name is letters, digits, - _ +, got {name!r}")
    return name, kind


@dataclass(frozen=True)
class Annotation:
    """How to read one label array.

    Attributes:
        class_name: the annotated class.
        kind: ``semantic`` (present or not) or ``instance`` (ids).
        absent: stored value that means "annotated, not this class".
        unknown: stored value that means "not annotated", or None if no value does.
        counts: voxels of the finest level by state, as far as the file gives them (``absent``, ``unknown``).
    """

    class_name: str
    kind: Kind
    absent: int
    unknown: int | None
    counts: Mapping[str, int]

    def decode(self, values: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return two masks of the shape of ``values``: present, and known (present or absent)."""
        known = np.ones(values.shape, bool) if self.unknown is None else values != self.unknown
        return (values != self.absent) & known, known

    @property
    def fully_known(self) -> bool:
        """Whether the file says that no voxel of the array is unknown."""
        return self.unknown is None or self.counts.get("unknown") == 0

    @classmethod
    def from_attrs(cls, group: Mapping[str, Any], array: Mapping[str, Any], where: str) -> Annotation:
        """Read the attributes of a class's group and of its finest array (which has the counts).

        Raises `MetadataError` if the ``cellmap`` attributes are missing or invalid: without them a zero could mean
        absent or unknown, and a wrong guess would become training data.
        """
        merged: dict[str, Any] = {}
        for attrs in (group, array):
            merged.update({k: v for k, v in _annotation(attrs, where).items() if v is not None})
        if not merged:
            raise MetadataError(
                f"{where}: no attrs['cellmap']['annotation'], so 0 could mean absent or unknown; "
                "add the annotation attributes (encoding, type, class_name) or leave the class out"
            )
        annotation_type = merged.get("annotation_type")
        if not isinstance(annotation_type, Mapping):
            raise MetadataError(f"{where}: attrs['cellmap']['annotation'] has no annotation_type; got {sorted(merged)}")
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
        if kind == "instance" and counts and counts.get("unknown", 0) == 0:
            unknown = None  # nothing is unknown, so a voxel with that value is an object that happens to have this id
        class_name = str(merged.get("class_name", where.rsplit("/", 1)[-1]))
        return cls(class_name, kind, encoding.get("absent", 0), unknown, counts)

    def to_attrs(self, *, with_counts: bool = True) -> dict[str, Any]:
        """Return the ``cellmap`` attribute that `from_attrs` reads."""
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
    """The annotation part of ``attrs``; empty if there is none."""
    part: Any = attrs
    for key in ("cellmap", "annotation"):
        if key not in part:
            return {}
        part = part[key]
        if not isinstance(part, Mapping):
            raise MetadataError(f"{where}: attrs[{key!r}] must be a mapping, got {type(part).__name__}")
    return part


def _numbers(part: Any, name: str, where: str) -> dict[str, int]:
    try:
        return {str(k): int(v) for k, v in part.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise MetadataError(f"{where}: {name} must map states to whole numbers, got {part!r}") from error
