"""A trained network over crops: from a configuration and a checkpoint to probabilities on disk.

What is predicted is a list of `Target`: crops of the catalog, rows of a crop table, or a box of a data set
(`targets_of`). Each becomes one `NetworkPredictTask` below ``{out}/{dataset}.zarr/{name}``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.crop_table import CropTable
from connectomics.config.schema import RunConfig
from connectomics.data.dataset.build import inputs_of
from connectomics.data.normalization import for_prediction
from connectomics.data.splits import kept_out
from connectomics.errors import BlocksFailedError, InputError, MissingError
from connectomics.geometry import Box, Triple, VoxelGrid, triple
from connectomics.inference.augmented import dropout_on
from connectomics.inference.predict_task import TASK_FILE, PredictTask, given
from connectomics.inference.save import save_cellmap_predictions as save_cellmap_predictions
from connectomics.inference.symmetry import symmetries
from connectomics.io import store
from connectomics.io.location import local_path
from connectomics.io.normalization import Normalization
from connectomics.pipeline.network_task import NetworkPredictTask, channels_of, common_hash, ready, weights_hash
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.failures import Accepted, accepted_of
from connectomics.tasks.pool import Engine, Here
from connectomics.tasks.runner import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

    from connectomics.lightning.module import ConnectomicsModule

#: Shows the progress of a task, by its name, while the context lasts.
Shown = Callable[[str], AbstractContextManager[Progress | None]]
Checkpoints = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class Target:
    """One region to predict.

    Attributes:
        dataset: name of the data set in the data root.
        name: of the region's folder in the output, ``crop557``.
        grids: the grid that is written for each class.
    """

    dataset: str
    name: str
    grids: Mapping[str, VoxelGrid] = field(hash=False)


# -- what to predict -------------------------------------------------------------------------------------------------
def targets_of(
    config: RunConfig, *, crop_table: CropTable | str | Path | None = None, box: str | None = None
) -> list[Target]:
    """What a configuration says to predict.

    Args:
        config: ``dataset`` names the data root, the classes, and (for the catalog) data sets and crops.
        crop_table: predict these rows, as far as the network has their classes: a table, its path, or "challenge".
        box: predict a box at the network's voxel size instead: ``DATASET:z0,y0,x0:z1,y1,x1`` in nm.

    Returns:
        Targets. Without table and box those of ``config.dataset.crop_table`` where that is set, else the catalog's
        crops (``dataset.datasets``, ``dataset.crops``).

    Raises:
        InputError, UnknownNameError, MissingError: nothing is left to predict, or a name is not known.
    """
    if box is not None:
        return [box_target(config, box)]
    table = crop_table if crop_table is not None else config.dataset.crop_table
    if table is not None:
        return table_targets(CropTable.resolve(table), config.dataset.classes)
    crops = Catalog.open(config.dataset.data_root).crops(
        config.dataset.datasets, config.dataset.crops, config.dataset.classes
    )
    return [crop_target(crop, config.dataset.classes) for crop in crops]


def kept_out_targets(config: RunConfig, checkpoints: Sequence[str | Path]) -> list[Target]:
    """The annotated crops, or parts of crops, that no network of ``checkpoints`` was trained on: ``val`` of
    ``split.yaml`` in its run. Those that overlap what one of them was trained on are left out, with a warning.

    Raises:
        MissingError: a checkpoint does not lie in a run's folder, ``RUN/checkpoints/x.ckpt``.
        InputError: every crop was trained on by one of them.
    """
    data = config.dataset
    crops = Catalog.open(data.data_root).crops(data.datasets, data.crops, data.classes)
    files = [Path(path).resolve().parent.parent / "split.yaml" for path in checkpoints]
    for path, file in zip(checkpoints, files, strict=True):
        if not file.is_file():
            raise MissingError(
                f"{path}: which crops it was not trained on is in the split.yaml of its run, and there is no {file}; "
                "name the crops yourself: dataset.crops=[...]"
            )
    kept = kept_out(crops, files)
    if not kept:
        raise InputError(
            f"no crop of {config.dataset.data_root} was kept out of the training of "
            f"{', '.join(map(str, checkpoints))}; name the crops yourself: dataset.crops=[...]"
        )
    return [crop_target(crop, config.dataset.classes) for crop in kept]


def crop_target(crop: Crop, classes: Sequence[str]) -> Target:
    """All ``classes`` on the grid of a crop of the catalog: a class's own where it has labels, else the finest one."""
    grids = {name: crop.within(crop.labels[name].grid) if name in crop.labels else crop.grid for name in classes}
    return Target(crop.dataset, crop.name, grids)


def table_targets(table: CropTable, classes: Sequence[str]) -> list[Target]:
    """Each crop of a table with those of ``classes`` that the table asks for; crops without any are left out."""
    targets = []
    for rows in table.crops().values():
        grids = {row.class_name: row.grid for row in rows if row.class_name in classes}
        if grids:
            targets.append(Target(rows[0].dataset, rows[0].crop_name, grids))
    if not targets:
        asked = sorted({row.class_name for row in table})
        raise InputError(f"the crop table asks for {', '.join(asked[:12])}; the network gives {', '.join(classes)}")
    return targets


def box_target(config: RunConfig, text: str) -> Target:
    """The box ``DATASET:z0,y0,x0:z1,y1,x1`` (faces, nm), at the network's voxel size, for all classes."""
    parts = text.rsplit(":", 2)
    try:
        begin, end = (triple([float(v) for v in part.split(",")], "a corner") for part in parts[1:])
        dataset = parts[0]
    except ValueError as error:
        raise InputError(f"a box is DATASET:z0,y0,x0:z1,y1,x1 in nm, found {text!r} ({error})") from error
    box = Box(begin, end)
    if not dataset or box.is_empty:
        raise InputError(f"a box is DATASET:z0,y0,x0:z1,y1,x1 in nm with each end above its begin, found {text!r}")
    grid = VoxelGrid.covering(box, config.dataset.voxel_size)
    # exactly, or two boxes could share a name
    name = "box_" + "_".join(str(int(v)) if v.is_integer() else repr(v) for v in (*begin, *end))
    return Target(dataset, name, dict.fromkeys(config.dataset.classes, grid))


# -- predicting ------------------------------------------------------------------------------------------------------
def predict_cellmap_crops(
    model: ConnectomicsModule | None,
    config: RunConfig,
    checkpoint_path: Checkpoints,
    output_dir: str | Path,
    *,
    targets: Sequence[Target] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool | Shown = True,
    accept_failed: Accepted | Collection[int] = (),
) -> list[Path]:
    """Predict crops by sliding window, block by block, into ``{output_dir}/{dataset}.zarr/{crop}/{class}/s0``.

    Every target is checked before the first is predicted: the raw must be there, and no output of other settings in
    the way. A run that was killed goes on where it stopped; what is finished is left alone.

    Args:
        model: a network with its weights, for engines that work in this process; None loads ``checkpoint_path``.
        config: ``dataset`` (root, classes, resolution), ``data`` (patch size, intensity range), ``inference``,
            ``engine``, and ``training.precision``, which holds on a GPU (the CPU computes in float32).
        checkpoint_path: what to load where there is no ``model``. Several are an ensemble: their probabilities are
            averaged. All are held in memory at once, which is little beside a block, and their order does not matter.
        targets: regions; None: `targets_of` the configuration.
        device: ``cpu``, ``cuda``, ``cuda:1``; None: a GPU where there is one and ``system.accelerator`` allows it.
        overwrite: replace predictions that were made with other settings or another checkpoint.
        resume: go on only: an error where nothing was begun. With ``overwrite``: replace predictions of other settings,
            and keep what is there of these.
        progress: show a bar on stderr; or what shows the progress of a task, by its name.
        accept_failed: numbers of blocks that may fail (they are then stored as 0 and recorded as ``unknown`` in the
            attributes), by crop, ``{"crop1": {12, 40}}``; numbers alone if there is one target.

    Returns:
        The folders of the targets, in their order.

    Raises:
        InputError: the network's classes or inputs are not the configuration's, two checkpoints hold the same weights,
            a region has no raw, or lacks some and ``data.allow_missing_raw`` is not set, ``inference.tta`` or
            ``inference.uncertainty`` cannot be had, or a ``model`` is to go to other processes.
        MissingError, UnknownNameError: the checkpoint, the data root, a data set or a crop is not there.
        WriteError: an output of other settings is in the way, or the disk is full.
        BlocksFailedError: blocks could not be predicted (raw that cannot be decoded); all others are, of all targets.
        StoreError, OutOfMemoryError: raw cannot be read, or memory does not suffice; what is done is kept.
    """
    place = chosen_device(config, device)
    modules = _modules(model, config, checkpoint_path)
    tasks = _tasks(config, modules, () if model is not None else _paths(checkpoint_path), output_dir, targets, place)
    if resume and not overwrite and not any((task.folder / TASK_FILE).exists() for task in tasks):
        raise MissingError(f"--resume: nothing was begun below {output_dir}; leave it out to begin")
    blocks = accept_failed if isinstance(accept_failed, Mapping) else {"": accept_failed} if accept_failed else {}
    accepted = {task.output: numbers for task, numbers in zip(tasks, accepted_of(tasks, blocks), strict=True)}
    anew = [task.begins_anew(overwrite=overwrite, resume=resume) for task in tasks]
    todo = [task for task, again in zip(tasks, anew, strict=True) if task.check(overwrite=again)]
    with open_engine(config.engine, place) as engine:
        if not isinstance(engine, Here):
            if model is not None:
                raise InputError(
                    "a model that is given in memory can only predict in this process: give its checkpoint instead, or "
                    "engine.name=local engine.workers=1 without limits"
                )
            del modules  # every worker loads its own
            _run_all(todo, engine, overwrite, resume, progress, accepted)
        elif todo:
            with ready(list(modules.values()), todo[0], place) as networks:
                _run_all([given(task, networks) for task in todo], engine, overwrite, resume, progress, accepted)
    return [task.folder for task in tasks]


def prediction_tasks(
    config: RunConfig,
    checkpoint_path: Checkpoints,
    output_dir: str | Path,
    *,
    targets: Sequence[Target] | None = None,
    device: str | None = None,
) -> list[NetworkPredictTask]:
    """What `predict_cellmap_crops` would run: a task for each target, which any process can do."""
    modules = _modules(None, config, checkpoint_path)
    return _tasks(config, modules, _paths(checkpoint_path), output_dir, targets, chosen_device(config, device))


def _run_all(
    tasks: Sequence[PredictTask],
    engine: Engine,
    overwrite: bool,
    resume: bool,
    progress: bool | Shown,
    accepted: Mapping[str, Collection[int]],
) -> None:
    """One after the other; blocks that fail in one do not keep the others from being done."""
    failed = []
    shown = partial(_bar, shown=progress) if isinstance(progress, bool) else progress
    for task in tasks:
        with shown(task.name) as advance:
            try:
                run_task(task, engine, advance, overwrite=overwrite, resume=resume, accept=accepted[task.output])
            except BlocksFailedError as error:
                failed.append(str(error))
    if failed:
        raise BlocksFailedError("; ".join(failed))


def _paths(checkpoints: Checkpoints) -> tuple[str, ...]:
    given_paths = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints or ())
    return tuple(os.path.abspath(path) for path in given_paths)


def _modules(
    model: ConnectomicsModule | None, config: RunConfig, checkpoints: Checkpoints
) -> dict[str, ConnectomicsModule]:
    """The given network or the checkpoints', by `weights_hash`, in its order: sums are then the same to the bit
    whichever is named first. Their classes must be the configuration's, in their order."""
    from connectomics.lightning.checkpoints import check_classes, load_module

    paths = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints or ())
    if model is not None:
        check_classes(", ".join(map(str, paths)) or "(the given model)", model.classes, config.dataset.classes)
        return {weights_hash(model): model}
    if not paths:
        raise InputError("nothing to predict with: give a model or a checkpoint")
    modules: dict[str, ConnectomicsModule] = {}
    origin: dict[str, str | Path] = {}
    for path in paths:
        module = load_module(path, config)
        key = weights_hash(module)
        if key in modules:
            raise InputError(f"checkpoints {origin[key]} and {path} hold the same weights; give each network once")
        modules[key], origin[key] = module, path
    return dict(sorted(modules.items()))


def chosen_device(config: RunConfig, name: str | None) -> str:
    """The device that is asked for, if this machine has it (`InputError` otherwise; the workers of a cluster may have
    what this machine has not); by default a GPU where there is one and ``system.accelerator`` allows it."""
    if config.engine.name == "dask" and name is not None:
        return name
    if name is not None:
        return _known_device(name)
    import torch

    return "cuda" if config.system.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def _known_device(name: str) -> str:
    """The device's name, if this machine has it; `InputError` otherwise."""
    import torch

    there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise InputError(f"no device {name!r} here; this machine has {', '.join(there)}")
    return name


def _tasks(
    config: RunConfig,
    modules: Mapping[str, ConnectomicsModule],
    checkpoints: tuple[str, ...],
    output_dir: str | Path,
    targets: Sequence[Target] | None,
    device: str,
) -> list[NetworkPredictTask]:
    """A task for each target. The networks have the same inputs and channels."""
    from connectomics.config.heads import channel_attributes
    from connectomics.lightning.network import inference_window

    catalog = Catalog.open(config.dataset.data_root)
    for module in modules.values():
        trained = replace(
            config, model=module.config.model, data=replace(config.data, inputs=module.config.data.inputs)
        )
        window = inference_window(trained)
        if config.inference.uncertainty == "dropout":
            with dropout_on(module):  # refused before anything is written
                pass
    channels, about = channels_of(module), channel_attributes(module.config)
    options = config.inference
    chosen_targets = list(targets) if targets is not None else targets_of(config)
    used = _normalizations(config, [module.config for module in modules.values()], catalog, chosen_targets)
    on_gpu = {"16-mixed": "fp16", "bf16-mixed": "bf16", "32": "32"}[config.training.precision]
    out = local_path(output_dir)
    tasks = []
    for target in chosen_targets:
        raw = catalog.raw_location(target.dataset)
        grids = _grids(target, channels, about, triple(config.dataset.voxel_size, "dataset.voxel_size"))
        tasks.append(
            NetworkPredictTask(
                raw=_absolute(raw),
                output=os.path.abspath(Path(out, f"{target.dataset}.zarr", target.name)),
                classes=channels,
                targets=grids,
                voxel_size=triple(config.dataset.voxel_size, "dataset.voxel_size"),
                window=(window[0], window[1], window[2]),
                checkpoint=common_hash(list(modules)),
                checkpoints=checkpoints,
                normalization=used[target.dataset],
                overlap=options.overlap,
                blending=options.blending,
                context=None if options.context is None else (options.context,) * 3,
                block_size=(options.block_size[0], options.block_size[1], options.block_size[2]),
                batch_size=options.batch_size,
                precision="32" if device == "cpu" else on_gpu,
                channels_last=options.channels_last,
                compile=options.compile,
                dtype=options.dtype,
                pyramid=options.pyramid,
                views=inputs_of(trained),
                symmetries=tuple(str(symmetry) for symmetry in symmetries(options.tta)),
                uncertainty=options.uncertainty,
                dropout_samples=options.dropout_samples if options.uncertainty == "dropout" else 0,
                skip_empty=options.skip_empty,
                mask=_mask(catalog, target.dataset, options.mask),
                allow_missing_raw=config.data.allow_missing_raw,
                about=about,
            )
        )
    return tasks


def _normalizations(
    config: RunConfig, trained: Sequence[RunConfig], catalog: Catalog, targets: Sequence[Target]
) -> dict[str, Normalization]:
    """The normalization of each data set that is predicted."""
    boxes: dict[str, list[Box]] = {}
    for target in targets:
        boxes.setdefault(target.dataset, []).extend(grid.box for grid in set(target.grids.values()))
    return {name: for_prediction(config, trained, name, catalog.raw_location(name), of) for name, of in boxes.items()}


def _grids(
    target: Target, channels: Sequence[str], about: Mapping[str, Mapping[str, Any]], voxel_size: Triple
) -> dict[str, VoxelGrid]:
    """The grid of each channel that is written: that of its class.

    A class with affinities is written at the network's voxel size, over the same box, together with these: between
    voxels of another size a neighbour is no neighbour any more, and nothing could be decoded.
    """
    paired = {what["class_name"] for what in about.values() if what["artefact"] == "affinity"}
    grids = {}
    for name in channels:
        owner = str(about.get(name, {}).get("class_name", name))
        grid = target.grids.get(owner)
        if grid is not None:
            same = owner not in paired or grid.voxel_size == voxel_size
            grids[name] = grid if same else grid.at_voxel_size(voxel_size)
    return grids


def _mask(catalog: Catalog, dataset: str, mask: str | None) -> str | None:
    """Where ``inference.mask`` is for a data set: a path or an address, or a group in the data set's Zarr root."""
    if mask is None:
        return None
    inside = store.join(catalog.location(dataset), mask)
    return _absolute(inside if not Path(mask).is_absolute() and store.exists(inside) else mask)


def _absolute(location: str) -> str:
    """A location that means the same in any process."""
    return location if store.is_s3(location) else os.path.abspath(store.normalize(location))


@contextmanager
def _bar(what: str, shown: bool) -> Iterator[Progress | None]:
    """A progress bar on stderr for each stage of a task."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        numbers: dict[str, TaskID] = {}

        def advance(stage: str, done: int, blocks: int) -> None:
            if stage not in numbers:
                numbers[stage] = bars.add_task(f"{what}, {stage}", total=blocks)
            bars.update(numbers[stage], completed=done)

        yield advance
