"""A trained network over crops: from a configuration and a checkpoint to probabilities on disk.

What is predicted is a list of `Target`: crops of the catalog, rows of a crop table, or a box of a data set
(`targets_of`). Each becomes one `connectomics.inference.task.PredictTask` below ``{out}/{dataset}.zarr/{name}``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.crop_table import CropTable
from connectomics.config.schema import RunConfig
from connectomics.data.dataset.build import views_of
from connectomics.data.volumes import Intensity
from connectomics.errors import InputError
from connectomics.geometry import Box, Index, Triple, VoxelGrid, triple
from connectomics.inference.augmented import dropout_on, symmetries
from connectomics.inference.task import PredictTask, check_predict_task, run_predict_task
from connectomics.io.multiscale import Multiscale

if TYPE_CHECKING:
    import torch

    from connectomics.lightning.module import ConnectomicsModule


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


def crop_target(crop: Crop, classes: Sequence[str]) -> Target:
    """All ``classes`` on the grid of a crop of the catalog: a class's own where it has labels, else the finest one."""
    grids = {name: crop.labels[name].grid if name in crop.labels else crop.grid for name in classes}
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
    grid = VoxelGrid.covering(box, config.dataset.resolution)
    name = "box_" + "_".join(f"{v:g}" for v in (*begin, *end))
    return Target(dataset, name, dict.fromkeys(config.dataset.classes, grid))


# -- predicting ------------------------------------------------------------------------------------------------------
def predict_cellmap_crops(
    model: ConnectomicsModule | None,
    config: RunConfig,
    checkpoint_path: str | Path | Sequence[str | Path] | None,
    output_dir: str | Path,
    *,
    targets: Sequence[Target] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Predict crops by sliding window, block by block, into ``{output_dir}/{dataset}.zarr/{crop}/{class}/s0``.

    Every target is checked before the first is predicted: the raw must be there, and no output of other settings in
    the way. A run that was killed goes on where it stopped; what is finished is left alone.

    Args:
        model: a network with its weights; None loads ``checkpoint_path``.
        config: ``dataset`` (root, classes, resolution), ``data`` (patch size, intensity range), ``inference``, and
            ``training.precision``, which holds on a GPU (the CPU computes in float32).
        checkpoint_path: what to load where there is no ``model``. Several are an ensemble: their probabilities are
            averaged. All are held in memory at once, which is little beside a block, and their order does not matter.
        targets: regions; None: `targets_of` the configuration.
        device: ``cpu``, ``cuda``, ``cuda:1``; None: a GPU where there is one and ``system.accelerator`` allows it.
        overwrite: replace predictions that were made with other settings or another checkpoint.
        progress: show a bar on stderr.

    Returns:
        The folders of the targets, in their order.

    Raises:
        InputError: the network's classes or inputs are not the configuration's, two checkpoints hold the same weights,
            there is no raw in a region, or ``inference.tta`` or ``inference.uncertainty`` cannot be had.
        MissingError, UnknownNameError: the checkpoint, the data root, a data set or a crop is not there.
        WriteError, CorruptDataError: see `connectomics.inference.task.run_predict_task`.
    """
    from connectomics.lightning.module import inference_window

    wanted = list(targets) if targets is not None else targets_of(config)
    modules = _modules(model, config, checkpoint_path)
    place = _device(config) if device is None else _known_device(device)
    catalog = Catalog.open(config.dataset.data_root)
    checkpoint = _common_hash(list(modules))
    for module in modules.values():
        trained = module.config
        data = replace(config.data, inputs=trained.data.inputs)
        window = inference_window(replace(config, model=trained.model, data=data))
    views = views_of(trained)  # the same for all, as is the window
    tasks = [_task(config, catalog, target, Path(output_dir), window, views, checkpoint, place) for target in wanted]
    for task in tasks:
        check_predict_task(task, overwrite=overwrite)

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.train, module.training)
            module.eval().to(place)
            if config.inference.uncertainty == "dropout":
                stack.enter_context(dropout_on(module))
        networks = [module.probabilities for module in modules.values()]
        for task in tasks:
            with _bar(task.name, progress) as advance:
                run_predict_task(task, networks, place, advance, overwrite=overwrite)
    return [Path(task.output) for task in tasks]


def weights_hash(module: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits of the SHA-256 over names, shapes and bytes of all weights and buffers.

    Of the weights and not of the file, so that copies of a checkpoint count as the same.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


def _common_hash(hashes: Sequence[str]) -> str:
    """That of a single network itself; of several one that does not depend on their order."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()[:16]


def _modules(
    model: ConnectomicsModule | None, config: RunConfig, checkpoints: str | Path | Sequence[str | Path] | None
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


def _device(config: RunConfig) -> str:
    import torch

    return "cuda" if config.system.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def _known_device(name: str) -> str:
    """The device's name, if this machine has it; `InputError` otherwise."""
    import torch

    there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise InputError(f"no device {name!r} here; this machine has {', '.join(there)}")
    return name


def _task(
    config: RunConfig,
    catalog: Catalog,
    target: Target,
    output_dir: Path,
    window: Sequence[int],
    views: tuple[tuple[Triple, Index], ...],
    checkpoint: str,
    device: str,
) -> PredictTask:
    raw = catalog.raw_location(target.dataset)
    intensity = Intensity.of(Multiscale.open(raw), config.data.intensity_range)
    options = config.inference
    on_gpu = {"16-mixed": "fp16", "bf16-mixed": "bf16", "32": "32"}[config.training.precision]
    z, y, x = window
    depth, height, width = options.block_size
    return PredictTask(
        raw=raw,
        output=str(output_dir / f"{target.dataset}.zarr" / target.name),
        classes=tuple(config.dataset.classes),
        targets=target.grids,
        voxel_size=triple(config.dataset.resolution, "dataset.resolution"),
        window=(z, y, x),
        checkpoint=checkpoint,
        intensity_range=(intensity.low, intensity.high),
        overlap=options.overlap,
        blending=options.blending,
        context=None if options.context is None else (options.context,) * 3,
        block_size=(depth, height, width),
        batch_size=options.batch_size,
        precision="32" if device == "cpu" else on_gpu,
        views=views,
        symmetries=tuple(str(symmetry) for symmetry in symmetries(options.tta)),
        uncertainty=options.uncertainty,
        dropout_samples=options.dropout_samples if options.uncertainty == "dropout" else 0,
        skip_empty=options.skip_empty,
    )


@contextmanager
def _bar(what: str, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, to be called with the finished and the total number of blocks."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        number = bar.add_task(what)

        def advance(done: int, total: int) -> None:
            bar.update(number, completed=done, total=total)

        yield advance
