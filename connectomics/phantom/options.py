"""The options of a phantom, and the description of one that was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from connectomics.cellmap.classes import CLASSES, get_class
from connectomics.errors import InputError, require_known
from connectomics.geometry import VoxelGrid

#: Extent of each data set (nm), number of training crops and of test crops of each data set.
PRESETS: dict[str, tuple[float, int, int]] = {"tiny": (640.0, 5, 1), "small": (1600.0, 7, 1), "large": (4800.0, 12, 2)}

#: The classes that a phantom annotates: all scored ones. ER exit sites are always absent.
PHANTOM_CLASSES: tuple[str, ...] = tuple(c.name for c in CLASSES.values() if c.scored and c.name != "vim")


@dataclass(frozen=True)
class PhantomOptions:
    """Options of `make_phantom`.

    Attributes:
        seed: random seed; the same options give the same bytes.
        preset: ``tiny`` (unit tests), ``small`` (the demo) or ``large``; sets the options below that are None.
        size_nm: extent of each data set along every axis, nm.
        crops, test_crops: number of training crops and of test crops of each data set.
        crop_nm: usual edge of a crop, nm; crops are a third to twice as long. By default 0.35 ``size_nm``.
        classes: annotated classes; by default all of `PHANTOM_CLASSES`.
        overwrite: replace an existing phantom.
    """

    seed: int = 0
    preset: str = "small"
    size_nm: float | None = None
    crops: int | None = None
    test_crops: int | None = None
    crop_nm: float | None = None
    classes: tuple[str, ...] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_known("phantom preset", [self.preset], PRESETS)
        size = f"size_nm ({self.extent:g} nm)"
        for ok, rule, found in (
            (self.seed >= 0, "seed must be 0 or more", self.seed),
            (self.extent >= 320, "size_nm must be at least 320 nm", self.extent),
            (self.training_crops >= 1, "training crops must be at least one", self.training_crops),
            (self.testing_crops >= 1, "test crops must be at least one", self.testing_crops),
            (80 <= self.crop_edge <= self.extent / 2, f"crop_nm must be from 80 nm to half of {size}", self.crop_edge),
        ):
            if not ok:
                raise InputError(f"a phantom's {rule}, got {found:g}")
        for name in self.class_names:
            get_class(name)
            require_known("phantom class", [name], PHANTOM_CLASSES)

    @property
    def extent(self) -> float:
        """Extent of each data set, nm."""
        return PRESETS[self.preset][0] if self.size_nm is None else float(self.size_nm)

    @property
    def training_crops(self) -> int:
        """Training crops of each data set."""
        return PRESETS[self.preset][1] if self.crops is None else self.crops

    @property
    def testing_crops(self) -> int:
        """Test crops of each data set."""
        return PRESETS[self.preset][2] if self.test_crops is None else self.test_crops

    @property
    def crop_edge(self) -> float:
        """Usual edge of a crop, nm."""
        return min(0.35 * self.extent, 900.0) if self.crop_nm is None else float(self.crop_nm)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that are annotated."""
        return PHANTOM_CLASSES if self.classes is None else tuple(self.classes)


@dataclass(frozen=True)
class CropInfo:
    """One crop of a phantom.

    Attributes:
        dataset: its data set.
        name: ``crop7``.
        test: whether it is in the crop table and not in the data root.
        grid: grid of its finest array.
        voxels: present voxels by class, in writing order.
        objects: number of objects by instance class.
        unknown: unknown voxels by class, if there are any.
    """

    dataset: str
    name: str
    test: bool
    grid: VoxelGrid
    voxels: dict[str, int]
    objects: dict[str, int]
    unknown: dict[str, int]


@dataclass(frozen=True)
class PhantomInfo:
    """A phantom that was written.

    Attributes:
        root: the data root, for `Catalog.open`.
        raw: grid of the finest raw level by data set.
        crops: training and test crops.
        objects: number of objects in the whole of each data set, by kind.
    """

    root: Path
    raw: dict[str, VoxelGrid]
    crops: tuple[CropInfo, ...]
    objects: dict[str, dict[str, int]]

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(self.raw)

    @property
    def crop_table(self) -> Path:
        """CSV of the test crops."""
        return self.root / "test_crops.csv"

    @property
    def truth(self) -> Path:
        """Zarr of the test crops' labels, in the scorer's layout."""
        return self.root / "truth.zarr"
