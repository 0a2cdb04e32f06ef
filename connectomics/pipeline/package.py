"""Making a model package of a checkpoint (`connectomics.lightning.model_package` says what is in one, and reads it)."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import connectomics
from connectomics.config import RunConfig, config_to_dict
from connectomics.config.heads import channel_names
from connectomics.data.splits import Split
from connectomics.errors import InputError, MissingError, WriteError
from connectomics.io.location import local_path
from connectomics.io.replacing import not_ours
from connectomics.io.store import read_json
from connectomics.lightning.checkpoints import load_network
from connectomics.lightning.model_package import ABOUT, FORMAT, SUFFIX, TEST, WEIGHTS, Package, answer, is_package
from connectomics.pipeline.runs import Run

if TYPE_CHECKING:
    from connectomics.inference.trained_network import TrainedNetwork

_EDGE = 32  # voxels of the test input along each axis, where the patch is a multiple of it


def load_model(path: str | Path) -> TrainedNetwork:
    """Return the network of a model package or a checkpoint, on the CPU, in evaluation mode.

    A package is verified first: its checksums, and its answer to the input it contains. ``model.config`` says how it
    was trained, ``model.classes`` what its channels are. ``model.probabilities(image)`` gives (B, C, D, H, W) float32
    for images (B, 1, D, H, W) at ``model.config.dataset.voxel_size`` nm; ``model.normalization(dataset).input(raw)``
    makes the image, float32, from raw values.

    Raises:
        MissingError, CorruptDataError, InputError, ConfigError: the file is absent, damaged, or of another kind.
    """
    return load_network(str(path))


def package(
    source: str | Path | Run,
    out: str | Path | None = None,
    *,
    scores: str | Path | None = None,
    license_name: str = "",
    description: str = "",
    overwrite: bool = False,
) -> tuple[Package, Path]:
    """Pack a trained network into one file; return what it says of itself, and its path.

    Args:
        source: a run, its folder (then its best checkpoint), or a checkpoint.
        out: the file; default ``{run}.pytc``.
        scores: ``scores.json`` to store in it.

    Raises:
        MissingError, InputError: a path. WriteError: the file exists, or is not a package.
    """
    run = source.folder if isinstance(source, Run) else Path(source)
    checkpoint: Path | None = run
    if run.is_dir():
        checkpoint = next((p for n in ("best", "last") if (p := run / f"checkpoints/{n}.ckpt").is_file()), None)
        if checkpoint is None:
            raise MissingError(
                f"{run}: expected checkpoints/best.ckpt or checkpoints/last.ckpt; give a run folder or a checkpoint"
            )
    elif not run.exists():
        raise MissingError(f"nothing at {run}; give a run folder or a checkpoint")
    known = None if scores is None else read_json(scores)
    if scores is not None and known is None:
        raise MissingError(f"no scores at {scores}; make them with `pytc score`, or leave --scores out")
    name = f"{run.resolve().parent.name}-{run.resolve().name}" if run.is_dir() else run.stem
    target = Path(out) if out is not None else Path(f"{name}{SUFFIX}")
    if target.is_dir():
        raise InputError(f"{target} is a folder; give the file's name, such as {target / (name + SUFFIX)}")
    assert checkpoint is not None
    made = write_package(
        checkpoint, target, scores=known, license_name=license_name, description=description, overwrite=overwrite
    )
    return made, target


def write_package(
    checkpoint: str | Path,
    out: str | Path,
    *,
    scores: Mapping[str, Any] | None = None,
    license_name: str = "",
    description: str = "",
    overwrite: bool = False,
) -> Package:
    """Make a package of a checkpoint.

    Args:
        checkpoint: of `pytc train`; its run folder, where it lies in one, gives the data that it was trained on and its
            last validation scores.
        out: the file; it appears in one step.
        scores: what is known of its quality, for people (``scores.json`` of score, or the summary of evaluate).

    Raises:
        WriteError: the file is there (with ``overwrite``: and is no package). What reading the checkpoint raises.
    """
    import torch
    from safetensors.torch import save

    target = local_path(out)
    if target.exists() and not overwrite:
        raise WriteError(f"{target} is there already; give --overwrite to replace it, or another name")
    if target.exists() and not is_package(target):
        raise not_ours(target, "package")
    module = load_network(checkpoint)
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    images = _test_images(module.config)
    result = answer(module, [torch.from_numpy(image) for image in images])
    test = {f"input-{n}": torch.from_numpy(image) for n, image in enumerate(images)} | {"output": result.contiguous()}
    members = {WEIGHTS: save(weights), TEST: save(test)}
    config = module.config
    about = {
        "format": FORMAT,
        "version": connectomics.__version__,
        "architecture": config.model.architecture,
        "classes": list(config.dataset.classes),
        "channels": list(channel_names(config)),
        "voxel_size": [float(v) for v in config.dataset.voxel_size],
        "normalization": config.data.normalization,
        "window": list(config.inference.window or config.data.patch_size),
        "parameters": sum(p.numel() for p in module.parameters()),
        "scores": dict(scores or {}),
        "validation": _validation(Path(checkpoint)),
        "trained_on": _trained_on(Path(checkpoint)),
        "license": license_name,
        "description": description,
        "config": config_to_dict(config),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }
    _write_zip(target, {ABOUT: json.dumps(about, indent=1).encode(), **members})
    return Package(target, about)


def _test_images(config: RunConfig) -> list[np.ndarray]:
    """(1, 1, d, h, w) float32 in [0, 1] for each view: the middle of a patch is enough, where the network takes it."""
    generator = np.random.default_rng(0)
    if config.data.inputs:  # views are fitted to each other by their extents, so these stay whole
        shapes = [config.data.patch_size, *[view.patch_size for view in config.data.inputs]]
    else:
        shapes = [[_EDGE if n % _EDGE == 0 else n for n in config.data.patch_size]]
    return [generator.random((1, 1, *shape), dtype=np.float32) for shape in shapes]


def _write_zip(target: Path, members: Mapping[str, bytes]) -> None:
    part = target.with_name(f".{target.name}.part-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
            for name, data in members.items():
                # a fixed date: the same model gives the same bytes
                file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WriteError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error


def _trained_on(checkpoint: Path) -> list[str]:
    """``dataset/crop`` of what was trained on, as far as the run's folder says."""
    file = checkpoint.resolve().parent.parent / "split.yaml"
    return [str(key) for key in Split.load(file).train] if file.is_file() else []


def _validation(checkpoint: Path) -> dict[str, float]:
    """The last value of every ``val/`` metric in the run's table."""
    file = checkpoint.resolve().parent.parent / "metrics.csv"
    found: dict[str, float] = {}
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as table:
            for row in csv.DictReader(table):
                found |= {k: float(v) for k, v in row.items() if k.startswith("val/") and v}
    return found
