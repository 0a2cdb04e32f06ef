"""Probabilities to labels, one class of one crop after the other, from artefact to artefact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.config.schema import EngineConfig
from connectomics.decoding.blocks.components import ComponentsTask
from connectomics.decoding.blocks.labels_task import LabelsTask, objects_of, tables
from connectomics.decoding.blocks.mask import MaskTask
from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.blocks.table import write_tables
from connectomics.decoding.cellmap_postprocess import (
    components,
    fill_holes,
    filter_by_size,
    finished,
    semantic_to_instance,
)
from connectomics.decoding.label_artifact import BLOCK, inputs_of, label_array, partial_of, standing_labels, write_whole
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, default_parameters
from connectomics.decoding.probabilities import DTYPES, OnGrid, above, read_block
from connectomics.decoding.unknown import blank, unknown_of, unknown_share
from connectomics.decoding.watershed.heads import HeadValues, LearnedDistance, StoredHead
from connectomics.decoding.watershed.watershed_task import BLOCK as WATERSHED_BLOCK
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.decoding.watershed.whole import flood, grow
from connectomics.errors import (
    BlocksFailedError,
    IncompleteError,
    InputError,
    MetadataError,
    MissingError,
    WriteError,
    unknown_name,
)
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.artifacts import Provenance
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import update_attrs
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.block_task import TASK_FILE
from connectomics.tasks.lock import leading
from connectomics.tasks.pool import Engine

log = logging.getLogger(__name__)

#: Told after each array: how many are done, how many there are, and which one it was.
Progress = Callable[[int, int, str], None]


#: Arrays of more voxels than this, those of a block, are decoded block by block: of 512^3 that takes a fifth of the
#: memory and no more time.
BLOCKWISE_ABOVE = 256**3


@dataclass(frozen=True)
class DecodedArray:
    """One label array: where it is, how many objects (a mask: 0 or 1) it holds, and whether it was there already."""

    dataset: str
    crop: str
    class_name: str
    location: str
    objects: int
    skipped: bool


def decode_class(
    probabilities: NDArray[Any], voxel_size: Sequence[float], parameters: DecodeParameters
) -> NDArray[Any]:
    """Labels of one class in memory.

    Args:
        probabilities: (D, H, W), see `above`.
        voxel_size: nm, z y x.
        parameters: what to do.

    Returns:
        (D, H, W): uint8 0/1 for the method ``threshold``, else ids 1..n in the narrowest unsigned type.
    """
    return decode_mask(above(probabilities, parameters.threshold), voxel_size, parameters)


def decode_mask(
    mask: NDArray[np.bool_], voxel_size: Sequence[float], parameters: DecodeParameters, head: HeadValues | None = None
) -> NDArray[Any]:
    """`decode_class` from the thresholded mask on; ``head``: of distances, where ``parameters.height`` asks for it."""
    if mask.ndim != 3:
        raise InputError(f"decoding needs a (D, H, W) volume, found shape {mask.shape}")
    least = parameters.min_voxels(voxel_size)
    if parameters.height == "distance":
        if head is None or head.values.shape != mask.shape:
            found = "none" if head is None else f"one of {head.values.shape}"
            raise InputError(f"decoding with height distance needs that head of shape {mask.shape}, found {found}")
        if mask.size == 0:
            return np.zeros(mask.shape, np.uint8)
        rule = LearnedDistance.of(head.scale_nm, parameters.max_depth_nm, head.values.dtype)
        heights, reach = rule.heights(mask, head.values), parameters.min_distance_nm
        pieces = flood(heights, parameters.connectivity, voxel_size, reach, rule.floor)
        return finished(pieces, least, parameters.connectivity, parameters.fill_holes)
    if parameters.method != "threshold":
        return semantic_to_instance(
            mask,
            least,
            parameters.method,
            connectivity=parameters.connectivity,
            fill_holes=parameters.fill_holes,
            min_distance=parameters.min_distance_nm,
            max_depth=parameters.max_depth_nm,
            voxel_size=voxel_size,
        )
    if parameters.is_local or mask.size == 0:
        return mask.astype(np.uint8)
    pieces = components(mask, parameters.connectivity)
    if parameters.fill_holes:
        pieces = fill_holes(pieces, parameters.connectivity)
    return (filter_by_size(pieces, least) > 0).astype(np.uint8)


def decode_between(
    mask: NDArray[np.bool_], walls: NDArray[Any], voxel_size: Sequence[float], parameters: DecodeParameters
) -> NDArray[Any]:
    """`decode_mask` for objects that touch: found where there is no wall, then grown back over it.

    Args:
        mask: (D, H, W), where the class is.
        walls: (D, H, W) the probability of what separates the objects (another class, or the class's head of
            boundaries), see `above`.
        voxel_size: nm, z y x.
        parameters: ``threshold`` holds for the walls too.

    Returns:
        (D, H, W) ids 1..n by their first voxel in z-y-x order. Growing is a watershed on the walls' probability:
        objects meet where it is highest. What touches no core is left out.
    """
    cores = decode_mask(mask & ~above(walls, parameters.threshold), voxel_size, parameters)
    return grow(mask, walls, cores, parameters.connectivity).astype(cores.dtype)


def decode_predictions(
    predictions_dir: str | Path,
    output_dir: str | Path,
    parameters: Mapping[str, DecodeParameters] | None = None,
    *,
    classes: Collection[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    blockwise_above: int = BLOCKWISE_ABOVE,
    block_progress: Progress | None = None,
    engine: EngineConfig | None = None,
    table: str = "csv",
) -> list[DecodedArray]:
    """Decode every class of every crop of a predictions folder.

    Reads ``{dataset}.zarr/{crop}/{class}`` (probabilities as uint8 or float16) and writes labels at the same places
    below ``output_dir``, on the same grids. Labels that were made from the same prediction with the same parameters are
    left as they are, so a killed run goes on where it stopped; others are replaced with ``overwrite`` only, and what
    decode did not write never. All of this is checked before the first is decoded. Large arrays are decoded block by
    block on the engine; the rest hold one class of one crop (about 6 bytes a voxel; watershed about 13). Beside
    instances lies a table of them, ``instances.csv``.

    Args:
        parameters: by class; a class without an entry gets its kind's defaults.
        classes: decode only these.
        overwrite: decode again also what is already there, whatever it was made from.
        resume: only go on: an error where nothing was begun. With ``overwrite``: replace labels of another decoding,
            and keep what is there of this one.
        progress: told after each array.
        blockwise_above: voxels; larger arrays are decoded block by block.
        block_progress: told of each stage of such an array how many of its blocks are done, and how many there are.
        engine: who works on blocks; None: this process.
        table: ``parquet``: tables of instances are written as Parquet too.

    Raises:
        MissingError: no predictions there. IncompleteError: a prediction is only half written (checked for all before
        the first is decoded). MetadataError: an array that is no prediction. UnknownNameError: a class of ``classes``
        that no crop has. BlocksFailedError: blocks of an array could not be done; those of the others are. WriteError:
        labels of another decoding (without ``overwrite``) or foreign files are in the way, another process works on the
        same labels, or the disk is full.
    """
    out = local_path(output_dir)
    jobs = decode_jobs(predictions_dir, out, parameters, classes=classes, blockwise_above=blockwise_above, table=table)
    if resume and not overwrite and not any(job.location.exists() or partial_of(job.location).exists() for job in jobs):
        raise MissingError(f"--resume: nothing was begun below {out}; leave it out to begin")
    for job in jobs:
        job.finished(overwrite=job.starts_over(overwrite=overwrite, resume=resume))
    results, failed = list[DecodedArray](), list[str]()
    with ExitStack() as stack:
        workers: Engine | None = None
        for done, job in enumerate(jobs, start=1):
            anew = job.starts_over(overwrite=overwrite, resume=resume)
            result = job.finished(overwrite=anew)
            if result is None and job.task is None:
                with leading(partial_of(job.location)):
                    result = job.finished(overwrite=anew) or _decode_whole(job)
            if result is None and job.task is not None:
                workers = workers or stack.enter_context(open_engine(engine))
                tell = None if block_progress is None else partial(_tell, block_progress, job.name)
                try:
                    run_task(job.task, workers, tell, overwrite=anew)
                    result = job.decoded(objects_of(job.task))
                except BlocksFailedError as error:  # of this array; the others do not suffer for it
                    failed.append(str(error))
            if result is not None:
                results.append(result)
                _warn_of_unknown(job, result)
            if done == len(jobs) or jobs[done].location.parent != job.location.parent:
                whole = all((job.location.parent / name).exists() for name in job.siblings)
                update_attrs(job.location.parent, {"connectomics": {"artefact": "labels", "complete": whole}})
            if progress is not None:
                progress(done, len(jobs), job.name)
    if failed:
        raise BlocksFailedError("; ".join(failed))
    return results


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """One class of one crop that is to be decoded.

    Attributes:
        source: its probabilities. walls: those of what separates its objects, where there is anything.
        head: its head of distances, where that is asked for.
        location: where the labels go.
        siblings: the classes that were predicted in this crop.
        table: ``csv`` or ``parquet``.
        task: how it is decoded block by block; None: whole, in this process.
    """

    dataset: str
    crop: str
    class_name: str
    source: Multiscale
    walls: Multiscale | None
    head: StoredHead | None
    location: Path
    siblings: tuple[str, ...]
    parameters: DecodeParameters
    table: str
    task: LabelsTask | None

    @property
    def name(self) -> str:
        """``{dataset}/{crop}/{class}``."""
        return f"{self.dataset}/{self.crop}/{self.class_name}"

    @property
    def about(self) -> dict[str, Any]:
        """What the labels' attribute says of their origin."""
        provenance = Provenance(made_from=self.made_from)
        origin = {"source": _origin(self.source), **self.unknown}
        return {"decode": self.parameters.to_dict(), **origin, **provenance.to_dict()}

    @property
    def unknown(self) -> dict[str, Any]:
        """The attribute ``unknown``, if some of the prediction was given up."""
        return unknown_of(self.source, self.walls)

    @property
    def made_from(self) -> dict[str, str]:
        """Role -> identity of what is decoded."""
        return inputs_of(self.source.location, self.parameters)

    def decoded(self, objects: int, skipped: bool = False) -> DecodedArray:
        """The result, with its number of objects."""
        return DecodedArray(self.dataset, self.crop, self.class_name, str(self.location), objects, skipped)

    def starts_over(self, *, overwrite: bool, resume: bool) -> bool:
        """As `BlockTask.starts_over`, also for labels that are decoded whole."""
        if overwrite and resume:
            try:
                self.finished()
            except WriteError:  # labels of another decoding are in the way
                return True
            return False
        return overwrite

    def finished(self, *, overwrite: bool = False) -> DecodedArray | None:
        """The result if it is there already, made from the same prediction with the same parameters.

        Raises `WriteError` if something is there that may not be replaced (`standing_labels`), or unfinished labels.
        """
        begun = self.task is not None and self.task.is_begun  # by a run that was allowed to replace what is there
        may_replace = overwrite or begun
        there = standing_labels(self.location, self.parameters, self.made_from, overwrite=may_replace)
        partial = partial_of(self.location)
        if not may_replace and there is None and (partial / TASK_FILE).exists():
            if self.task is None:
                raise WriteError(
                    f"{partial} holds labels that are decoded block by block and unfinished; finish them with the same "
                    "decoding.blockwise_above, or overwrite them (--overwrite)"
                )
            self.task.check()
        if there is None:
            return None
        if self.parameters.kind == "instance" and not all((self.location / n).exists() for n in tables(self.table)):
            return None
        return self.decoded(int(there["objects"]), True)


def decode_jobs(
    predictions_dir: str | Path,
    output_dir: str | Path,
    parameters: Mapping[str, DecodeParameters] | None = None,
    *,
    classes: Collection[str] | None = None,
    blockwise_above: int = BLOCKWISE_ABOVE,
    table: str = "csv",
) -> list[DecodeJob]:
    """What `decode_predictions` has to do, by data set, crop and class; its arguments and its errors."""
    root, out = Path(predictions_dir), local_path(output_dir)
    if root.resolve() == out.resolve():
        raise InputError(f"labels cannot be written into the predictions folder {root}; give another output folder")
    found = list(find_arrays(root))
    if not found:
        raise MissingError(f"no predictions in {root}: expected {{dataset}}.zarr/{{crop}}/{{class}}; run predict first")
    known = {name for _, _, name in found}
    for name in classes or ():
        if name not in known:
            raise unknown_name("class", name, known, str(root))
    jobs = []
    for dataset, crop, name in found:
        if classes is not None and name not in classes:
            continue
        source = open_prediction(root, dataset, crop, name)
        chosen = (parameters or {}).get(name) or default_parameters(name)
        walls = open_walls(root, dataset, crop, source, chosen)
        head = StoredHead.open(source, "distance") if chosen.height == "distance" else None
        location = out / f"{dataset}.zarr" / crop / name
        siblings = tuple(n for d, c, n in found if (d, c) == (dataset, crop))
        kind = task_of(chosen, source.levels[0].grid.size > blockwise_above)
        task = None
        if kind is not None:
            origin = {**_origin(source), **unknown_of(source, walls)}
            task = kind(source.location, str(location), name, chosen, source=origin, table=table)
            if chosen.has_walls:  # growing takes as much memory as a watershed
                task = replace(task, block_shape=WATERSHED_BLOCK)
        jobs.append(DecodeJob(dataset, crop, name, source, walls, head, location, siblings, chosen, table, task))
    return jobs


def task_of(parameters: DecodeParameters, large: bool) -> type[LabelsTask] | None:
    """The task that decodes an array with these parameters; None where it is decoded whole.

    Affinities always go block by block; other methods for large arrays.
    """
    if parameters.method in AFFINITY_METHODS:
        from connectomics.decoding.affinities.affinity_task import AffinitiesTask

        return AffinitiesTask
    if not large:
        return None
    if parameters.is_local:
        return MaskTask
    return ComponentsTask if parameters.method in ("cc3d", "threshold") else WatershedTask


def find_arrays(root: str | Path) -> Iterator[tuple[str, str, str]]:
    """(data set, crop, class) of every array below a folder of predictions or labels, in sorted order."""
    for dataset in store.list_groups(str(root)):
        if not dataset.endswith(".zarr"):
            continue
        for crop in store.list_groups(store.join(str(root), dataset)):
            for name in store.list_groups(store.join(str(root), dataset, crop)):
                yield dataset.removesuffix(".zarr"), crop, name


def open_prediction(root: Path, dataset: str, crop: str, name: str) -> Multiscale:
    """The opened prediction, checked to be one and to be whole."""
    location = root / f"{dataset}.zarr" / crop / name
    about = store.read_attrs(str(location)).get("connectomics")
    if not isinstance(about, dict) or about.get("artefact") != "probability":
        kind = about.get("artefact") if isinstance(about, dict) else "no 'connectomics' attribute"
        raise MetadataError(f"{location}: expected probabilities written by predict, found {kind}")
    if about.get("complete") is not True:
        raise IncompleteError(f"{location} is only half written; run predict to its end first")
    source = Multiscale.open(str(location))
    if source.levels[0].dtype not in DTYPES:
        raise MetadataError(f"{location}: probabilities must be uint8 or float16, found {source.levels[0].dtype}")
    return source


def open_walls(
    root: Path, dataset: str, crop: str, source: Multiscale, parameters: DecodeParameters
) -> Multiscale | None:
    """What separates the objects of the class whose opened prediction is given, checked as that was; None: nothing."""
    if parameters.boundary:
        return open_prediction(root, dataset, crop, parameters.boundary)
    return StoredHead.open(source, "boundary").source if parameters.has_walls else None


def _decode_whole(job: DecodeJob) -> DecodedArray:
    """Decode one array in this process: a mask block by block, anything else in memory."""
    source, grid, parameters = job.source, job.source.levels[0].grid, job.parameters
    how: dict[str, Any] = {"class_name": job.class_name, "kind": parameters.kind}
    if parameters.is_local:
        # Whether there is any object is known only at the end, so a mask's attribute is set after its blocks.
        present = False
        with label_array(job.location, grid, np.dtype(np.uint8), **how, about=job.about) as writer:
            for begin, block in grid.blocks(BLOCK):
                mask = above(read_block(source, begin, block.shape), parameters.threshold)
                present = present or bool(mask.any())
                writer.write(begin, mask.view(np.uint8))
            _count(Path(writer.location).parent, int(present))
        return job.decoded(int(present))
    mask = np.zeros(grid.shape, np.bool_)
    for begin, block in grid.blocks(BLOCK):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        mask[z, y, x] = above(read_block(source, begin, block.shape), parameters.threshold)
    if job.walls is None:
        labels = decode_mask(mask, grid.voxel_size, parameters, job.head.all() if job.head else None)
    else:
        labels = decode_between(mask, read_on(job.walls, grid), grid.voxel_size, parameters)
    objects = int(labels.max(initial=0))
    blank(labels, job.about, grid)
    del mask
    with label_array(job.location, grid, labels.dtype, **how, about={**job.about, "objects": objects}) as writer:
        write_whole(writer, labels)
        if parameters.kind == "instance":
            found = Pieces.measured(labels, objects, (0, 0, 0), labels.shape)
            write_tables(Path(writer.location).parent, found, grid, job.table)
    return job.decoded(objects)


def read_on(source: Multiscale, grid: VoxelGrid) -> NDArray[Any]:
    """The probabilities of another class on this grid, read block by block; in the type that they are stored in."""
    other = OnGrid(source, grid)
    values = np.zeros(grid.shape, other.dtype)
    for begin, block in grid.blocks(BLOCK):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        values[z, y, x] = other.read(begin, block.shape)
    return values


def _origin(source: Multiscale) -> dict[str, Any]:
    """What a prediction says of itself, for the labels that are made from it."""
    return {k: v for k, v in source.attrs["connectomics"].items() if k not in ("artefact", "complete")}


def _warn_of_unknown(job: DecodeJob, result: DecodedArray) -> None:
    if job.unknown and not result.skipped:
        share = unknown_share({**job.unknown, "grid": job.source.levels[0].grid.to_dict()})
        log.warning(
            "%s: %.3g %% of the volume was not predicted (accepted failed blocks); it is unknown, and its labels are 0",
            job.name,
            100 * share,
        )


def _tell(progress: Progress, name: str, stage: str, done: int, number: int) -> None:
    progress(done, number, f"{name} ({stage})")


def _count(group: Path, objects: int) -> None:
    about = store.read_attrs(str(group))["connectomics"]
    update_attrs(group, {"connectomics": {**about, "objects": objects}})
