"""A run's intensity augmentation of whole training batches: the run's own view and all further ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.data.intensity.augmentor import IntensityAugmentor
from connectomics.data.intensity.recognise import recognise


@dataclass(frozen=True)
class BatchAugmentor:
    """`IntensityAugmentor` for packed batches (see `connectomics.data.patches.collate`).

    Attributes:
        own: of the run's own view. views: of the further views in their order, each with its own voxel size.

    Further views have the draws of their patch, but for kinds that move an image against its labels; ids of objects
    move with the labels. Voxels without raw keep the mean of tissue, as the network meets them in prediction. Images
    are on the unit scale; they are centered afterwards (`connectomics.data.patches.centered`).
    """

    own: IntensityAugmentor
    views: tuple[IntensityAugmentor, ...] = ()

    @classmethod
    def of(cls, config: RunConfig) -> BatchAugmentor | None:
        """What ``data.intensity`` names, and those of MONAI's transforms that the loader leaves to the device; None
        where there is nothing to do. Errors as `IntensityAugmentor.from_config`."""
        recognised, _ = recognise(config.data.augmentations)
        kinds = {**recognised, **config.data.intensity}
        sizes = [config.dataset.voxel_size, *(view.voxel_size for view in config.data.inputs)]
        own, *views = (IntensityAugmentor.from_config(kinds, size) for size in sizes)
        return None if own is None else cls(own, tuple(view for view in views if view is not None))

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with other images and codes; the tensors given stay as they are."""
        before = batch["image"]
        image, codes = self.own(before, batch["codes"], batch["seed"])
        assert codes is not None  # it was given codes
        # where nothing is known and raw is exactly the mean there is none, or it is as good as none
        mean = batch["mean"].to(before.device)[:, None, None, None, None] if "mean" in batch else before.new_zeros(())
        blank = (before == mean) & (batch["codes"] == 0)[:, None] & (codes == 0)[:, None]
        changed = {"image": torch.where(blank, mean, image), "codes": codes}
        if "ids" in batch:
            changed["ids"] = self.own.moved_ids(batch["ids"], batch["seed"])
        for number, augmentor in enumerate(self.views, start=1):
            view = batch[f"image_{number}"]
            changed[f"image_{number}"] = torch.where(view == mean, mean, augmentor(view, None, batch["seed"])[0])
        return {**batch, **changed}
