"""MONAI dictionary transforms on dense patches: ``known`` and instance ``ids`` follow ``label`` through them.

In `Augmentor` (the chain that ``data.augmentations`` names) and `GivenAugmentor` (built by a user), the transforms know
only ``image`` and ``label``. ``known`` moves as ``label`` does; a voxel is known afterwards only if everything it was
interpolated from is known. Labels are interpolated as fractions and then thresholded, unless ``mode`` is nearest;
``ids`` move by nearest neighbor, and are made to agree with label and known afterwards.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.data.augmentation.argument_rules import is_sequence, several
from connectomics.errors import ConfigError, InputError, require_known, unknown_name

Sample = dict[str, Any]
_KEYS = ("image", "label", "known")
_ALL_KNOWN = 0.999  # interpolation weights sum to 1 except for rounding
# transforms that resample to a size: torch's "nearest" is off by half a voxel there, "nearest-exact" is not
_RESIZING = ("RandZoomd", "Zoomd", "Resized", "RandSimulateLowResolutiond")
_KEEP = "a transform must keep every array and its shape; remove it, or set data.patch_size to the size that it gives"


class Augmentor:
    """A chain of MONAI dictionary transforms for numpy arrays (C, D, H, W).

    Calling it takes ``image``, ``label``, ``known``, and ``ids`` (I, D, H, W) as in `PackedPatch` if there are any, and
    returns the same, contiguous: image and label float32, known bool, ids int32, -1 where nothing was; call `agree` on
    the ids afterwards. `seed` makes the next call reproducible.
    """

    def __init__(self, transforms: Sequence[Callable[[Sample], Sample]]) -> None:
        from monai.transforms import Compose

        self._compose = Compose(list(transforms))
        _follow_label(self._compose)

    def seed(self, seed: int) -> None:
        """Set the random stream of every transform."""
        self._compose.set_random_state(seed=seed)

    def image_only(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the image (1, D, H, W) after a chain that changes only the image."""
        return np.ascontiguousarray(np.asarray(self._apply({"image": image})["image"]), dtype=np.float32)

    def __call__(self, sample: Mapping[str, NDArray[Any]], soft: bool = False) -> Sample:
        """Return the augmented sample, labels as fractions if ``soft``; raises `ConfigError` if a transform fails or
        changes what a sample holds."""
        moved = self._apply(_as_floats(sample))
        arrays = {name: np.ascontiguousarray(np.asarray(moved[name])) for name in (*_KEYS, "ids") if name in moved}
        result = {
            **sample,
            "image": arrays["image"].astype(np.float32, copy=False),
            "label": (arrays["label"] if soft else arrays["label"] >= 0.5).astype(np.float32),
            "known": arrays["known"] > _ALL_KNOWN,
        }
        return {**result, "ids": _as_ids(arrays["ids"])} if "ids" in arrays else result

    def _apply(self, data: Sample) -> Sample:
        try:
            result = self._compose(data)
        except RuntimeError as error:  # MONAI wraps the error of a transform
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            named = re.search(r"\.(\w+) object at", str(error))
            raise ConfigError(f"data.augmentations.{named[1] if named else '?'} cannot be applied: {cause}") from error
        changed = _what_changed(data, result)
        if changed is None:
            return result
        for transform in self._compose.transforms:  # find the one that did it
            by_this = _what_changed(data, transform(dict(data)))
            if by_this is not None:
                raise ConfigError(f"data.augmentations.{type(transform).__name__} {by_this}; {_KEEP}")
        raise ConfigError(f"data.augmentations {changed}; {_KEEP}")


def _what_changed(before: Sample, after: Any) -> str | None:
    """Return what a transform did that a training patch does not allow; None if it kept all arrays and shapes."""
    if not isinstance(after, Mapping):
        return f"gives a {type(after).__name__} of {len(after)} samples, expected one sample"
    missing = [name for name in before if name not in after]
    if missing:
        return f"removes {', '.join(missing)} from the sample"
    for name, array in before.items():
        if tuple(np.shape(after[name])) != tuple(np.shape(array)):
            return f"gives {name} the shape {tuple(np.shape(after[name]))}, expected {tuple(np.shape(array))}"
    return None


class GivenAugmentor:
    """A MONAI transform or `Compose` that a user gave to a data set.

    ``known`` and ``ids`` move in the same call as ``label``, so with the same random numbers. A function that is not
    a MONAI transform is called with the sample as it is, and must move all of it.
    """

    def __init__(self, given: Callable[[Sample], Any]) -> None:
        self.given = given
        self._is_monai = _follow_label(given)

    def __call__(self, sample: Sample, instances: Sequence[str], classes: Sequence[str]) -> Any:
        """Return the augmented sample, or a list of samples if the transform gives several.

        ``ids`` are of ``instances``, ``label`` and ``known`` of ``classes``. Raises `InputError` if label and known
        come back with other shapes than each other or other channels than ``classes``.
        """
        if not self._is_monai:
            return self.given(sample)
        moved = self.given(_as_floats(sample))
        if isinstance(moved, list):
            return [self._finished(part, instances, classes) for part in moved]
        return self._finished(moved, instances, classes)

    @staticmethod
    def _finished(moved: Sample, instances: Sequence[str], classes: Sequence[str]) -> Sample:
        shapes = {name: tuple(moved[name].shape) if name in moved else None for name in ("label", "known")}
        shape = shapes["label"]
        if shape is None or shape != shapes["known"] or shape[0] != len(classes):
            raise InputError(
                f"the augmentor gives label {shape} and known {shapes['known']}, expected the same shape with "
                f"{len(classes)} channels; apply transforms that remove label or change its channels after the data set"
            )
        label, known = np.asarray(moved["label"]) >= 0.5, np.asarray(moved["known"]) > _ALL_KNOWN
        result = {
            **moved,
            "label": _like(moved["label"], label.astype(np.float32)),
            "known": _like(moved["known"], known),
        }
        if "ids" in moved:
            ids = _as_ids(np.asarray(moved["ids"]))
            result["ids"] = _like(moved["ids"], agree(ids, instances, label, known, classes))
        return result


def agree(
    ids: NDArray[np.int32],
    instances: Sequence[str],
    label: NDArray[Any],
    known: NDArray[np.bool_],
    classes: Sequence[str],
) -> NDArray[np.int32]:
    """Return ``ids`` (I, D, H, W) of ``instances`` that agree with label and known (C, D, H, W) of ``classes``.

    Ids are moved by nearest neighbor and labels are thresholded, so they may differ at the rim of an object. In the
    result an id is 0 where its class is known to be absent, and -1 where it is unknown or present without an id.
    """
    agreed = ids.copy()
    for name, channel in zip(instances, agreed, strict=True):
        if name in classes:
            at = list(classes).index(name)
            channel[(channel == 0) & (label[at] > 0)] = -1
            channel[label[at] <= 0] = 0
            channel[~known[at]] = -1
    return agreed


def _as_floats(sample: Mapping[str, Any]) -> Sample:
    """Return the sample as MONAI moves it. Transforms fill with 0, which must mean unknown: ids are increased by 1."""
    objects = {"ids": (sample["ids"] + 1).astype(np.float32)} if "ids" in sample else {}
    return {**sample, **objects, "known": np.asarray(sample["known"], np.float32)}


def _as_ids(moved: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.rint(moved).astype(np.int32) - 1


def _like(like: Any, array: NDArray[Any]) -> Any:
    """Return the array as a tensor if ``like`` is one."""
    if isinstance(like, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)


def _follow_label(transform: Any) -> bool:
    """Make ``known`` and ``ids`` follow ``label`` through a MONAI transform and the transforms in it.

    Returns False if it is not a MONAI transform. It stays the same object, with the same random state.
    """
    if "monai.transforms" not in sys.modules:  # a MONAI transform would have imported it
        return False
    from monai.transforms import Compose, MapTransform, Transform

    if isinstance(transform, Compose):
        for part in transform.transforms:
            _follow_label(part)
    elif isinstance(transform, MapTransform) and "label" in transform.keys and "known" not in transform.keys:
        # every dictionary transform calls this for its keys and the options of each key
        iterate: Any = transform.key_iterator
        if not isinstance(iterate, partial):
            setattr(transform, "key_iterator", partial(_with_followers, iterate))  # noqa: B010
    return isinstance(transform, Transform)


def _with_followers(
    key_iterator: Callable[..., Iterator[Any]], data: Mapping[Any, Any], *options: Any
) -> Iterator[Any]:
    """Yield what MONAI's ``key_iterator`` yields, and ``known`` and ``ids`` after ``label`` with its options."""
    for item in key_iterator(data, *options):
        yield item
        key, *own = item if options else (item,)
        for name in ("known", "ids") if key == "label" else ():
            if name in data:
                nearest = [_nearest(option) for option in own] if name == "ids" else own
                yield (name, *nearest) if options else name


def _nearest(option: Any) -> Any:
    """Return the option of a key, with interpolation modes (a name, or the order of a spline) replaced by nearest."""
    if type(option) is int:
        return 0
    if str(option).lower() in ("trilinear", "linear", "area"):  # modes of a transform that resizes
        return "nearest-exact"
    return "nearest" if str(option).lower() in ("bilinear", "bicubic") else option


# -- from the configuration ------------------------------------------------------------------------------------------
def build_augmentor(augmentations: Mapping[str, Any], patch_size: Sequence[int]) -> Augmentor | None:
    """Return the chain that ``data.augmentations`` names (transform -> arguments), in this order; None if empty.

    A suffix ``_2``, ``_3``... repeats a transform; `RandRotate90d` takes a list of planes and becomes one transform
    per plane.

    Raises:
        UnknownNameError: MONAI does not have the transform or the argument. ConfigError: MONAI refuses an argument.
    """
    transforms: list[Callable[[Sample], Sample]] = []
    for name, arguments in augmentations.items():
        if arguments is None:
            continue
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"data.augmentations.{name}: the arguments must be keys and values, got {arguments!r}")
        transforms += _build(str(name), dict(arguments), patch_size)
    return Augmentor(transforms) if transforms else None


def _build(name: str, arguments: dict[str, Any], patch_size: Sequence[int]) -> list[Callable[[Sample], Sample]]:
    import monai.transforms

    kind = re.sub(r"(?<=.)_\d+$", "", name)
    cls = getattr(monai.transforms, kind, None)
    if cls is None or not kind.endswith("d"):
        known = [n for n in dir(monai.transforms) if n.endswith("d") and n[:1].isupper()]
        raise unknown_name("transform", kind, known, "data.augmentations")
    if not issubclass(cls, monai.transforms.Randomizable) and not kind.startswith("Rand"):
        raise ConfigError(
            f"data.augmentations.{name}: {kind} is not random, and would change training only, not validation and "
            "prediction. Normalization belongs to the model: remove the transform, and set data.intensity_range to "
            "auto, table or [low, high]"
        )
    allowed = inspect.signature(cls).parameters
    require_known(f"argument of {kind}", arguments, allowed, "data.augmentations")
    if arguments.get("keys") is None:
        raise ConfigError(f"data.augmentations.{name}: keys is missing; set it to [image] or [image, label]")
    keys = [str(key) for key in several(arguments["keys"])]
    require_known("key", keys, _KEYS, f"data.augmentations.{name}.keys")
    variants = [_with_modes(kind, {**arguments, "keys": keys}, allowed)]
    if kind == "RandRotate90d":
        given = list(arguments["spatial_axes"]) if arguments.get("spatial_axes") is not None else [0, 1]
        pairs: list[Any] = given if is_sequence(given[0]) else [given]
        planes = [tuple(pair) for pair in pairs]
        for a, b in planes:
            if patch_size[a] != patch_size[b]:
                raise ConfigError(
                    f"data.augmentations.{name} rotates axes {(a, b)}, which needs a patch of the same length on both, "
                    f"got data.patch_size {list(patch_size)}; remove that plane from spatial_axes"
                )
        variants = [{**variants[0], "spatial_axes": plane} for plane in planes]
    try:
        return [cls(**{k: _tuples(v) for k, v in variant.items()}) for variant in variants]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.augmentations.{name}: {' '.join(str(error).split())}") from error


def _with_modes(kind: str, arguments: dict[str, Any], allowed: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the arguments of a transform that moves labels with interpolation and padding modes for each key."""
    keys = arguments["keys"]
    if not {"label", "known"} & set(keys):
        return arguments
    result = dict(arguments)
    resizing = kind in _RESIZING
    if "mode" in allowed:
        linear, nearest = ("trilinear", "nearest-exact") if resizing else ("bilinear", "nearest")
        given = _by_key(arguments.get("mode"), keys)
        label = nearest if str(given.get("label")).startswith("nearest") else linear
        result["mode"] = [given.get("image", linear) if key == "image" else label for key in keys]
    if "padding_mode" in allowed:
        # resizing pads as numpy does ("constant": zeros), the other transforms as torch's grid_sample
        image = _by_key(arguments.get("padding_mode"), keys).get("image") or ("edge" if resizing else "border")
        result["padding_mode"] = [image if k == "image" else "constant" if resizing else "zeros" for k in keys]
    return result


def _by_key(value: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Return an argument as MONAI takes it (one for all keys, or one per key) by key."""
    if value is None:
        return {}
    values = [value] * len(keys) if isinstance(value, str) else list(value)
    return dict(zip(keys, values, strict=False))


def _tuples(value: Any) -> Any:
    """Return lists as tuples: MONAI reads ``(a, b)`` as a range in some places where it refuses a list."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
