"""`IntensityAugmentor` applies kinds of `intensity_kinds` to a batch, on the device (CPU or GPU) that holds it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.values import read
from connectomics.data.augmentation.argument_rules import several
from connectomics.data.augmentation.intensity_kinds import KINDS, Drawn, Kind
from connectomics.data.augmentation.intensity_operations import shift_codes
from connectomics.data.augmentation.presets import augmentations_of, em_intensity
from connectomics.errors import ConfigError, InputError, unknown_name
from connectomics.geometry import Index, Triple, triple

#: ``noise``, ``noise_2`` (a second one), ``noise_monai`` (replaces a MONAI transform)
_NAME = re.compile(rf"({'|'.join(KINDS)})(_monai)?(_\d+)?")
_ORDER = {kind: place for place, kind in enumerate(KINDS.values())}


@dataclass(frozen=True)
class IntensityAugmentor:
    """Named kinds of augmentation, applied in the order of `KINDS` whatever their order in the configuration.

    The result for a sample depends only on its seed: not on the batch, on other samples, or on the other kinds.
    Global random state is neither read nor changed. On the CPU results are bit-identical for the same number of
    threads (means and powers may differ in the last bit otherwise); a GPU draws other noise from the same seed, and
    everything else is the same.
    """

    kinds: tuple[tuple[str, Kind], ...]  # with their names, sorted by the order of application, then by name
    voxel_size: Triple  # of the images, nm, z y x

    def __post_init__(self) -> None:
        ordered = sorted(self.kinds, key=lambda named: (_ORDER[type(named[1])], named[0]))
        object.__setattr__(self, "kinds", tuple(ordered))

    @classmethod
    def from_config(cls, intensity: Mapping[str, Any], voxel_size: Sequence[float]) -> IntensityAugmentor | None:
        """Return the augmentor of ``data.intensity`` (name -> arguments), or None if it is empty.

        A name is a key of `KINDS`; a suffix ``_2``, ``_3``... repeats a kind. Missing arguments take their defaults
        (``noise: {}``); null instead of arguments disables a kind. ``voxel_size``: nm, z y x.

        Raises:
            UnknownNameError: the kind is unknown. ConfigError: an argument is unknown or its value is not allowed.
        """
        kinds = []
        for name, given in intensity.items():
            found = _NAME.fullmatch(str(name))
            if found is None:
                raise unknown_name("augmentation", str(name), KINDS, "data.intensity")
            if given is not None:
                kinds.append((str(name), read(KINDS[found[1]], given, f"data.intensity.{name}", ConfigError)))
        return cls(tuple(kinds), triple(voxel_size, "voxel_size")) if kinds else None

    def drawn(self, seed: int, shape: Index, *, moving: bool = True) -> Iterator[tuple[str, Kind, Drawn]]:
        """Yield what a sample with this seed gets, in order: name, kind, numbers drawn. ``shape``: voxels z y x.

        ``moving=False`` leaves out the kinds that move image and labels.
        """
        for name, kind in self.kinds:
            # each name has its own stream, so that adding a kind does not change the others
            rng = np.random.default_rng([seed & (2**64 - 1), zlib.crc32(name.encode())])
            if rng.random() < kind.prob and (moving or not kind.moves):
                yield name, kind, kind.draw(rng, shape, self.voxel_size)

    @torch.no_grad()
    def __call__(self, image: Tensor, codes: Tensor | None, seeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the augmented batch; the given tensors are not changed.

        Args:
            image: (B, C, D, H, W), values in [0, 1]; channels of a sample share its draws (noise differs per voxel).
            codes: (B, D, H, W) integer, 0 where everything is unknown. None leaves out the kinds that move the image.
            seeds: int64 (B,), preferably on the host.

        Returns:
            image float32 in [0, 1] and codes of the given dtype, on the same device.

        Raises:
            InputError: the shapes do not fit each other.
        """
        if image.ndim != 5 or seeds.shape != image.shape[:1]:
            raise InputError(
                f"expected image (B, C, D, H, W) and seeds (B,), got {tuple(image.shape)} and {tuple(seeds.shape)}"
            )
        if codes is not None and codes.shape != (image.shape[0], *image.shape[2:]):
            raise InputError(f"codes must have the voxels of the image {tuple(image.shape)}, got {tuple(codes.shape)}")
        shape = (image.shape[2], image.shape[3], image.shape[4])
        images: list[Tensor] = []
        moved = codes
        with torch.autocast(image.device.type, enabled=False):
            for number, seed in enumerate(seeds.tolist()):
                patch = image[number].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                for _, kind, numbers in self.drawn(seed, shape, moving=codes is not None):
                    patch = kind.apply(patch, **numbers)
                    if kind.moves and moved is not None:
                        moved = moved.clone() if moved is codes else moved
                        shift_codes(moved[number], **numbers)
                images.append(patch)
            return torch.stack(images).clamp_(0.0, 1.0), moved

    @torch.no_grad()
    def moved_ids(self, ids: Tensor, seeds: Tensor) -> Tensor:
        """Return instance ids (B, I, D, H, W), signed integers, moved as the codes of the same batch are.

        Voxels that come into view are -1 (unknown). If nothing moves, ``ids`` itself is returned; it is not changed.
        """
        moved = ids
        shape = (ids.shape[2], ids.shape[3], ids.shape[4])
        for number, seed in enumerate(seeds.tolist() if any(kind.moves for _, kind in self.kinds) else ()):
            for _, kind, numbers in self.drawn(seed, shape):
                if kind.moves:
                    moved = moved.clone() if moved is ids else moved
                    for channel in moved[number]:
                        shift_codes(channel, **numbers, vacated=-1)
        return moved


@dataclass(frozen=True)
class BatchAugmentor:
    """The intensity augmentation of packed training batches (see `connectomics.data.patches.collate`).

    Further inputs get the draws of their patch, except kinds that move an image against its labels; instance ids move
    with the labels. Voxels without raw keep the tissue mean, as in prediction. Images are on the unit scale; they are
    centered afterwards (`connectomics.data.patches.centered`).
    """

    own: IntensityAugmentor  # for the image
    inputs: tuple[IntensityAugmentor, ...] = ()  # for the further inputs in their order, each with its own voxel size

    @classmethod
    def of(cls, config: RunConfig) -> BatchAugmentor | None:
        """Return the augmentor for ``data.intensity``, that of ``data.augmentation``, and the MONAI transforms that run
        on the device.

        None if there are none. Errors are those of `IntensityAugmentor.from_config`.
        """
        augmentations, intensity = augmentations_of(config.data, config.dataset.voxel_size)
        kinds = {**recognize(augmentations)[0], **intensity}
        sizes = [config.dataset.voxel_size, *(given.voxel_size for given in config.data.inputs)]
        own, *inputs = (IntensityAugmentor.from_config(kinds, size) for size in sizes)
        return None if own is None else cls(own, tuple(augmentor for augmentor in inputs if augmentor is not None))

    @classmethod
    def strong(cls, config: RunConfig, strength: float) -> BatchAugmentor | None:
        """Return the augmentor of the preset ``em`` at a strength and of ``data.intensity``, which overrides it by
        name, without kinds that move the image; None if there are none."""
        size = config.dataset.voxel_size
        kinds = {**em_intensity(size, config.data.patch_size, strength), **config.data.intensity}
        sizes = [size, *(given.voxel_size for given in config.data.inputs)]
        found = [IntensityAugmentor.from_config(kinds, of) for of in sizes]
        kept = [replace(one, kinds=tuple(k for k in one.kinds if not k[1].moves)) for one in found if one is not None]
        return cls(kept[0], tuple(kept[1:])) if kept and kept[0].kinds else None

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with new images and codes; the given tensors are not changed."""
        before = batch["image"]
        image, codes = self.own(before, batch["codes"], batch["seed"])
        assert codes is not None  # codes were given
        # a voxel where nothing is known and raw is exactly the mean has no raw, or looks as if it had none
        mean = batch["mean"].to(before.device)[:, None, None, None, None] if "mean" in batch else before.new_zeros(())
        blank = (before == mean) & (batch["codes"] == 0)[:, None] & (codes == 0)[:, None]
        changed = {"image": torch.where(blank, mean, image), "codes": codes}
        if "ids" in batch:
            changed["ids"] = self.own.moved_ids(batch["ids"], batch["seed"])
        for number, augmentor in enumerate(self.inputs, start=1):
            given = batch[f"image_{number}"]
            changed[f"image_{number}"] = torch.where(given == mean, mean, augmentor(given, None, batch["seed"])[0])
        return {**batch, **changed}


# -- MONAI transforms of the image alone that have an exact counterpart ------------------------------------------------
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
