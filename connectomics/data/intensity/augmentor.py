"""Intensity augmentations of a batch, on the device that the batch is on."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from connectomics.data.intensity import operations
from connectomics.data.intensity.kinds import KINDS, OPERATIONS
from connectomics.data.intensity.rules import Drawn, Kind, Nanometres, Shape3
from connectomics.errors import ConfigError, InputError, unknown_name

#: ``noise``, ``noise_2`` (a second one), ``noise_monai`` (in the place of a MONAI transform)
_NAME = re.compile(rf"({'|'.join(KINDS)})(_monai)?(_\d+)?")
_ORDER = {kind: place for place, kind in enumerate(OPERATIONS)}


@dataclass(frozen=True)
class IntensityAugmentor:
    """Kinds of augmentation by name, applied in the fixed order of `kinds`, whatever order they are named in.

    What happens to a sample depends on its seed alone: not on the batch it comes in, on other samples, or on which
    other kinds are configured. Global random state is neither read nor changed. On the CPU a result is the same bit for
    bit (with as many threads: means and powers may differ in the last bit otherwise); a GPU draws other noise from the
    same seed, and everything else the same.

    Attributes:
        kinds: (name, kind), sorted by the order of application, then by name.
        voxel_size: nm, z y x, of the images.
    """

    kinds: tuple[tuple[str, Kind], ...]
    voxel_size: Nanometres

    def __post_init__(self) -> None:
        if len(self.voxel_size) != 3 or not all(v > 0 for v in self.voxel_size):
            raise InputError(f"voxel_size must be three positive lengths in nm (z, y, x), found {self.voxel_size}")
        ordered = sorted(self.kinds, key=lambda named: (_ORDER[type(named[1])], named[0]))
        object.__setattr__(self, "kinds", tuple(ordered))
        object.__setattr__(self, "voxel_size", tuple(float(v) for v in self.voxel_size))

    @classmethod
    def from_config(cls, intensity: Mapping[str, Any], voxel_size: Sequence[float]) -> IntensityAugmentor | None:
        """The augmentor of ``data.intensity`` (name -> arguments), None where it is empty.

        A name is a kind of `kinds`; ``_2``, ``_3``... after it repeats it. Arguments that are not given have their
        defaults (``noise: {}``); null instead of arguments switches a kind off. ``voxel_size``: nm, z y x.

        Raises:
            UnknownNameError: no such kind or argument (the nearest is named). ConfigError: a value that is not allowed.
        """
        kinds = [(str(name), build(str(name), given)) for name, given in intensity.items() if given is not None]
        z, y, x = voxel_size
        return cls(tuple(kinds), (z, y, x)) if kinds else None

    def drawn(self, seed: int, shape: Shape3, *, moving: bool = True) -> Iterator[tuple[str, Kind, Drawn]]:
        """What a sample with this seed gets, in order: name, kind, numbers drawn. ``shape``: voxels z y x.

        ``moving=False`` leaves out the kinds that move image and labels.
        """
        for name, kind in self.kinds:
            # a stream for each kind by name: adding one changes nothing about the others
            rng = np.random.default_rng([seed & (2**64 - 1), zlib.crc32(name.encode())])
            if rng.random() < kind.prob and (moving or not kind.moves):
                yield name, kind, kind.draw(rng, shape, self.voxel_size)

    @torch.no_grad()
    def __call__(self, image: Tensor, codes: Tensor | None, seeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Augment a batch; the tensors given stay as they are.

        Args:
            image: (B, C, D, H, W), values in [0, 1]; channels of one sample share its draws (noise differs by voxel).
            codes: (B, D, H, W) integer, 0 where everything is unknown, or None: then what would move image against
                labels is left out.
            seeds: int64 (B,), best kept on the host.

        Returns:
            image float32 in [0, 1] and codes of the type given, on the device given.

        Raises:
            InputError: shapes that do not fit each other.
        """
        if image.ndim != 5 or seeds.shape != image.shape[:1]:
            raise InputError(
                f"expected image (B, C, D, H, W) and seeds (B,), found {tuple(image.shape)} and {tuple(seeds.shape)}"
            )
        if codes is not None and codes.shape != (image.shape[0], *image.shape[2:]):
            raise InputError(f"codes {tuple(codes.shape)} do not fit the image {tuple(image.shape)} voxel by voxel")
        shape = (image.shape[2], image.shape[3], image.shape[4])
        images: list[Tensor] = []
        moved = codes
        with torch.autocast(image.device.type, enabled=False):
            for number, seed in enumerate(seeds.tolist()):
                patch = image[number].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                for _, kind, numbers in self.drawn(seed, shape, moving=codes is not None):
                    patch = OPERATIONS[type(kind)](patch, **numbers)
                    if kind.moves and moved is not None:
                        moved = moved.clone() if moved is codes else moved
                        operations.shift_codes(moved[number], **numbers)
                images.append(patch)
            return torch.stack(images).clamp_(0.0, 1.0), moved

    @torch.no_grad()
    def moved_ids(self, ids: Tensor, seeds: Tensor) -> Tensor:
        """Ids of objects (B, I, D, H, W), any signed integers, moved as the codes of the same batch are; -1, unknown,
        where nothing came. The tensor given stays as it is, and is the one returned where nothing moves."""
        moved = ids
        shape = (ids.shape[2], ids.shape[3], ids.shape[4])
        for number, seed in enumerate(seeds.tolist() if any(kind.moves for _, kind in self.kinds) else ()):
            for _, kind, numbers in self.drawn(seed, shape):
                if kind.moves:
                    moved = moved.clone() if moved is ids else moved
                    for channel in moved[number]:
                        operations.shift_codes(channel, **numbers, vacated=-1)
        return moved


def build(name: str, given: Any) -> Kind:
    """The kind named ``name`` with the arguments given; see `IntensityAugmentor.from_config`."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise unknown_name("augmentation", name, KINDS, "data.intensity")
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"data.intensity.{name} must map arguments to values ({{}} for the defaults), found {given!r}"
        )
    kind = KINDS[found[1]]
    allowed = [f.name for f in fields(kind)]
    for argument in given:
        if argument not in allowed:
            raise unknown_name(f"argument of {found[1]}", str(argument), allowed, f"data.intensity.{name}")
    try:
        return kind(**{str(argument): value for argument, value in given.items()})
    except InputError as error:
        raise ConfigError(f"data.intensity.{name}.{error}") from error
