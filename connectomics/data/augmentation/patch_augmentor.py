"""`PatchAugmentor`: what ``data.augmentations`` names, applied to training patches in a loader worker.

Flips, rotations, affine and elastic deformations run fused into the reading of a patch (`SpatialAugmentor`),
intensity transforms that the device can do are left to it (`IntensityAugmentor`), and the rest runs as MONAI
transforms on dense arrays (`Augmentor`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelCodes
from connectomics.cellmap.labels import FRACTION_STEPS, LabelVolume, words_for
from connectomics.data.augmentation.argument_rules import several
from connectomics.data.augmentation.intensity_from_monai import recognize
from connectomics.data.augmentation.monai_transforms import Augmentor, agree, build_augmentor
from connectomics.data.augmentation.spatial_augmentor import SpatialAugmentor
from connectomics.data.patches import PackedPatch
from connectomics.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchAugmentor:
    """The augmentation of training patches in a loader worker."""

    spatial: SpatialAugmentor | None  # drawn for each patch and applied while the patch is read
    others: Augmentor | None  # MONAI transforms that run afterwards
    moves_labels: bool = False  # whether one of these moves labels, which must be made dense for it (slow)

    @classmethod
    def of(
        cls,
        augmentations: Mapping[str, Any],
        patch_size: Sequence[int],
        extent: Sequence[float] | None = None,
        voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> PatchAugmentor | None:
        """Return the augmentor for ``data.augmentations``, or None if nothing remains for a worker.

        ``extent``: voxels of the run (z y x) that the widest further input covers, if there are any. ``voxel_size``:
        of the run, nm, z y x. Errors are those of `SpatialAugmentor.split` and `build_augmentor`.
        """
        spatial, remaining = SpatialAugmentor.split(augmentations, patch_size, extent, voxel_size)
        if len(set(voxel_size)) > 1:
            _refuse_rotations(remaining, voxel_size)
        _, remaining = recognize(remaining)
        others = build_augmentor(remaining, patch_size)
        if spatial is None and others is None:
            return None
        moving = [n for n, a in remaining.items() if a is not None and {"label", "known"} & set(several(a["keys"]))]
        if moving:
            log.info("data.augmentations: %s need dense labels, which is slow", ", ".join(moving))
        return cls(spatial, others, bool(moving))

    def finish(self, patch: PackedPatch, seed: int) -> PackedPatch:
        """Apply the MONAI transforms to the image and labels of a patch that was read."""
        if self.others is None:
            return patch
        self.others.seed(seed)
        if not self.moves_labels:
            image = self.others.image_only(patch.images[0])
            return replace(patch, images=(image, *patch.images[1:]))
        moved = self.others(patch.dense(), soft=patch.states.fractions is not None)
        codes = LabelCodes.of(_packed(moved["label"], moved["known"], patch))
        ids = None
        if patch.ids is not None:
            ids = agree(moved["ids"], patch.instances, moved["label"] >= 0.5, moved["known"], patch.states.classes)
        images = (moved["image"], *patch.images[1:])
        return replace(patch, images=images, codes=codes.codes, states=codes.states, ids=ids)


def _packed(label: NDArray[np.float32], known: NDArray[np.bool_], patch: PackedPatch) -> LabelVolume:
    """Return dense labels (C, D, H, W) as one bit per class, and their fractions if the patch has soft labels."""
    classes = patch.states.classes
    words = np.zeros((2, words_for(len(classes)), *label.shape[1:]), np.uint64)
    for channel in range(len(classes)):
        word, bit = divmod(channel, 64)
        words[0, word] |= ((label[channel] >= 0.5) & known[channel]).astype(np.uint64) << np.uint64(bit)
        words[1, word] |= known[channel].astype(np.uint64) << np.uint64(bit)
    fractions = None
    if patch.states.fractions is not None:
        fractions = np.where(known, np.rint(FRACTION_STEPS * label), 0).astype(np.uint8)
    return LabelVolume(patch.grid, classes, words[0], words[1], fractions=fractions)


def _refuse_rotations(augmentations: Mapping[str, Any], voxel_size: Sequence[float]) -> None:
    """Raise `ConfigError` for a MONAI transform that rotates or shears in voxels, for anisotropic voxels."""
    for name, given in augmentations.items():
        rotates = isinstance(given, Mapping) and (given.get("rotate_range") or given.get("shear_range"))
        if re.sub(r"_\d+$", "", name) == "RandRotated" or rotates:
            raise ConfigError(
                f"data.augmentations.{name} rotates or shears in voxels, which distorts tissue with anisotropic voxels "
                f"of {list(voxel_size)} nm; use RandAffined (or one Rand3DElasticd) with keys [image, label], mode "
                "bilinear, before any other transform of labels: it rotates in nm"
            )
