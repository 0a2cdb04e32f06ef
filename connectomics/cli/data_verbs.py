"""Verbs that make or look at data: phantom, describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from connectomics.cli import show
from connectomics.cli.paths import OutArgument


def phantom(
    out: Annotated[Path, OutArgument(help="Folder to make: a data root, test_crops.csv and truth.zarr.")],
    preset: Annotated[str, typer.Option(help="tiny (tests), small (the demo) or large.")] = "small",
    size: Annotated[float | None, typer.Option(help="Extent of each data set, nm; default: the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed is another cell.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT where it exists.")] = False,
) -> None:
    """Make a synthetic data root in the CellMap layout, whose truth is a function of position.

    Examples:

      pytc phantom data/phantom

      pytc phantom /scratch/phantom --preset tiny --seed 7
    """
    from connectomics.phantom import PhantomOptions, make_phantom

    with show.stage(f"making the phantom {out}"):
        info = make_phantom(out, PhantomOptions(seed=seed, preset=preset, size_nm=size, overwrite=overwrite))
    for crop in info.crops:
        part = "test    " if crop.test else "training"
        print(f"  {part} {crop.dataset}/{crop.name}: {crop.grid}, {len(crop.voxels)} classes")
    print(f"data root {info.root}, crop table {info.crop_table}, truth {info.truth}")


def describe(
    root: Annotated[str, typer.Argument(help="Data root: holds {dataset}/{dataset}.zarr; a folder or s3:// URL.")],
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    crop: Annotated[list[str] | None, typer.Option(help="Only this crop (crop234); may be repeated.")] = None,
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    voxel_size: Annotated[
        str | None, typer.Option(help="Voxel size of a run, nm: 8 or 16,8,8; default: the raw's finest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print data sets, crops, voxel sizes, extents, classes, and how much of each is present, absent and unknown.

    Raw chunks that are not stored under a crop (a partial download) are counted, for the level that a run reads.

    Examples:

      pytc describe data/phantom

      pytc describe data/phantom --class mito --class nuc --json

      pytc describe s3://janelia-cosem-datasets --dataset jrc_cos7-1a --voxel-size 8
    """
    from connectomics.cellmap.summary import summarize

    summary = summarize(root, dataset, crop, class_name, None if voxel_size is None else voxel_size_of(voxel_size))
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    _print_summary(summary)


def _print_summary(summary: dict[str, Any]) -> None:
    for item in summary["datasets"]:
        raw = item["raw"]
        levels = ", ".join(show.triple(level["voxel_size"]) for level in raw["levels"])
        print(f"{item['name']}: raw {show.shape(raw['levels'][0]['shape'])} {raw['dtype']}, levels of {levels} nm")
        for crop in item["crops"]:
            extent = show.triple(crop["extent_nm"])
            place = f"{extent} nm from {show.triple(crop['begin_nm'])} nm"
            print(f"  {crop['name']}: {place}, {len(crop['classes'])} classes, {_stored(crop['raw_chunks'])}")
        if item["raw_chunks"]["missing"]:
            print(f"  in all: {_stored(item['raw_chunks'])}")
    if not summary["classes"]:
        return
    rows = []
    for name, c in summary["classes"].items():
        total = max(1e-9, c["present_um3"] + c["absent_um3"] + c["unknown_um3"])
        shares = [f"{100 * c[k] / total:.1f} %" for k in ("present_um3", "absent_um3", "unknown_um3")]
        rows.append([name, c["kind"], str(c["crops"]), *shares, f"{c['present_um3']:.4g}"])
    header = ["class", "annotated as", "crops", "present", "absent", "unknown", "present um^3"]
    show.table(header, rows, title=f"classes over {summary['n_crops']} crops")
    for name, number in summary["not_annotated"].items():
        print(f"{name}: a group without annotation in {number} crop(s), no class")


def _stored(chunks: dict[str, Any]) -> str:
    first = chunks.get("first_missing")
    hint = f" (first missing: {first})" if first else ""
    return f"raw chunks stored {chunks['total'] - chunks['missing']} of {chunks['total']}{hint}"


def voxel_size_of(text: str) -> tuple[float, float, float]:
    """``8`` or ``16,8,8`` as three sizes."""
    from connectomics.errors import InputError
    from connectomics.geometry import triple

    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--voxel-size must be one number or three (z,y,x) in nm, found {text!r}") from error
    size = triple(sizes * 3 if len(sizes) == 1 else sizes, "--voxel-size")
    if not min(size) > 0:
        raise InputError(f"--voxel-size must be above 0 nm, found {text}")
    return size
