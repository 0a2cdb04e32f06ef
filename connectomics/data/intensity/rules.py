"""What an argument of an augmentation may be: the type of each field of a kind carries the rule that checks it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, get_type_hints

import numpy as np

from connectomics.errors import InputError

Range = tuple[float, float]
AxisRanges = tuple[Range, Range, Range]
Shape3 = tuple[int, int, int]
Nanometres = tuple[float, float, float]
Drawn = dict[str, Any]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Limits:
    """Numbers from ``least`` to ``most``; ``whole``: integers only."""

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        if math.isinf(self.least) and math.isinf(self.most):
            return kind
        if math.isinf(self.most):
            return f"{kind} of at least {self.least:g}"
        return f"{kind} from {self.least:g} to {self.most:g}"

    def read(self, value: Any) -> float | None:
        number = _number(value)
        if number is None or not self.least <= number <= self.most or (self.whole and number != int(number)):
            return None
        return int(number) if self.whole else number

    def read_range(self, value: Any) -> Range | None:
        """``n`` as ``(n, n)``, ``[low, high]`` as it is; None where it is neither."""
        pair = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
        ends = [self.read(v) for v in pair]
        if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
            return None
        return ends[0], ends[1]


@dataclass(frozen=True)
class OneNumber:
    """A number."""

    limits: Limits

    def __call__(self, name: str, value: Any) -> float:
        number = self.limits.read(value)
        if number is None:
            raise InputError(f"{name} must be one of the {self.limits}, found {value!r}")
        return number


@dataclass(frozen=True)
class OneRange:
    """A range ``[low, high]``, both ends included, or one number for a fixed value."""

    limits: Limits

    def __call__(self, name: str, value: Any) -> Range:
        found = self.limits.read_range(value)
        if found is None:
            raise InputError(f"{name} must be [low, high] or one value, {self.limits}, low first; found {value!r}")
        return found


@dataclass(frozen=True)
class RangeByAxis:
    """A range for all three axes, or ``[range, range, range]`` for z, y, x."""

    limits: Limits

    def __call__(self, name: str, value: Any) -> AxisRanges:
        same = self.limits.read_range(value)
        if same is not None:
            return same, same, same
        several = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
        found = [self.limits.read_range(v) for v in several]
        if len(found) != 3 or found[0] is None or found[1] is None or found[2] is None:
            raise InputError(
                f"{name} must be [low, high] for all axes or three of them for z, y, x, {self.limits}, low first; "
                f"found {value!r}"
            )
        return found[0], found[1], found[2]


@dataclass(frozen=True)
class Choices:
    """One or several words out of ``options``; of several, each patch draws one."""

    options: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> tuple[str, ...]:
        words = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
        if not words or any(w not in self.options for w in words):
            raise InputError(f"{name} must be one or several of {', '.join(self.options)}; found {value!r}")
        return tuple(words)


#: types of fields: what the value is once read, and the rule that reads it
Number = Annotated[float, OneNumber(Limits())]
Share = Annotated[float, OneNumber(Limits(0.0, 1.0))]
AnyRange = Annotated[Range, OneRange(Limits())]
Amount = Annotated[Range, OneRange(Limits(0.0))]
Positive = Annotated[Range, OneRange(Limits(1e-3))]
AtLeastOne = Annotated[Range, OneRange(Limits(1.0))]
Count = Annotated[tuple[int, int], OneRange(Limits(1, whole=True))]
AmountByAxis = Annotated[AxisRanges, RangeByAxis(Limits(0.0))]
FactorByAxis = Annotated[AxisRanges, RangeByAxis(Limits(1.0))]
CountByAxis = Annotated[AxisRanges, RangeByAxis(Limits(1, whole=True))]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of augmentation with its ranges; subclasses are in `kinds`.

    ``prob`` is the share of patches it is applied to. A kind draws the few numbers that say what happens to one patch
    (`draw`); what happens then is a function of the patch and those numbers alone.

    Raises:
        InputError: an argument is not what its field takes; the message begins with the field's name.
    """

    name: ClassVar[str]
    moves: ClassVar[bool] = False  # moves the image, so that labels must move with it

    prob: Share = 0.1

    def __post_init__(self) -> None:
        types = get_type_hints(type(self), include_extras=True)
        for argument in fields(self):
            (rule,) = types[argument.name].__metadata__
            object.__setattr__(self, argument.name, rule(argument.name, getattr(self, argument.name)))

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        """Numbers for one patch of ``shape`` voxels (z, y, x) of ``voxel_size`` nm: arguments of `apply`."""
        raise NotImplementedError


def pick(rng: np.random.Generator, limits: Range) -> float:
    """A number of the range, evenly drawn."""
    return float(rng.uniform(*limits))


def pick_whole(rng: np.random.Generator, limits: Range) -> int:
    """A whole number of the range, both ends included."""
    return int(rng.integers(int(limits[0]), int(limits[1]) + 1))


def pick_word(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """One of the words."""
    return words[int(rng.integers(len(words)))]


def pick_seed(rng: np.random.Generator) -> int:
    """A seed for the device's generator (63 bits)."""
    return int(rng.integers(1 << 63))
