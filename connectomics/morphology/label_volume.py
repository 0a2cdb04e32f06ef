"""The labels that a task reads: where they are, and how to notice that they changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from connectomics.errors import MetadataError
from connectomics.geometry import Index, VoxelGrid
from connectomics.io.artifacts import require_complete
from connectomics.io.fingerprint import fingerprint
from connectomics.io.multiscale import Multiscale


@dataclass(frozen=True)
class LabelVolume:
    """The labels of one class of one crop.

    Attributes:
        location: path or URL of the multiscale group, whose finest level is read.
        shape: voxels of that level, z y x.
        semantic: whether everything above 0 is one instance with ID 1.
        stamp: hash of attributes and of chunk sizes and times; changes when any program changes the labels.
    """

    dataset: str
    crop: str
    location: str
    semantic: bool
    shape: Index
    stamp: str

    @classmethod
    def open(cls, dataset: str, crop: str, location: str) -> LabelVolume:
        """Return the labels at ``location``; raises `MissingError`, `IncompleteError`, `MetadataError` (no labels)."""
        source = Multiscale.open(location)
        about = require_complete(source.location, "labels", foreign=True)
        level = source.levels[0]
        if level.dtype.kind not in "uib":
            raise MetadataError(f"{source.location}: labels must be whole numbers, found {level.dtype}")
        stamp = fingerprint(source, with_location=False)[:16]
        return cls(dataset, crop, source.location, about.get("kind") == "semantic", level.grid.shape, stamp)

    @property
    def name(self) -> str:
        """``{dataset}/{crop}/{class}``."""
        return f"{self.dataset}/{self.crop}/{Path(self.location).name}"

    @property
    def grid(self) -> VoxelGrid:
        """Grid of the finest level, from the file."""
        return Multiscale.open(self.location).levels[0].grid

    def check_unchanged(self) -> None:
        """Raise `MetadataError` if the labels are no longer those that the task was made for."""
        if LabelVolume.open(self.dataset, self.crop, self.location) != self:
            raise MetadataError(f"{self.location} has changed since the task was made; run it again with --overwrite")
