"""Decode a folder: the predictions of every class of every crop to labels."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from connectomics.config import RunConfig, as_config, import_plugins
from connectomics.config.output import wants_pyramid
from connectomics.config.schema import DecodingConfig, EngineConfig
from connectomics.decoding.affinities.affinity_task import AffinitiesTask
from connectomics.decoding.blocks.labels_task import LabelsTask, MaskTask, objects_of
from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.decode import decode_class
from connectomics.decoding.label_artifact import (
    clear_unknown,
    existing_labels,
    has_tables,
    inputs_of,
    label_array,
    label_attrs,
    partial_of,
    remove_rest,
    unknown_of,
    unknown_share,
    write_tables,
    write_whole,
)
from connectomics.decoding.parameters import AFFINITY_METHODS, DecodeParameters, decode_parameters, default_parameters
from connectomics.decoding.prediction import StoredHead, open_boundary, open_prediction, read_on
from connectomics.decoding.probabilities import above
from connectomics.decoding.watershed.watershed_task import BLOCK as WATERSHED_BLOCK
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.errors import BlocksFailedError, InputError, MissingError, WriteError
from connectomics.io.artifacts import Provenance, is_complete
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import array_place, output_place, place
from connectomics.io.sharded import Storage
from connectomics.io.write import update_attrs
from connectomics.morphology.block_sums import compact
from connectomics.pipeline.results import Labels, Probabilities, chosen_arrays
from connectomics.progress import Progress, named, silent
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.block_task import TASK_FILE, require_begun, starts_over
from connectomics.tasks.lock import leading
from connectomics.tasks.pool import Engine
from connectomics.tasks.pyramid import pyramid_grids

if TYPE_CHECKING:
    from connectomics.tasks.estimate import Estimate

log = logging.getLogger(__name__)


def decode(
    probabilities: Probabilities | str | Path,
    *,
    out: str | Path,
    config: RunConfig | str | Path | None = None,
    classes: Collection[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Labels:
    """Turn probabilities into labels: masks of semantic classes, instance IDs of the others.

    Args:
        probabilities: what `predict` returned, or its folder.
        out: folder for the labels (local or on S3), in the same layout; a table of instances goes beside instances.
        config: its ``decoding``, ``engine``; a file or a configuration; None: the one that was predicted with.
        classes: only these.
        overwrite: replace labels that were made from another prediction or with other parameters.
        resume: fail if nothing was started; with ``overwrite``, keep labels made with these parameters.
        progress: called for the blocks of large arrays.

    Raises:
        MissingError, IncompleteError, MetadataError, UnknownNameError: the probabilities.
        BlocksFailedError: some blocks; all other arrays are decoded.
        WriteError: other files or another process in the way, or a full disk.
    """
    source = Probabilities.open(probabilities)
    chosen = source.config or RunConfig() if config is None else as_config(config)
    import_plugins(chosen.plugins)
    jobs = _jobs_of(source, out, chosen, classes)
    done = do_jobs(jobs, chosen.engine, overwrite=overwrite, resume=resume, progress=progress or silent)
    return Labels(output_place(out), chosen, source.crops, tuple(item.job.location for item in done))


def decode_estimate(
    probabilities: str | Path,
    out: str | Path,
    config: RunConfig,
    *,
    classes: Collection[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> tuple[str, Estimate | None]:
    """Return what `decode` would do: a line, and the cost of what is decoded block by block, if anything is."""
    from connectomics.tasks.estimate import estimate

    import_plugins(config.plugins)
    jobs = _jobs_of(Probabilities.open(probabilities), out, config, classes)
    left = [j for j in jobs if j.finished(overwrite=j.replaces(overwrite=overwrite, resume=resume)) is None]
    tasks = [job.task for job in left if job.task is not None]
    already, whole = f"{len(jobs) - len(left)} decoded already", f"{len(left) - len(tasks)} to decode whole"
    line = f"{len(jobs)} array(s): {already}, {whole}, {len(tasks)} block by block"
    if not tasks:
        return line, None
    again = overwrite or not all(task.is_begun for task in tasks)  # resumes what is begun, replaces other output
    return line, estimate(tasks, config.engine, overwrite=again, resume=resume)


@dataclass(frozen=True)
class DecodedArray:
    """The labels of a job: their number of objects (a mask: 0 or 1), and whether they existed already."""

    job: DecodeJob
    objects: int
    skipped: bool = False


def do_jobs(
    jobs: Sequence[DecodeJob],
    engine: EngineConfig | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
) -> list[DecodedArray]:
    """Do the jobs of `decode_jobs`; return one result per array.

    Labels that were made from the same prediction with the same parameters are kept, so a killed run can be resumed.
    Files that decode did not write are never replaced. All of this is checked before the first array is decoded. Arrays
    in memory take about 6 bytes a voxel (watershed about 13).

    Args:
        engine: runs the blocks of large arrays; None: this process.
        overwrite, resume, progress: as for `decode`.
    """
    begun = any(job.location.exists() or partial_of(job.location).exists() for job in jobs)
    require_begun(begun or not jobs, jobs and jobs[0].location.parents[2], overwrite=overwrite, resume=resume)
    shared = engine is not None and engine.share
    resume = resume or shared  # what other jobs have written is kept
    for job in jobs:
        job.finished(overwrite=job.replaces(overwrite=overwrite, resume=resume))
    results, failed = list[DecodedArray](), list[str]()
    with ExitStack() as stack:
        workers: Engine | None = None
        for done, job in enumerate(jobs, start=1):
            replaces = job.replaces(overwrite=overwrite, resume=resume)
            result = job.finished(overwrite=replaces)
            if result is None and job.task is None:
                with leading(partial_of(job.location), wait=shared):
                    result = job.finished(overwrite=replaces) or _decode_whole(job)
            if result is None and job.task is not None:
                workers = workers or stack.enter_context(open_engine(engine))
                try:
                    run_task(job.task, workers, named(progress, job.name), overwrite=replaces)
                    result = DecodedArray(job, objects_of(job.task))
                except BlocksFailedError as error:  # the other arrays can still be decoded
                    failed.append(str(error))
            if result is not None:
                remove_rest(job.location)
                results.append(result)
                _warn(result)
            if done == len(jobs) or jobs[done].location.parent != job.location.parent:
                complete = all(is_complete(job.location.parent / name) for name in job.siblings)
                update_attrs(job.location.parent, {"connectomics": {"artefact": "labels", "complete": complete}})
    if failed:
        raise BlocksFailedError("; ".join(failed))
    return results


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """One class of one crop to decode.

    Attributes:
        source: its probabilities.
        boundary: what separates its objects, if anything.
        head: its distances, if needed.
        location: where the labels go.
        siblings: the predicted classes of this crop.
        table: ``csv`` or ``parquet``.
        storage: how the labels are stored.
        pyramid: whether they have coarser levels.
        task: how it is decoded block by block; None: whole, in this process.
    """

    dataset: str
    crop: str
    class_name: str
    source: Multiscale
    boundary: Multiscale | None
    head: StoredHead | None
    location: Path
    siblings: tuple[str, ...]
    parameters: DecodeParameters
    table: str
    storage: Storage
    pyramid: bool = False
    task: LabelsTask | None = None

    @property
    def name(self) -> str:
        """``{dataset}/{crop}/{class}``."""
        return f"{self.dataset}/{self.crop}/{self.class_name}"

    @property
    def unknown(self) -> dict[str, Any]:
        """The attribute ``unknown``, if parts of the prediction were given up."""
        return unknown_of(self.source, self.boundary)

    @property
    def origin(self) -> dict[str, Any]:
        """What the prediction says of itself, for the labels made from it."""
        said = self.source.attrs["connectomics"]
        return {**{k: v for k, v in said.items() if k not in ("artefact", "complete")}, **self.unknown}

    @property
    def made_from(self) -> dict[str, str]:
        """Role -> identity of what is decoded."""
        return inputs_of(self.source.location, self.parameters)

    def replaces(self, *, overwrite: bool, resume: bool) -> bool:
        """Return whether to overwrite what exists; with ``resume`` too, only the labels of another decoding."""
        return starts_over(self.finished, overwrite=overwrite, resume=resume)

    def finished(self, *, overwrite: bool = False) -> DecodedArray | None:
        """Return the result if it exists, made from the same prediction with the same parameters.

        Raises:
            WriteError: unfinished labels, or something that may not be replaced (`existing_labels`), is in the way.
        """
        may_replace = overwrite or (self.task is not None and self.task.is_begun)
        there = existing_labels(self.location, self.parameters, self.made_from, self.storage, overwrite=may_replace)
        partial = partial_of(self.location)
        if not may_replace and there is None and (partial / TASK_FILE).exists():
            if self.task is None:
                raise WriteError(
                    f"{partial} holds unfinished labels that are decoded block by block; finish them with the same "
                    "decoding.blockwise_above, or overwrite them (--overwrite)"
                )
            self.task.check()
        if there is None or not has_tables(self.location, self.parameters.kind, self.table):
            return None
        return DecodedArray(self, int(there["objects"]), True)


def _jobs_of(
    source: Probabilities, out: str | Path, config: RunConfig, classes: Collection[str] | None
) -> list[DecodeJob]:
    decoding, output = config.decoding, config.output
    parameters = decode_parameters(source.classes, decoding.default, decoding.classes)
    return decode_jobs(
        source.folder, out, parameters, classes=classes, blockwise_above=decoding.blockwise_above,
        table=decoding.table, storage=Storage.of(output), pyramid=output.pyramid,
    )  # fmt: skip


def decode_jobs(
    predictions_dir: str | Path,
    output_dir: str | Path,
    parameters: Mapping[str, DecodeParameters] | None = None,
    *,
    classes: Collection[str] | None = None,
    blockwise_above: int = DecodingConfig.blockwise_above,
    table: str = "csv",
    storage: Storage = Storage(),  # noqa: B008 (frozen)
    pyramid: bool | str = "auto",
) -> list[DecodeJob]:
    """Return what there is to decode in a predictions folder, by data set, crop and class; errors as for `decode`.

    Labels get the same places below ``output_dir`` and the same grids, with a table ``instances.csv`` beside instances.

    Args:
        parameters: by class; a class without an entry gets the defaults of its kind.
        classes: only these.
        blockwise_above: voxels; larger arrays are decoded block by block.
        storage: how labels are stored.
        table: ``parquet``: instance tables as Parquet too.
        pyramid: coarser levels; ``auto``: of large arrays.
    """
    root, out = place(predictions_dir), output_place(output_dir)
    if root.resolve() == out.resolve():
        raise InputError(f"cannot write labels into the predictions folder {root}; choose another output folder")
    found = chosen_arrays(root)
    if not found:
        raise MissingError(f"no predictions in {root}: expected {{dataset}}.zarr/{{crop}}/{{class}}; run predict first")
    jobs = []
    for dataset, crop, name in chosen_arrays(root, classes=classes):
        source = open_prediction(root, dataset, crop, name)
        chosen = (parameters or {}).get(name) or default_parameters(name)
        boundary = open_boundary(source, chosen)
        head = StoredHead.open(source, "distance") if chosen.height == "distance" else None
        location = array_place(out, dataset, crop, name)
        siblings = tuple(n for d, c, n in found if (d, c) == (dataset, crop))
        kind = task_of(chosen, source.levels[0].grid.size > blockwise_above)
        levels = wants_pyramid(pyramid, source.levels[0].grid.size)
        job = DecodeJob(dataset, crop, name, source, boundary, head, location, siblings, chosen, table, storage, levels)
        if kind is not None:
            task = kind(source.location, str(location), name, chosen, source=job.origin, table=table)
            if chosen.has_boundary:  # growing takes as much memory as a watershed
                task = replace(task, block_shape=WATERSHED_BLOCK)
            task = replace(task, block_shape=storage.block(task.block_shape), storage=storage, pyramid=levels)
            job = replace(job, task=task)
        jobs.append(job)
    return jobs


def task_of(parameters: DecodeParameters, large: bool) -> type[LabelsTask] | None:
    """Return the task that decodes an array with these parameters; None if it is decoded whole.

    Affinities are always decoded block by block; other methods only if the array is large, and registered methods
    (`register_decoder`) never.
    """
    if parameters.method in AFFINITY_METHODS:
        return AffinitiesTask
    if not large or parameters.is_registered:
        return None
    if parameters.is_local:
        return MaskTask
    return ComponentsTask if parameters.method in ("cc3d", "threshold") else WatershedTask


def _decode_whole(job: DecodeJob) -> DecodedArray:
    """Decode one array in memory and write its labels."""
    grid, parameters = job.source.levels[0].grid, job.parameters
    labels = _labels_of(job)
    clear_unknown(labels, job.unknown, grid)
    if job.unknown and parameters.is_registered:  # some of its instances may be gone
        labels = compact(labels, semantic=False)[0].astype(labels.dtype)
    objects = int(labels.max(initial=0))
    provenance = Provenance(made_from=job.made_from)
    attrs = label_attrs(grid, job.class_name, parameters, job.origin, provenance, objects)
    with label_array(job.location, pyramid_grids(grid, job.pyramid), labels.dtype, attrs, job.storage) as writers:
        write_whole(writers, labels)
        if parameters.kind == "instance":
            found = Pieces.measured(labels, objects, (0, 0, 0), labels.shape)
            write_tables(place(writers[0].location).parent, found, grid, job.table)
    return DecodedArray(job, objects)


def _labels_of(job: DecodeJob) -> NDArray[Any]:
    """Decode one array in memory and return its labels (D, H, W)."""
    grid, parameters = job.source.levels[0].grid, job.parameters
    values = read_on(job.source, grid)
    if not parameters.is_registered:
        values = above(values, parameters.threshold)  # frees the probabilities
    clear_unknown(values, job.unknown, grid)
    walls = None if job.boundary is None else read_on(job.boundary, grid)
    head = job.head.all() if job.head else None
    return decode_class(values, grid.voxel_size, parameters, boundary=walls, head=head)


def _warn(result: DecodedArray) -> None:
    job = result.job
    wanted = pyramid_grids(job.source.levels[0].grid, job.pyramid)
    if result.skipped and len(Multiscale.open(job.location).levels) < len(wanted):
        log.warning("%s: these labels have no coarser levels; to add them, decode again with --overwrite", job.name)
    if job.unknown and not result.skipped:
        share = unknown_share({**job.unknown, "grid": job.source.levels[0].grid.to_dict()})
        log.warning(
            "%s: %.3g %% of the volume was not predicted (accepted failed blocks); it is unknown, and its labels are 0",
            job.name, 100 * share,
        )  # fmt: skip
