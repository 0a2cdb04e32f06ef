"""MONAI transforms of the image alone that have an exact counterpart in `intensity_kinds`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from connectomics.config.values import read
from connectomics.data.augmentation.argument_rules import several
from connectomics.data.augmentation.intensity_kinds import KINDS
from connectomics.errors import ConfigError

Arguments = dict[str, Any]
#: MONAI transforms that keep values in [0, 1] there: what comes after them may be clamped
_KEEP_RANGE = {
    "RandFlipd", "RandAxisFlipd", "RandRotate90d", "RandRotated", "RandZoomd", "RandAffined", "Rand3DElasticd",
    "RandGridDistortiond", "symmetry", "rotation", "scale", "elastic",
}  # fmt: skip


def recognize(augmentations: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``data.augmentations`` into what runs on the device and what stays with MONAI.

    Recognized are `RandGaussianNoised`, `RandGaussianSmoothd`, `RandScaleIntensityd`, `RandShiftIntensityd` and
    `RandAdjustContrastd` with ``keys: [image]`` if all their other arguments have a counterpart, and if every
    remaining transform comes before them and keeps values in [0, 1]. They differ from MONAI's in their order
    (`KINDS`), in clamping at the end, and in blur, which mirrors the patch at its border instead of padding with zeros.

    Returns:
        what to add to ``data.intensity`` (with names such as ``noise_monai``), and the remaining transforms.
    """
    found: list[tuple[str, Arguments]] = []
    remaining = dict(augmentations)
    for name in reversed(list(augmentations)):
        if augmentations[name] is None:  # disabled
            continue
        translated = _translate(name, augmentations[name])
        if translated is None:
            break
        del remaining[name]
        found.append(translated)
    if not all(_base_name(name) in _KEEP_RANGE for name, given in remaining.items() if given is not None):
        return {}, dict(augmentations)
    named: dict[str, Any] = {}
    for kind, arguments in reversed(found):
        repeats = sum(re.fullmatch(rf"{kind}_monai(_\d+)?", other) is not None for other in named)
        named[f"{kind}_monai" + (f"_{repeats + 1}" if repeats else "")] = arguments
    return named, remaining


def _base_name(name: str) -> str:
    return re.sub(r"_\d+$", "", str(name))


def _translate(name: str, given: Any) -> tuple[str, Arguments] | None:
    """Return the kind that does the same and its arguments, or None if there is none."""
    translation = _TRANSLATIONS.get(_base_name(name))
    if translation is None or not isinstance(given, Mapping) or several(given.get("keys")) != ("image",):
        return None
    kind, defaults, translate = translation
    arguments = {str(k): v for k, v in given.items() if k not in ("keys", "allow_missing_keys")}
    if not set(arguments) <= set(defaults) | {"prob"}:
        return None
    try:
        ours = translate({**defaults, **arguments})
        if ours is None:
            return None
        ours["prob"] = arguments.get("prob", 0.1)
        read(KINDS[kind], ours, name, ConfigError)
    except (TypeError, ValueError):  # left to MONAI, which reports the error
        return None
    return kind, ours


def _about_zero(value: Any) -> list[float]:
    """Return ``n`` as ``[-n, n]``, as MONAI reads it, and a pair in ascending order."""
    low, high = sorted(float(v) for v in ((-value, value) if isinstance(value, (int, float)) else value))
    return [low, high]


def _noise(a: Arguments) -> Arguments | None:
    if not isinstance(a["sample_std"], bool):
        return None
    return {"mean": a["mean"], "std": [0.0 if a["sample_std"] else a["std"], a["std"]]}


def _blur(a: Arguments) -> Arguments | None:
    # MONAI's "x, y, z" are the first, second and third array axis, which are z, y, x here
    return {"sigma": [list(a["sigma_x"]), list(a["sigma_y"]), list(a["sigma_z"])]} if a["approx"] == "erf" else None


def _gain(a: Arguments) -> Arguments | None:
    low, high = _about_zero(a["factors"])
    return {"factor": [1.0 + low, 1.0 + high]} if a["channel_wise"] is False else None


def _brightness(a: Arguments) -> Arguments | None:
    return {"shift": _about_zero(a["offsets"])} if a["channel_wise"] is False and a["safe"] is False else None


def _gamma(a: Arguments) -> Arguments | None:
    if a["invert_image"] is not False or a["retain_stats"] is not False:
        return None
    gamma = a["gamma"]
    if isinstance(gamma, (int, float)):
        return {"exponent": [0.5, float(gamma)]} if gamma > 0.5 else None
    return {"exponent": _about_zero(gamma)}


_SIGMA = (0.25, 1.5)
#: MONAI's name -> our kind, MONAI's defaults (None: required), and the translation of its arguments
_TRANSLATIONS: dict[str, tuple[str, Arguments, Callable[[Arguments], Arguments | None]]] = {
    "RandGaussianNoised": ("noise", {"mean": 0.0, "std": 0.1, "sample_std": True}, _noise),
    "RandGaussianSmoothd": ("blur", {"sigma_x": _SIGMA, "sigma_y": _SIGMA, "sigma_z": _SIGMA, "approx": "erf"}, _blur),
    "RandScaleIntensityd": ("gain", {"factors": None, "channel_wise": False}, _gain),
    "RandShiftIntensityd": ("brightness", {"offsets": None, "channel_wise": False, "safe": False}, _brightness),
    "RandAdjustContrastd": ("gamma", {"gamma": (0.5, 4.5), "invert_image": False, "retain_stats": False}, _gamma),
}
