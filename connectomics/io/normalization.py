"""`Normalization`: how raw values of one data set become the network's input, in training and prediction alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.config.values import plain, read
from connectomics.errors import InputError, MetadataError

_CLOSE = 0.02


@dataclass(frozen=True)
class Normalization:
    """Input = (clip((v - low) / (high - low), 0, 1) - mean) / std, so that tissue has mean 0.

    Attributes:
        low, high: raw values mapped to 0 and 1 on the unit scale. ``low`` above ``high`` inverts the contrast.
        mean, std: mean and standard deviation of tissue on the unit scale.

    Raises:
        InputError: ``low`` and ``high`` are equal, ``std`` is not positive, or a value is not finite.
    """

    low: float = 0.0
    high: float = 255.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "high", "mean", "std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise InputError(f"normalization: {name} must be a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.low == self.high:
            raise InputError(
                f"normalization: expected two different raw values for 0 and 1, got {self.low:g} for both; "
                "set data.intensity_range=[low,high]"
            )
        if self.std <= 0:
            raise InputError(f"normalization: std must be above 0, got {self.std:g}")

    def is_close(self, other: Normalization) -> bool:
        """Return whether both give the same input to within two percent of the unit scale."""
        gray = self.high - self.low
        differences = ((other.low - self.low) / gray, (other.high - self.high) / gray, other.mean - self.mean)
        return all(abs(d) < _CLOSE for d in (*differences, other.std - self.std))

    @property
    def range(self) -> tuple[float, float]:
        return self.low, self.high

    def unit(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return raw values on the unit scale, 0 to 1, in the memory of ``values`` (float32)."""
        values -= np.float32(self.low)
        values /= np.float32(self.high - self.low)
        return np.clip(values, 0, 1, out=values)

    def quantized(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return raw values on the unit scale as uint8, rounded: 255 stands for 1."""
        scaled = (values - np.float32(self.low)) * np.float32(255.0 / (self.high - self.low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    def centered(self, unit: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return the network's input from values on the unit scale, in their memory: 0, the mean of tissue, where
        ``inside`` is False (no raw)."""
        unit -= np.float32(self.mean)
        unit /= np.float32(self.std)
        unit[~inside] = 0
        return unit

    def input(self, values: ArrayLike) -> NDArray[np.float32]:
        """Return the network's input from raw values of any shape and type, as a new array."""
        unit = self.unit(np.array(values, np.float32))
        return self.centered(unit, np.ones(unit.shape, bool))

    def to_dict(self) -> dict[str, float]:
        """Return the four numbers by name."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "a normalization") -> Self:
        """Read the four numbers; other keys are ignored. Raises `MetadataError` if one is missing."""
        names = ("low", "high", "mean", "std")
        if any(name not in data for name in names):
            raise MetadataError(f"{where} needs low, high, mean and std, got {data!r}")
        return read(cls, {name: data[name] for name in names}, where)
