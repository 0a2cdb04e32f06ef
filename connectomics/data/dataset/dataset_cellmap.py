"""Patches of CellMap crops as torch data sets: one class a sample, or all classes at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from connectomics.cellmap.catalog import Catalog, Crop, informs
from connectomics.data.augmentation import Augmentor, GivenAugmentor, PatchAugmentor, SpatialAugmentor, agree
from connectomics.data.cache import cache_folder
from connectomics.data.dataset.dataset_base import BaseDataset, Mode
from connectomics.data.patch_reader import PatchReader, PatchShape, context_needed
from connectomics.data.patches import PackedPatch
from connectomics.data.sampling import PatchRequest, foreground_points
from connectomics.data.volumes import CropVolume
from connectomics.errors import InputError, unknown_name
from connectomics.geometry import Index, Triple, VoxelGrid, triple
from connectomics.io.normalization import Normalization
from connectomics.io.store import StoreOptions

_MOST_POINTS = 2**22  # positions that a data set keeps: 100 MB
Sample = dict[str, Any]


@dataclass(frozen=True)
class PatchOptions:
    """The less usual options of a data set, ``mode_kwargs`` of the constructors.

    Attributes:
        seed: of the positions.
        balance: share of the patches of plain indices that go through a voxel of a class (else uniform).
        normalizations: by data set, how raw becomes the image; for one that is not there 0 to 255 become 0 to 1 (uint8
            raw only).
        cache: none | memory | disk: whether each crop is decoded once, and where that is kept.
        cache_dir: where it is kept on disk; None for the user's cache folder.
        cache_context: voxels of raw kept around each crop, one number; None: as far as patches can reach.
        allow_missing_raw: take crops of which some raw chunks are not stored; labels are unknown there.
        min_known: least share of a patch's voxels at which something is known, where its crop allows it.
        inputs: further views of each patch's place: (voxel size in nm, shape in voxels), z y x.
        chunk_cache_bytes: decoded chunks that a process keeps while it reads without the crop cache.
        instances: classes whose objects are told apart: samples have ``ids`` then, see `PackedPatch`.
    """

    seed: int = 42
    balance: float = 0.7
    normalizations: Mapping[str, Normalization] = field(default_factory=dict)
    cache: Literal["none", "memory", "disk"] = "none"
    cache_dir: str | None = None
    cache_context: int | None = None
    allow_missing_raw: bool = False
    min_known: float = 0.0
    inputs: tuple[tuple[Triple, Index], ...] = ()
    chunk_cache_bytes: int = 64 << 20
    instances: tuple[str, ...] = ()

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> PatchOptions:
        """Checked against the fields: an unknown one raises `UnknownNameError`."""
        for name in kwargs:
            if name not in cls.__dataclass_fields__:
                raise unknown_name("option", name, cls.__dataclass_fields__, "mode_kwargs")
        return cls(**kwargs)


class CropPatches(BaseDataset):
    """What both data sets share: crops as volumes, and patches drawn from them.

    ``data_root`` is where it was opened (None where crops were given), ``datasets`` the names of those that it has.

    Samples have ``ids`` (I, D, H, W) int32 where `PatchOptions.instances` names classes, in that order.

    A plain index gives a dense patch of that sample's crop: a new random one each time in training (from the loader
    worker's random stream), always the same one in validation and test. A `PatchRequest` (from a sampler) gives exactly
    the patch that it names, packed.
    """

    data_root: str | None = None

    def __init__(
        self,
        data_root: str,
        datasets: Sequence[str] | None,
        crops: Sequence[str] | None = None,
        classes: Sequence[str] = ("nuc", "mito"),
        mode: Mode = "train",
        patch_size: Sequence[int] = (128, 128, 128),
        resolution: Sequence[float] = (8.0, 8.0, 8.0),
        augmentor: Callable[[Sample], Sample] | PatchAugmentor | None = None,
        mode_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """``patch_size`` in voxels and ``resolution`` in nm, z y x; ``mode_kwargs`` are the fields of `PatchOptions`;
        ``augmentor`` is a `PatchAugmentor`, MONAI dictionary transforms (`GivenAugmentor`: ``known`` goes wherever
        ``label`` goes), or any function of a dense sample, which moves ``known`` itself. Raises `MissingError` or
        `UnknownNameError` for a root, data set, crop or class that is not there."""
        options = PatchOptions.from_kwargs(mode_kwargs or {})
        store = StoreOptions(cache_bytes=options.chunk_cache_bytes)
        found = Catalog.open(data_root, store).crops(datasets, crops, classes)
        self.data_root = str(data_root)
        self._set_up(found, classes, mode, patch_size, resolution, augmentor, options)

    def _set_up(
        self,
        crops: Sequence[Crop],
        classes: Sequence[str],
        mode: Mode,
        patch_size: Sequence[int],
        resolution: Sequence[float],
        augmentor: Callable[[Sample], Sample] | PatchAugmentor | None,
        options: PatchOptions,
    ) -> None:
        super().__init__(augmentor, mode)
        self.datasets = list(dict.fromkeys(crop.dataset for crop in crops))
        if len(patch_size) != 3 or min(patch_size) < 1:
            raise InputError(f"patch_size must be three positive whole numbers (z, y, x), found {list(patch_size)}")
        self.classes = tuple(classes)
        self.patch_size = (int(patch_size[0]), int(patch_size[1]), int(patch_size[2]))
        self.voxel_size = triple(resolution, "resolution")
        self.options = options
        for name in options.instances:
            if name not in self.classes:
                raise unknown_name("instance class", name, self.classes, "the classes")
        in_reading = augmentor if isinstance(augmentor, PatchAugmentor) else None
        self._augment: Augmentor | GivenAugmentor | None = None
        if augmentor is not None and not isinstance(augmentor, PatchAugmentor):
            self._augment = augmentor if isinstance(augmentor, Augmentor) else GivenAugmentor(augmentor)
        own = PatchShape(self.patch_size, self.voxel_size)
        views = [PatchShape(shape, size) for size, shape in options.inputs]
        spatial = None if in_reading is None else in_reading.spatial
        self.volumes = [self._volume(crop, own, self.classes, spatial) for crop in crops]
        self.view_volumes = [[self._volume(crop, view, (), spatial) for crop in crops] for view in views]
        for volume in self.volumes:
            volume.check()
        self.reader = PatchReader(
            self.volumes, own, list(zip(views, self.view_volumes, strict=True)), in_reading, options.min_known
        )
        self._points: dict[tuple[int, str], NDArray[np.float64]] = {}
        self._rng: np.random.Generator | None = None

    def _volume(
        self, crop: Crop, view: PatchShape, classes: tuple[str, ...], spatial: SpatialAugmentor | None
    ) -> CropVolume:
        """A crop at a view's voxel size, with as much context as patches can look at."""
        options = self.options
        ratio = np.divide(view.voxel_size, self.voxel_size)
        extent = np.multiply(view.voxels, ratio)  # in voxels of the run
        # validation slides windows that look beyond the crop by up to a quarter of a window
        plain = extent / 2 if self.mode == "train" else 0.75 * extent
        reach = (plain if spatial is None else np.asarray(spatial.reach(extent.tolist()))) / ratio
        grid = VoxelGrid.covering(crop.box, self.voxel_size)
        margin = options.cache_context
        context = context_needed(grid.shape, self.patch_size, reach.tolist(), (1 / ratio).tolist())
        return CropVolume(
            crop=crop,
            classes=classes,
            voxel_size=view.voxel_size,
            normalization=options.normalizations.get(crop.dataset),
            cache=cache_folder(options.cache, options.cache_dir),
            context=context if margin is None else (margin, margin, margin),
            allow_missing_raw=options.allow_missing_raw,
            instances=tuple(options.instances) if classes else (),  # further views have no labels
        )

    @property
    def all_volumes(self) -> list[CropVolume]:
        """Every volume that patches are read from: what there is to decode."""
        return [*self.volumes, *(volume for at in self.view_volumes for volume in at)]

    # -- where patches are -------------------------------------------------------------------------------------------
    def points(self, volume: int, class_name: str) -> NDArray[np.float64]:
        """Positions (n, 3) in nm where the class is present in that crop, found once."""
        key = (volume, class_name)
        if key not in self._points:
            found = self.volumes[volume].points(class_name)
            if found is None:
                found = foreground_points(self.volumes[volume].crop, class_name, self.options.seed)
            # both are in random order; hundreds of crops with dozens of classes must not fill the memory with places
            self._points[key] = found[: max(64, _MOST_POINTS // (len(self.volumes) * len(self.classes)))].copy()
        return self._points[key]

    def _stream(self, index: int) -> np.random.Generator:
        """The random stream of a plain index: the worker's own in training, the sample's own otherwise."""
        if self.mode != "train":
            return np.random.default_rng([self.options.seed, index])
        if self._rng is None:
            worker = get_worker_info()
            entropy = [self.options.seed] if worker is None else [self.options.seed, worker.seed % 2**63]
            self._rng = np.random.default_rng(entropy)
        return self._rng

    def _draw(self, volume: int, classes: Sequence[str], index: int) -> Sample:
        rng = self._stream(index)
        present = [c for c in classes if len(self.points(volume, c))]
        point = None
        if present and rng.random() < self.options.balance:
            points = self.points(volume, present[int(rng.integers(len(present)))])
            point = triple(points[int(rng.integers(len(points)))])
        seed = tuple(int(s) for s in rng.integers(2**31, size=2))
        patch = self.reader.read(PatchRequest(volume, point, seed))
        sample = patch.dense(classes)
        if isinstance(self._augment, GivenAugmentor):
            sample = self._augment(sample, patch.instances, classes)
        elif self._augment is not None:
            self._augment.seed(patch.seed % 2**31)
            sample = self._augment(sample)
            if "ids" in sample:
                sample["ids"] = agree(sample["ids"], patch.instances, sample["label"], sample["known"], classes)
        mean, std = np.float32(patch.normalization.mean), np.float32(patch.normalization.std)
        if (mean, std) == (0, 1):
            return sample
        return {k: (v - mean) / std if k == "image" or k.startswith("image_") else v for k, v in sample.items()}

    def __getstate__(self) -> dict[str, Any]:
        # a loader worker starts its own random stream, and the positions are the sampler's business
        return {**self.__dict__, "_rng": None, "_points": {}}


class CellMapDataset(CropPatches):
    """One sample for each (data set, crop, class): ``image`` (1, D, H, W) float32 (see `PatchOptions.normalizations`;
    in [0, 1] without), ``label`` (1, D, H, W) float32 0/1 and ``known`` (1, D, H, W) bool. A label counts only where
    ``known``.

    ``data_samples`` lists the samples: ``dataset``, ``crop``, ``class``, ``raw_path``, ``label_path`` (None where the
    class is known through others only) and ``scale_level``, the pyramid level that raw is read from.
    """

    @cached_property
    def data_samples(self) -> list[dict[str, Any]]:
        """The samples: every class of every crop in which it can be known."""
        return [
            self._describe(number, name)
            for number, volume in enumerate(self.volumes)
            for name in self.classes
            if informs(name, volume.crop.labels)
        ]

    def _describe(self, volume: int, name: str) -> dict[str, Any]:
        crop = self.volumes[volume].crop
        label = crop.labels.get(name)
        return {
            "dataset": crop.dataset,
            "crop": crop.name,
            "class": name,
            "raw_path": crop.raw,
            "label_path": label.location if label else None,
            "scale_level": crop.raw_source.level_for(self.voxel_size),
            "volume": volume,
        }

    def __len__(self) -> int:
        return len(self.data_samples)

    def __getitem__(self, index: int | PatchRequest) -> Sample:
        if isinstance(index, PatchRequest):
            raise InputError("CellMapDataset has one class a sample and takes plain indices, not patch requests")
        info = self.data_samples[index]
        return self._draw(info["volume"], [info["class"]], index)


class CellMapMultiClassDataset(CropPatches):
    """One sample for each crop: ``image`` (1, D, H, W) float32 (see `PatchOptions.normalizations`; in [0, 1] without),
    ``label`` (C, D, H, W) float32 0/1 and
    ``known`` (C, D, H, W) bool, in the order of ``classes``. A class that nobody annotated is unknown, not absent.

    ``crop_groups`` lists the crops: ``dataset``, ``crop``, ``raw_path``, ``label_paths`` (class -> path).
    """

    @classmethod
    def of_crops(
        cls,
        crops: Sequence[Crop],
        classes: Sequence[str],
        mode: Mode,
        patch_size: Sequence[int],
        resolution: Sequence[float],
        augmentor: Callable[[Sample], Sample] | PatchAugmentor | None = None,
        options: PatchOptions | None = None,
    ) -> CellMapMultiClassDataset:
        """The data set of given crops (one side of a split)."""
        made = cls.__new__(cls)
        made._set_up(crops, classes, mode, patch_size, resolution, augmentor, options or PatchOptions())
        return made

    @property
    def crop_groups(self) -> list[dict[str, Any]]:
        """The crops, as the plan's tables have them."""
        return [
            {
                "dataset": v.crop.dataset,
                "crop": v.crop.name,
                "raw_path": v.crop.raw,
                "label_paths": {c: v.crop.labels[c].location for c in self.classes if c in v.crop.labels},
            }
            for v in self.volumes
        ]

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int | PatchRequest) -> Sample | PackedPatch:
        if isinstance(index, PatchRequest):
            return self.reader.read(index)
        return self._draw(index, self.classes, index)
