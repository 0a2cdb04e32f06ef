"""Made-up patches for requests of a sampler; in a module that imports little, because loader workers import it."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from connectomics.data.regions import Regions
from connectomics.data.sampling import PatchRequest
from connectomics.geometry import VoxelGrid
from tests.lightning.made_up_patches import Patches

REGIONS = Regions.of([VoxelGrid((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (40, 4, 4))], (4, 4, 4))


class Requested(Dataset[dict[str, torch.Tensor]]):
    """Patches with noise from the request's seed."""

    def __init__(self) -> None:
        self._patches = Patches(50)

    def __getitem__(self, request: PatchRequest) -> dict[str, torch.Tensor]:
        _, epoch, position, _ = request.seed
        place = 0 if request.point is None else int(request.point[0])  # with hard examples, patches differ by region
        sample = dict(self._patches[(5 * epoch + position + place) % 50])
        noise = torch.randn(sample["image"].shape, generator=torch.Generator().manual_seed(1000 * epoch + position))
        return {
            **sample,
            "image": sample["image"] + 0.1 * noise,
            "place": torch.tensor([epoch, position]),
        } | self._region(request)

    @staticmethod
    def _region(request: PatchRequest) -> dict[str, torch.Tensor]:
        return {} if request.point is None else {"region": torch.tensor(REGIONS.number(request.index, request.point))}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
