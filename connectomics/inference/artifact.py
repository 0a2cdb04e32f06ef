"""What a prediction leaves on disk: its groups, what they say of themselves, and whether they are whole.

Under the output folder::

    {class}/s0           the probabilities, Zarr v2, in an OME-NGFF 0.4 multiscale group; with a pyramid s1, s2, ... too
    {class}/.zattrs      multiscales, and connectomics: artefact, class_name, complete, grid, id, made_from, model,
                         scale, version
    {class}/uncertainty  the class's uncertainty where it is asked for, a multiscale group like its parent; its
                         attributes also say the kind
    .zattrs              connectomics: artefact, complete, classes, id, made_from, model, version
    task.json            the task, with the same id and made_from (`connectomics.io.artifacts`)
    .done-{stage}        one byte per block (`connectomics.tasks.done`)

``scale``: a stored value times it is the probability (the uncertainty). ``complete`` is false until the last block is
written, and only then the coarser levels are named. Complete groups also say what they lack: ``missing_raw`` and
``unknown``, see `connectomics.inference.gaps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import connectomics
from connectomics.geometry import VoxelGrid
from connectomics.inference.augmented import LARGEST
from connectomics.inference.layout import Layout
from connectomics.inference.output import UNITS
from connectomics.io import store
from connectomics.io.artifacts import Provenance
from connectomics.io.levels import level_grids
from connectomics.io.write import (
    ArrayWriter,
    create_array,
    create_multiscale,
    ensure_group,
    multiscales_attrs,
    update_attrs,
)

ARTEFACT = "probability"
UNCERTAINTY = "uncertainty"  # the artefact, and its group below that of the class
_SMALL = 64  # voxels: the coarsest level of a pyramid is no longer along any axis


@dataclass(frozen=True)
class Group:
    """One multiscale group that a prediction writes: the probabilities of a channel, or their uncertainty.

    Attributes:
        place: its folder. layout: its grid, blocks and chunks.
        channel: of the network. uncertainty: the kind, or "" for probabilities.
        dtype: uint8 or float16. pyramid: whether there are levels beyond s0.
        about: what its attributes say beside `artefact` and `complete`.
    """

    place: Path
    layout: Layout
    channel: int
    uncertainty: str
    dtype: str
    pyramid: bool
    about: Mapping[str, Any] = field(hash=False)

    @property
    def grids(self) -> list[VoxelGrid]:
        """The grids of its levels, finest first."""
        longest, levels = max(self.layout.target.shape), 1
        while self.pyramid and longest > _SMALL:
            longest, levels = -(-longest // 2), levels + 1
        return level_grids(self.layout.target, levels)

    @property
    def is_made(self) -> bool:
        """Whether its finest array was made to its end: the group's attributes are written last."""
        return (self.place / ".zattrs").exists() and "multiscales" in store.read_attrs(str(self.place))

    def make(self) -> None:
        """Make the group with its finest array, empty; what is in its place is removed."""
        attrs, grid = {"connectomics": self.attributes(None)}, self.layout.target
        if self.place.parent.suffix != ".zarr":
            ensure_group(self.place.parent)
        create_multiscale(
            self.place, [grid], self.dtype, chunks=self.layout.chunks, attrs=attrs, name=self.place.name, overwrite=True
        )

    def make_level(self, level: int) -> bool:
        """Make the array of a coarser level where it is not there; whether it was not."""
        place = self.place / f"s{level}"
        if (place / ".zarray").exists():
            return False
        grid = self.grids[level]
        create_array(place, grid.shape, self.dtype, chunks=self.layout.chunks, overwrite=True, grid=grid)
        return True

    def array(self, level: int = 0) -> ArrayWriter:
        """One of its arrays."""
        return ArrayWriter.open(self.place / f"s{level}")

    def close(self, provenance: Provenance, gaps: Mapping[str, Any]) -> None:
        """Say that it is whole but for its gaps (`connectomics.inference.gaps`), which output it is, and name all of
        its levels."""
        levels = multiscales_attrs(self.grids, self.place.name)
        update_attrs(self.place, {**levels, "connectomics": {**self.attributes(provenance), **gaps}})

    def attributes(self, provenance: Provenance | None) -> dict[str, Any]:
        """The ``connectomics`` attribute; None: of a group that is not whole yet."""
        largest = LARGEST.get(self.uncertainty, 1.0)
        attrs = {**marks(provenance), **self.about, "scale": largest * UNITS[self.dtype]}
        return {**attrs, "artefact": UNCERTAINTY, "kind": self.uncertainty} if self.uncertainty else attrs


def marks(provenance: Provenance | None) -> dict[str, Any]:
    """What the attributes of every group of a prediction begin with; None: it is not whole yet."""
    about = {} if provenance is None else provenance.to_dict()
    return {"artefact": ARTEFACT, "complete": bool(about), "version": connectomics.__version__, **about}
