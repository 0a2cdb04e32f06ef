"""Batches in numbers: values of images, known and present voxels, raw, the loader's speed and memory; and warnings if
something looks wrong."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import psutil
from numpy.typing import NDArray
from torch import Tensor

from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.patch_reader import PatchReader
from connectomics.data.sampling import PatchRequest
from connectomics.data.volumes import CropVolume

Batch = Mapping[str, Tensor]

_LEAST = 8  # batches to time, if the epoch has as many
_PER_WORKER = 4  # batches to time for each worker: the first ones were read before the clock started
_LONGEST = 20.0  # seconds after which timing ends


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, bytes: its pages in memory, and those of no other process.

    ``proportional`` divides shared pages by the number of processes that share them: the sum over processes is a total.
    """

    name: str
    resident: int
    private: int
    proportional: int

    @property
    def shared(self) -> int:
        """Pages that other processes have too: libraries, batches in transit, mapped files of the crop cache."""
        return self.resident - self.private


@dataclass(frozen=True)
class LoaderSpeed:
    """Time and memory that a loader takes.

    ``first_s``: seconds until the first batch, in which workers start. ``timed_s``: for all ``timed_batches``.
    ``memory``: of the main process and every worker while they read; empty if the system does not say.
    """

    workers: int
    first_s: float
    timed_batches: int
    timed_s: float
    batch_size: int
    batch_bytes: int
    memory: tuple[ProcessMemory, ...]

    @property
    def patches_per_s(self) -> float | None:
        """Patches per second, None if there were too few batches to measure."""
        return self.timed_batches * self.batch_size / self.timed_s if self.timed_batches and self.timed_s > 0 else None

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes of tensors per second."""
        return self.timed_batches * self.batch_bytes / self.timed_s if self.timed_batches and self.timed_s > 0 else None


def take(loader: Iterable[Batch], number: int, workers: int) -> tuple[list[Batch], LoaderSpeed]:
    """Return the first ``number`` batches of a loader with ``workers`` workers (fewer if it ends), and its speed.

    Workers prefetch, so batches that were ready before the first one was taken do not count: with workers the clock
    starts after as many more batches as there are workers. Batches are not processed while the clock runs.
    """
    before = {process.pid for process in multiprocessing.active_children()}
    begin = time.perf_counter()
    batches: Iterator[Batch] = iter(loader)
    taken = list(islice(batches, 1))
    first = time.perf_counter() - begin
    taken += islice(batches, max(0, number - 1, workers))
    memory = _memory(before)  # at the end of an epoch the workers end too
    goal = max(_LEAST, _PER_WORKER * workers)
    begin, timed, elapsed = time.perf_counter(), 0, 0.0
    while timed < goal and elapsed < _LONGEST and next(batches, None) is not None:
        timed += 1
        elapsed = time.perf_counter() - begin
    later = _memory(before)
    memory = later if len(later) >= len(memory) else memory
    size = sum(tensor.nbytes for tensor in taken[0].values()) if taken else 0
    batch_size = len(taken[0]["image"]) if taken else 0
    return taken[:number], LoaderSpeed(workers, first, timed, elapsed, batch_size, size, memory)


def _memory(before: Container[int | None]) -> tuple[ProcessMemory, ...]:
    """Return the memory of this process and of its children that did not exist ``before``."""
    children = sorted(p.pid for p in multiprocessing.active_children() if p.pid is not None and p.pid not in before)
    names = {os.getpid(): "main process", **{pid: f"worker {k}" for k, pid in enumerate(children, start=1)}}
    found = [memory_of(pid, name) for pid, name in names.items()]
    return tuple(memory for memory in found if memory is not None)


def memory_of(pid: int, name: str) -> ProcessMemory | None:
    """Return the memory of a process; None if the system does not say or the process has ended."""
    try:
        found = psutil.Process(pid).memory_full_info()
        return ProcessMemory(name, found.rss, found.uss, found.pss)
    except (psutil.Error, AttributeError):  # only Linux has pss
        return None


@dataclass(frozen=True)
class RawShare:
    """``none``: share of an image's voxels without raw; ``zero``, ``one``: shares of the others at exactly 0 and 1."""

    none: float
    zero: float
    one: float

    @classmethod
    def of(cls, image: NDArray[np.float32], there: NDArray[np.bool_]) -> RawShare:
        """Measure an image; ``there``: where it has raw, of the same shape."""
        values = image[there]
        zero, one = ((values == end).sum() / max(1, values.size) for end in (0, 1))
        return cls((image.size - values.size) / image.size, float(zero), float(one))


@dataclass(frozen=True)
class MissingRaw:
    """Number of missing chunks of a crop's raw (with the context that patches can reach), and the ``first`` of them."""

    crop: str
    missing: int
    total: int
    first: str | None


class RawPresence(CropVolume):
    """A crop whose raw is white, without mirroring and filling: a patch of it is 0 exactly where there is no raw."""

    @classmethod
    def of(cls, volume: CropVolume) -> RawPresence:
        """Copy a crop; an open cache entry stays in use."""
        made = cls.__new__(cls)
        made.__setstate__(volume.__getstate__())
        return made

    def arrays(self, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
        """Return the crop's arrays of that part alone, with white as raw."""
        whole = self.plain_arrays(lo, hi)
        low = np.clip(np.subtract(lo, whole.raw_begin), 0, whole.raw.shape)
        high = np.clip(np.subtract(hi, whole.raw_begin), low, whole.raw.shape)
        part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        z, y, x = (int(b + a) for b, a in zip(whole.raw_begin, low, strict=True))
        return replace(
            whole,
            raw=np.full([s.stop - s.start for s in part], 255, np.uint8),
            raw_begin=(z, y, x),
            fill=0.0,
            inside=None if whole.inside is None else np.ascontiguousarray(whole.inside[part]),
        )


def where_raw_is(reader: PatchReader, request: PatchRequest) -> list[NDArray[np.bool_]] | None:
    """Return where each image of a patch has raw, bool (D, H, W): inside the volume, and in no missing chunk.

    The same request is read from a crop whose raw is white, so that 0 means no raw. None if a MONAI transform moves
    the patch after reading.
    """
    augmentor = reader.augmentor
    if augmentor is not None and augmentor.moves_labels:
        return None
    here = replace(request, index=0)
    further = [(shape, [RawPresence.of(at[request.index])]) for shape, at in reader.inputs]
    spatial = None if augmentor is None else PatchAugmentor(augmentor.spatial, None)
    volume = RawPresence.of(reader.volumes[request.index])
    white = PatchReader([volume], reader.shape, further, spatial, reader.min_known).read(here)
    return [image[0] > 0 for image in white.images]


def missing_raw(volume: CropVolume) -> MissingRaw:
    """Count the raw chunks of a crop with the context that patches can reach."""
    return MissingRaw(volume.crop.key, *volume.crop.raw_source.missing_chunks(volume.cached_raw_grid))


# Shares that give a warning: of known voxels below, of raw at exactly 0 or 1 above, of voxels without raw above.
_FEW_KNOWN, _CLIPPED, _NO_RAW = 0.01, 0.05, 0.5


@dataclass(frozen=True)
class ValueRange:
    """The values of an image: extremes, percentiles, and the shares of voxels that are exactly 0 and exactly 1."""

    low: float
    high: float
    mean: float
    p1: float
    p50: float
    p99: float
    zero: float
    one: float

    @classmethod
    def of(cls, image: NDArray[np.float32]) -> ValueRange:
        """Measure an array of any shape."""
        values = (image.min(), image.max(), image.mean(dtype=np.float64), *np.percentile(image, [1, 50, 99]))
        return cls(*(float(v) for v in (*values, (image == 0).mean(), (image == 1).mean())))


@dataclass(frozen=True)
class LabelNumbers:
    """Labels of ``voxels`` voxels: by class, the number of ``known`` voxels and of known and ``present`` ones.

    ``anything``: voxels where some class is known. ``states``: number of combinations of classes that occur.
    """

    voxels: int
    anything: int
    states: int
    known: dict[str, int]
    present: dict[str, int]

    @classmethod
    def of(
        cls, codes: NDArray[np.integer], present: NDArray[np.bool_], known: NDArray[np.bool_], classes: Sequence[str]
    ) -> LabelNumbers:
        """Count codes of any shape, with the tables (C, K) of present and known by class and code."""
        often = np.bincount(codes.ravel(), minlength=known.shape[1])
        n_known, n_present = (
            dict(zip(classes, (table @ often).tolist(), strict=True)) for table in (known, present & known)
        )
        anything = int(often[known.any(axis=0)].sum())
        return cls(codes.size, anything, int((often > 0).sum()), n_known, n_present)

    @property
    def known_share(self) -> float:
        """Share of (class, voxel) pairs that are known, which the loss counts."""
        return sum(self.known.values()) / max(1, self.voxels * len(self.known))


@dataclass(frozen=True)
class ClassNumbers:
    """One class over all patches: share of voxels ``known``, share ``present`` among those (None if none is known),
    and the number of patches in which it is known and present."""

    name: str
    known: float
    present: float | None
    patches_known: int
    patches_present: int


def by_class(patches: Sequence[LabelNumbers]) -> list[ClassNumbers]:
    """Return every class, pooled over patches."""
    rows = []
    voxels = sum(p.voxels for p in patches)
    for name in patches[0].known if patches else ():
        known, present = ([p.known[name] for p in patches], [p.present[name] for p in patches])
        share = sum(present) / sum(known) if any(known) else None
        n_known, n_present = (sum(n > 0 for n in counts) for counts in (known, present))
        rows.append(ClassNumbers(name, sum(known) / voxels, share, n_known, n_present))
    return rows


def label_warnings(patches: Sequence[LabelNumbers]) -> list[str]:
    """Return what looks wrong about the labels."""
    rows = by_class(patches)
    warnings: list[str] = []
    never_known = [r.name for r in rows if r.patches_known == 0]
    never_present = [r.name for r in rows if r.patches_known and not r.patches_present]
    few = [r.name for r in rows if 0 < r.known < _FEW_KNOWN]
    n = len(patches)
    if never_known:
        warnings.append(
            f"Known in none of the {n} patches: {', '.join(never_known)}. No training crop annotates them, or none "
            "was drawn; the network learns nothing about them from such patches."
        )
    if never_present:
        warnings.append(
            f"Known but never present in {n} patches: {', '.join(never_present)}. Take more --batches to be sure; "
            "raise their weight in data.class_weights or data.sampling if they stay rare."
        )
    if few:
        warnings.append(f"Known in less than 1 % of the voxels: {', '.join(few)}.")
    share = sum(p.anything for p in patches) / max(1, sum(p.voxels for p in patches))
    if share < _FEW_KNOWN:
        warnings.append(
            f"Some class is known in only {100 * share:.2g} % of all voxels: patches are much larger than crops, or "
            "raw is missing there. Set a smaller data.patch_size, or data.min_known."
        )
    return warnings


def image_warnings(name: str, values: ValueRange, raw: RawShare | None) -> list[str]:
    """Return what looks wrong about one image of a patch; ``raw``: None if it is not measured."""
    if raw is not None and raw.none > _NO_RAW:
        return [f"{name}: {100 * raw.none:.0f} % of the voxels have no raw."]
    if values.low == values.high:
        return [f"{name}: the image is constant ({values.low:g})."]
    # voxels without raw are 0, so without a measure of raw the zeros say nothing
    ends = ((1, values.one),) if raw is None else ((0, raw.zero), (1, raw.one))
    return [
        f"{name}: {100 * share:.0f} % of the values are exactly {end}: data.intensity_range or an intensity "
        "augmentation clips them."
        for end, share in ends
        if share > _CLIPPED
    ]
