"""What a training patch costs, stage by stage, and what the same bytes cost at the least.

The stages are the loader's own code with clocks around its parts: `PatchReader` is given volumes and an augmentor that
pass every call on. The limits are measured on the very same patches, right after: a copy out of the memory map, the
decompression of the chunks behind it, and the fused pass over arrays that lie in memory already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import BatchAugmentor, CoordinateMap, PatchAugmentor, SpatialAugmentor, sample
from connectomics.data.bench.chunks import decompress
from connectomics.data.bench.meter import Meter
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset
from connectomics.data.patch_reader import PatchReader
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.sampling import PatchRequest
from connectomics.data.volumes import CropVolume

#: In the order in which a patch goes through them.
STAGES = ("read", "spatial", "others", "collate", "transfer", "intensity")
#: Measured beside them on the same patches.
LIMITS = ("copy", "kernel", "decompress", "decode", "dense")

Range = tuple[Sequence[int], Sequence[int]]


class _TimedVolume:
    """A `CropVolume` whose reading is measured; it remembers what it gave."""

    def __init__(self, volume: CropVolume, work: PatchWork) -> None:
        self._volume, self._work = volume, work

    def arrays(self, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
        with self._work.meter.part("read"):
            found = self._volume.arrays(lo, hi)
        self._work.given.append((self._volume, (lo, hi), found))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._volume, name)


class _TimedSpatial:
    """A `SpatialAugmentor` that remembers what it drew."""

    def __init__(self, spatial: SpatialAugmentor, work: PatchWork) -> None:
        self._spatial, self._work = spatial, work

    def draw(self, rng: np.random.Generator) -> CoordinateMap:
        self._work.drawn = self._spatial.draw(rng)
        return self._work.drawn


class _TimedAugmentor:
    """A `PatchAugmentor` whose MONAI part is measured."""

    def __init__(self, augmentor: PatchAugmentor, work: PatchWork) -> None:
        self._augmentor, self._work = augmentor, work
        spatial = augmentor.spatial
        self.spatial = None if spatial is None else _TimedSpatial(spatial, work)

    def finish(self, patch: PackedPatch, seed: int) -> PackedPatch:
        if self._augmentor.others is None:
            return self._augmentor.finish(patch, seed)
        with self._work.meter.part("others"):
            return self._augmentor.finish(patch, seed)


@dataclass(frozen=True)
class _Limit:
    """What is needed to do a patch's limits: its volume, the range and the arrays it was read from, its map."""

    volume: CropVolume
    range: Range
    arrays: CropArrays
    moved: CoordinateMap
    patch: PackedPatch


class PatchWork:
    """Patches of a data set in the order of a sampler, in this process, measured in rounds."""

    def __init__(
        self,
        dataset: CellMapMultiClassDataset,
        requests: Iterator[PatchRequest],
        *,
        batch_size: int = 1,
        device: str = "cpu",
        intensity: BatchAugmentor | None = None,
    ) -> None:
        self.dataset, self._requests = dataset, requests
        self._batch_size, self._device, self._intensity = batch_size, torch.device(device), intensity
        self.meter = Meter()
        self.given: list[tuple[CropVolume, Range, CropArrays]] = []
        self.drawn = CoordinateMap.identity()
        reader = dataset.reader
        augmentor = None if reader.augmentor is None else cast(PatchAugmentor, _TimedAugmentor(reader.augmentor, self))
        self._reader = PatchReader(
            self._timed(reader.volumes),
            reader.shape,
            [(view, self._timed(at)) for view, at in reader.views],
            augmentor,
            reader.min_known,
        )

    def _timed(self, volumes: Sequence[CropVolume]) -> list[CropVolume]:
        return [cast(CropVolume, _TimedVolume(volume, self)) for volume in volumes]

    def patch(self) -> PackedPatch:
        """The next patch, measured; what it was made from is remembered."""
        self.given, self.drawn = [], CoordinateMap.identity()
        request = next(self._requests)
        with self.meter.part("spatial"):  # all of the reading that is not a part of its own: place, draw, fused pass
            return self._reader.read(request)

    def batch(self) -> list[_Limit]:
        """The next batch through every stage; what its limits need."""
        patches, limits = [], []
        for _ in range(self._batch_size):
            patches.append(self.patch())
            limits.append(_Limit(*self.given[0], self.drawn, patches[-1]))
        with self.meter.part("collate"):
            batch = collate(patches)
        with self.meter.part("transfer"):
            moved = {name: value.to(self._device) for name, value in batch.items() if name != "seed"}
            self._wait()
        with self.meter.part("intensity") if self._intensity is not None else nullcontext():
            if self._intensity is not None:
                self._intensity({**moved, "seed": batch["seed"]})
                self._wait()
        return limits

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    # -- rounds ------------------------------------------------------------------------------------------------------
    def round(self, batches: int, limits: Sequence[str] = ()) -> dict[str, float]:
        """CPU seconds a patch of every stage over some batches, their sum ``whole``, ``patch`` (all up to the data
        set's item), and of the ``limits`` named, each done right after its batch. A stage that does nothing is left
        out. ``whole_wall``: wall seconds a patch."""
        self.meter = Meter()
        for _ in range(batches):
            for limit in self.batch():
                for name in limits:
                    self._do_limit(name, limit)
        patches = batches * self._batch_size
        found = {name: cost.cpu / patches for name, cost in self.meter.costs.items()}
        stages = [name for name in STAGES if name in found]
        found["patch"] = sum(found[name] for name in stages if name in ("read", "spatial", "others"))
        found["whole"] = sum(found[name] for name in stages)
        found["whole_wall"] = sum(self.meter.costs[name].wall for name in stages) / patches
        return found

    def peaks(self, batches: int) -> dict[str, float]:
        """Most memory (MB) that each stage took beyond what was held before."""
        self.meter = Meter(memory=True)
        for _ in range(batches):
            self.batch()
        return {name: cost.peak_mb for name, cost in self.meter.costs.items() if cost.peak_mb is not None}

    def _do_limit(self, name: str, work: _Limit) -> None:
        volume, (lo, hi), arrays = work.volume, work.range, work.arrays
        grid = work.patch.grid
        if name == "copy":
            begin = np.rint(volume.grid.to_index(grid.translation)).astype(int)
            with self.meter.part(name):
                _copy(arrays.raw, begin - arrays.raw_begin, grid.shape)
                _copy(arrays.codes, begin - arrays.codes_begin, grid.shape)
        elif name == "kernel":
            in_memory = _in_memory(arrays, lo, hi)
            center = volume.grid.to_index(np.asarray(grid.box.center))
            with self.meter.part(name):
                sample(in_memory, center, work.moved, grid.shape)
        elif name == "decompress":
            decompress(volume, volume.grid.crop(lo, [h - b for b, h in zip(lo, hi, strict=True)]), self.meter, name)
        elif name == "decode":
            plain = replace(volume, cache=None)
            with self.meter.part(name):
                plain.arrays(lo, hi)
        elif name == "dense":
            with self.meter.part(name):
                work.patch.dense()


def _copy(block: np.ndarray[Any, Any], begin: np.ndarray[Any, Any], shape: Sequence[int]) -> None:
    """Copy what a block holds of a patch that begins at its index ``begin``."""
    low, high = np.maximum(begin, 0), np.minimum(begin + shape, block.shape)
    if (high > low).all():
        np.copy(block[low[0] : high[0], low[1] : high[1], low[2] : high[2]])


def _in_memory(arrays: CropArrays, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
    """The part from lattice index ``lo`` to ``hi`` (exclusive) in memory of its own."""

    def cut(block: np.ndarray[Any, Any], begin: Sequence[int]) -> tuple[np.ndarray[Any, Any], tuple[int, int, int]]:
        low = np.minimum(np.maximum(np.subtract(lo, begin), 0), block.shape)
        high = np.maximum(np.minimum(np.subtract(hi, begin), block.shape), low)
        part = np.array(block[low[0] : high[0], low[1] : high[1], low[2] : high[2]])
        z, y, x = (low + begin).tolist()
        return part, (z, y, x)

    raw, raw_begin = cut(arrays.raw, arrays.raw_begin)
    codes, codes_begin = cut(arrays.codes, arrays.codes_begin)
    inside = None if arrays.inside is None else cut(arrays.inside, arrays.raw_begin)[0]
    return CropArrays(raw, raw_begin, inside, codes, codes_begin, arrays.states)
