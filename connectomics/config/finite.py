"""Numbers of a configuration that are no numbers."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from typing import Any

from connectomics.errors import ConfigError


def check_finite(value: Any, where: str, key: str = "") -> None:
    """Raise `ConfigError` for a number anywhere in the configuration that is nan or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} must be a finite number, found {value}")
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for name, item in value.items():
            check_finite(item, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_finite(item, where, f"{key}[{number}]")
