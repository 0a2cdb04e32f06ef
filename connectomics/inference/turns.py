"""Channels that mean a direction, seen in a symmetry of the cube.

When a window is turned, put through the network, and the result turned back, a class's channel is what it was. The
affinity of the offset o is that of another offset then: with S for what the symmetry does to offsets, the channel whose
offset is S o speaks of the pair p, p + o. Where the network has no such channel but the opposite one, -S o, that speaks
of p, p - o: what is asked of p stands at p + o then, and a slab as wide as the offset is missing at a face of the
window. Shape descriptors that are components of a vector or a tensor exchange places, and some change their sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connectomics.errors import InputError
from connectomics.geometry import Index
from connectomics.inference.symmetry import Symmetry

if TYPE_CHECKING:
    import torch

_AXES = "zyx"


@dataclass(frozen=True)
class Turn:
    """Where a channel is found in a result that was turned back.

    Attributes:
        channel: its number there.
        complement: as one minus it.
        shift: what is asked of voxel p stands at p + shift, z y x.
    """

    channel: int
    complement: bool = False
    shift: Index = (0, 0, 0)


@dataclass(frozen=True)
class Turns:
    """All channels in one symmetry."""

    channels: tuple[Turn, ...]

    @classmethod
    def of(cls, symmetry: Symmetry, about: Sequence[Mapping[str, Any]]) -> Turns:
        """For channels of which ``about`` says what they are, as `connectomics.config.heads.channel_attributes` does;
        nothing for a class. Raises `InputError` where the network has no channel for an offset that is asked for."""
        return cls(tuple(_turn(symmetry, number, about) for number in range(len(about))))

    @property
    def partial(self) -> bool:
        """Whether a slab of a channel is missing."""
        return any(any(turn.shift) for turn in self.channels)

    def apply(self, out: torch.Tensor) -> torch.Tensor:
        """(B, C, d, h, w) with every channel in its place; 0 where it is missing."""
        import torch

        if out.shape[1] != len(self.channels):
            raise InputError(f"the network must give {len(self.channels)} channels, found {out.shape[1]}")
        if all(turn == Turn(number) for number, turn in enumerate(self.channels)):
            return out
        result = torch.zeros_like(out)
        for number, turn in enumerate(self.channels):
            here, there = _parts(out.shape[2:], turn.shift)
            values = out[:, turn.channel][there]
            result[:, number][here] = 1 - values if turn.complement else values
        return result

    def seen(self, like: torch.Tensor) -> torch.Tensor:
        """1 where a channel is there, 0 where it is missing: (C, d, h, w) float32, for a result ``like`` this."""
        import torch

        result = torch.zeros(like.shape[1:], dtype=torch.float32, device=like.device)
        for number, turn in enumerate(self.channels):
            result[number][_parts(like.shape[2:], turn.shift)[0][1:]] = 1
        return result


def _parts(shape: Sequence[int], shift: Index) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The voxels p of (B, d, h, w) whose p + shift is inside too, and those p + shift."""
    here = (slice(max(0, -s), max(0, n - max(0, s))) for n, s in zip(shape, shift, strict=True))
    there = (slice(max(0, s), max(0, n - max(0, -s))) for n, s in zip(shape, shift, strict=True))
    return (slice(None), *here), (slice(None), *there)


def _turn(symmetry: Symmetry, number: int, about: Sequence[Mapping[str, Any]]) -> Turn:
    mine = about[number]
    kind = mine.get("artefact")
    alike = {n: a for n, a in enumerate(about) if all(a.get(k) == mine.get(k) for k in ("artefact", "class_name"))}
    if kind == "affinity":
        return _turned_offset(symmetry, mine, alike)
    if kind == "lsd":
        return _turned_component(symmetry, str(mine["component"]), {a["component"]: n for n, a in alike.items()})
    return Turn(number)


def _turned_offset(symmetry: Symmetry, mine: Mapping[str, Any], alike: Mapping[int, Mapping[str, Any]]) -> Turn:
    z, y, x = (int(o) for o in mine["offset"])
    wanted = symmetry.turn((z, y, x))
    offsets = {tuple(int(o) for o in a["offset"]): n for n, a in alike.items()}
    if wanted in offsets:
        return Turn(offsets[wanted])
    opposite = tuple(-o for o in wanted)
    if opposite in offsets:
        return Turn(offsets[opposite], shift=(z, y, x))
    raise InputError(
        f"inference.tta: seen by {symmetry}, the affinity of {mine['class_name']} at offset {[z, y, x]} is the one at "
        f"{list(wanted)}, which the network does not give, nor its opposite; take inference.tta=none, or symmetries "
        "that keep the offsets, or train with offsets alike along the axes that are exchanged"
    )


def _turned_component(symmetry: Symmetry, name: str, numbers: Mapping[str, int]) -> Turn:
    """Of "offset z" along which axis of the turned window it is, and whether against it; of "correlation zy" both."""
    what, _, letters = name.partition(" ")
    places = [symmetry.axes.index(_AXES.index(letter)) for letter in letters]
    turned = "".join(_AXES[place] for place in sorted(places))  # a correlation is written in the order of the axes
    against = sum(symmetry.backwards[place] for place in places) % 2 == 1
    return Turn(numbers[f"{what} {turned}" if letters else what], complement=against and what != "variance")
