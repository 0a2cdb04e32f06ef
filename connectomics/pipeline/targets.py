"""What to predict: crops of the data root, rows of a crop table, or a box of a data set."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.cellmap.catalog import Catalog, Crop, box_of
from connectomics.cellmap.classes import unions_of
from connectomics.cellmap.crop_table import CropTable
from connectomics.config.schema import RunConfig
from connectomics.data.normalization import for_prediction
from connectomics.data.run_split import run_crops
from connectomics.data.splits import parse_entry, trained_and_kept_out
from connectomics.errors import ConfigError, InputError, MissingError, first_of, number_of
from connectomics.geometry import Box, Triple, VoxelGrid
from connectomics.io import store
from connectomics.io.location import absolute
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization
from connectomics.lightning.model_package import split_of

log = logging.getLogger(__name__)

_BOX = "box_"  # begins the names of boxes
_ADVICE = "do not evaluate or tune on training data; --crops val predicts the others"


@dataclass(frozen=True)
class Target:
    """One region to predict.

    Attributes:
        dataset: name of the data set in the data root.
        name: name of the region's folder in the output, ``crop557``.
        grids: the grid to write for each class.
        seen_in_training: whether a network was trained on a part of it.
    """

    dataset: str
    name: str
    grids: Mapping[str, VoxelGrid] = field(hash=False)
    seen_in_training: bool = False

    @property
    def key(self) -> str:
        """``{dataset}/{name}``."""
        return f"{self.dataset}/{self.name}"


def targets_of(
    config: RunConfig, *, crop_table: CropTable | str | Path | None = None, box: str | None = None
) -> list[Target]:
    """Return what a configuration says to predict.

    Args:
        config: ``dataset`` names the data root, the classes, and (for the catalog) data sets and crops.
        crop_table: predict these rows, as far as the network has their classes: a table, its path, or "challenge".
        box: predict a box at the network's voxel size instead: ``DATASET:z0,y0,x0:z1,y1,x1`` in nm, or ``DATASET``.

    Returns:
        Targets; without table and box those of ``dataset.crop_table`` if set, else the catalog's annotated crops.

    Raises:
        InputError, UnknownNameError, MissingError: there is nothing to predict, or a name is unknown.
    """
    if box is not None:
        return [box_target(config, box)]
    table = crop_table if crop_table is not None else config.dataset.crop_table
    if table is not None:
        return table_targets(CropTable.resolve(table), predicted_classes(config))
    classes = predicted_classes(config)
    return [crop_target(crop, classes) for crop in run_crops(config, classes)]


def predicted_classes(config: RunConfig) -> list[str]:
    """Return the classes of a prediction: those of the network, then the groups of ``inference.groups``."""
    classes = config.dataset.classes
    return [*classes, *unions_of(classes, config.inference.groups)]


def kept_out_targets(config: RunConfig, checkpoints: Sequence[str | Path]) -> list[Target]:
    """Return the annotated crops, or parts of crops, that no network of ``checkpoints`` was trained on.

    They are ``val`` of ``split.yaml`` in each run, which its package holds, too, without those that overlap a training
    crop of another network (with a warning).

    Raises:
        MissingError: a run had no validation crops, a checkpoint does not lie in its folder,
            ``RUN/checkpoints/x.ckpt``, or a package was made from such a checkpoint.
        InputError: every crop was used to train one of the networks.
    """
    splits = {}
    for path in checkpoints:
        if not (split := split_of(path)) or not split.val:
            raise MissingError(
                f"{path}: no validation crops are known, from split.yaml of its run or from its package; name crops "
                "that it was not trained on yourself: dataset.crops=[...]"
            )
        splits[str(path)] = split
    _, kept = trained_and_kept_out(run_crops(config), splits)
    if not kept:
        raise InputError(
            f"no crop of {config.dataset.data_root} was kept out of the training of "
            f"{', '.join(map(str, checkpoints))}; name the crops yourself: dataset.crops=[...]"
        )
    return [crop_target(crop, predicted_classes(config)) for crop in kept]


def crop_target(crop: Crop, classes: Sequence[str]) -> Target:
    """Return all ``classes`` of a catalog crop, each on the grid of its labels; without labels, on the finest grid."""
    grids = {name: crop.within(crop.labels[name].grid) if name in crop.labels else crop.grid for name in classes}
    return Target(crop.dataset, crop.name, grids)


def table_targets(table: CropTable, classes: Sequence[str]) -> list[Target]:
    """Return the crops of a table with those of ``classes`` that the table asks for; leave out crops without any."""
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
    """Return a box, ``DATASET:z0,y0,x0:z1,y1,x1`` (faces, nm) or ``DATASET`` for all of its raw, for all classes."""
    if ":" in text:
        dataset, box = box_of(text)
    else:
        dataset, box = text, Multiscale.open(Catalog.open(config.dataset.data_root).raw_location(text)).grid.box
    grid = VoxelGrid.covering(box, config.dataset.voxel_size)
    # exact numbers, or two boxes could share a name
    name = _BOX + "_".join(str(int(v)) if v.is_integer() else repr(v) for v in (*box.begin, *box.end))
    return Target(dataset, name, dict.fromkeys(predicted_classes(config), grid))


def chosen_targets(
    config: RunConfig, checkpoints: Sequence[Path], crops: CropTable | str | Path | None, box: str | None
) -> tuple[list[Target], CropTable | None]:
    """Return the regions to predict, and the crop table that they come from, if any."""
    if crops is not None and box is not None:
        raise ConfigError("--crops and --box exclude each other; give one of them")
    if crops == "val":
        return kept_out_targets(config, checkpoints), None
    if crops is None:
        return targets_of(config, box=box), None
    table = CropTable.of_root(config.dataset.data_root) if crops == "test" else CropTable.resolve(crops)
    return targets_of(config, crop_table=table), table


def with_trained(
    targets: Sequence[Target] | None, config: RunConfig, checkpoints: Sequence[str | Path], advice: str = _ADVICE
) -> list[Target]:
    """Return targets (None: those of the configuration) that say whether a network was trained on a part of them, as
    far as its run (``split.yaml``) or its package says so. Warn of these. They may overlap a training crop of another
    name. Boxes of ``--box`` are not checked: they have no ground truth."""
    seen = {parse_entry(entry) for path in checkpoints if (split := split_of(path)) for entry in split.all_trained}
    chosen, catalog = targets_of(config) if targets is None else targets, Catalog.open(config.dataset.data_root)
    parts: dict[str, list[Box]] = {target.dataset: [] for target in chosen if not target.name.startswith(_BOX)}
    for key, region in seen:
        dataset, _, crop = key.partition("/")
        if dataset in parts and (region or crop in catalog.crop_names(dataset)):
            parts[dataset].append(region or catalog.crop(dataset, crop).box)
    found = []
    for target in chosen:
        # without the outer half of voxels, which may touch a region
        boxes = [grid.box.grow(-0.5 * np.asarray(grid.voxel_size)) for grid in target.grids.values()]
        overlaps = (not part.intersect(box).is_empty for part in parts.get(target.dataset, ()) for box in boxes)
        found.append(replace(target, seen_in_training=(target.key, None) in seen or any(overlaps)))
    name_trained(((target.key, target.seen_in_training) for target in found), advice)
    return found


def name_trained(crops: Iterable[tuple[str, bool]], advice: str = _ADVICE) -> None:
    """Warn of crops (``dataset/crop``, and whether a network was trained on it) for which this holds at least once."""
    known = dict(sorted(crops))
    if seen := [key for key, trained in known.items() if trained]:
        log.warning(
            "%d of %s %s used for training (%s): %s", len(seen), number_of(len(known), "crop"),
            "was" if len(seen) == 1 else "were", first_of(seen, 3), advice,
        )  # fmt: skip


def normalizations_of(
    config: RunConfig, trained: Sequence[RunConfig], catalog: Catalog, targets: Sequence[Target]
) -> dict[str, Normalization]:
    """Return the normalization of each data set to predict."""
    boxes: dict[str, list[Box]] = {}
    for target in targets:
        boxes.setdefault(target.dataset, []).extend(grid.box for grid in set(target.grids.values()))
    return {name: for_prediction(config, trained, name, catalog.raw_location(name), of) for name, of in boxes.items()}


def grids_of(
    target: Target, channels: Sequence[str], about: Mapping[str, Mapping[str, Any]], voxel_size: Triple
) -> dict[str, VoxelGrid]:
    """Return the grid to write for each channel: that of its class.

    A class with affinities is written at the network's voxel size, over the same box, together with its affinities:
    at another voxel size neighbors are no longer neighbors, and decoding would be impossible.
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


def mask_of(catalog: Catalog, dataset: str, mask: str | None) -> str | None:
    """Return the location of ``inference.mask`` for a data set: a path, an address, or a group in its Zarr root."""
    if mask is None:
        return None
    inside = store.join(catalog.location(dataset), mask)
    return absolute(inside if not Path(mask).is_absolute() and store.exists(inside) else mask)
