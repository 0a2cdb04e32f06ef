"""`make_phantom`: a whole data root, in one step."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from connectomics import __version__
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.errors import WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.artifacts import publish
from connectomics.io.location import local_path
from connectomics.io.replacing import not_ours
from connectomics.io.write import ensure_group
from connectomics.phantom import kinds, layout, write
from connectomics.phantom.options import CropInfo, PhantomInfo, PhantomOptions

_MARK = "phantom.json"


def make_phantom(
    out: str | Path, options: PhantomOptions | None = None, progress: Callable[[str], None] | None = None
) -> PhantomInfo:
    """Write a phantom to the folder ``out``; it appears there whole or not at all.

    The folder holds the data sets in CellMap's layout, ``test_crops.csv`` (the crop table of the held-back crops),
    ``truth.zarr`` (their labels in the scorer's layout) and ``phantom.json`` (what it is and how it was made).

    Args:
        out: a folder that does not exist or is empty, or with ``options.overwrite`` one that holds a phantom.
        options: what to make; by default the demo's phantom.
        progress: called with a line before each step.

    Raises:
        WriteError: ``out`` is taken, the disk is full, no permission. InputError: the crops do not fit.
    """
    wanted = options or PhantomOptions()
    target = local_path(out).absolute()
    _check_target(target, wanted.overwrite)
    part = target.parent / f".{target.name}.part-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        part.mkdir(parents=True)
        info = _write(part, wanted, progress or (lambda line: None))
        (part / _MARK).write_text(json.dumps(_record(wanted, info), indent=2) + "\n", encoding="utf-8")
        publish(part, target)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(f"cannot write a phantom to {target}: {error.strerror or error}; nothing was kept") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return PhantomInfo(
        target, info.datasets, target / "test_crops.csv", target / "truth.zarr", info.raw, info.crops, info.objects
    )


def _write(root: Path, options: PhantomOptions, progress: Callable[[str], None]) -> PhantomInfo:
    plans = layout.datasets(options)
    infos: list[CropInfo] = []
    table: list[TableEntry] = []
    raw: dict[str, VoxelGrid] = {}
    objects: dict[str, dict[str, int]] = {}
    truth = root / "truth.zarr"
    ensure_group(truth)
    for plan in plans:
        progress(f"{plan.name}: placing a cell in {plan.raw}")
        scene = plan.scene()
        raw[plan.name] = plan.raw
        objects[plan.name] = {k.name: scene.objects.count(i) for i, k in enumerate(kinds.KINDS)}
        for crop in layout.crops(plan, scene, options):
            progress(f"{plan.name}: crop{crop.number}, {len(crop.grids)} classes, {crop.finest}")
            if crop.test:
                infos.append(write.write_test_crop(truth, plan, scene, crop))
                table.extend(TableEntry(crop.number, plan.name, n, g) for n, g in crop.grids.items())
            else:
                infos.append(write.write_training_crop(root, plan, scene, crop))
        progress(f"{plan.name}: raw")
        write.write_raw(root, plan, scene)
    CropTable(tuple(table)).save(root / "test_crops.csv")
    names = tuple(p.name for p in plans)
    return PhantomInfo(root, names, root / "test_crops.csv", truth, raw, tuple(infos), objects)


def _record(options: PhantomOptions, info: PhantomInfo) -> dict[str, object]:
    """What ``phantom.json`` says: no paths and no times, so that the same options give the same bytes."""
    crops = [{**asdict(c), "grid": c.grid.to_dict()} for c in info.crops]
    wanted = {k: v for k, v in asdict(options).items() if k != "overwrite"}
    return {
        "artefact": "phantom",
        "version": __version__,
        "options": wanted,
        "datasets": {n: {"raw": info.raw[n].to_dict(), "objects": info.objects[n]} for n in info.datasets},
        "crops": crops,
    }


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise WriteError(f"cannot write a phantom to {target}: it is a file; give a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise WriteError(
                f"{target} is there already and not empty; give another folder, or overwrite it (--overwrite)"
            )
        if (foreign := _foreign(target)) is not None:
            raise not_ours(foreign, "phantom")


def _foreign(target: Path) -> Path | None:
    """Something in a folder that is no part of a phantom; the folder itself if it holds none."""
    try:
        made = json.loads((target / _MARK).read_text(encoding="utf-8"))
        own = {_MARK, "test_crops.csv", "truth.zarr", *made["datasets"]} if made["artefact"] == "phantom" else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    return next((path for path in sorted(target.iterdir()) if path.name not in own), None) if own else target
