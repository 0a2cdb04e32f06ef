"""Test-time augmentation of channels that mean a direction: every symmetry says the same of the same pair of voxels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from connectomics.config.heads import Head
from connectomics.errors import InputError
from connectomics.geometry import Index, VoxelGrid
from connectomics.inference.augmented import Averaged
from connectomics.inference.sliding import predict_blocks
from connectomics.inference.symmetry import IDENTITY, SYMMETRY_SETS, Symmetry
from connectomics.models.targets import affinity, shape_descriptors

UNIT = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
LONG = (*UNIT, (0, 3, 0), (0, 0, 3), (-3, 0, 0))
DIAGONAL = ((0, 1, 2), (0, 1, -2), (0, 2, 1), (0, 2, -1))
GUESS = 0.7  # of a network where it cannot know


def about(offsets: Sequence[Index]) -> list[dict[str, Any]]:
    """A class, a boundary, and affinities."""
    head = Head("affinities", "mito", (8.0,) * 3, tuple(offsets))
    rest = [{"class_name": "mito", **what} for what in head.attributes().values()]
    return [{}, {"class_name": "mito", "artefact": "boundary", "scale_nm": 8.0}, *rest]


def seeing(offsets: Sequence[Index]) -> Callable[[Tensor], Tensor]:
    """A network that sees objects in the raw (by their grey value), and tells exactly what lies inside the window."""

    def network(image: Tensor) -> Tensor:
        ids = (image[:, 0] * 10).round().int()
        parts = [image[:, 0], (ids > 2).float()]
        for offset in offsets:
            target, known = affinity(ids, offset)
            parts.append(torch.where(known, target, torch.tensor(GUESS)))
        return torch.stack(parts, 1)

    return network


def grey_objects(shape: Index, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 4, [-(-n // 3) for n in shape], generator=generator)
    for axis in range(3):
        blocks = blocks.repeat_interleave(3, axis)
    return (blocks[: shape[0], : shape[1], : shape[2]] / 10)[None, None]


@pytest.mark.parametrize(
    ("offsets", "chosen"),
    [
        (UNIT, SYMMETRY_SETS["flips"]),
        (LONG, SYMMETRY_SETS["flips"]),
        (LONG, SYMMETRY_SETS["all"]),
        (DIAGONAL, SYMMETRY_SETS["section"]),
        (UNIT, [IDENTITY, Symmetry.parse("xyz")]),
        (UNIT, [Symmetry.parse("x-yz"), IDENTITY]),
    ],
)
@pytest.mark.parametrize("variance", [False, True])
def test_a_network_that_is_right_in_every_symmetry_says_the_same(
    offsets: Sequence[Index], chosen: Sequence[Symmetry], variance: bool
) -> None:
    """Also at the faces: what a turned pass does not know there, and puts a guess for, has no part in the mean."""
    image = grey_objects((9, 9, 9))
    network = seeing(offsets)
    found = Averaged([network], chosen, variance=variance, about=about(offsets))(image)
    expected = network(image)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected)
    if variance:
        assert found[:, expected.shape[1] :].abs().max() < 1e-9


def test_without_saying_what_channels_are_it_would_be_wrong() -> None:
    image = grey_objects((9, 9, 9))
    network = seeing(UNIT)
    found = Averaged([network], SYMMETRY_SETS["flips"])(image)
    assert (found - network(image)).abs().max() > 0.4


def test_members_and_batches_are_averaged_as_before() -> None:
    image = torch.cat([grey_objects((6, 9, 9), seed) for seed in range(2)])
    network = seeing(UNIT)
    members = [network, lambda image: network(image) / 2]
    found = Averaged(members, SYMMETRY_SETS["section"], about=about(UNIT))(image)
    torch.testing.assert_close(found, 0.75 * network(image))


def test_over_a_volume_it_is_the_plain_prediction_wherever_that_knows() -> None:
    grid = VoxelGrid((8.0,) * 3, (0.0,) * 3, (20, 20, 20))
    volume = np.pad(grey_objects(grid.shape)[0, 0].numpy().astype(np.float32), 8)

    def read(part: VoxelGrid) -> np.ndarray:
        begin = np.rint(grid.to_index(part.translation)).astype(int) + 8
        return volume[tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))]

    network = seeing(LONG)

    def predicted(network: Callable[..., Tensor]) -> np.ndarray:
        blocks = predict_blocks(read, grid, network, channels=8, window=12, overlap=0.5, block_size=20, context=4)
        return next(iter(blocks))[1]

    plain = predicted(network)
    found = predicted(Averaged([network], SYMMETRY_SETS["all"], about=about(LONG)))
    np.testing.assert_allclose(found, plain, atol=1e-5)
    # blended windows are right where at least the heavy ones know: far better than guesses
    ids = torch.from_numpy(volume * 10).round().int()[None]
    for channel, offset in enumerate(LONG):
        truth = affinity(ids, offset)[0][0, 8:28, 8:28, 8:28].numpy()
        np.testing.assert_array_equal(found[2 + channel] > 0.5, truth > 0)


def test_descriptors_turn_as_vectors_and_tensors_do() -> None:
    head = Head("lsd", "mito", (8.0,) * 3, scale_nm=24.0)

    def network(image: Tensor) -> Tensor:
        return shape_descriptors((image[:, 0] * 10).round().int(), (8.0,) * 3, 24.0)[0]

    image = grey_objects((9, 9, 9))
    what = [{"class_name": "mito", **a} for a in head.attributes().values()]
    ids = (image * 10).round().expand(1, 10, 9, 9, 9) > 0
    for symmetry in SYMMETRY_SETS["all"]:
        found = Averaged([network], [symmetry], about=what)(image)
        torch.testing.assert_close(found[ids], network(image)[ids], atol=1e-5, rtol=0)


class TestWhatCannotBe:
    def test_an_offset_that_the_network_does_not_have_is_one_line(self) -> None:
        flat = ((-1, 0, 0), (0, -3, 0), (0, 0, -3))
        Averaged([seeing(flat)], SYMMETRY_SETS["section"], about=about(flat))
        with pytest.raises(InputError, match=r"at offset \[-1, 0, 0\] is the one at .*does not give") as error:
            Averaged([seeing(flat)], SYMMETRY_SETS["all"], about=about(flat))
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=r"at offset \[0, 1, 2\]"):
            Averaged([seeing(DIAGONAL[:1])], SYMMETRY_SETS["flips"], about=about(DIAGONAL[:1]))

    def test_symmetries_that_all_leave_out_a_slab_are_one_line(self) -> None:
        with pytest.raises(InputError, match="add zyx"):
            Averaged([seeing(UNIT)], [Symmetry.parse("-zyx")], about=about(UNIT))

    def test_a_network_with_another_number_of_channels_is_one_line(self) -> None:
        averaged = Averaged([lambda x: x], SYMMETRY_SETS["flips"], about=about(UNIT))
        with pytest.raises(InputError, match="must give 5 channels, got 1"):
            averaged(grey_objects((6, 6, 6)))
