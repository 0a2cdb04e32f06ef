"""Patches of CellMap crops as torch data sets: one class per sample, or all classes at once."""

from __future__ import annotations

import math
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
from connectomics.data.foreground import ObjectPoints, foreground_points, object_points
from connectomics.data.patch_reader import PatchReader, PatchShape, context_needed, samples_of
from connectomics.data.patches import PackedPatch
from connectomics.data.regions import Regions
from connectomics.data.sampling import PatchRequest, SampledCrop
from connectomics.data.volumes import CropVolume
from connectomics.errors import InputError, require_known
from connectomics.geometry import Index, Triple, VoxelGrid, index, triple
from connectomics.io.normalization import Normalization
from connectomics.io.store import StoreOptions

_MOST_POINTS = 2**22  # positions that a data set keeps: 100 MB
_MOST_SAMPLES = 8  # of raw for a voxel of a further input; raw without a level of nearly its size is read at its size
Sample = dict[str, Any]


@dataclass(frozen=True)
class PatchOptions:
    """The less usual options of a data set, ``mode_kwargs`` of the constructors."""

    seed: int = 42  # random seed for patch positions
    balance: float = 0.7  # for plain indices, share of patches that contain a voxel of a class (the others are uniform)
    #: by data set, how raw becomes the image; a missing data set maps 0..255 to 0..1 (uint8 raw only)
    normalizations: Mapping[str, Normalization] = field(default_factory=dict)
    cache: Literal["none", "memory", "disk"] = "none"  # whether and where each crop is decoded once
    cache_dir: str | None = None  # cache folder on disk; None for the user's cache folder
    cache_context: int | None = None  # voxels of raw kept around each crop; None for as far as patches can reach
    allow_missing_raw: bool = False  # accept crops with missing raw chunks; labels are unknown there
    min_known: float = 0.0  # smallest share of known voxels in a patch, where its crop allows it
    #: further inputs at each patch's place: (voxel size in nm, shape in voxels), z y x
    inputs: tuple[PatchShape | tuple[Triple, Index], ...] = ()
    chunk_cache_bytes: int = 64 << 20  # decoded chunks that a process keeps when it reads without the crop cache
    instances: tuple[str, ...] = ()  # classes with object IDs; samples then have ``ids``, see `PackedPatch`
    regions: bool = False  # whether a patch says in which region of its crop it is, see `connectomics.data.regions`
    alternate_ties: bool = False  # training: see `connectomics.cellmap.labels.read_labels`
    soft_labels: bool = False  # training: labels are fractions; an augmentor in MONAI makes them 0 or 1 again

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> PatchOptions:
        """Return the options of a mapping; raises `UnknownNameError` for an unknown one."""
        require_known("option", kwargs, cls.__dataclass_fields__, "mode_kwargs")
        return cls(**kwargs)


class CropPatches(BaseDataset):
    """What both data sets share: crops as volumes, and patches drawn from them.

    A plain index gives a dense patch of that sample's crop: a new random one each time in training (from the loader
    worker's random stream), always the same one in validation and test. A `PatchRequest` (from a sampler) gives exactly
    the patch that it names, packed. Samples have ``ids`` (I, D, H, W) int32 if `PatchOptions.instances` names classes.

    For a torch ``DataLoader`` with workers pass ``multiprocessing_context="forkserver"``: Python before 3.14 forks them
    on Linux, and a forked worker reads local volumes more slowly, and S3 not at all, if this process has read before.
    """

    data_root: str | None = None  # None if the data set was made from crops

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
        """Open the crops of a data root.

        Args:
            patch_size: voxels, z y x. resolution: the voxel size in nm, z y x (attribute ``voxel_size``).
            augmentor: a `PatchAugmentor`, MONAI dictionary transforms (`GivenAugmentor`: ``known`` moves with
                ``label``), or any function of a dense sample, which then moves ``known`` itself.
            mode_kwargs: fields of `PatchOptions`.

        Raises:
            MissingError, UnknownNameError: the root, a data set, a crop or a class does not exist.
        """
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
        self.patch_size = index(patch_size)
        self.voxel_size = triple(resolution, "resolution")
        self.options = options
        require_known("instance class", options.instances, self.classes, "the classes")
        in_reading = augmentor if isinstance(augmentor, PatchAugmentor) else None
        self._augment: Augmentor | GivenAugmentor | None = None
        if augmentor is not None and not isinstance(augmentor, PatchAugmentor):
            self._augment = augmentor if isinstance(augmentor, Augmentor) else GivenAugmentor(augmentor)
        own = PatchShape(self.voxel_size, self.patch_size)
        inputs = [PatchShape(*given) for given in options.inputs]
        spatial = None if in_reading is None else in_reading.spatial
        self.volumes = [self._volume(crop, own, self.classes, spatial) for crop in crops]
        self.input_volumes = [[self._volume(crop, given, (), spatial) for crop in crops] for given in inputs]
        for volume in self.volumes:
            volume.check()
        further = list(zip(inputs, self.input_volumes, strict=True))
        regions = Regions.of([volume.grid for volume in self.volumes], self.patch_size) if options.regions else None
        self.reader = PatchReader(self.volumes, own, further, in_reading, options.min_known, regions)
        self._points: dict[tuple[int, str], NDArray[np.float64]] = {}
        self._objects: dict[tuple[int, str], ObjectPoints] = {}
        self._rng: np.random.Generator | None = None

    def _volume(
        self, crop: Crop, shape: PatchShape, classes: tuple[str, ...], spatial: SpatialAugmentor | None
    ) -> CropVolume:
        """A crop at the voxel size of the run, or for a further input on the raw that is read for it, with as much
        context as patches can look at."""
        options, size = self.options, shape.voxel_size
        extent = np.multiply(shape.voxels, np.divide(size, self.voxel_size))  # in voxels of the run
        if not classes:
            stored = crop.raw_source.levels[crop.raw_source.level_for(size)].grid.voxel_size
            size = stored if math.prod(samples_of(size, stored)) <= _MOST_SAMPLES else size
        ratio = np.divide(size, self.voxel_size)
        # validation slides windows that look beyond the crop by up to a quarter of a window
        plain = extent / 2 if self.mode == "train" else 0.75 * extent
        reach = (plain if spatial is None else np.asarray(spatial.reach(extent.tolist()))) / ratio
        grid = VoxelGrid.covering(crop.box, self.voxel_size)
        margin = options.cache_context
        context = context_needed(grid.shape, self.patch_size, reach.tolist(), (1 / ratio).tolist())
        return CropVolume(
            crop=crop,
            classes=classes,
            voxel_size=size,
            normalization=options.normalizations.get(crop.dataset),
            cache=cache_folder(options.cache, options.cache_dir),
            context=context if margin is None else (margin, margin, margin),
            allow_missing_raw=options.allow_missing_raw,
            instances=tuple(options.instances) if classes else (),  # further inputs have no labels
            alternate_ties=options.alternate_ties and self.mode == "train",
            soft=options.soft_labels and self.mode == "train" and bool(classes),
        )

    @property
    def all_volumes(self) -> list[CropVolume]:
        """Every volume that patches are read from."""
        return [*self.volumes, *(volume for at in self.input_volumes for volume in at)]

    def sampled_crops(self, objects: bool = False) -> list[SampledCrop]:
        """What a `PatchSampler` needs of each crop; with ``objects``, read positions in those of every class."""
        return [
            SampledCrop(
                v.dataset,
                float(v.grid.size),
                {c: self.points(i, c) for c in self.classes},
                {c: self._objects_of(i, c) for c in self.classes if objects},
            )
            for i, v in enumerate(self.volumes)
        ]

    # -- where patches are -------------------------------------------------------------------------------------------
    def points(self, volume: int, class_name: str) -> NDArray[np.float64]:
        """Return positions (n, 3) in nm where the class is present in that crop; found once."""
        key = (volume, class_name)
        if key not in self._points:
            found = self.volumes[volume].points(class_name)
            if found is None:
                found = foreground_points(self.volumes[volume].crop, class_name, self.options.seed)
            # both are in random order; hundreds of crops with dozens of classes must not fill the memory with places
            self._points[key] = found[: max(64, _MOST_POINTS // (len(self.volumes) * len(self.classes)))].copy()
        return self._points[key]

    def _objects_of(self, volume: int, class_name: str) -> ObjectPoints:
        """`object_points` of that crop, found once."""
        key = (volume, class_name)
        if key not in self._objects:
            self._objects[key] = object_points(self.volumes[volume].crop, class_name, self.options.seed)
        return self._objects[key]

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
        seed = tuple(map(int, rng.integers(2**31, size=2)))
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
        # a loader worker starts its own random stream, and only the sampler needs the positions
        return {**self.__dict__, "_rng": None, "_points": {}, "_objects": {}}


class CellMapDataset(CropPatches):
    """One sample for each (data set, crop, class): ``image`` (1, D, H, W) float32 (see `PatchOptions.normalizations`;
    in [0, 1] without), ``label`` (1, D, H, W) float32 0/1 and ``known`` (1, D, H, W) bool. A label counts only where
    ``known``.
    """

    @cached_property
    def data_samples(self) -> list[dict[str, Any]]:
        """Every class of every crop in which it can be known: ``dataset``, ``crop``, ``class``, ``raw_path``,
        ``label_path`` (None if only other classes say something of it) and ``scale_level``, the raw pyramid level."""
        return [
            {
                "dataset": crop.dataset,
                "crop": crop.name,
                "class": name,
                "raw_path": crop.raw,
                "label_path": crop.labels[name].location if name in crop.labels else None,
                "scale_level": crop.raw_source.level_for(self.voxel_size),
                "volume": number,
            }
            for number, crop in enumerate(volume.crop for volume in self.volumes)
            for name in self.classes
            if informs(name, crop.labels)
        ]

    def __len__(self) -> int:
        return len(self.data_samples)

    def __getitem__(self, index: int | PatchRequest) -> Sample:
        if isinstance(index, PatchRequest):
            raise InputError("CellMapDataset has one class per sample and takes plain indices, not patch requests")
        info = self.data_samples[index]
        return self._draw(info["volume"], [info["class"]], index)


class CellMapMultiClassDataset(CropPatches):
    """One sample for each crop: ``image`` (1, D, H, W) float32 (see `PatchOptions.normalizations`; in [0, 1] without),
    ``label`` (C, D, H, W) float32 0/1 and ``known`` (C, D, H, W) bool, in the order of ``classes``. A class that nobody
    annotated is unknown, not absent.
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
        """Return the data set of given crops (one side of a split)."""
        made = cls.__new__(cls)
        made._set_up(crops, classes, mode, patch_size, resolution, augmentor, options or PatchOptions())
        return made

    @property
    def crop_groups(self) -> list[dict[str, Any]]:
        """The crops: ``dataset``, ``crop``, ``raw_path``, ``label_paths`` (class -> path)."""
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
