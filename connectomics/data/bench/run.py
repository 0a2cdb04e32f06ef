"""`bench_data`: the data path of a run, measured stage by stage, as a whole, and against the official loader."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from connectomics.config import RunConfig
from connectomics.data.augmentation import BatchAugmentor, PatchAugmentor
from connectomics.data.bench.chunks import can_decompress
from connectomics.data.bench.loader_run import LoaderSpeed, run_loader
from connectomics.data.bench.meter import can_measure_peaks, median_ratio, medians
from connectomics.data.bench.peer import OUR_AUGMENTED, Comparison, Peer, compare
from connectomics.data.bench.stages import LIMITS, STAGES, PatchWork
from connectomics.data.cache import prepare
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.dataset.build import cache_mode, patch_options
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset
from connectomics.data.sampling import PatchRequest, PatchSampler, SampledCrop
from connectomics.errors import InputError

Progress = Callable[[int, int, str], None]

_ROUNDS = 5
#: What is slow is done for a few patches a round.
_FEW = 2
_SLOW = ("decode", "decompress", "dense")


def _silent(done: int, number: int, name: str) -> None:
    return None


@dataclass(frozen=True)
class DataBench:
    """What `bench_data` found. Times are CPU seconds a patch, medians over ``rounds``; memory in 10^6 bytes.

    Attributes:
        setup: what was measured, for people and programs. stages: by name of `STAGES`, those that do something.
        peaks: most memory that a stage took beyond what was held before; empty where the system does not tell.
        limits: by name of `LIMITS`, those that could be measured.
        ratios: medians of the ratios within rounds. loader: with the configured workers. peer: see `Comparison`.
        prepare_s: wall seconds until the crops were decoded into the cache. peak_mb: of this process, resident.
    """

    setup: dict[str, Any]
    rounds: int
    stages: dict[str, float]
    whole: float
    patches_per_s: float
    peaks: dict[str, float]
    limits: dict[str, float]
    ratios: dict[str, float]
    loader: LoaderSpeed
    prepare_s: float
    peak_mb: float
    peer: tuple[Comparison, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dict(vars(self))
        found["loader"] = dict(vars(self.loader))
        found["peer"] = [comparison.to_dict() for comparison in self.peer]
        return found


def bench_data(
    config: RunConfig,
    patches: int = 64,
    *,
    peer_python: Path | None = None,
    progress: Progress = _silent,
) -> DataBench:
    """Measure the data path of a run.

    Args:
        config: the run; its crops are split, decoded into its cache and sampled as for training.
        patches: how many are measured in all, by stages and again by the whole loader.
        peer_python: the Python of cellmap-data's environment, to be measured against; None for not at all.

    Raises:
        InputError: fewer than one patch. What `CellMapDataModule.setup` raises. PeerError: the other loader fails.
    """
    if patches < 1:
        raise InputError(f"--patches must be at least 1, found {patches}")
    size = config.data.batch_size
    batches = max(1, -(-patches // (size * _ROUNDS)))
    epoch = max(config.data.patches_per_epoch or 0, size * (batches + 8) * _ROUNDS)
    config = replace(config, data=replace(config.data, patches_per_epoch=epoch))
    module = CellMapDataModule(config)
    begin = time.perf_counter()
    module.setup()
    prepared = time.perf_counter() - begin
    device = "cuda" if torch.cuda.is_available() and config.system.accelerator != "cpu" else "cpu"
    intensity = BatchAugmentor.of(config)
    work = PatchWork(
        module.train_dataset, endless(module.sampler()), batch_size=size, device=device, intensity=intensity
    )
    limits = _limits_of(config, work.dataset)
    with one_torch_thread():
        found = _rounds(work, batches, limits, progress)
        peaks = work.peaks(_FEW) if can_measure_peaks() else {}
    progress(_ROUNDS, _ROUNDS + 1, "whole loader")
    speed = run_loader(module.train_dataloader(), patches)
    progress(_ROUNDS + 1, _ROUNDS + 1, "whole loader")
    middle = medians(found)
    return DataBench(
        setup=_setup(config, module, device),
        rounds=_ROUNDS,
        stages={name: middle[name] for name in STAGES if name in middle},
        whole=middle["whole"],
        patches_per_s=1 / middle["whole_wall"],
        peaks={name: peaks[name] for name in STAGES if name in peaks},
        limits={name: middle[name] for name in limits},
        ratios=_ratios(found, limits),
        loader=speed,
        prepare_s=prepared,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3,
        peer=() if peer_python is None else against_peer(config, module.train_dataset, peer_python, progress),
    )


def _rounds(work: PatchWork, batches: int, limits: list[str], progress: Progress) -> list[dict[str, float]]:
    """Every stage and limit in each round, after one that is not counted (compilation, first pages)."""
    quick = [name for name in limits if name not in _SLOW]
    slow = [name for name in limits if name in _SLOW]
    work.round(2, limits)
    found = []
    for number in range(_ROUNDS):
        costs = work.round(batches, quick)
        if slow:
            few = work.round(_FEW, slow)
            costs |= {name: few[name] for name in slow}
        found.append(costs)
        progress(number + 1, _ROUNDS + 1, "rounds by stage")
    return found


def _limits_of(config: RunConfig, dataset: CellMapMultiClassDataset) -> list[str]:
    """The limits that can be measured: what a reader without cache costs is no limit where that is what is read."""
    left_out = set()
    if cache_mode(config) == "none":
        left_out |= {"decode"}
    if not all(can_decompress(volume) for volume in dataset.volumes):
        left_out |= {"decompress"}
    return [name for name in LIMITS if name not in left_out]


def _ratios(found: list[dict[str, float]], limits: list[str]) -> dict[str, float]:
    """How far the stages are from their limits."""
    ratios = {
        "patch/copy": median_ratio(found, "patch", "copy"),
        "patch/kernel": median_ratio(found, "patch", "kernel"),
    }
    if "decode" in limits:
        ratios["decode/read"] = median_ratio(found, "decode", "read")
    return ratios


def _setup(config: RunConfig, module: CellMapDataModule, device: str) -> dict[str, Any]:
    dataset = module.train_dataset
    return {
        "data_root": config.dataset.data_root,
        "crops": len(dataset.volumes),
        "classes": len(dataset.classes),
        "patch_size": list(dataset.patch_size),
        "resolution": list(dataset.voxel_size),
        "batch_size": config.data.batch_size,
        "cache": cache_mode(config),
        "device": device,
        "augmented": dataset.reader.augmentor is not None,
    }


# -- parts that the benchmarks use as well -----------------------------------------------------------------------------
class one_torch_thread(AbstractContextManager[None]):  # noqa: N801
    """torch with one thread, as in a loader worker; as before afterwards."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._before)


def endless(sampler: PatchSampler) -> Iterator[PatchRequest]:
    """The requests of one epoch after the other."""
    epoch = sampler.epoch
    while True:
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1


def work_on(dataset: CellMapMultiClassDataset, sampling: Mapping[str, float] | None = None, seed: int = 0) -> PatchWork:
    """Patches of a data set one by one, as the data module samples them."""
    crops = [
        SampledCrop(v.dataset, float(v.grid.size), {c: dataset.points(i, c) for c in dataset.classes})
        for i, v in enumerate(dataset.volumes)
    ]
    sampler = PatchSampler(
        crops, 4096, classes=dataset.classes, sampling=dict(sampling or {}), class_weights={}, seed=seed
    )
    return PatchWork(dataset, endless(sampler))


def ours_for_peer(work: PatchWork) -> Callable[[int], dict[str, float]]:
    """Our side of `compare`."""

    def ours(patches: int) -> dict[str, float]:
        costs = work.round(patches)
        return {"whole": costs["whole"], "dense": work.round(_FEW, ("dense",))["dense"]}

    return ours


def _tell(progress: Progress, what: str, done: int, number: int, name: str) -> None:
    progress(done, number, what)


def against_peer(
    config: RunConfig, dataset: CellMapMultiClassDataset, python: Path, progress: Progress = _silent
) -> tuple[Comparison, ...]:
    """cellmap-data on the crops, classes, patch and voxel size of a run: plain patches, then flipped and rotated
    ones. Ours reads the run's cache, or where it has none a cache on disk."""
    options = patch_options(config)
    options = replace(options, inputs=(), cache="disk" if options.cache == "none" else options.cache)
    crops = [volume.crop for volume in dataset.volumes]
    found = []
    for augmented in (False, True):
        augmentor = PatchAugmentor.of(OUR_AUGMENTED, dataset.patch_size) if augmented else None
        own = CellMapMultiClassDataset.of_crops(
            crops, dataset.classes, "train", dataset.patch_size, dataset.voxel_size, augmentor, options
        )
        prepare(own.all_volumes, None, processes=1)
        work = work_on(own, config.data.sampling, config.system.seed)
        with (
            one_torch_thread(),
            Peer(python, crops, dataset.classes, dataset.patch_size, dataset.voxel_size, augmented=augmented) as peer,
        ):
            tell = partial(_tell, progress, "cellmap-data, " + ("augmented" if augmented else "plain"))
            found.append(compare(peer, ours_for_peer(work), augmented=augmented, say=tell))
    return tuple(found)


__all__ = ["DataBench", "against_peer", "bench_data", "endless", "one_torch_thread", "ours_for_peer", "work_on"]
