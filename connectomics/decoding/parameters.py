"""What decoding needs to know about a class: one frozen value, in nanometres, with defaults by the class's kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from connectomics.cellmap.classes import CLASSES, is_instance_class
from connectomics.errors import ConfigError, unknown_name
from connectomics.geometry import triple

METHODS = ("threshold", "cc3d", "watershed", "mutex_watershed", "agglomeration")
#: methods that read the affinities beside a class's probabilities
AFFINITY_METHODS = ("mutex_watershed", "agglomeration")
#: heads that a watershed can read; "" for none
HEIGHTS = ("", "distance", "boundary")
#: parameters that only some methods read; elsewhere they must keep their defaults
_ONLY = {
    "max_depth_nm": ("watershed",),
    "height": ("watershed",),
    "bias_short": ("mutex_watershed",),
    "bias_long": ("mutex_watershed",),
    "merge_threshold": ("agglomeration",),
    "halo_nm": AFFINITY_METHODS,
    "stitch_threshold": AFFINITY_METHODS,
}


@dataclass(frozen=True)
class DecodeParameters:
    """How one class's probabilities become labels.

    Sizes and distances are physical, so the same parameters mean the same at every voxel size.

    Attributes:
        threshold: foreground is where the probability is **above** it; 0 to 1.
        method: ``threshold`` gives a 0/1 mask; ``cc3d``, ``watershed``, and from affinities ``mutex_watershed`` and
            ``agglomeration`` give instance ids.
        min_size_nm3: smaller objects (of a mask: smaller components) are removed; nm^3.
        fill_holes: cavities go to the object around them.
        connectivity: neighbours that hold together: 6, 18 or 26.
        min_distance_nm: watershed only: the reach of a seed along each axis, nm.
        max_depth_nm: watershed only: what lies deeper in an object than this counts as so deep, and is not cut apart,
            nm. So far beyond a block its probabilities are read. It must exceed half the thickness of necks to cut.
        height: watershed only: a head of the class (`model.heads`) that it reads, or "" for none. ``distance``: its
            values are flooded in the place of the distance to the background, cut off at ``max_depth_nm`` like that.
            ``boundary``: it separates objects as a boundary class does.
        boundary: a class that separates objects (``pm`` for ``cell``), or "" for none: objects are found where the
            probability of this class is not above the threshold, and then grown back over it.
        bias_short, bias_long: mutex_watershed only: the affinity above which two voxels attract and below which they
            repel each other; of neighbours, and of voxels farther apart. Higher values split more.
        merge_threshold: agglomeration only: the mean affinity above which two regions are united.
        halo_nm: affinities only: how much of the volume around a block is segmented with it, nm; 0: the longest offset
            and 16 voxels.
        stitch_threshold: affinities only: how far two blocks must agree at a face, 0 to 1, for their pieces to be one.
    """

    threshold: float = 0.5
    method: str = "threshold"
    min_size_nm3: float = 0.0
    fill_holes: bool = False
    connectivity: int = 26
    min_distance_nm: float = 80.0
    max_depth_nm: float = 320.0
    height: str = ""
    boundary: str = ""
    bias_short: float = 0.5
    bias_long: float = 0.5
    merge_threshold: float = 0.5
    halo_nm: float = 0.0
    stitch_threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"decoding: threshold must lie between 0 and 1, found {self.threshold}")
        if self.method not in METHODS:
            raise ConfigError(f"decoding: method must be one of {', '.join(METHODS)}, found {self.method!r}")
        if not 0.0 <= self.min_size_nm3 < math.inf:
            raise ConfigError(f"decoding: min_size_nm3 must be at least 0, found {self.min_size_nm3}")
        if self.connectivity not in (6, 18, 26):
            raise ConfigError(f"decoding: connectivity must be 6, 18 or 26, found {self.connectivity}")
        if self.boundary and self.method not in ("cc3d", "watershed"):
            raise ConfigError("decoding: boundary separates objects, so it needs method cc3d or watershed")
        if self.height not in HEIGHTS:
            raise ConfigError(f"decoding: height must be distance or boundary, found {self.height!r}")
        if self.height and self.boundary:
            raise ConfigError(
                f"decoding: height ({self.height}) reads a head and boundary ({self.boundary}) another class to "
                f"separate objects; give one of them"
            )
        if not 0.0 < self.min_distance_nm < math.inf:
            raise ConfigError(f"decoding: min_distance_nm must be positive, found {self.min_distance_nm}")
        if not 0.0 < self.max_depth_nm < math.inf:
            raise ConfigError(f"decoding: max_depth_nm must be positive, found {self.max_depth_nm}")
        for name in ("bias_short", "bias_long", "merge_threshold", "stitch_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"decoding: {name} must lie between 0 and 1, found {getattr(self, name)}")
        if not 0.0 <= self.halo_nm < math.inf:
            raise ConfigError(f"decoding: halo_nm must be at least 0, found {self.halo_nm}")
        for field in dataclasses.fields(self):
            methods = _ONLY.get(field.name, METHODS)
            if self.method not in methods and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"decoding: {field.name} belongs to method {' or '.join(methods)}, found method {self.method}"
                )

    @property
    def kind(self) -> str:
        """``semantic`` (0/1) or ``instance`` (ids): what the labels hold."""
        return "semantic" if self.method == "threshold" else "instance"

    @property
    def is_local(self) -> bool:
        """Whether a voxel's label depends on its own probability only, so that blocks can be decoded alone."""
        return self.method == "threshold" and self.min_size_nm3 == 0 and not self.fill_holes

    @property
    def has_walls(self) -> bool:
        """Whether something predicted separates objects: another class, or the class's head of boundaries."""
        return bool(self.boundary) or self.height == "boundary"

    def min_voxels(self, voxel_size: Sequence[float]) -> int:
        """The smallest whole number of voxels (nm, z y x) that is at least ``min_size_nm3``."""
        size = triple(voxel_size, "voxel_size")
        return math.ceil(self.min_size_nm3 / (size[0] * size[1] * size[2]) - 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """For attributes and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "decoding") -> DecodeParameters:
        """The inverse of `to_dict`; absent keys keep their defaults, an unknown key is a `ConfigError`."""
        return _with(cls(), values, where)


def default_parameters(class_name: str) -> DecodeParameters:
    """Connected components of at least 10,000 nm^3 (a cube of 21.5 nm) for instance classes, else a plain threshold."""
    if is_instance_class(class_name):
        return DecodeParameters(method="cc3d", min_size_nm3=1e4)
    return DecodeParameters()


def decode_parameters(
    classes: Iterable[str],
    default: Mapping[str, Any] | None = None,
    by_class: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, DecodeParameters]:
    """The parameters of every class: its kind's, changed by ``default``, changed by its own entry in ``by_class``.

    This is how the configuration's ``decoding.default`` and ``decoding.classes`` are read. An entry for a class that is
    neither among ``classes`` nor one of the challenge's raises `UnknownNameError`; an unknown key `ConfigError`.
    """
    names = list(classes)
    own = dict(by_class or {})
    for name in own:
        if name not in names and name not in CLASSES:
            raise unknown_name("class", name, {*names, *CLASSES}, "decoding.classes")
    result = {}
    for name in names:
        general = _with(default_parameters(name), default or {}, "decoding.default")
        result[name] = _with(general, own.get(name, {}), f"decoding.classes.{name}")
    return result


def _with(parameters: DecodeParameters, values: Mapping[str, Any], where: str) -> DecodeParameters:
    fields = {f.name: type(getattr(parameters, f.name)) for f in dataclasses.fields(parameters)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(str(unknown_name("key", str(key), fields, where)))
        kind = fields[key]
        right = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not right or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{where}.{key} must be a {kind.__name__}, found {value!r}")
        changes[str(key)] = kind(value)
    return dataclasses.replace(parameters, **changes)
