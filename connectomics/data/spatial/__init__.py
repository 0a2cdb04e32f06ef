"""The fused spatial pass: flips, turns, affine and elastic transforms as one map, read from a crop in one pass."""

from connectomics.data.spatial.augmentor import SpatialAugmentor
from connectomics.data.spatial.mapping import CoordinateMap, Displacement
from connectomics.data.spatial.sample import sample, sample_reference

__all__ = ["CoordinateMap", "Displacement", "SpatialAugmentor", "sample", "sample_reference"]
