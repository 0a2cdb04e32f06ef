"""The verb package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import options as opt
from connectomics.cli.options import InArgument, InOption, OutOption


def package(
    source: Annotated[Path, InArgument(help="Checkpoint, or run folder (then its best checkpoint).")],
    out: Annotated[Path | None, OutOption(help="The file; default {run}.pytc.")] = None,
    scores: Annotated[Path | None, InOption(help="scores.json of score, to store its quality.")] = None,
    license_name: Annotated[str, typer.Option("--license", help="License of the weights, such as CC-BY-4.0.")] = "",
    description: Annotated[str, typer.Option(help="What it is for, in a sentence.")] = "",
    file_format: Annotated[str, typer.Option("--format", help="pytc, or bioimageio (BioImage Model Zoo).")] = "pytc",
    dataset: Annotated[str | None, typer.Option(help="bioimageio: training data set whose gray range to use.")] = None,
    author: Annotated[list[str] | None, typer.Option(help="bioimageio: name of an author; may be repeated.")] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Pack a trained network into one file: weights, configuration, classes, voxel size, scores, and a test input with
    its output. `pytc predict --checkpoint FILE` and connectomics.load_model(FILE) verify it and use it.

    Examples:

      pytc package outputs/cellmap_mito/version_0 --license CC-BY-4.0

      pytc package outputs/cellmap_mito/version_0/checkpoints/best.ckpt --out mito.pytc --scores outputs/scores.json

      pytc package outputs/cellmap_mito/version_0 --format bioimageio --license CC-BY-4.0 --author "A. Name"
    """
    from connectomics.errors import unknown_name
    from connectomics.pipeline.package import write_package

    if file_format not in ("pytc", "bioimageio"):
        raise unknown_name("format", file_format, ("pytc", "bioimageio"), "--format")
    if file_format == "bioimageio":
        from connectomics.pipeline.bioimageio import write_bioimageio

        path = write_bioimageio(
            source, out, dataset=dataset, authors=author or (), license_name=license_name, description=description,
            overwrite=overwrite,
        )  # fmt: skip
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
        return
    made = write_package(
        source, out, scores=scores, license_name=license_name, description=description, overwrite=overwrite
    )
    shown = ("architecture", "parameters", "classes", "voxel_size", "validation", "license")
    print(json.dumps({key: made.about.get(key) for key in shown}))
    print(f"{made.path} ({made.path.stat().st_size / 1e6:.1f} MB)")
