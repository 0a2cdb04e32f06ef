"""The `Normalization` of each data set of a run, from ``data.intensity_range``.

For each data set, or for all: ``[low, high]``, the raw values that become 0 and 1; ``table``, the gray range that the
package lists for a data set of the challenge; ``auto``, two percentiles of its raw; null: ``table`` if the data set is
listed, otherwise ``auto``. Mean and standard deviation of tissue are always measured.

Training measures once and stores the result with the model (``data.normalization`` of its configuration). Validation,
prediction and resumed runs use what is stored.
"""

from __future__ import annotations

import csv
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.config import RunConfig
from connectomics.config.intensity_range import KEY, check_intensity_range, of_dataset, pair_of
from connectomics.errors import CorruptDataError, InputError, unknown_name
from connectomics.geometry import Box, Triple, VoxelGrid, triple
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization

log = logging.getLogger(__name__)

ALL = "*"  # stands for every data set in ``data.normalization``
_PERCENTILES = (0.5, 99.5)
_EDGE = 32  # voxels of a sampled block
_VOXELS, _BLOCKS = 1 << 20, 256  # voxels sampled of a data set, in at most so many blocks, each within one chunk
_FEW = 1 << 12  # voxels; fewer say too little of a volume
_LEAST_STD = 0.05  # of tissue, on the unit scale


@dataclass(frozen=True)
class Chosen:
    """A normalization, and a description of its origin."""

    normalization: Normalization
    origin: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entry for ``data.normalization``."""
        return {**self.normalization.to_dict(), "origin": self.origin}

    def __str__(self) -> str:
        n = self.normalization
        return f"raw {n.low:g} to {n.high:g} (mean {n.mean:.3f}, std {n.std:.3f} of that), from {self.origin}"


@cache
def table() -> Mapping[str, tuple[float, float]]:
    """Return the gray range of each data set of the challenge that has one."""
    text = resources.files("connectomics.cellmap").joinpath("tables/intensity_ranges.csv").read_text(encoding="utf-8")
    return {row["dataset"]: (float(row["low"]), float(row["high"])) for row in csv.DictReader(text.splitlines())}


def kept(config: RunConfig, dataset: str, spec: Any) -> Chosen | None:
    """Return what a configuration stores for a data set; None if it has no entry, or if ``spec`` is another pair."""
    entry = config.data.normalization.get(dataset, config.data.normalization.get(ALL))
    if entry is None:
        return None
    normalization = Normalization.from_dict(entry, f"data.normalization of {dataset}")
    pair = pair_of(of_dataset(spec, dataset))
    if pair is not None and pair != normalization.range:
        return None
    return Chosen(normalization, str(entry.get("origin", "data.normalization")))


def before_it_was_kept(config: RunConfig) -> dict[str, Any]:
    """Return ``data.normalization`` for a model that was trained without centering."""
    pair = pair_of(config.data.intensity_range) or (0.0, 255.0)
    return {ALL: Chosen(Normalization(*pair), "the model, which was trained without centering").to_dict()}


def of_crops(config: RunConfig, crops: Sequence[Crop]) -> dict[str, Chosen]:
    """Return the normalization of each data set of a training run: as stored, or measured in these crops."""
    spec, boxes, sources = config.data.intensity_range, dict[str, list[Box]](), dict[str, Multiscale]()
    check_intensity_range(spec)
    for crop in crops:
        boxes.setdefault(crop.dataset, []).append(crop.box)
        sources.setdefault(crop.dataset, crop.raw_source)
    found = {}
    for name, source in sources.items():
        _name_coarse(name, source, config.voxel_size)
        chosen = kept(config, name, spec)
        found[name] = chosen or choose(spec, name, source, [boxes[name]], config.voxel_size)
        if chosen is None:
            log.info("%s: %s", name, found[name])
    return found


def for_prediction(
    config: RunConfig, trained: Sequence[RunConfig], dataset: str, raw: str, boxes: Sequence[Box]
) -> Normalization:
    """Return the normalization for a prediction: as in training if the networks know the data set, otherwise by
    ``data.intensity_range``. Logs which one, and its origin.

    Args:
        config: of the prediction. trained: of each network. raw: location of the data set's raw.
        boxes: predicted boxes, nm; measured if too little of the whole volume is stored.

    Raises:
        InputError: networks that know the data set were trained with different normalizations of it.
    """
    known = [one for one in (kept(of, dataset, config.data.intensity_range) for of in trained) if one is not None]
    if any(not known[0].normalization.is_close(other.normalization) for other in known[1:]):
        raise InputError(
            f"the checkpoints were trained with different normalizations of {dataset} "
            f"({'; '.join(map(str, known))}), so they cannot be averaged; predict with each by itself"
        )
    source = Multiscale.open(raw)
    _name_coarse(dataset, source, config.voxel_size)
    if known:
        chosen = replace(known[0], origin=f"the model ({known[0].origin})")
    else:
        chosen = choose(config.data.intensity_range, dataset, source, [[], boxes], config.voxel_size)
    log.info("%s: %s", dataset, chosen)
    own = next((one for one in (kept(of, dataset, None) for of in trained) if one is not None), None)
    if own is not None and own.normalization.range != chosen.normalization.range:
        log.warning(
            "%s: %s asks for raw %g to %g, but the network was trained with %g to %g: expect worse results; leave it "
            "out to use the network's own",
            dataset, KEY, *chosen.normalization.range, *own.normalization.range,
        )  # fmt: skip
    return chosen.normalization


def _name_coarse(dataset: str, source: Multiscale, voxel_size: Triple) -> None:
    """Warn if raw is coarser than it could be at a voxel size (nm), since finer levels were not downloaded."""
    if finer := source.finer_absent(voxel_size):
        used, asked = (" x ".join(f"{v:g}" for v in size) for size in (source.grid.voxel_size, voxel_size))
        log.warning(
            "%s: its raw is read at %s nm, coarser than %s nm, since %s is not stored: fetch it "
            "(pytc fetch --voxel-size), or set dataset.voxel_size",
            dataset, used, asked, ", ".join(finer),
        )  # fmt: skip


def with_normalization(config: RunConfig, entries: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with more entries of ``data.normalization``."""
    return replace(config, data=replace(config.data, normalization={**config.data.normalization, **entries}))


def choose(spec: Any, dataset: str, source: Multiscale, regions: Sequence[Sequence[Box]], voxel_size: Triple) -> Chosen:
    """Return the normalization of a data set by ``data.intensity_range``, measured where necessary.

    Args:
        spec: see the module. source: the data set's raw.
        regions: boxes (nm) to measure in; the next ones if raw is missing in the first. No box at all: the volume.
        voxel_size: of the run, nm, z y x.

    Returns:
        The same for the same arguments. Numbers have six digits, so that YAML and JSON keep them.

    Raises:
        ConfigError: ``spec`` is none. UnknownNameError: ``table`` for a data set that is not listed. CorruptDataError:
        no sampled place can be read.
    """
    check_intensity_range(spec)
    one = of_dataset(spec, dataset)
    if one == "table" and dataset not in table():
        raise unknown_name("data set", dataset, table(), f"the table of gray ranges ({KEY}=table)")
    values = np.zeros(0, np.float32)
    for boxes in regions:
        values = sampled(source, boxes, voxel_size, zlib.crc32(dataset.encode()))
        if len(values) >= _FEW:
            break
    dtype = source.levels[0].dtype
    tissue = _tissue(values, dtype)
    if (pair := pair_of(one)) is not None:
        origin = KEY
    elif one != "auto" and dataset in table():
        pair, origin = table()[dataset], "the table of the challenge's data sets"
    else:
        pair, origin = _percentiles(tissue, dtype)
    unit = Normalization(*pair).unit(tissue.copy())
    mean, std = (float(unit.mean(dtype=np.float64)), float(unit.std(dtype=np.float64))) if len(unit) else (0.5, 0.25)
    std = max(std, _LEAST_STD)
    return Chosen(Normalization(*map(_rounded, (*pair, mean, std))), origin)


def _percentiles(tissue: NDArray[np.float32], dtype: np.dtype[Any]) -> tuple[tuple[float, float], str]:
    low, high = (_rounded(v) for v in np.percentile(tissue, _PERCENTILES)) if len(tissue) else (0.0, 0.0)
    if low < high:
        return (low, high), f"its raw: percentiles {_PERCENTILES[0]} and {_PERCENTILES[1]} of {len(tissue)} voxels"
    info = np.iinfo(dtype) if dtype.kind in "iu" else None
    whole = (float(info.min), float(info.max)) if info else (low, low + 1.0)
    return whole, "its type, since its raw is missing or constant where it was sampled"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _tissue(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """``values`` but for what is at the ends of their type (padding, saturation), unless little or one value stays."""
    info = np.iinfo(dtype) if dtype.kind in "iu" else None
    ends = (0.0,) if info is None else (float(info.min), float(info.max), 0.0)
    kept_values = values[~np.isin(values, np.array(ends, np.float32))]
    return kept_values if len(kept_values) > len(values) / 100 and np.ptp(kept_values) > 0 else values


def sampled(source: Multiscale, boxes: Sequence[Box], voxel_size: Triple, seed: int) -> NDArray[np.float32]:
    """Raw values (n,) at a voxel size, from places in boxes (nm; none: the whole volume), as far as raw is stored.

    Each box in turn gets blocks of at most 32 voxels, each inside one stored chunk: at most 256, and no more after a
    million voxels. Raises `CorruptDataError` if none of them can be read.
    """
    level = source.levels[source.level_for(voxel_size)]
    within = [box.intersect(level.grid.box) for box in boxes] or [level.grid.box]
    within = [box for box in within if not box.is_empty]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(within))
    chunk = np.multiply(level.chunks, level.grid.voxel_size)
    shape = np.clip(np.floor(chunk / voxel_size + 1e-6), 1, _EDGE).astype(int)
    size = shape * np.array(voxel_size)
    origin = np.array(level.grid.box.begin)
    found, number, corrupt = [np.zeros(0, np.float32)], 0, list[CorruptDataError]()
    for n in range(_BLOCKS if within else 0):
        box = within[order[n % len(within)]]
        point = rng.uniform(box.begin, box.end)
        first = origin + np.floor((point - origin) / chunk) * chunk
        face = np.clip(point - size / 2, first, np.maximum(first, first + chunk - size))
        # from a face of stored voxels, as crops are: between them, interpolation would smooth the noise away
        face = origin + np.floor((face - origin) / level.grid.voxel_size + 1e-6) * level.grid.voxel_size
        grid = VoxelGrid.covering(Box(triple(face), triple(face + size)), voxel_size)
        if not source.stored_chunks(grid.crop([k // 2 for k in grid.shape], (1, 1, 1))).any():
            continue
        try:
            values, inside = source.read_raw(grid)
        except CorruptDataError as error:  # those who need that place say so
            corrupt.append(error)
            continue
        found.append(values[inside])
        number += len(found[-1])
        if number >= _VOXELS:
            break
    if corrupt and not number:
        raise CorruptDataError(f"{corrupt[0]}; none of {len(corrupt)} sampled places can be read")
    if corrupt:
        message = "%d of %d sampled places take no part in measuring the gray range of %s; the first: %s"
        log.warning(message, len(corrupt), len(corrupt) + len(found) - 1, source.location, corrupt[0])
    return np.concatenate(found)
