"""Values of ``data.intensity_range``: the rule, and the value for one data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from connectomics.errors import ConfigError

KEY = "data.intensity_range"
WORDS = ("auto", "table")


def check_intensity_range(spec: Any) -> Any:
    """Return ``spec`` if it is null, ``auto``, ``table``, ``[low, high]``, or one of these by data set, else raise."""
    for name, one in spec.items() if isinstance(spec, Mapping) else ((None, spec),):
        if one is None or (isinstance(one, str) and one in WORDS) or pair_of(one) is not None:
            continue
        where = KEY if name is None else f"{KEY} of {name}"
        raise ConfigError(f"{where} must be auto, table, or [low, high] with two different numbers, got {one!r}")
    return spec


def pair_of(spec: Any) -> tuple[float, float] | None:
    """Return ``[low, high]`` as two numbers, None for anything else."""
    if not isinstance(spec, Sequence) or isinstance(spec, str) or len(spec) != 2:
        return None
    numbers = [v for v in spec if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    return (float(numbers[0]), float(numbers[1])) if len(numbers) == 2 and numbers[0] != numbers[1] else None


def of_dataset(spec: Any, dataset: str) -> Any:
    """Return the value for one data set."""
    return spec.get(dataset) if isinstance(spec, Mapping) else spec
