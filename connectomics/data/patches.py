"""A patch as it travels from a loader worker to the device, and batches of patches.

Labels travel packed: one small code per voxel, and a table of what the codes mean. That takes one or two bytes per
voxel for any number of classes. The device unpacks them class by class where the loss needs them
(`connectomics.models.batch_labels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.normalization import Normalization


@dataclass(frozen=True)
class PackedPatch:
    """One training patch."""

    #: float32 (1, D, H, W) on the unit scale, 0 to 1: the main input, then those of ``data.inputs``
    images: tuple[NDArray[np.float32], ...]
    #: uint8, uint16 or uint32 (D, H, W), rows of ``states``; state 0 means that nothing is known
    codes: NDArray[np.unsignedinteger]
    states: LabelStates  # what the codes mean
    grid: VoxelGrid  # where the patch was before augmentation, nm
    crop: int  # number of the crop in its data set
    seed: int  # random seed for augmentation on the device
    drawn_by: str = ""  # what the sampler drew it for
    normalization: Normalization = Normalization()  # noqa: RUF009 (frozen); images are centered after augmentation
    augmentation: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # the spatial augmentation, for display
    instances: tuple[str, ...] = ()  # classes with object IDs
    #: int32 (I, D, H, W), for each of ``instances`` the object at a voxel: 1 to 2^24, 0 where the class is known to be
    #: absent, -1 where the class or the object is unknown; only valid within one class and one patch
    ids: NDArray[np.int32] | None = None
    region: int | None = None  # number of the region that holds the patch's center, see `connectomics.data.regions`

    def dense(self, classes: Sequence[str] | None = None) -> dict[str, Any]:
        """Return ``image`` (1, D, H, W) float32 on the unit scale, ``label`` (C, D, H, W) float32 and ``known``
        bool in the order of ``classes``, further inputs as ``image_1``, ``image_2``..., and ``ids`` if any."""
        label, known = self.states.dense(self.codes, classes)
        objects = {} if self.ids is None else {"ids": self.ids}
        return {**_named(self.images), "label": label, "known": known, **objects}


def collate(patches: Sequence[PackedPatch]) -> dict[str, torch.Tensor]:
    """Return a batch of patches.

    Returns:
        ``image`` (B, 1, D, H, W) float32 on the unit scale, and ``image_1``... for further inputs; ``mean`` and ``std``
        (B,) float32, used by `centered`; ``codes`` (B, D, H, W) uint8, int16 or int32; ``present`` and
        ``known_states`` (B, C, K) bool: whether class c is present, and known, in voxels of code k of sample b; with
        soft labels ``fraction`` (B, C, K) uint8, in sixteenths;
        ``seed`` and ``crop`` (B,) int64; ``ids`` (B, I, D, H, W) int32 and ``region`` (B,) int64 if
        patches have them.
    """
    if not patches:
        raise InputError("a batch needs at least one patch")
    named = [_named(patch.images) for patch in patches]
    batch = {name: torch.from_numpy(np.stack([images[name] for images in named])) for name in named[0]}
    n_states = max(len(p.states) for p in patches)
    # torch indexes signed integers and uint8 only
    kind = np.uint8 if n_states <= 256 else np.int16 if n_states <= 2**15 else np.int32
    codes = np.empty((len(patches), *patches[0].codes.shape), kind)
    tables = np.zeros((2, len(patches), len(patches[0].states.classes), n_states), bool)
    for number, patch in enumerate(patches):
        codes[number] = patch.codes
        tables[:, number, :, : len(patch.states)] = patch.states.tables()
    batch["codes"] = torch.from_numpy(codes)
    batch["present"], batch["known_states"] = torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
    soft = [p.states.fraction_table() for p in patches]
    if soft[0] is not None:
        fraction = np.zeros(tables.shape[1:], np.uint8)
        for number, table in enumerate(soft):
            assert table is not None, "patches of one run are read alike"
            fraction[number, :, : table.shape[1]] = table
        batch["fraction"] = torch.from_numpy(fraction)
    ids = [p.ids for p in patches if p.ids is not None]
    if ids:
        batch["ids"] = torch.from_numpy(np.stack(ids))
    regions = [p.region for p in patches if p.region is not None]
    if regions:
        batch["region"] = torch.tensor(regions, dtype=torch.int64)
    for name in ("mean", "std"):
        batch[name] = torch.tensor([getattr(p.normalization, name) for p in patches], dtype=torch.float32)
    for name in ("seed", "crop"):
        batch[name] = torch.tensor([getattr(p, name) for p in patches], dtype=torch.int64)
    return batch


def centered(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch of `collate` with centered images (see `Normalization.centered`) and without ``mean`` and ``std``.

    A batch that has no ``mean`` and ``std`` is centered already.
    """
    changed = {name: value for name, value in batch.items() if name not in ("mean", "std")}
    if {"mean", "std"} <= batch.keys():
        for name in changed:
            if name == "image" or name.startswith("image_"):
                mean, std = (batch[key].to(batch[name].device)[:, None, None, None, None] for key in ("mean", "std"))
                changed[name] = (batch[name] - mean) / std
    return changed


def input_names(n_inputs: int) -> list[str]:
    """Return the names of further inputs in samples and batches: ``image_1``, ``image_2``..."""
    return [f"image_{n}" for n in range(1, n_inputs + 1)]


def _named(images: Sequence[NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return dict(zip(("image", *input_names(len(images) - 1)), images, strict=True))
