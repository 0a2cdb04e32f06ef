"""What ``data.augmentations`` names, applied to patches.

`PatchAugmentor` is what training uses: flips, turns, affine and elastic deformations run fused into the reading of a
patch (`connectomics.data.spatial`), intensity transforms that the device can do are left to it
(`connectomics.data.intensity`), and the rest runs as MONAI transforms. `Augmentor` runs everything as MONAI dictionary
transforms on dense arrays, image, label and known alike. `GivenAugmentor` is a chain that somebody else built, given to
a data set, whose keys know of ``image`` and ``label`` only.

What it adds to what the YAML says:

- ``known`` goes wherever ``label`` goes, with zeros (unknown) where nothing was: a voxel is known afterwards only
  where everything that it was made of is known, so an unknown voxel stays unknown when it is moved;
- labels are moved as shares and then voted (present from one half on), unless ``mode`` says nearest;
- ``ids`` of objects, where they are asked for, go wherever ``label`` goes, by nearest, and are made to agree with label
  and known afterwards;
- `RandRotate90d` takes a list of planes: one transform for each.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelCodes
from connectomics.cellmap.labels import LabelVolume, words_for
from connectomics.data.intensity import recognise
from connectomics.data.patches import PackedPatch
from connectomics.data.spatial import SpatialAugmentor
from connectomics.errors import ConfigError, InputError, unknown_name

log = logging.getLogger(__name__)

Sample = dict[str, Any]
_FIELDS = ("image", "label", "known")
_ALL_KNOWN = 0.999  # weights of an interpolation add up to 1 but for rounding
# transforms that resample to a size: torch's plain "nearest" is half a voxel off there, "nearest-exact" is not
_RESIZING = ("RandZoomd", "Zoomd", "Resized", "RandSimulateLowResolutiond")
_KEEP = "a transform must keep every array and its shape; remove it, or set data.patch_size to the size that it gives"
# default of the image's values beyond its border, where the transform has such an option
_IMAGE_PADDING = "border"


class Augmentor:
    """A chain of MONAI dictionary transforms for ``{"image", "label", "known"}`` numpy arrays (C, D, H, W).

    Calling it gives the same three arrays, contiguous: image float32, label float32, known bool. `seed` makes the next
    call reproducible, whichever process makes it. A chain that was built with ``ids`` takes and gives ``ids`` as well,
    int32 (I, D, H, W) as in `PackedPatch`, -1 where nothing was; `agree` comes after it.
    """

    def __init__(self, transforms: Sequence[Callable[[Sample], Sample]], ids: bool = False) -> None:
        from monai.transforms import Compose

        self._compose = Compose(list(transforms))
        self._ids = ids

    def seed(self, seed: int) -> None:
        """Set the random stream of every transform."""
        self._compose.set_random_state(seed=seed)

    def image_only(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """The image (1, D, H, W) after a chain that touches nothing else."""
        return np.ascontiguousarray(np.asarray(self._apply({"image": image})["image"]), dtype=np.float32)

    def __call__(self, sample: Mapping[str, NDArray[Any]]) -> Sample:
        if ("ids" in sample) != self._ids:
            raise InputError(
                f"this chain was built {'with' if self._ids else 'without'} ids, and the sample is "
                f"{'with' if 'ids' in sample else 'without'}: build it with ids={'ids' in sample}"
            )
        # what a transform fills in is 0, which must be unknown: ids travel one higher
        objects = {"ids": (sample["ids"] + 1).astype(np.float32)} if self._ids else {}
        moved = self._apply({**sample, **objects, "known": np.asarray(sample["known"], np.float32)})
        if self._ids:
            objects["ids"] = np.ascontiguousarray(np.rint(np.asarray(moved["ids"])).astype(np.int32) - 1)
        result = {name: np.ascontiguousarray(np.asarray(moved[name])) for name in _FIELDS}
        return {
            **sample,
            **objects,
            "image": result["image"].astype(np.float32, copy=False),
            "label": (result["label"] >= 0.5).astype(np.float32),
            "known": result["known"] > _ALL_KNOWN,
        }

    def _apply(self, data: Sample) -> Sample:
        try:
            result = self._compose(data)
        except RuntimeError as error:  # MONAI's wrapper around whatever the transform refused
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            named = re.search(r"\.(\w+) object at", str(error))
            raise ConfigError(f"data.augmentations.{named[1] if named else '?'} cannot be applied: {cause}") from error
        changed = _what_changed(data, result)
        if changed is None:
            return result
        for transform in self._compose.transforms:  # which of them it is, now that one of them is known to
            self._refuse_change(transform, data)
        raise ConfigError(f"data.augmentations {changed}; {_KEEP}")

    @staticmethod
    def _refuse_change(transform: Callable[[Sample], Sample], data: Sample) -> None:
        """Raise `ConfigError` if a transform alone changes what a sample consists of."""
        changed = _what_changed(data, transform(dict(data)))
        if changed is not None:
            raise ConfigError(f"data.augmentations.{type(transform).__name__} {changed}; {_KEEP}")


def _what_changed(before: Sample, after: Any) -> str | None:
    """What a transform did that a training patch cannot take; None if it kept all arrays and their shapes."""
    if not isinstance(after, Mapping):
        return f"gives a {type(after).__name__} of {len(after)} samples, expected one sample"
    missing = [name for name in before if name not in after]
    if missing:
        return f"removes {', '.join(missing)} from the sample"
    for name, array in before.items():
        if tuple(np.shape(after[name])) != tuple(np.shape(array)):
            return f"gives {name} the shape {tuple(np.shape(after[name]))}, expected {tuple(np.shape(array))}"
    return None


def agree(
    ids: NDArray[np.int32],
    instances: Sequence[str],
    label: NDArray[Any],
    known: NDArray[np.bool_],
    classes: Sequence[str],
) -> NDArray[np.int32]:
    """``ids`` (I, D, H, W) of ``instances``, made to agree with label and known (C, D, H, W) of ``classes``.

    Ids are moved by nearest and labels by vote, so that the two may differ at an object's rim. Afterwards an id is 0
    where its class is known absent, -1 where it is unknown, and -1 where it is present without an id.
    """
    agreed = ids.copy()
    for name, row in zip(instances, agreed, strict=True):
        if name in classes:
            at = list(classes).index(name)
            row[(row == 0) & (label[at] > 0)] = -1
            row[label[at] <= 0] = 0
            row[~known[at]] = -1
    return agreed


class GivenAugmentor:
    """A MONAI transform, or a `Compose` of them, made to treat ``known`` (and ``ids``) wherever it treats ``label``.

    The same call of a transform moves them, so the same random numbers do: by the mode that it has for ``label``, and
    ids by nearest. Afterwards a voxel is present from one half on, and known where everything that it was made of is
    known. A function that is no MONAI transform is called with what there is, and moves all of it itself.
    """

    def __init__(self, given: Callable[[Sample], Any]) -> None:
        self.given = given
        self._is_monai = _follow_label(given)

    def __call__(self, sample: Sample, instances: Sequence[str], classes: Sequence[str]) -> Any:
        """The sample, or a list of samples where a transform gives several. ``ids`` are of ``instances``, ``label`` and
        ``known`` of ``classes``. `InputError` where label and known do not come out as a pair."""
        if not self._is_monai:
            return self.given(sample)
        # what a transform fills in is 0, which must be unknown: ids travel one higher
        objects = {"ids": (sample["ids"] + 1).astype(np.float32)} if "ids" in sample else {}
        moved = self.given({**sample, **objects, "known": np.asarray(sample["known"], np.float32)})
        if isinstance(moved, list):
            return [self._finished(part, instances, classes) for part in moved]
        return self._finished(moved, instances, classes)

    @staticmethod
    def _finished(moved: Sample, instances: Sequence[str], classes: Sequence[str]) -> Sample:
        shapes = {name: tuple(moved[name].shape) if name in moved else None for name in ("label", "known")}
        shape = shapes["label"]
        if shape is None or shape != shapes["known"] or shape[0] != len(classes):
            raise InputError(
                f"the augmentor gives label {shape} and known {shapes['known']}, expected both with {len(classes)} "
                "channels and of one shape; leave transforms that take label away or change its channels to the end "
                "of the pipeline, after the data set"
            )
        label, known = np.asarray(moved["label"]) >= 0.5, np.asarray(moved["known"]) > _ALL_KNOWN
        result = {**moved, "label": _as(moved["label"], label.astype(np.float32)), "known": _as(moved["known"], known)}
        if "ids" in moved:
            ids = np.rint(np.asarray(moved["ids"])).astype(np.int32) - 1
            result["ids"] = _as(moved["ids"], agree(ids, instances, label, known, classes))
        return result


def _as(like: Any, array: NDArray[Any]) -> Any:
    """The array as a tensor where ``like`` is one."""
    if isinstance(like, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)


def _follow_label(transform: Any) -> bool:
    """Let ``known`` and ``ids`` follow ``label`` through a MONAI transform and those that it holds; False where it is
    none. It stays the same object, with the same random state, and treats samples without them as before."""
    from monai.transforms import Compose, MapTransform, Transform

    if isinstance(transform, Compose):
        for part in transform.transforms:
            _follow_label(part)
    elif isinstance(transform, MapTransform) and "label" in transform.keys and "known" not in transform.keys:
        # what every dictionary transform asks for its keys, and for the options that it has for each
        ask: Any = transform.key_iterator
        if not isinstance(ask, partial):
            setattr(transform, "key_iterator", partial(_with_followers, ask))  # noqa: B010
    return isinstance(transform, Transform)


def _with_followers(
    key_iterator: Callable[..., Iterator[Any]], data: Mapping[Any, Any], *options: Any
) -> Iterator[Any]:
    """MONAI's ``key_iterator``, with ``known`` and ``ids`` after ``label``, by the options of ``label``."""
    for item in key_iterator(data, *options):
        yield item
        key, *own = item if options else (item,)
        for name in ("known", "ids") if key == "label" else ():
            if name in data:
                nearest = [_nearest(option) for option in own] if name == "ids" else own
                yield (name, *nearest) if options else name


def _nearest(option: Any) -> Any:
    """A key's option, where it is a way to interpolate nearest instead (a name, or the order of a spline)."""
    if type(option) is int:
        return 0
    return "nearest" if str(option).lower() in ("bilinear", "trilinear", "bicubic", "linear", "area") else option


@dataclass(frozen=True)
class PatchAugmentor:
    """The augmentation of training patches in a loader worker.

    Attributes:
        spatial: drawn for each patch and done while it is read; None for none.
        others: MONAI transforms that come after; None for none.
        moves_labels: whether one of these moves labels, which must be made dense for it (slow).
    """

    spatial: SpatialAugmentor | None
    others: Augmentor | None
    moves_labels: bool = False

    @classmethod
    def of(
        cls,
        augmentations: Mapping[str, Any],
        patch_size: Sequence[int],
        extent: Sequence[float] | None = None,
        ids: bool = False,
        voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> PatchAugmentor | None:
        """From ``data.augmentations``; None where nothing is left to do in a worker. Errors as `build_augmentor`.

        ``extent``: voxels of the run (z y x) that the widest of further views covers, where there are any. ``ids``:
        whether the patches have ids of objects. ``voxel_size``: of the run, nm, z y x.
        """
        spatial, remaining = SpatialAugmentor.split(augmentations, patch_size, extent, voxel_size)
        if len(set(voxel_size)) > 1:
            _refuse_turns(remaining, voxel_size)
        _, remaining = recognise(remaining)
        others = build_augmentor(remaining, patch_size, ids)
        if spatial is None and others is None:
            return None
        moving = [n for n, a in remaining.items() if a is not None and {"label", "known"} & set(_keys_of(a))]
        if moving:
            log.info("data.augmentations: %s runs on dense labels, which is slow", ", ".join(moving))
        return cls(spatial, others, bool(moving))

    def finish(self, patch: PackedPatch, seed: int) -> PackedPatch:
        """What comes after the reading: the MONAI transforms, on the run's own view."""
        if self.others is None:
            return patch
        self.others.seed(seed)
        if not self.moves_labels:
            image = self.others.image_only(patch.images[0])
            return replace(patch, images=(image, *patch.images[1:]))
        moved = self.others(patch.dense())
        codes = LabelCodes.of(_packed(moved["label"], moved["known"], patch))
        ids = None
        if patch.ids is not None:
            ids = agree(moved["ids"], patch.instances, moved["label"], moved["known"], patch.states.classes)
        images = (moved["image"], *patch.images[1:])
        return replace(patch, images=images, codes=codes.codes, states=codes.states, ids=ids)


def _packed(label: NDArray[np.float32], known: NDArray[np.bool_], patch: PackedPatch) -> LabelVolume:
    """Dense labels (C, D, H, W) as words again."""
    classes = patch.states.classes
    words = np.zeros((2, words_for(len(classes)), *label.shape[1:]), np.uint64)
    for channel in range(len(classes)):
        word, bit = divmod(channel, 64)
        words[0, word] |= ((label[channel] > 0) & known[channel]).astype(np.uint64) << np.uint64(bit)
        words[1, word] |= known[channel].astype(np.uint64) << np.uint64(bit)
    return LabelVolume(patch.grid, classes, words[0], words[1])


def _refuse_turns(augmentations: Mapping[str, Any], voxel_size: Sequence[float]) -> None:
    """Raise `ConfigError` for a MONAI transform that turns or shears in voxels, where these are no cubes."""
    for name, arguments in augmentations.items():
        kind = re.sub(r"_\d+$", "", name)
        turning = [
            key for key in ("rotate_range", "shear_range") if isinstance(arguments, Mapping) and arguments.get(key)
        ]
        if kind == "RandRotated" or turning:
            raise ConfigError(
                f"data.augmentations.{name} turns or shears in voxels, and voxels of {list(voxel_size)} nm are no "
                "cubes: tissue would be distorted; use RandAffined (or one Rand3DElasticd) with keys [image, label], "
                "mode bilinear, and before any other transform of labels: it turns in nm"
            )


def _keys_of(arguments: Any) -> list[str]:
    keys = arguments.get("keys") if isinstance(arguments, Mapping) else None
    return [str(k) for k in ([keys] if isinstance(keys, str) else keys or [])]


def build_augmentor(augmentations: Mapping[str, Any], patch_size: Sequence[int], ids: bool = False) -> Augmentor | None:
    """The chain named under ``data.augmentations``: transform name -> arguments, in their order; None where empty.
    ``ids``: whether samples have ids of objects, which then go with the labels.

    A name ending in ``_2``, ``_3``... repeats a transform. Raises `UnknownNameError` (nearest name) for a transform or
    an argument that MONAI does not have, `ConfigError` for arguments that it refuses.
    """
    transforms: list[Callable[[Sample], Sample]] = []
    for name, arguments in augmentations.items():
        if arguments is None:
            continue
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"data.augmentations.{name} must map arguments to values, found {arguments!r}")
        transforms += _build(str(name), dict(arguments), patch_size, ids)
    return Augmentor(transforms, ids) if transforms else None


def _build(
    name: str, arguments: dict[str, Any], patch_size: Sequence[int], ids: bool
) -> list[Callable[[Sample], Sample]]:
    import monai.transforms

    base, _, suffix = name.rpartition("_")
    kind = base if base and suffix.isdigit() else name
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
    for key in arguments:
        if key not in allowed:
            raise unknown_name(f"argument of {kind}", key, allowed, "data.augmentations")
    keys = arguments.pop("keys", None)
    if keys is None:
        raise ConfigError(f"data.augmentations.{name}: keys is absent; give [image] or [image, label]")
    fields = [str(k) for k in ([keys] if isinstance(keys, str) else keys)]
    for key in fields:
        if key not in _FIELDS:
            raise unknown_name("key", key, _FIELDS, f"data.augmentations.{name}.keys")
    arguments = _for_fields(kind, arguments, fields, allowed, ids)
    planes = arguments.get("spatial_axes")
    if kind == "RandRotate90d":
        given = list(planes) if planes is not None else [0, 1]
        several: list[Any] = given if isinstance(given[0], Sequence) else [given]
        chosen = [tuple(p) for p in several]
        for plane in chosen:
            if patch_size[plane[0]] != patch_size[plane[1]]:
                raise ConfigError(
                    f"data.augmentations.{name} turns axes {plane}, which needs a patch as long on both; "
                    f"data.patch_size is {list(patch_size)}: leave that plane out of spatial_axes"
                )
        variants = [{**arguments, "spatial_axes": plane} for plane in chosen]
    else:
        variants = [arguments]
    try:
        return [cls(**{k: _tuples(v) for k, v in variant.items()}) for variant in variants]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.augmentations.{name}: {' '.join(str(error).split())}") from error


def _for_fields(
    kind: str, arguments: dict[str, Any], fields: list[str], allowed: Mapping[str, inspect.Parameter], ids: bool
) -> dict[str, Any]:
    """The arguments with ``known`` (and ``ids``) added beside ``label``, and modes given for each field."""
    given_modes = _by_field(arguments.get("mode"), fields)
    given_padding = _by_field(arguments.get("padding_mode"), fields)
    if "label" in fields and "known" not in fields:
        fields = [*fields, "known"]
    if "label" in fields and ids:
        fields = [*fields, "ids"]
    arguments = {**arguments, "keys": fields}
    if not {"label", "known"} & set(fields):
        return arguments
    resizing = kind in _RESIZING
    if "mode" in allowed:
        linear, nearest = ("trilinear", "nearest-exact") if resizing else ("bilinear", "nearest")
        modes = {"image": given_modes.get("image", linear), "ids": nearest}
        modes["label"] = modes["known"] = nearest if str(given_modes.get("label")).startswith("nearest") else linear
        arguments["mode"] = [modes[f] for f in fields]
    if "padding_mode" in allowed:
        # resizing pads as numpy does ("constant": zeros), the others as torch's grid_sample
        image_padding = given_padding.get("image") or ("edge" if resizing else _IMAGE_PADDING)
        arguments["padding_mode"] = [
            image_padding if f == "image" else ("constant" if resizing else "zeros") for f in fields
        ]
    return arguments


def _by_field(value: Any, fields: Sequence[str]) -> dict[str, Any]:
    """A per-key argument as MONAI takes it (one for all, or one a key) by field."""
    if value is None:
        return {}
    values = [value] * len(fields) if isinstance(value, str) else list(value)
    return dict(zip(fields, values, strict=False))


def _tuples(value: Any) -> Any:
    """Lists of numbers as tuples: MONAI reads ``(a, b)`` as a range in some places where it refuses a list."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
