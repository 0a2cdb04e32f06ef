"""The challenge's classes: ids, the atomic parts of group classes, which ones are scored, and how."""

from __future__ import annotations

import csv
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from connectomics.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class CellMapClass:
    """One class of the challenge.

    Attributes:
        name: as in paths and tables (``mito_mem``).
        id: the challenge's number.
        atoms: names of the atomic classes whose union this group class is; empty for an atomic class.
        instance: whether the score compares instances (else voxels).
        scored: whether the challenge scores the class.
    """

    name: str
    id: int
    atoms: tuple[str, ...]
    instance: bool
    scored: bool

    @property
    def is_group(self) -> bool:
        """Whether the class is a union of atomic classes."""
        return bool(self.atoms)


def _load() -> Mapping[str, CellMapClass]:
    text = resources.files("connectomics.cellmap").joinpath("tables/classes.csv").read_text(encoding="utf-8")
    table = {
        row["class_name"]: CellMapClass(
            name=row["class_name"],
            id=int(row["class_id"]),
            atoms=tuple(row["atomic_parts"].split()),
            instance=row["instance_scored"] == "1",
            scored=row["scored"] == "1",
        )
        for row in csv.DictReader(text.splitlines())
    }
    return MappingProxyType(table)


CLASSES: Mapping[str, CellMapClass] = _load()

#: Classes that the scorer treats as instances. ``vim`` is one of them although the current table does not score it.
INSTANCE_CLASSES: frozenset[str] = frozenset(c.name for c in CLASSES.values() if c.instance)

#: Mutually exclusive classes: a point of the world belongs to at most one of them.
ATOMIC_CLASSES: frozenset[str] = frozenset(c.name for c in CLASSES.values() if not c.is_group)


def get_class(name: str) -> CellMapClass:
    """Return the class of that name; raise `UnknownNameError` with the nearest known name."""
    try:
        return CLASSES[name]
    except KeyError:
        raise unknown_name("class", name, CLASSES) from None


def is_instance_class(name: str) -> bool:
    """Return whether a class is scored by instances. Names unknown to the challenge (your own) are semantic."""
    return name in INSTANCE_CLASSES


def is_scored_by_instances(name: str, kind: str | None) -> bool:
    """Return whether labels are compared object by object.

    Those of the challenge's instance classes are, and those of your own classes if ``kind`` is ``instance``.
    """
    return is_instance_class(name) or (kind == "instance" and name not in CLASSES)


def atoms_of(name: str) -> tuple[str, ...]:
    """Return the atomic classes of ``name``: itself if it is atomic or not a class of the challenge."""
    known = CLASSES.get(name)
    return known.atoms if known is not None and known.atoms else (name,)


def arrays_for(name: str, there: Container[str]) -> list[str]:
    """Return whose arrays, among ``there``, annotate a class: its own, else those of its atoms."""
    return [name] if name in there else [atom for atom in atoms_of(name) if atom in there]


def unions_of(classes: Sequence[str], wanted: bool | Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return group classes that follow from predicted atomic classes: name -> its atoms, all of them in ``classes``.

    Args:
        classes: what a network predicts.
        wanted: names of groups; True: every group that follows and is not predicted itself; False: none.

    Raises:
        UnknownNameError: no such class.
        ConfigError: it is no group, is predicted itself, or an atom is not predicted.
    """
    if isinstance(wanted, bool):
        groups = (c for c in CLASSES.values() if wanted and c.is_group and c.name not in classes)
        return {group.name: group.atoms for group in groups if set(group.atoms) <= set(classes)}
    for name in wanted:
        group = get_class(name)
        missing = [atom for atom in group.atoms if atom not in classes]
        if not group.is_group or name in classes or missing:
            why = f"{', '.join(missing)} of its atoms are not in dataset.classes" if missing else "it is no group"
            why = "the network predicts it itself (dataset.classes)" if name in classes else why
            raise ConfigError(f"inference.groups: {name} cannot be the union of predicted classes: {why}; leave it out")
    return {name: CLASSES[name].atoms for name in dict.fromkeys(wanted)}
