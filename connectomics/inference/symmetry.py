"""The symmetries of the cube: sets for test-time augmentation, and what they do to channels that mean a direction.

If a window is transformed, put through the network, and the result transformed back, a class's channel is what it was.
An affinity is not: with S for what the symmetry does to offsets, the affinity of offset o stands in the channel whose
offset is S o, for the pair p, p + o. If the network only has the opposite channel, -S o, that channel holds the pair
p, p - o: the value for p stands at p + o, and a slab as wide as the offset is missing at a face of the window.
Components of a vector or a tensor (shape descriptors) exchange places, and some change their sign.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connectomics.errors import InputError, require_known
from connectomics.geometry import Index, index, overlapping

if TYPE_CHECKING:
    import torch

_AXES = "zyx"


@dataclass(frozen=True)
class Symmetry:
    """One of the 48 symmetries of the cube: a signed permutation of the axes z, y, x.

    As text, ``"x-yz"``: the first axis of the result is the input's x, the second its y reversed, the third its z.

    Attributes:
        axes: for each axis of the result the axis of the input, 0 to 2.
        backwards: for each axis of the result whether it is reversed.
    """

    axes: Index = (0, 1, 2)
    backwards: tuple[bool, ...] = (False, False, False)

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2] or len(self.backwards) != 3:
            raise InputError(f"a symmetry is a permutation of the axes 0, 1, 2 with three signs, got {self!r}")

    @classmethod
    def parse(cls, text: str) -> Symmetry:
        """Return the symmetry that prints as ``text``; raises `InputError` for anything else."""
        parts = re.findall("-?[zyx]", str(text))
        letters = [part[-1] for part in parts]
        if "".join(parts) != str(text) or sorted(letters) != sorted(_AXES):
            raise InputError(f"a symmetry is written as z, y, x in any order with signs, as in 'x-yz'; got {text!r}")
        return cls(index(map(_AXES.index, letters)), tuple(part.startswith("-") for part in parts))

    def __str__(self) -> str:
        return "".join("-" * sign + _AXES[axis] for axis, sign in zip(self.axes, self.backwards, strict=True))

    @property
    def inverse(self) -> Symmetry:
        """The symmetry that undoes this one."""
        axes = index(map(self.axes.index, range(3)))
        return Symmetry(axes, tuple(self.backwards[axis] for axis in axes))

    def offset(self, offset: Index) -> Index:
        """Return what an offset (z, y, x) becomes."""
        signs = (-1 if back else 1 for back in self.backwards)
        return index(sign * offset[axis] for axis, sign in zip(self.axes, signs, strict=True))

    def before(self, shape: Index) -> Index:
        """Return the shape (z, y, x) that becomes ``shape``."""
        return index(shape[self.axes.index(axis)] for axis in range(3))

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Transform (..., d, h, w), contiguous; the identity returns its argument."""
        import torch

        if self == IDENTITY:
            return values
        before = values.ndim - 3
        permuted = values.permute(*range(before), *(before + axis for axis in self.axes))
        return torch.flip(permuted, [before + k for k in range(3) if self.backwards[k]]).contiguous()


IDENTITY = Symmetry()


def _flips(orders: Sequence[Index]) -> tuple[Symmetry, ...]:
    both = (False, True)
    return tuple(Symmetry(order, (z, y, x)) for order in orders for z in both for y in both for x in both)


SYMMETRY_SETS: dict[str, tuple[Symmetry, ...]] = {
    "none": (IDENTITY,),
    "flips": _flips([(0, 1, 2)]),  # 8
    "section": _flips([(0, 1, 2), (0, 2, 1)]),  # 16: right angles of the section plane (y, x), and all flips
    # 12: a network of planes sees those along each axis, in four orientations
    "planes": tuple(s for s in _flips([(0, 1, 2), (1, 0, 2), (2, 0, 1)]) if not s.backwards[0]),
    "all": _flips([(a, b, 3 - a - b) for a, b in itertools.permutations(range(3), 2)]),  # 48
}


def symmetries(what: str | Sequence[str]) -> tuple[Symmetry, ...]:
    """Return the symmetries of a named set (``none``, ``flips``: 8, ``section``: 16, ``planes``: 12, ``all``: 48), or
    of a list of them as text (``["zyx", "-zyx"]``).

    Raises `InputError` for an unknown name, an empty list, and a repeated symmetry.
    """
    if isinstance(what, str):
        require_known("set of symmetries", [what], SYMMETRY_SETS, "inference.tta")
        return SYMMETRY_SETS[what]
    chosen = tuple(Symmetry.parse(text) for text in what)
    if not chosen or len(set(chosen)) != len(chosen):
        raise InputError(f"a list of symmetries must hold at least one, and none twice; got {list(what)}")
    return chosen


def windows_seen(chosen: Sequence[Symmetry], window: Index) -> dict[Index, tuple[Symmetry, ...]]:
    """Return the window shapes (voxels, z y x) that become ``window`` in the symmetries, and for each these symmetries.

    With windows of (1, 256, 256) and the symmetries zyx, yzx and xyz a network sees all three kinds of planes.
    """
    found: dict[Index, tuple[Symmetry, ...]] = {}
    for symmetry in chosen:
        shape = symmetry.before(window)
        found[shape] = (*found.get(shape, ()), symmetry)
    return found


def require_unchanged(chosen: Sequence[Symmetry], sizes: Sequence[float], what: str) -> None:
    """Raise `InputError` if one of ``chosen`` changes ``sizes`` (z, y, x), which the message calls ``what``."""
    for symmetry in chosen:
        if any(sizes[axis] != size for axis, size in zip(symmetry.axes, sizes, strict=True)):
            raise InputError(
                f"test-time augmentation by {symmetry} exchanges axes along which {what} {tuple(sizes)} (z, y, x) "
                "differs; set inference.tta=section (y and x alike) or flips, or make the axes alike"
            )


# -- channels that mean a direction ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ChannelSource:
    """Where a channel is found in a result that was transformed back.

    Attributes:
        channel: its number there.
        complement: whether the value is one minus what stands there.
        shift: the value for voxel p stands at p + shift, z y x.
    """

    channel: int
    complement: bool = False
    shift: Index = (0, 0, 0)


@dataclass(frozen=True)
class ChannelMap:
    """Where all channels are found in one symmetry."""

    channels: tuple[ChannelSource, ...]

    @classmethod
    def of(cls, symmetry: Symmetry, about: Sequence[Mapping[str, Any]]) -> ChannelMap:
        """Return the map for channels described by ``about`` (`connectomics.config.heads.channel_attributes`; empty for
        a class). Raises `InputError` if the network has no channel for an offset that is needed."""
        return cls(tuple(_source(symmetry, number, about) for number in range(len(about))))

    @property
    def partial(self) -> bool:
        """Whether a slab of a channel is missing."""
        return any(any(source.shift) for source in self.channels)

    def apply(self, out: torch.Tensor) -> torch.Tensor:
        """Return (B, C, d, h, w) with every channel moved back; 0 where it is missing."""
        import torch

        if out.shape[1] != len(self.channels):
            raise InputError(f"the network must give {len(self.channels)} channels, got {out.shape[1]}")
        if all(source == ChannelSource(number) for number, source in enumerate(self.channels)):
            return out
        result = torch.zeros_like(out)
        for number, source in enumerate(self.channels):
            here, there = overlapping(out[:, 0].shape, (0, *source.shift))
            values = out[:, source.channel][there]
            result[:, number][here] = 1 - values if source.complement else values
        return result

    def seen(self, like: torch.Tensor) -> torch.Tensor:
        """Return (C, d, h, w) float32 for a result ``like`` this: 1 where a channel is there, 0 where it is missing."""
        import torch

        result = torch.zeros(like.shape[1:], dtype=torch.float32, device=like.device)
        for number, source in enumerate(self.channels):
            result[number][overlapping(like.shape[2:], source.shift)[0]] = 1
        return result


def channel_maps(chosen: Sequence[Symmetry], about: Sequence[Mapping[str, Any]]) -> dict[Symmetry, ChannelMap]:
    """Return the channel map of each symmetry; {} if no channel means a direction.

    Raises `InputError` as `ChannelMap.of` does, and if a channel would have voxels that no symmetry covers.
    """
    if not any(about):
        return {}
    maps = {symmetry: ChannelMap.of(symmetry, about) for symmetry in chosen}
    for number, what in enumerate(about):
        if all(any(found.channels[number].shift) for found in maps.values()):
            raise InputError(
                f"inference.tta: none of {', '.join(map(str, chosen))} gives the affinity of {what['class_name']} at "
                f"offset {list(what['offset'])} up to the faces of a window; add zyx, the unchanged window"
            )
    return maps


def _source(symmetry: Symmetry, number: int, about: Sequence[Mapping[str, Any]]) -> ChannelSource:
    mine = about[number]
    kind = mine.get("artefact")
    alike = {n: a for n, a in enumerate(about) if all(a.get(k) == mine.get(k) for k in ("artefact", "class_name"))}
    if kind == "affinity":
        return _source_of_offset(symmetry, mine, alike)
    if kind == "lsd":
        return _source_of_component(symmetry, str(mine["component"]), {a["component"]: n for n, a in alike.items()})
    return ChannelSource(number)


def _source_of_offset(
    symmetry: Symmetry, mine: Mapping[str, Any], alike: Mapping[int, Mapping[str, Any]]
) -> ChannelSource:
    offset = index(mine["offset"])
    wanted = symmetry.offset(offset)
    offsets = {tuple(map(int, a["offset"])): n for n, a in alike.items()}
    if wanted in offsets:
        return ChannelSource(offsets[wanted])
    opposite = tuple(-o for o in wanted)
    if opposite in offsets:
        return ChannelSource(offsets[opposite], shift=offset)
    raise InputError(
        f"inference.tta: seen by {symmetry}, the affinity of {mine['class_name']} at offset {list(offset)} is the one "
        f"at {list(wanted)}, but the network does not give it, nor its opposite; set inference.tta=none, choose "
        "symmetries that keep the offsets, or train with equal offsets along the exchanged axes"
    )


def _source_of_component(symmetry: Symmetry, name: str, numbers: Mapping[str, int]) -> ChannelSource:
    """Components are named by their axes, as in "offset z", "variance y", "correlation zy", "size"."""
    what, _, letters = name.partition(" ")
    places = [symmetry.axes.index(_AXES.index(letter)) for letter in letters]
    there = "".join(_AXES[place] for place in sorted(places))  # a correlation is written in the order of the axes
    against = sum(symmetry.backwards[place] for place in places) % 2 == 1
    return ChannelSource(numbers[f"{what} {there}" if letters else what], complement=against and what != "variance")
