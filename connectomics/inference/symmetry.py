"""The symmetries of the cube, and the sets of them that test-time augmentation goes through."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectomics.errors import InputError, unknown_name
from connectomics.geometry import Index

if TYPE_CHECKING:
    import torch

_AXES = "zyx"
_TEXT = re.compile("-?[zyx]" * 3)


@dataclass(frozen=True)
class Symmetry:
    """One of the 48 symmetries of the cube: a signed permutation of the axes z, y, x.

    As text, ``"x-yz"``: the first axis of the result is the input's x, the second its y reversed, the third its z.

    Attributes:
        axes: for each axis of the result the axis of the input, 0 to 2.
        backwards: for each axis of the result whether it is reversed.
    """

    axes: Index = (0, 1, 2)
    backwards: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2] or len(self.backwards) != 3:
            raise InputError(f"a symmetry is a permutation of the axes 0, 1, 2 with three signs, found {self!r}")

    @classmethod
    def parse(cls, text: str) -> Symmetry:
        """The symmetry that prints as ``text``; raises `InputError` for anything else."""
        letters = str(text).replace("-", "")
        if not _TEXT.fullmatch(str(text)) or sorted(letters) != sorted(_AXES):
            raise InputError(f"a symmetry is written as z, y, x in any order with signs, as in 'x-yz'; found {text!r}")
        signs = [part.startswith("-") for part in re.findall("-?[zyx]", text)]
        z, y, x = (_AXES.index(letter) for letter in letters)
        return cls((z, y, x), (signs[0], signs[1], signs[2]))

    def __str__(self) -> str:
        return "".join("-" * sign + _AXES[axis] for axis, sign in zip(self.axes, self.backwards, strict=True))

    @property
    def inverse(self) -> Symmetry:
        """The symmetry that undoes this one."""
        z, y, x = (self.axes.index(axis) for axis in range(3))
        return Symmetry((z, y, x), (self.backwards[z], self.backwards[y], self.backwards[x]))

    def turn(self, offset: Index) -> Index:
        """What an offset (z, y, x) becomes."""
        z, y, x = (
            -offset[axis] if back else offset[axis] for axis, back in zip(self.axes, self.backwards, strict=True)
        )
        return z, y, x

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """(..., d, h, w) turned, contiguous; the identity gives back what it got."""
        import torch

        if self == IDENTITY:
            return values
        before = values.ndim - 3
        turned = values.permute(*range(before), *(before + axis for axis in self.axes))
        return torch.flip(turned, [before + k for k in range(3) if self.backwards[k]]).contiguous()


IDENTITY = Symmetry()


def _flips(orders: Sequence[Index]) -> tuple[Symmetry, ...]:
    both = (False, True)
    return tuple(Symmetry(order, (z, y, x)) for order in orders for z in both for y in both for x in both)


SYMMETRY_SETS: dict[str, tuple[Symmetry, ...]] = {
    "none": (IDENTITY,),
    "flips": _flips([(0, 1, 2)]),  # 8
    "section": _flips([(0, 1, 2), (0, 2, 1)]),  # 16: right angles of the section plane (y, x), and all flips
    "all": _flips([(a, b, 3 - a - b) for a, b in itertools.permutations(range(3), 2)]),  # 48
}


def symmetries(what: str | Sequence[str]) -> tuple[Symmetry, ...]:
    """The symmetries of a named set (``none``, ``flips``: 8, ``section``: 16, ``all``: 48), or of a list of them as
    text (``["zyx", "-zyx"]``). Raises `InputError` for what is neither, is empty, or names one twice."""
    if isinstance(what, str):
        if what not in SYMMETRY_SETS:
            raise unknown_name("set of symmetries", what, SYMMETRY_SETS, "inference.tta")
        return SYMMETRY_SETS[what]
    chosen = tuple(Symmetry.parse(text) for text in what)
    if not chosen or len(set(chosen)) != len(chosen):
        raise InputError(f"a list of symmetries must hold at least one, and none twice; found {list(what)}")
    return chosen


def require_unchanged(chosen: Sequence[Symmetry], sizes: Sequence[float], what: str) -> None:
    """Raise `InputError` if one of ``chosen`` changes ``sizes`` (z, y, x), which ``what`` names in the message."""
    for symmetry in chosen:
        if any(sizes[axis] != size for axis, size in zip(symmetry.axes, sizes, strict=True)):
            raise InputError(
                f"test-time augmentation by {symmetry} exchanges axes along which {what} {tuple(sizes)} (z, y, x) "
                "differs; take inference.tta=section (y and x alike) or flips, or make them alike"
            )
