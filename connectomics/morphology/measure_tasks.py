"""The two tasks of measuring: the instances of a class, and the contacts of the instances of one with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index, VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.tables import Column, Ragged, Values
from connectomics.morphology import contacts, instances
from connectomics.morphology.contacts import Contacts, ContactSpec, contacts_of_block, halo_of
from connectomics.morphology.instances import Instances, instances_of_block
from connectomics.morphology.partial import Partial
from connectomics.morphology.table_task import Labels, TableTask, Totals

_AXES = "zyx"


@dataclass(frozen=True, kw_only=True)
class MeasureTask(TableTask):
    """The table of the instances of one class; a row an instance, by crop and by id.

    Attributes:
        class_name: recorded with the output.
    """

    kind: ClassVar[str] = "measure"
    tables: ClassVar[Mapping[str, int]] = instances.TABLES
    bytes_a_voxel: ClassVar[int] = 20
    columns: ClassVar[tuple[Column, ...]] = (
        Column("id", "id"),
        Column("voxels", "count", "voxels"),
        Column("volume_nm3", "number", "nm3"),
        Column("surface_nm2", "number", "nm2"),
        Column("sphericity", "number", digits=5),
        *(Column(f"{what}_{axis}_nm", "number", "nm") for what in ("centroid", "begin", "end") for axis in _AXES),
        Column("touches_border", "flag"),
    )

    class_name: str

    @property
    def name(self) -> str:
        return self.class_name

    def volumes(self, crop: int) -> tuple[Labels, ...]:
        return (self.inputs[crop],)

    def part(self, crop: int, sources: Sequence[Multiscale], begin: Index, shape: Index) -> Partial:
        return instances_of_block(sources[0], begin, shape, semantic=self.inputs[crop].semantic)

    def voxels_read(self, crop: int) -> int:
        return _voxels(self.inputs[crop].shape, self.block_shape, (1, 1, 1))

    def values(self, grid: VoxelGrid, found: Partial) -> dict[str, Values]:
        made = Instances.of(grid, found)
        places = np.hstack([made.centroid, made.box]).T
        names = [f"{what}_{axis}_nm" for what in ("centroid", "begin", "end") for axis in _AXES]
        return {
            "id": made.ids,
            "voxels": made.sizes,
            "volume_nm3": made.volume,
            "surface_nm2": made.surface,
            "sphericity": made.sphericity,
            **dict(zip(names, places, strict=True)),
            "touches_border": made.touches_border,
        }

    def totals(self) -> Totals:
        every = all(labels.semantic for labels in self.inputs)
        return _InstanceTotals(self.class_name, "semantic" if every else "instance")


class _InstanceTotals(Totals):
    """The sums of a table of instances; 8 bytes an instance, for the median."""

    def __init__(self, class_name: str, kind: str) -> None:
        self._head = {"class": class_name, "kind": kind}
        self._volumes: list[NDArray[np.float64]] = []
        self._voxels, self._border, self._surface = 0, 0, 0.0

    def add(self, values: Mapping[str, Any]) -> None:
        self._volumes.append(values["volume_nm3"])
        self._voxels += int(values["voxels"].sum())
        self._border += int(values["touches_border"].sum())
        self._surface += float(values["surface_nm2"].sum())

    def to_dict(self) -> dict[str, Any]:
        every = np.concatenate([np.zeros(0), *self._volumes])
        return {
            **self._head,
            "instances": len(every),
            "touch_border": self._border,
            "voxels": self._voxels,
            "volume_nm3": float(every.sum()),
            "median_volume_nm3": float(np.median(every)) if len(every) else None,
            "surface_nm2": self._surface,
        }


@dataclass(frozen=True, kw_only=True)
class ContactsTask(TableTask):
    """The table of the contacts of the instances of one class with another; a row an instance, with contact or without.

    Attributes:
        of, to, nm: see `ContactSpec`.
        others: the labels of the class ``to``, for each of ``inputs``.

    Raises:
        InputError: a distance of more than `connectomics.morphology.contacts.MOST_HALO` voxels (by `check`).
    """

    kind: ClassVar[str] = "contacts"
    places: ClassVar[frozenset[str]] = TableTask.places | {"others"}
    tables: ClassVar[Mapping[str, int]] = contacts.TABLES
    bytes_a_voxel: ClassVar[int] = 30
    columns: ClassVar[tuple[Column, ...]] = (
        Column("id", "id"),
        Column("surface_nm2", "number", "nm2"),
        Column("contact_nm2", "number", "nm2"),
        Column("partners", "count"),
        Column("partner_ids", "ids"),
    )

    of: str
    to: str
    nm: float
    others: tuple[Labels, ...]

    @classmethod
    def parsed(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        others = tuple(map(Labels.from_dict, data["others"]))
        return {**super().parsed(data), "others": others, "nm": float(data["nm"])}

    @property
    def spec(self) -> ContactSpec:
        """What is measured."""
        return ContactSpec(self.of, self.to, self.nm)

    @property
    def name(self) -> str:
        return str(self.spec)

    def check(self, *, overwrite: bool = False) -> bool:
        if len(self.others) != len(self.inputs):
            of, to = len(self.inputs), len(self.others)
            raise InputError(
                f"contacts {self.name}: {of} crops of {self.of} but {to} of {self.to}; they must be as many"
            )
        for labels in self.inputs:
            halo_of(Multiscale.open(labels.location).levels[0].grid, self.nm)
        return super().check(overwrite=overwrite)

    def volumes(self, crop: int) -> tuple[Labels, ...]:
        return self.inputs[crop], self.others[crop]

    def part(self, crop: int, sources: Sequence[Multiscale], begin: Index, shape: Index) -> Partial:
        semantic = self.inputs[crop].semantic, self.others[crop].semantic
        return contacts_of_block(sources[0], sources[1], self.nm, begin, shape, semantic=semantic)

    def voxels_read(self, crop: int) -> int:
        grid = Multiscale.open(self.inputs[crop].location).levels[0].grid
        return _voxels(grid.shape, self.block_shape, halo_of(grid, self.nm))

    def values(self, grid: VoxelGrid, found: Partial) -> dict[str, Values]:
        made = Contacts.of(grid, found)
        offsets = made.offsets
        return {
            "id": made.ids,
            "surface_nm2": made.surface,
            "contact_nm2": made.area,
            "partners": np.diff(offsets),
            "partner_ids": Ragged(made.pairs[:, 1], offsets),
        }

    def totals(self) -> Totals:
        return _ContactTotals(self.spec)


class _ContactTotals(Totals):
    """The sums of a table of contacts."""

    def __init__(self, spec: ContactSpec) -> None:
        self._head = {"of": spec.of, "to": spec.to, "nm": spec.nm}
        self._instances, self._with, self._pairs, self._area, self._surface = 0, 0, 0, 0.0, 0.0

    def add(self, values: Mapping[str, Any]) -> None:
        self._instances += len(values["id"])
        self._with += int(np.count_nonzero(values["partners"]))
        self._pairs += int(values["partners"].sum())
        self._area += float(values["contact_nm2"].sum())
        self._surface += float(values["surface_nm2"].sum())

    def to_dict(self) -> dict[str, Any]:
        return {
            **self._head,
            "instances": self._instances,
            "with_contact": self._with,
            "pairs": self._pairs,
            "contact_nm2": self._area,
            "surface_nm2": self._surface,
        }


def _voxels(shape: Index, block: Index, halo: Sequence[int] | NDArray[np.int64]) -> int:
    return int(np.prod([min(n, b) + 2 * int(h) for n, b, h in zip(shape, block, halo, strict=True)]))
