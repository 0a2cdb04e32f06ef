"""The arguments of one MONAI transform from the configuration, read as MONAI reads them and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from connectomics.errors import ConfigError, unknown_name
from connectomics.geometry import triple

_FIELDS = ("image", "label", "known")
_AXES = 3


class Arguments:
    """``data.augmentations.NAME``; every reader raises `ConfigError` in one line that names the argument."""

    def __init__(
        self, name: str, kind: str, values: Any, accepted: Sequence[str], voxel_size: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> None:
        self.name = name
        self.voxel_size = triple(voxel_size, "voxel_size")
        self.where = f"data.augmentations.{name}"
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self.where} must map arguments to values, found {values!r}")
        for key in values:
            if key not in accepted:
                raise unknown_name(f"argument of {kind}", str(key), accepted, "data.augmentations")
        self._values = values
        self.keys = self._keys()

    def _keys(self) -> list[str]:
        given = self._values.get("keys")
        if given is None:
            raise ConfigError(f"{self.where}: keys is absent; give [image, label]")
        keys = [str(k) for k in ([given] if isinstance(given, str) else given)]
        for key in keys:
            if key not in _FIELDS:
                raise unknown_name("key", key, _FIELDS, f"{self.where}.keys")
        if "image" not in keys or "label" not in keys:
            raise ConfigError(
                f"{self.where} moves only {' and '.join(keys) or 'nothing'}: raw and labels would no longer lie on "
                "each other; give keys [image, label]"
            )
        return keys

    def _refuse(self, name: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} must be {wanted}, found {self._values.get(name)!r}")

    def _number(self, name: str, value: Any, wanted: str = "a number") -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refuse(name, wanted)
        return float(value)

    def prob(self) -> float:
        """Probability, MONAI's default 0.1."""
        wanted = "a probability from 0 to 1"
        value = self._number("prob", self._values.get("prob", 0.1), wanted)
        if not 0 <= value <= 1:
            raise self._refuse("prob", wanted)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self._refuse(name, "true or false")
        return value

    def whole(self, name: str, default: int, least: int) -> int:
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._refuse(name, f"a whole number of at least {least}")
        return value

    def numbers(self, name: str, default: float) -> tuple[float, ...]:
        """One number or several, as a tuple."""
        value = self._values.get(name, default)
        return tuple(self._number(name, v, "a number or a list of numbers") for v in _several(value))

    def pair(self, name: str) -> tuple[float, float]:
        """(low, high), which must be given."""
        return self._pair(name, self._values.get(name))

    def _pair(self, name: str, value: Any) -> tuple[float, float]:
        wanted = "two numbers, the lower first"
        if not _is_sequence(value) or len(value) != 2:
            raise self._refuse(name, wanted)
        low, high = self._number(name, value[0], wanted), self._number(name, value[1], wanted)
        if low > high:
            raise self._refuse(name, wanted)
        return low, high

    def ranges(self, name: str, most: int) -> tuple[tuple[float, float], ...]:
        """As MONAI's `RandAffineGrid`: a number x means -x to x, a pair its two numbers; None is left out, so that what
        follows moves up; a single number is that of the first parameter alone."""
        value = self._values.get(name)
        entries = [e for e in _several(value) if e is not None]
        if len(entries) > most:
            raise self._refuse(name, f"at most {most} ranges")
        found = []
        for entry in entries:
            if _is_sequence(entry):
                found.append(self._pair(name, entry))
            else:
                size = abs(self._number(name, entry, "numbers or pairs of numbers"))
                found.append((-size, size))
        return tuple(found)

    def _axis(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not -_AXES <= value < _AXES:
            raise self._refuse(name, "axes from 0 (z) to 2 (x)")
        return value % _AXES

    def axes(self, name: str) -> tuple[int, ...] | None:
        """An axis or several; None where absent."""
        value = self._values.get(name)
        if value is None:
            return None
        found = tuple(self._axis(name, v) for v in _several(value))
        if len(set(found)) != len(found):
            raise self._refuse(name, "different axes")
        return found

    def planes(self, name: str, default: tuple[int, int]) -> list[tuple[int, int]]:
        """A pair of axes or a list of pairs."""
        value = self._values.get(name, default)
        wanted = "a pair of different axes (0 z, 1 y, 2 x) or a list of such pairs"
        if not _is_sequence(value) or not value:
            raise self._refuse(name, wanted)
        planes = value if _is_sequence(value[0]) else [value]
        found = []
        for plane in planes:
            axes = [self._axis(name, a) for a in plane] if _is_sequence(plane) else []
            if len(axes) != 2 or axes[0] == axes[1]:
                raise self._refuse(name, wanted)
            found.append((axes[0], axes[1]))
        return found

    def same_size(self, name: str, size: Sequence[int]) -> bool:
        """Whether a size of MONAI's is the patch's own: absent, equal, or not positive ("as the input")."""
        value = self._values.get(name)
        if value is None:
            return True
        several = _several(value) if _is_sequence(value) else [value] * _AXES
        if len(several) != _AXES or any(isinstance(n, bool) or not isinstance(n, int | None) for n in several):
            raise self._refuse(name, "one or three whole numbers")
        return all(n is None or n < 1 or n == own for n, own in zip(several, size, strict=True))

    def image_mode(self, known: Sequence[str]) -> str | None:
        """The interpolation asked for the image (None: not given); the label's is only checked."""
        value = self._values.get("mode")
        if value is None:
            return None
        several = _several(value)
        modes = [str(m) for m in several]
        if len(modes) not in (1, len(self.keys)) or any(m not in known for m in modes):
            raise self._refuse("mode", f"one for all keys or one for each of {self.keys}, of {', '.join(known)}")
        return modes[self.keys.index("image") if len(modes) > 1 else 0]

    def align_corners(self) -> bool:
        """One choice for image and label; absent is false."""
        several = {bool(v) if v is None else v for v in _several(self._values.get("align_corners"))}
        if len(several) != 1 or not isinstance(next(iter(several)), bool):
            raise self._refuse("align_corners", "true or false, the same for image and label")
        return bool(several.pop())


def _several(value: Any) -> list[Any]:
    return list(value) if _is_sequence(value) else [value]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
