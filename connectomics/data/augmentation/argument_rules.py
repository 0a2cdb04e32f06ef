"""Annotations that say what an argument of an augmentation may be, for `connectomics.config.values.read`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

Range = tuple[float, float]
AxisRanges = tuple[Range, Range, Range]

Number = Annotated[float, Field(strict=True)]
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]


def is_sequence(value: Any) -> bool:
    """Return whether a value is a list or a tuple, as YAML or Python gives it."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def several(value: Any) -> tuple[Any, ...]:
    """Return a list as a tuple, and one value as a tuple of that value."""
    return tuple(value) if is_sequence(value) else (value,)


def _pair(value: Any, least: float, whole: bool) -> Range | None:
    """Return a number as (n, n), a list [low, high] as a tuple, and None for everything else."""
    ends = tuple(value) if is_sequence(value) else (value, value)
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int | float | np.number) or not math.isfinite(end):
            return None
        if end < least or (whole and end != int(end)):
            return None
    return ends if len(ends) == 2 and ends[0] <= ends[1] else None


def _kind_of_number(least: float, whole: bool) -> str:
    return ("whole numbers" if whole else "numbers") + ("" if math.isinf(least) else f" of at least {least:g}")


def number_range(least: float = -math.inf, *, whole: bool = False, single: bool = True) -> BeforeValidator:
    """Annotation for a range ``[low, high]``, both included, or with ``single`` one number for a fixed value."""
    wanted = "one number or [low, high]" if single else "[low, high]"

    def check(value: Any) -> Range:
        found = _pair(value, least, whole) if single or is_sequence(value) else None
        if found is None:
            raise ValueError(f"must be {wanted} with low <= high, {_kind_of_number(least, whole)}")
        return found

    return BeforeValidator(check)


def range_by_axis(least: float, *, whole: bool = False) -> BeforeValidator:
    """Annotation for a range for all three axes, or ``[range, range, range]`` for z, y, x."""

    def check(value: Any) -> AxisRanges:
        same = _pair(value, least, whole)
        found = [same] * 3 if same is not None else [_pair(v, least, whole) for v in several(value)]
        if len(found) != 3 or found[0] is None or found[1] is None or found[2] is None:
            kind = _kind_of_number(least, whole)
            raise ValueError(f"must be [low, high] for all axes or for each of z, y, x with low <= high, {kind}")
        return found[0], found[1], found[2]

    return BeforeValidator(check)


def words(*options: str) -> BeforeValidator:
    """Annotation for one or more words out of ``options``; each patch draws one of them."""

    def check(value: Any) -> tuple[str, ...]:
        found = several(value)
        if not found or any(word not in options for word in found):
            raise ValueError(f"must be one or more of {', '.join(options)}")
        return found

    return BeforeValidator(check)
