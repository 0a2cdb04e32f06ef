"""The output channels of the network: the classes, then the heads (``model.heads``), which separate objects.

A head belongs to a class that is annotated with instance ids, from which its training targets are computed (see
`connectomics.models.targets`). A channel is named like the array in which a prediction stores it::

    mito                 a class
    mito/affinities/0    one per offset: 1 if both voxels belong to the same object
    mito/boundary        1 near the border of an object
    mito/distance        signed distance to the border
    mito/lsd/0           ten local shape descriptors

This module does not import torch, so that checking a configuration and planning a prediction stay fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from connectomics.config.schema import HeadConfig, RunConfig
from connectomics.errors import ConfigError, require_known
from connectomics.geometry import Index, Triple

# local shape descriptors, see `connectomics.models.targets.shape_descriptors`
LSD_COMPONENTS = (
    "offset z", "offset y", "offset x", "variance z", "variance y", "variance x",
    "correlation zy", "correlation zx", "correlation yx", "size",
)  # fmt: skip
_REACHES = (1, 3, 9)  # default affinity offsets along each axis, in units of the smallest voxel side
_DEFAULT_LOSSES = {
    "affinities": ("DiceLoss", "BalancedBCELoss"),
    "boundary": ("DiceLoss", "BalancedBCELoss"),
    "distance": ("MSELoss",),
    "lsd": ("MSELoss",),
}


@dataclass(frozen=True)
class Head:
    """One head of a run, with the defaults filled in.

    Attributes:
        kind: affinities, boundary, distance or lsd.
        class_name: the class whose objects it describes.
        voxel_size: of the run, nm, z y x.
        offsets: affinities only: voxels of the run, z y x, one per channel.
        scale_nm: width of a boundary, scale of a distance, sigma of descriptors; 0 for affinities.
        losses: names of `connectomics.models.losses.LOSSES`.
        weight: of its loss; the loss of the classes has 1.
        write: whether a prediction stores it.
    """

    kind: str
    class_name: str
    voxel_size: Triple
    offsets: tuple[Index, ...] = ()
    scale_nm: float = 0.0
    losses: tuple[str, ...] = ()
    weight: float = 1.0
    write: bool = True

    @property
    def name(self) -> str:
        """Name in logs, such as ``mito/affinities``."""
        return f"{self.class_name}/{self.kind}"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return {"affinities": len(self.offsets), "lsd": len(LSD_COMPONENTS)}.get(self.kind, 1)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """One name per channel, numbered if the kind can have several."""
        if self.kind in ("boundary", "distance"):
            return (self.name,)
        return tuple(f"{self.name}/{number}" for number in range(self.channels))

    @property
    def predicts(self) -> dict[str, Any]:
        """What its channels mean, as plain values; heads with equal values are interchangeable."""
        what: dict[str, Any] = {"kind": self.kind, "class": self.class_name}
        if self.kind == "affinities":
            return {**what, "offsets": [list(offset) for offset in self.offsets]}
        return {**what, "scale_nm": self.scale_nm}

    def attributes(self) -> dict[str, dict[str, Any]]:
        """Return the attributes of each channel's stored array, by channel name: ``artefact`` (affinity, boundary,
        distance or lsd), ``offset`` (voxels) with ``offset_nm``, z y x, or ``scale_nm``, and for lsd ``component``."""
        if self.kind == "affinities":
            about: list[dict[str, Any]] = [
                {
                    "artefact": "affinity",
                    "offset": list(offset),
                    "offset_nm": [o * v for o, v in zip(offset, self.voxel_size, strict=True)],
                }
                for offset in self.offsets
            ]
        else:
            about = [{"artefact": self.kind, "scale_nm": self.scale_nm}]
        if self.kind == "lsd":
            about = [{**about[0], "component": component} for component in LSD_COMPONENTS]
        return dict(zip(self.channel_names, about, strict=True))


def heads_of(config: RunConfig) -> tuple[Head, ...]:
    """Return the heads of a run, in the order of their channels.

    Raises:
        UnknownNameError: ``class_name`` is not one of the trained classes.
        ConfigError: a head is given twice, an offset is not a whole number of voxels, a number is out of range, or
            the kind does not have an option.
    """
    heads: list[Head] = []
    for number, given in enumerate(config.model.heads):
        head = _head(given, config, f"model.heads[{number}]")
        if head.name in (other.name for other in heads):
            raise ConfigError(f"model.heads has {head.name} twice; give its offsets (or its scale) in one")
        heads.append(head)
    return tuple(heads)


def head_classes(config: RunConfig) -> tuple[str, ...]:
    """Return the classes whose instance ids the heads need, in the order of first mention: the channels of ``ids``."""
    return tuple(dict.fromkeys(head.class_name for head in config.model.heads))


def instance_classes(config: RunConfig) -> tuple[str, ...]:
    """Return the classes whose instance ids a batch has: those of heads, then those of ``data.gap_nm``.

    Raises `UnknownNameError` if one of the latter is not one of the trained classes.
    """
    require_known("class", config.data.gap_nm, config.dataset.classes, "data.gap_nm (of dataset.classes)")
    return tuple(dict.fromkeys((*head_classes(config), *config.data.gap_nm)))


def channel_groups(config: RunConfig) -> list[int]:
    """Return the number of output channels of the classes, then of each head."""
    return [config.channels, *(head.channels for head in heads_of(config))]


def channel_names(config: RunConfig) -> tuple[str, ...]:
    """Return the channel names of a prediction: the classes, then the heads that are written."""
    written = (name for head in heads_of(config) if head.write for name in head.channel_names)
    return (*config.dataset.classes, *written)


def channel_attributes(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return ``class_name`` and `Head.attributes` of the channels of `channel_names` that belong to heads."""
    return {
        name: {"class_name": head.class_name, **about}
        for head in heads_of(config)
        if head.write
        for name, about in head.attributes().items()
    }


def default_offsets(voxel_size: Sequence[float]) -> tuple[Index, ...]:
    """Return the default offsets in voxels: one voxel back along each axis, then 3 and 9 times the smallest side.

    For anisotropic voxels (``voxel_size`` in nm), a long offset is rounded to whole voxels, and left out if it would
    repeat a shorter one.
    """
    found: list[Index] = []
    for reach in _REACHES:
        for axis, side in enumerate(voxel_size):
            steps = max(1, round(reach * min(voxel_size) / side))
            z, y, x = (-steps if axis == a else 0 for a in range(3))
            if (z, y, x) not in found:
                found.append((z, y, x))
    return tuple(found)


def _head(given: HeadConfig, config: RunConfig, where: str) -> Head:
    require_known("class", [given.class_name], config.dataset.classes, f"{where}: dataset.classes")
    z, y, x = (float(v) for v in config.dataset.voxel_size)
    affinities = given.kind == "affinities"
    if affinities and given.scale_nm is not None:
        raise ConfigError(f"{where}.scale_nm does not apply to affinities; set offsets_nm")
    if not affinities and given.offsets_nm:
        raise ConfigError(f"{where}.offsets_nm is for kind affinities only, got kind {given.kind}")
    return Head(
        kind=given.kind, class_name=given.class_name, voxel_size=(z, y, x),
        offsets=_offsets(given.offsets_nm, (z, y, x), where) if affinities else (),
        scale_nm=0.0 if affinities else _scale(given, (z, y, x), where),
        losses=tuple(given.losses) or _DEFAULT_LOSSES[given.kind], weight=float(given.weight),
        write=given.kind != "lsd" if given.write is None else given.write,
    )  # fmt: skip


def _scale(given: HeadConfig, voxel_size: Triple, where: str) -> float:
    """Return the scale in nm; by default 1 voxel for a boundary, 8 for a distance, 10 for descriptors."""
    least = min(voxel_size)
    default = {"boundary": max(voxel_size), "distance": 8 * least, "lsd": 10 * least}[given.kind]
    scale = default if given.scale_nm is None else float(given.scale_nm)
    if not least / 2 <= scale < float("inf"):
        raise ConfigError(
            f"{where}.scale_nm must be at least half a voxel of {list(voxel_size)} nm, got {scale:g}; remove it to use "
            f"{default:g}"
        )
    return scale


def _offsets(given: Sequence[Any], voxel_size: Triple, where: str) -> tuple[Index, ...]:
    """Convert offsets in nm (z, y, x) to voxels."""
    found: list[Index] = []
    for offset in given:
        fits = isinstance(offset, list | tuple) and len(offset) == 3
        if not fits or not all(isinstance(o, int | float) and abs(o) < float("inf") for o in offset):
            raise ConfigError(f"{where}.offsets_nm must be lists of three numbers (z, y, x) each, got {offset!r}")
        z, y, x = (round(o / v) for o, v in zip(offset, voxel_size, strict=True))
        nearest = [n * v for n, v in zip((z, y, x), voxel_size, strict=True)]
        if any(abs(n - o) > 1e-3 * v for n, o, v in zip(nearest, offset, voxel_size, strict=True)):
            raise ConfigError(
                f"{where}.offsets_nm: {list(offset)} is not a whole number of voxels at dataset.voxel_size "
                f"{list(voxel_size)} nm; the nearest valid offset is {nearest}"
            )
        if (z, y, x) == (0, 0, 0) or (z, y, x) in found or (-z, -y, -x) in found:
            raise ConfigError(
                f"{where}.offsets_nm: {list(offset)} is zero or given twice (an offset and its opposite are one pair)"
            )
        found.append((z, y, x))
    return tuple(found) or default_offsets(voxel_size)
