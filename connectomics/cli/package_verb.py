"""The verb package: a trained network as one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli.paths import InArgument, InOption, OutOption


def package(
    source: Annotated[Path, InArgument(help="Checkpoint, or run folder (then its best checkpoint).")],
    out: Annotated[Path | None, OutOption(help="The file; default {run}.pytc.")] = None,
    scores: Annotated[Path | None, InOption(help="scores.json of score: what is known of its quality.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights, as CC-BY-4.0.")] = "",
    description: Annotated[str, typer.Option(help="What it is for, in a sentence.")] = "",
    overwrite: Annotated[bool, typer.Option(help="Replace the file.")] = False,
) -> None:
    """Make one file of a trained network: weights, configuration, classes, voxel size, scores, and a test input with
    its output. `pytc predict --model FILE` and connectomics.load_model(FILE) use it, and check it first.

    Examples:

      pytc package outputs/cellmap_mito/version_0 --licence CC-BY-4.0

      pytc package outputs/cellmap_mito/version_0/checkpoints/best.ckpt --out mito.pytc --scores outputs/scores.json
    """
    from connectomics.errors import InputError, MissingError
    from connectomics.io.store import read_json
    from connectomics.lightning.model_package import SUFFIX
    from connectomics.pipeline.package import write_package

    checkpoint = source
    if source.is_dir():
        found = [source / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        there = [path for path in found if path.is_file()]
        if not there:
            raise MissingError(
                f"{source} holds no checkpoints/best.ckpt nor last.ckpt; give a run folder or a checkpoint"
            )
        checkpoint = there[0]
    elif not source.exists():
        raise MissingError(f"nothing at {source}; give a run folder or a checkpoint")
    known = None if scores is None else read_json(scores)
    if scores is not None and known is None:
        raise MissingError(f"no scores at {scores}; make them with `pytc score`, or leave --scores out")
    run = source.resolve()
    name = f"{run.parent.name}-{run.name}" if source.is_dir() else source.stem
    target = out or Path(f"{name}{SUFFIX}")
    if target.is_dir():
        raise InputError(f"{target} is a folder; give the file's name, {target / (name + SUFFIX)}")
    made = write_package(
        checkpoint, target, scores=known, licence=licence, description=description, overwrite=overwrite
    )
    shown = ("architecture", "parameters", "classes", "voxel_size", "validation", "licence")
    print(json.dumps({key: made.about[key] for key in shown}))
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
