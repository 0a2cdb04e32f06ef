"""Write model packages; `connectomics.lightning.model_package` describes and reads them."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import connectomics
from connectomics.config import RunConfig, config_to_dict
from connectomics.config.heads import channel_names
from connectomics.errors import InputError, MissingError, WriteError
from connectomics.io.location import local_path
from connectomics.io.replacing import not_ours, write_file
from connectomics.io.store import read_json
from connectomics.lightning.checkpoints import load_network, read_checkpoint
from connectomics.lightning.model_package import (
    ABOUT,
    FORMAT,
    SUFFIX,
    TEST,
    WEIGHTS,
    Package,
    answer,
    is_package,
    split_of,
)
from connectomics.lightning.network import model_options
from connectomics.lightning.run_state import metric_rows, weights_file
from connectomics.models.registry import check_patch_size, fixed_patch_size
from connectomics.pipeline.runs import Run

if TYPE_CHECKING:
    from connectomics.inference.trained_network import TrainedNetwork

_EDGE = 32  # voxels per side of the test input, if the patch is a multiple of it


def load_model(path: str | Path) -> TrainedNetwork:
    """Return the network of a model package or a checkpoint, on the CPU, in evaluation mode.

    The checksums and the test input of a package are verified. ``model.config`` is the configuration of its training;
    ``model.classes`` are its first channels. ``model.probabilities(image)`` returns (B, C, D, H, W) float32 for images
    (B, 1, D, H, W) at ``model.config.dataset.voxel_size`` nm; ``model.normalization(dataset).input(raw)`` returns the
    image, float32, for raw values.

    Raises:
        MissingError, CorruptDataError, InputError, ConfigError: the file is missing, damaged, or of another kind.
    """
    return load_network(str(path))


def write_package(
    source: str | Path | Run,
    out: str | Path | None = None,
    *,
    scores: Mapping[str, Any] | str | Path | None = None,
    license_name: str = "",
    description: str = "",
    overwrite: bool = False,
) -> Package:
    """Write a trained network to one file.

    Args:
        source: a run or its folder (for its best checkpoint), or a checkpoint; training data, and the scores of the
            checkpoint's validation, are read from the run folder, if any.
        out: the file, written atomically; default ``{run}.pytc``.
        scores: scores to store in it, or their file (``scores.json``).

    Raises:
        MissingError, InputError: a path is wrong.
        WriteError: the file exists (with ``overwrite``: and is not a package). Also what `load_network` raises.
    """
    import torch
    from safetensors.torch import save

    out = None if out is None else local_path(out)
    checkpoint, name = checkpoint_of(source)
    known = read_json(scores) if isinstance(scores, str | Path) else scores
    if scores is not None and known is None:
        raise MissingError(f"no scores at {scores}; create them with `pytc score`, or omit --scores")
    target = target_of(f"{name}{SUFFIX}" if out is None else out, is_package, "package", overwrite)
    module = load_network(checkpoint)
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    images = test_images(module.config)
    result = answer(module, [torch.from_numpy(image) for image in images])
    test = {f"input-{n}": torch.from_numpy(image) for n, image in enumerate(images)} | {"output": result.contiguous()}
    members = {WEIGHTS: save(weights), TEST: save(test)}
    config, split = module.config, split_of(checkpoint)
    table = checkpoint.resolve().parent.parent / "metrics.csv"
    about = {
        "format": FORMAT,
        "version": connectomics.__version__,
        "architecture": config.model.architecture,
        "classes": list(config.dataset.classes),
        "channels": list(channel_names(config)),
        "voxel_size": list(config.voxel_size),
        "normalization": config.data.normalization,
        "window": list(config.window),
        "parameters": sum(p.numel() for p in module.parameters()),
        "scores": dict(known or {}),
        "validation": _validation(table, int(read_checkpoint(checkpoint).get("global_step", 0))),
        "trained_on": split.all_trained if split else (),
        "validated_on": split.val if split else (),
        "license": license_name,
        "description": description,
        "config": config_to_dict(config),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }
    write_file(target, _zipped({ABOUT: json.dumps(about, indent=1).encode(), **members}))
    return Package(target, about)


def _validation(table: Path, steps: int) -> dict[str, float]:
    """Return the scores of the latest validation within so many optimizer steps; {} if there is none."""
    found: dict[str, float] = {}
    for row in metric_rows(table):
        if int(float(row["step"])) < steps:
            found |= {name: float(value) for name, value in row.items() if name[:4] == "val/" and value}
    return found


def checkpoint_of(source: str | Path | Run) -> tuple[Path, str]:
    """Return the best checkpoint of a run or its folder, or the file itself, and a name for what is made of it."""
    run = source.folder if isinstance(source, Run) else Path(source)
    name = f"{run.resolve().parent.name}-{run.resolve().name}" if run.is_dir() else run.stem
    return weights_file(run), name


def target_of(out: str | Path, is_ours: Callable[[Path], bool], what: str, overwrite: bool) -> Path:
    """Return a file to write; refuse a folder, a file without ``overwrite``, and one that is none of ours."""
    target = local_path(out)
    if target.is_dir():
        raise InputError(f"{target} is a folder; give a file name in it")
    if target.exists() and not overwrite:
        raise WriteError(f"{target} exists; add --overwrite to replace it, or give another name")
    if target.exists() and not is_ours(target):
        raise not_ours(target, what)
    return target


def test_images(config: RunConfig) -> list[np.ndarray]:
    """Return images (1, 1, d, h, w) float32 in [0, 1] for each input, smaller than a patch if that fits."""
    generator = np.random.default_rng(0)
    shapes = [config.data.patch_size, *[item.patch_size for item in config.data.inputs]]
    small = [_EDGE if n % _EDGE == 0 else n for n in config.data.patch_size]
    if not config.data.inputs and _takes(config, small):  # inputs are registered by their extents, so they keep them
        shapes = [small]
    return [generator.random((1, 1, *shape), dtype=np.float32) for shape in shapes]


def _takes(config: RunConfig, shape: Sequence[int]) -> bool:
    try:
        check_patch_size(config.model.architecture, shape, model_options(config))
    except InputError:
        return False
    return not fixed_patch_size(config.model.architecture)


def _zipped(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            # with a fixed date, the same model gives the same bytes
            file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return content.getvalue()
