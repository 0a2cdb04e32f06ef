"""Predict crops with trained networks: from a configuration and checkpoints to probabilities on disk.

The regions to predict are a list of `Target`: crops of the catalog, rows of a crop table, or a box of a data set
(`targets_of`). Each becomes one `NetworkPredictTask` below ``{out}/{dataset}.zarr/{name}``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.classes import unions_of
from connectomics.cellmap.crop_table import CropTable
from connectomics.config import RunConfig
from connectomics.config.heads import channel_attributes, channel_names
from connectomics.config.output import wants_pyramid
from connectomics.config.schema import EngineConfig
from connectomics.data.dataset.build import inputs_of
from connectomics.errors import BlocksFailedError, InputError
from connectomics.geometry import index
from connectomics.inference.artifact import save_cellmap_predictions as save_cellmap_predictions
from connectomics.inference.augmented import dropout_on
from connectomics.inference.predict_task import PredictTask, given
from connectomics.inference.symmetry import symmetries
from connectomics.inference.windows import WindowFit, window_for
from connectomics.io.location import absolute
from connectomics.io.place import output_place
from connectomics.io.sharded import Storage
from connectomics.pipeline.network_task import NetworkPredictTask, load_networks, network_and_config, ready
from connectomics.pipeline.results import Probabilities
from connectomics.pipeline.runs import Run
from connectomics.pipeline.targets import Target, chosen_targets, grids_of, mask_of, normalizations_of, with_trained
from connectomics.progress import Progress, named, silent
from connectomics.tasks import TASK_FILE, open_engine, run_task
from connectomics.tasks.block_task import require_begun
from connectomics.tasks.engines import Here
from connectomics.tasks.failures import Accepted, accepted_of

if TYPE_CHECKING:
    from connectomics.inference.trained_network import TrainedNetwork


def predict(
    network: Run | str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    config: RunConfig | str | Path | None = None,
    overrides: Sequence[str] = (),
    crops: CropTable | str | Path | None = None,
    box: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    accept_failed: Accepted | Collection[int] = (),
    progress: Progress | None = None,
) -> Probabilities:
    """Predict crops, a box or a volume by sliding window, block by block; return the probabilities (uint8 or float16).

    Args:
        network: a run, its folder, a checkpoint or a model package; several are averaged.
        out: folder, local or ``s3://bucket/folder``, for ``{dataset}.zarr/{crop}/{class}/s0``.
        config: a configuration or its file; None: the one of the run or package.
        overrides: ``key=value`` for it.
        crops: a crop table or its path, "challenge", "test" (``test_crops.csv`` of the data root, else the
            challenge's), or "val" (what the network was not trained on); None: all crops of the data root.
        box: ``DATASET:z0,y0,x0:z1,y1,x1`` (faces, nm) or ``DATASET`` for all of its raw, instead of crops.
        device: ``cpu``, ``cuda``, ``cuda:1``; None: a GPU if there is one and ``system.accelerator`` allows it.
        overwrite: replace predictions that were made with other settings or another checkpoint.
        resume: fail if nothing was started; with ``overwrite``, keep predictions made with these settings.
        accept_failed: numbers of blocks that may fail, by crop (`predict_cellmap_crops`).
        progress: called for the blocks of each region.

    Raises:
        ConfigError: the configuration. All others: see `predict_cellmap_crops`.
    """
    composed, paths = network_and_config(network, config, overrides)
    targets, table = chosen_targets(composed, paths, crops, box)
    written = predict_cellmap_crops(
        None, composed, paths, out, targets=targets, device=device,
        overwrite=overwrite, resume=resume, progress=progress, accept_failed=accept_failed,
    )  # fmt: skip
    return Probabilities(output_place(out), composed, table, tuple(written))


def predict_tasks(
    network: Run | str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    config: RunConfig | str | Path | None = None,
    overrides: Sequence[str] = (),
    crops: CropTable | str | Path | None = None,
    box: str | None = None,
    device: str | None = None,
) -> tuple[list[NetworkPredictTask], EngineConfig, str]:
    """Return what `predict` would run: the tasks, the engine and the device."""
    composed, paths = network_and_config(network, config, overrides)
    targets, _ = chosen_targets(composed, paths, crops, box)
    place = chosen_device(composed, device)
    tasks = network_tasks(composed, load_networks(paths, composed), paths, out, targets, place)
    return tasks, composed.engine, place


def predict_cellmap_crops(
    model: TrainedNetwork | None,
    config: RunConfig,
    checkpoint_path: str | Path | Sequence[str | Path] | None,
    output_dir: str | Path,
    *,
    targets: Sequence[Target] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    accept_failed: Accepted | Collection[int] = (),
) -> list[Path]:
    """Predict crops by sliding window, block by block, into ``{output_dir}/{dataset}.zarr/{crop}/{class}/s0``.

    Every target is checked before the first is predicted: its raw must exist, and its output folder must not hold a
    prediction with other settings. Rerun a killed run to resume it; finished blocks are kept.

    Args:
        model: a network with its weights, for engines that work in this process; None loads ``checkpoint_path``.
        config: ``dataset`` (root, classes, resolution), ``data`` (patch size, intensity range), ``inference``,
            ``engine``, and ``training.precision``, which holds on a GPU (the CPU computes in float32).
        checkpoint_path: what to load without a ``model``. Several are an ensemble: their probabilities are averaged.
            All are in memory at once, which is little compared to a block, and their order does not matter.
        output_dir: folder of the predictions.
        targets: regions; None: `targets_of` the configuration.
        device, overwrite, resume: as for `predict`.
        progress: called for the blocks of each stage of each target.
        accept_failed: numbers of blocks that may fail (they are then stored as 0 and recorded as ``unknown`` in the
            attributes), by crop, ``{"crop1": {12, 40}}``; numbers alone if there is one target.

    Returns:
        The folders of the targets, in order.

    Raises:
        InputError: the network's classes or inputs are not the configuration's, two checkpoints hold the same weights,
            a region lacks raw and ``data.allow_missing_raw`` is not set, ``inference.tta`` or
            ``inference.uncertainty`` is not possible, or a ``model`` would have to go to other processes.
        MissingError, UnknownNameError: the checkpoint, the data root, a data set or a crop does not exist.
        WriteError: there is an output of other settings, or the disk is full.
        BlocksFailedError: blocks could not be predicted (raw that cannot be decoded); all others are, of all targets.
        StoreError, OutOfMemoryError: raw cannot be read, or memory does not suffice; what is done is kept.
    """
    place = chosen_device(config, device)
    given_paths = [checkpoint_path] if isinstance(checkpoint_path, str | Path) else list(checkpoint_path or ())
    networks = load_networks(given_paths, config) if model is None else _given_network(model, config, given_paths)
    tasks = network_tasks(config, networks, given_paths if model is None else (), output_dir, targets, place)
    begun = any((task.folder / TASK_FILE).exists() for task in tasks)
    require_begun(begun, output_dir, overwrite=overwrite, resume=resume)
    blocks = accept_failed if isinstance(accept_failed, Mapping) else {"": accept_failed} if accept_failed else {}
    accepted = {task.output: numbers for task, numbers in zip(tasks, accepted_of(tasks, blocks), strict=True)}
    replaced = [task.starts_over(overwrite=overwrite, resume=resume) for task in tasks]
    todo: list[PredictTask] = [task for task, again in zip(tasks, replaced, strict=True) if task.check(overwrite=again)]
    failed = []
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(config.engine, place))
        if isinstance(engine, Here) and todo:
            runs = stack.enter_context(ready(list(networks.values()), todo[0], place))
            todo = [given(task, runs) for task in todo]
        elif not isinstance(engine, Here) and model is not None:
            raise InputError(
                "a model that is given in memory can only predict in this process: give its checkpoint instead, or "
                "set engine.name=local engine.workers=1 without limits"
            )
        del networks  # every other worker loads its own
        for task in todo:
            advance = named(progress or silent, task.name)
            try:
                run_task(task, engine, advance, overwrite=overwrite, resume=resume, accept=accepted[task.output])
            except BlocksFailedError as error:  # the other targets can still be predicted
                failed.append(str(error))
    if failed:
        raise BlocksFailedError("; ".join(failed))
    return [task.folder for task in tasks]


def _given_network(model: TrainedNetwork, config: RunConfig, paths: Sequence[str | Path]) -> dict[str, TrainedNetwork]:
    from connectomics.inference.trained_network import weights_hash
    from connectomics.lightning.checkpoints import check_classes

    check_classes(", ".join(map(str, paths)) or "(the given model)", model.classes, config.dataset.classes)
    return {weights_hash(model): model}


def chosen_device(config: RunConfig, name: str | None) -> str:
    """Return the device ``name``; by default a GPU if there is one and ``system.accelerator`` allows it.

    Raises `InputError` if this machine does not have the device; with Dask the workers may have it.
    """
    if name is not None:
        return name if config.engine.name == "dask" else known_device(name)
    import torch

    return "cuda" if config.system.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def known_device(name: str) -> str:
    """Return ``name`` if this machine has the device: ``cpu``, ``cuda`` or ``cuda:N``. Raises `InputError` if not."""
    import torch

    there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise InputError(f"there is no device {name!r}; this machine has {', '.join(there)}")
    return name


def network_tasks(
    config: RunConfig,
    networks: Mapping[str, TrainedNetwork],
    checkpoints: Sequence[str | Path],
    output_dir: str | Path,
    targets: Sequence[Target] | None,
    device: str,
) -> list[NetworkPredictTask]:
    """Return a task for each target (None: those of the configuration), below ``output_dir``; nothing is written.

    The networks, by the hash of their weights, have the same inputs and channels; ``checkpoints`` are their files.
    """
    from connectomics.inference.trained_network import common_hash
    from connectomics.lightning.network import inference_window

    catalog = Catalog.open(config.dataset.data_root)
    for network in networks.values():
        trained = replace(
            config, model=network.config.model, data=replace(config.data, inputs=network.config.data.inputs)
        )
        inference_window(trained)  # refuses what the network cannot take
        if config.inference.uncertainty == "dropout":
            with dropout_on(network):  # refused before anything is written
                pass
    options, about = config.inference, channel_attributes(network.config)
    channels = (*channel_names(network.config), *unions_of(config.dataset.classes, options.groups))
    chosen = with_trained(targets, config, checkpoints)
    for number, target in enumerate(chosen):
        if any(target.key == other.key for other in chosen[:number]):
            raise InputError(
                f"{target.key} has several parts to predict, and a crop has one output folder; "
                "predict them one by one (--box), or leave one part in the split file"
            )
    normalizations = normalizations_of(config, [network.config for network in networks.values()], catalog, chosen)
    on_gpu = {"16-mixed": "fp16", "bf16-mixed": "bf16", "32": "32"}[config.training.precision]
    out, storage, fit = output_place(output_dir), Storage.of(config.output), WindowFit.of(config)
    windows = [window_for(trained, max(t.grids.values(), key=lambda grid: grid.size).box) for t in chosen]
    return [
        NetworkPredictTask(
            raw=absolute(catalog.raw_location(target.dataset)),
            output=absolute(out / f"{target.dataset}.zarr" / target.name),
            classes=channels,
            targets=grids_of(target, channels, about, config.voxel_size),
            voxel_size=config.voxel_size,
            window=window,
            checkpoint=common_hash(list(networks)),
            checkpoints=tuple(map(os.path.abspath, checkpoints)),
            normalization=normalizations[target.dataset],
            overlap=overlap,
            multiple=None if fit is None else fit.multiple,
            blending=options.blending,
            context=None if options.context is None else (options.context,) * 3,
            block_size=None if options.block_size is None else index(options.block_size),
            batch_size=options.batch_size,
            precision="32" if device == "cpu" else on_gpu,
            channels_last=options.channels_last,
            compile=options.compile,
            dtype=options.dtype,
            pyramid=wants_pyramid(config.output.pyramid, max(grid.size for grid in target.grids.values())),
            inputs=inputs_of(trained),
            symmetries=tuple(map(str, symmetries(options.tta))),
            uncertainty=options.uncertainty,
            dropout_samples=options.dropout_samples if options.uncertainty == "dropout" else 0,
            skip_empty=options.skip_empty,
            mask=mask_of(catalog, target.dataset, options.mask),
            allow_missing_raw=config.data.allow_missing_raw,
            seen_in_training=target.seen_in_training,
            about=about,
            storage=storage,
        )
        for target, (window, overlap) in zip(chosen, windows, strict=True)
    ]
