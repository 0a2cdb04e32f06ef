"""Augmentation of training patches.

Where to add one: an intensity or electron-microscopy augmentation in `intensity_kinds`, a spatial transform in
`spatial_transforms`. docs/augmentations.md shows each kind. Needs torch; MONAI is imported only if a configuration
names a transform that is in neither of the two.
"""

from connectomics.data.augmentation.coordinate_map import CoordinateMap, Displacement
from connectomics.data.augmentation.intensity_augmentor import BatchAugmentor, IntensityAugmentor, recognize
from connectomics.data.augmentation.intensity_kinds import KINDS
from connectomics.data.augmentation.monai_transforms import Augmentor, GivenAugmentor, agree, build_augmentor
from connectomics.data.augmentation.patch_augmentor import PatchAugmentor, SpatialAugmentor
from connectomics.data.augmentation.presets import augmentations_of
from connectomics.data.augmentation.warp import sample

__all__ = [
    "KINDS",
    "Augmentor",
    "BatchAugmentor",
    "CoordinateMap",
    "Displacement",
    "GivenAugmentor",
    "IntensityAugmentor",
    "PatchAugmentor",
    "SpatialAugmentor",
    "agree",
    "augmentations_of",
    "build_augmentor",
    "recognize",
    "sample",
]
