"""MONAI transforms of the image alone that have an exact counterpart on the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from connectomics.data.intensity.augmentor import build
from connectomics.errors import ConfigError

Arguments = dict[str, Any]

#: MONAI transforms that leave values in [0, 1] where they were: what comes after them may clamp there
_KEEP_RANGE = {"RandFlipd", "RandAxisFlipd", "RandRotate90d", "RandRotated", "RandZoomd", "RandAffined"} | {
    "Rand3DElasticd",
    "RandGridDistortiond",
}


def recognise(augmentations: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``data.augmentations`` into what the device does and what stays with MONAI.

    Recognised are `RandGaussianNoised`, `RandGaussianSmoothd`, `RandScaleIntensityd`, `RandShiftIntensityd` and
    `RandAdjustContrastd` with ``keys: [image]``, where every other argument has a counterpart and every transform that
    is left comes before them and keeps values in [0, 1]: the result is then distributed as MONAI's but for this, that
    the order among them is that of `kinds`, that values are clamped to [0, 1] at the end, and that blur mirrors the
    patch at its border where MONAI pads it with zeros.

    Returns:
        what to add to ``data.intensity`` (names of their own, ``noise_monai``: no clash), and the remaining mapping.
    """
    additions: dict[str, Any] = {}
    remaining = dict(augmentations)
    for name in reversed(list(augmentations)):
        if augmentations[name] is None:  # switched off
            continue
        translated = _translate(name, augmentations[name])
        if translated is None:
            break
        del remaining[name]
        kind, arguments = translated
        additions[name] = (kind, arguments)
    if not all(_kind_of(name) in _KEEP_RANGE for name, given in remaining.items() if given is not None):
        return {}, dict(augmentations)
    named: dict[str, Any] = {}
    for kind, arguments in reversed(additions.values()):
        repeats = sum(re.fullmatch(rf"{kind}_monai(_\d+)?", other) is not None for other in named)
        named[f"{kind}_monai" + (f"_{repeats + 1}" if repeats else "")] = arguments
    return named, remaining


def _kind_of(name: str) -> str:
    return re.sub(r"_\d+$", "", str(name))


def _translate(name: str, given: Any) -> tuple[str, Arguments] | None:
    """Our kind and its arguments, None where there is none that does the same."""
    translation = _TRANSLATIONS.get(_kind_of(name))
    if translation is None or not isinstance(given, Mapping):
        return None
    arguments = {str(k): v for k, v in given.items()}
    keys = arguments.pop("keys", None)
    arguments.pop("allow_missing_keys", None)  # the image is always there
    if keys != "image" and (not isinstance(keys, Sequence) or list(keys) != ["image"]):
        return None
    kind, defaults, translate = translation
    if not set(arguments) <= set(defaults) | {"prob"}:
        return None
    try:
        ours = translate({**defaults, **arguments})
        if ours is None:
            return None
        ours["prob"] = arguments.get("prob", 0.1)
        build(kind, ours)
    except (TypeError, ValueError, ConfigError):  # MONAI says what is wrong with it
        return None
    return kind, ours


def _pair(value: Any) -> tuple[float, float]:
    low, high = (float(v) for v in value)
    return min(low, high), max(low, high)


def _about_zero(value: Any) -> tuple[float, float]:
    """``n`` is ``(-n, n)``, as MONAI reads it."""
    return _pair((-value, value) if isinstance(value, (int, float)) else value)


def _noise(a: Arguments) -> Arguments | None:
    if not isinstance(a["sample_std"], bool):
        return None
    return {"mean": a["mean"], "std": [0.0 if a["sample_std"] else a["std"], a["std"]]}


def _smooth(a: Arguments) -> Arguments | None:
    # MONAI's "x, y, z" are the first, second and third array axis: z, y, x here
    return {"sigma": [list(a["sigma_x"]), list(a["sigma_y"]), list(a["sigma_z"])]} if a["approx"] == "erf" else None


def _scale(a: Arguments) -> Arguments | None:
    low, high = _about_zero(a["factors"])
    return {"factor": [1.0 + low, 1.0 + high]} if a["channel_wise"] is False else None


def _shift(a: Arguments) -> Arguments | None:
    return {"shift": list(_about_zero(a["offsets"]))} if a["channel_wise"] is False and a["safe"] is False else None


def _contrast(a: Arguments) -> Arguments | None:
    if a["invert_image"] is not False or a["retain_stats"] is not False:
        return None
    gamma = a["gamma"]
    if isinstance(gamma, (int, float)):
        return {"exponent": [0.5, float(gamma)]} if gamma > 0.5 else None
    return {"exponent": list(_pair(gamma))}


#: MONAI's name -> our kind, MONAI's defaults (None: it must be given), and the arguments in our terms
_TRANSLATIONS: dict[str, tuple[str, Arguments, Callable[[Arguments], Arguments | None]]] = {
    "RandGaussianNoised": ("noise", {"mean": 0.0, "std": 0.1, "sample_std": True}, _noise),
    "RandGaussianSmoothd": (
        "blur",
        {"sigma_x": (0.25, 1.5), "sigma_y": (0.25, 1.5), "sigma_z": (0.25, 1.5), "approx": "erf"},
        _smooth,
    ),
    "RandScaleIntensityd": ("gain", {"factors": None, "channel_wise": False}, _scale),
    "RandShiftIntensityd": ("brightness", {"offsets": None, "channel_wise": False, "safe": False}, _shift),
    "RandAdjustContrastd": (
        "gamma",
        {"gamma": (0.5, 4.5), "invert_image": False, "retain_stats": False},
        _contrast,
    ),
}
