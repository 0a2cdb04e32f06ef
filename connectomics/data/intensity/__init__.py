"""Intensity and electron-microscopy augmentations on the batch's device (CPU or GPU, the same code).

`IntensityAugmentor` applies what ``data.intensity`` names; `recognise` finds the MONAI transforms it can do as well.
docs/augmentations.md shows each kind. Needs torch, not MONAI.
"""

from connectomics.data.intensity.augmentor import IntensityAugmentor
from connectomics.data.intensity.batch import BatchAugmentor
from connectomics.data.intensity.kinds import KINDS
from connectomics.data.intensity.recognise import recognise

__all__ = ["KINDS", "BatchAugmentor", "IntensityAugmentor", "recognise"]
