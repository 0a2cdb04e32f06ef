"""The decoding parameters of a class: one frozen value, in nanometers, with defaults by the kind of the class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from numpy.typing import NDArray
from pydantic import StrictBool, StrictFloat, StrictInt

from connectomics.cellmap.classes import CLASSES, is_instance_class
from connectomics.config.values import one_of, read
from connectomics.errors import ConfigError, InputError, unknown_name
from connectomics.geometry import triple

METHODS = ("threshold", "cc3d", "watershed", "mutex_watershed", "agglomeration")
#: Methods that read the affinities predicted with the class.
AFFINITY_METHODS = ("mutex_watershed", "agglomeration")
#: Method -> function, added by `register_decoder`.
DECODERS: dict[str, Callable[[NDArray[Any], Sequence[float], DecodeParameters], NDArray[Any]]] = {}
_SHARES = ("threshold", "bias_short", "bias_long", "merge_threshold", "stitch_threshold")
_POSITIVE = ("min_distance_nm", "max_depth_nm")
#: Parameters that only some methods read; with other methods they must keep their defaults.
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
    """How the probabilities of one class become labels.

    Sizes and distances are physical, so the same parameters mean the same at every voxel size.

    Attributes:
        threshold: foreground is where the probability is **above** it; 0 to 1.
        method: one of `METHODS`, or a name given to `register_decoder`. ``threshold`` gives a 0/1 mask; ``cc3d``,
            ``watershed``, and from affinities ``mutex_watershed`` and ``agglomeration`` give instance ids.
        min_size_nm3: smaller objects (of a mask: smaller components) are removed; nm^3.
        fill_holes: cavities go to the object around them.
        connectivity: 6 (faces), 18 (edges) or 26 (corners) neighbors are connected.
        min_distance_nm: watershed only: the reach of a seed along each axis, nm.
        max_depth_nm: watershed only: depths are cut off here, nm, and wider objects are not split. Probabilities are
            read this far beyond a block. It must exceed half the thickness of the necks to cut.
        height: watershed only: the head of the class (`model.heads`) that it reads, or "" for none. ``distance``
            replaces the distance to the background. ``boundary`` separates objects as a boundary class does.
        boundary: a class that separates objects (``pm`` for ``cell``), or "" for none: objects are found where the
            probability of this class is not above the threshold, and then grown back over it.
        bias_short, bias_long: mutex_watershed only: the affinity above which two voxels attract and below which they
            repel each other; of neighbors, and of voxels farther apart. Higher values split more.
        merge_threshold: agglomeration only: regions are merged while their mean affinity is above it.
        halo_nm: affinities only: the halo that is segmented with a block, nm; 0: the longest offset and 16 voxels.
        stitch_threshold: affinities only: how far two blocks must agree at a face to unite their pieces, 0 to 1.
    """

    threshold: StrictFloat = 0.5
    method: str = "threshold"
    min_size_nm3: StrictFloat = 0.0
    fill_holes: StrictBool = False
    connectivity: StrictInt = 26
    min_distance_nm: StrictFloat = 80.0
    max_depth_nm: StrictFloat = 320.0
    height: Annotated[str, one_of("", "distance", "boundary")] = ""
    boundary: str = ""
    bias_short: StrictFloat = 0.5
    bias_long: StrictFloat = 0.5
    merge_threshold: StrictFloat = 0.5
    halo_nm: StrictFloat = 0.0
    stitch_threshold: StrictFloat = 0.5

    def __post_init__(self) -> None:
        def require(right: bool, name: str, rule: str) -> None:
            if not right:
                raise ConfigError(f"{name} must {rule}, got {getattr(self, name)!r}")

        for name in _SHARES:
            require(0.0 <= getattr(self, name) <= 1.0, name, "lie between 0 and 1")
        for name in ("min_size_nm3", "halo_nm"):
            require(0.0 <= getattr(self, name) < math.inf, name, "be at least 0 and finite")
        for name in _POSITIVE:
            require(0.0 < getattr(self, name) < math.inf, name, "be positive and finite")
        methods = (*METHODS, *DECODERS)
        require(self.method in methods, "method", f"be one of {', '.join(methods)}")
        require(self.connectivity in (6, 18, 26), "connectivity", "be 6, 18 or 26")
        require(self.height in ("", "distance", "boundary"), "height", "be distance or boundary")
        if self.boundary and self.method not in ("cc3d", "watershed"):
            raise ConfigError(f"boundary separates objects and needs method cc3d or watershed, got {self.method}")
        if self.height and self.boundary:
            raise ConfigError(f"give either height or boundary, got height {self.height} and boundary {self.boundary}")
        for field in dataclasses.fields(self):
            allowed = _ONLY.get(field.name, methods)
            if self.method not in allowed and getattr(self, field.name) != field.default:
                raise ConfigError(f"{field.name} needs method {' or '.join(allowed)}, got method {self.method}")

    @property
    def kind(self) -> Literal["semantic", "instance"]:
        """What the labels hold: ``semantic`` 0/1, ``instance`` ids."""
        return "semantic" if self.method == "threshold" else "instance"

    @property
    def is_registered(self) -> bool:
        """Whether a function given to `register_decoder` decodes the class."""
        return self.method in DECODERS

    @property
    def is_local(self) -> bool:
        """Whether the label of a voxel depends on its own probability only."""
        return self.method == "threshold" and self.min_size_nm3 == 0 and not self.fill_holes

    @property
    def has_boundary(self) -> bool:
        """Whether a predicted boundary separates objects: another class, or the boundary head of the class."""
        return bool(self.boundary) or self.height == "boundary"

    def min_voxels(self, voxel_size: Sequence[float]) -> int:
        """Return the smallest number of voxels (nm, z y x) whose volume is at least ``min_size_nm3``."""
        return math.ceil(self.min_size_nm3 / math.prod(triple(voxel_size, "voxel_size")) - 1e-9)


def register_decoder(
    name: str, function: Callable[[NDArray[Any], Sequence[float], DecodeParameters], NDArray[Any]]
) -> None:
    """Register a decoding method, for ``decoding.default.method`` and ``decoding.classes.CLASS.method``.

    Call it in a module that the configuration names in ``plugins``. The function decodes whole arrays in memory; sizes
    (``min_size_nm3``) and holes (``fill_holes``) are handled afterwards, as for the other methods. A decoder registered
    before under the same name is replaced.

    Args:
        name: of the method.
        function: takes probabilities (D, H, W), float32 in [0, 1]; the voxel size (nm, z y x); and the parameters of
            the class. Returns instance ids (D, H, W), any integer type, 0 for background.

    Raises:
        InputError: the name is that of a method of this package.
    """
    if name in METHODS:
        raise InputError(f"method {name!r} is a method of this package; register yours under another name")
    DECODERS[name] = function


def default_parameters(class_name: str) -> DecodeParameters:
    """Return the parameters of a class that the configuration does not mention."""
    return DecodeParameters(**_defaults(class_name))


def decode_parameters(
    classes: Iterable[str],
    default: Mapping[str, Any] | None = None,
    by_class: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, DecodeParameters]:
    """Return the parameters of every class: its default, changed by ``default``, then by its entry in ``by_class``.

    ``default`` and ``by_class`` are ``decoding.default`` and ``decoding.classes`` of the configuration.

    Raises:
        UnknownNameError: an entry is for a class that is neither in ``classes`` nor one of the challenge.
        ConfigError: unknown key or wrong value.
    """
    names, own = list(classes), dict(by_class or {})
    for name in own:
        if name not in names and name not in CLASSES:
            raise unknown_name("class", name, {*names, *CLASSES}, "decoding.classes")
    result = {}
    for name in names:
        values = {**_defaults(name), **(default or {})}
        where = "decoding.default"
        if name in own:
            where = f"{where} and decoding.classes.{name}" if default else f"decoding.classes.{name}"
        result[name] = read(DecodeParameters, {**values, **own.get(name, {})}, where, ConfigError)
    return result


def _defaults(class_name: str) -> dict[str, Any]:
    """Components of at least 10,000 nm^3 (a cube of 21.5 nm) for instance classes, else a threshold."""
    return {"method": "cc3d", "min_size_nm3": 1e4} if is_instance_class(class_name) else {}
