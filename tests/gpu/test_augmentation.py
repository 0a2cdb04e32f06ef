"""Intensity augmentation on a GPU is that on the CPU."""

from __future__ import annotations

import pytest
import torch

from connectomics.data.augmentation import KINDS, IntensityAugmentor

#: their voxels come from the device's own random generator
FROM_THE_DEVICE = ("noise", "poisson", "cutout")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_kind_is_the_same_on_every_device(name: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = 0.25 + 0.5 * torch.rand((3, 1, 24, 32, 40), generator=generator)
    codes = torch.randint(1, 9, (3, 24, 32, 40), generator=generator).to(torch.uint8)
    seeds = torch.arange(11, 14)
    made = IntensityAugmentor.from_config({name: {"prob": 1}}, (8.0, 8.0, 8.0))
    assert made is not None
    expected, moved = made(image, codes, seeds)
    found, found_codes = made(image.to(device), codes.to(device), seeds)
    assert found.device.type == device
    assert moved is not None
    assert found_codes is not None
    assert torch.equal(found_codes.cpu(), moved)
    if name not in FROM_THE_DEVICE:
        assert torch.allclose(found.cpu(), expected, atol=2e-3)
    assert torch.equal(made(image.to(device), codes.to(device), seeds)[0], found), "not the same a second time"
