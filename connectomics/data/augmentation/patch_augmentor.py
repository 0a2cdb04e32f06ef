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
from connectomics.config.values import read
from connectomics.data.augmentation.argument_rules import several
from connectomics.data.augmentation.coordinate_map import CoordinateMap, Floats
from connectomics.data.augmentation.intensity_augmentor import recognize
from connectomics.data.augmentation.monai_transforms import Augmentor, agree, build_augmentor
from connectomics.data.augmentation.spatial_transforms import TRANSFORMS, PatchFrame, SpatialTransform
from connectomics.data.augmentation.tissue_transforms import TISSUE_TRANSFORMS, TissueTransform
from connectomics.data.patches import PackedPatch
from connectomics.errors import ConfigError
from connectomics.geometry import Triple, index, triple

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpatialAugmentor:
    """Random flips, rotations, affine, zoom and elastic transforms of a patch, drawn together."""

    transforms: tuple[tuple[str, SpatialTransform], ...]  # by name, in order of application; at most one is elastic
    frame: PatchFrame  # size and voxel size of the patch
    extent: Triple  # size of the largest patch that a map is used for, voxels, z y x; elastic fields cover it

    @classmethod
    def split(
        cls,
        augmentations: Mapping[str, Any],
        patch_size: Sequence[int],
        extent: Sequence[float] | None = None,
        voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> tuple[SpatialAugmentor | None, dict[str, Any]]:
        """Return the augmentor for the transforms of `TRANSFORMS`, and the other transforms in their order.

        A transform of `TRANSFORMS` stays with the others if it asks for what one pass does not do (another size, an
        image mode that is not linear, a second elastic field) or if a transform that moves labels comes before it.

        Args:
            augmentations: ``data.augmentations``: name of a MONAI transform -> arguments.
            patch_size: voxels, z y x.
            extent: size of the largest patch around the same center that uses the map (coarser inputs), in voxels of
                this patch.
            voxel_size: nm, z y x. Rotations and shears are in nm, and a quarter turn between axes of different voxel
                size is refused.

        Raises:
            ConfigError: an argument is unknown or has a bad value, or a transform would move image or label alone.
        """
        frame = PatchFrame(index(patch_size), triple(voxel_size, "voxel_size"))
        fused: list[tuple[str, SpatialTransform]] = []
        remaining: dict[str, Any] = {}
        before_labels = True
        for name, values in augmentations.items():
            if values is None:
                continue
            found = _read(str(name), values, frame)
            fits = found is not None and before_labels and found.fits_one_pass(frame)
            if found is not None and found.has_field and any(transform.has_field for _, transform in fused):
                if str(name) in TISSUE_TRANSFORMS:
                    raise ConfigError(f"data.augmentations.{name}: a patch has one elastic deformation; remove one")
                fits = False
            if found is not None and fits:
                fused += [(str(name), transform) for transform in found.expanded()]
                continue
            remaining[str(name)] = values
            before_labels = before_labels and not _moves_labels(values)
        if not fused:
            return None, remaining
        z, y, x = np.maximum(frame.size, frame.size if extent is None else np.asarray(extent, np.float64)).tolist()
        return cls(tuple(fused), frame, (float(z), float(y), float(x))), remaining

    def draw(self, rng: np.random.Generator) -> CoordinateMap:
        """Draw one map from MONAI's distributions. Its ``parameters`` say what was drawn."""
        drawn = CoordinateMap.identity()
        # an offset goes through the last transform first; an elastic field must cover what the later ones ask for
        for name, transform in reversed(self.transforms):
            found = transform.draw(rng, name, np.abs(drawn.bounds(self.extent)).max(0), self.frame)
            drawn = drawn if found is None else found.then(drawn)
        return drawn

    @property
    def may_leave(self) -> bool:
        """Whether a draw may be repeated if it leaves the crop: if it has a transform of the tissue."""
        return any(isinstance(transform, TissueTransform) for _, transform in self.transforms)

    def reach(self, shape: Sequence[float]) -> Floats:
        """Return the largest source offset (3,) of any draw, voxels, for a patch of ``shape`` voxels."""
        half = (np.asarray(shape, np.float64) - 1) / 2
        for _, transform in reversed(self.transforms):
            half = transform.reach(half, self.frame)
        return half


def _read(name: str, values: Any, frame: PatchFrame) -> SpatialTransform | None:
    base, _, suffix = name.rpartition("_")
    kind = {**TRANSFORMS, **TISSUE_TRANSFORMS}.get(base if base and suffix.isdigit() else name)
    if kind is None:
        return None
    found = read(kind, values, f"data.augmentations.{name}", ConfigError)
    try:
        found.check(frame)
    except ConfigError as error:
        raise ConfigError(f"data.augmentations.{name}: {error}") from error
    return found


def _moves_labels(values: Any) -> bool:
    """Return whether labels are among the keys of a transform; also true if the keys cannot be read."""
    keys = several(values.get("keys") if isinstance(values, Mapping) else None)
    return not all(isinstance(key, str) for key in keys) or bool({"label", "known"} & set(keys))


# -- all of a patch's augmentation -------------------------------------------------------------------------------------
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
