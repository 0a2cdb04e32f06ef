"""Pack labels or probabilities on the crop table's grids into one Zarr v2 group, folder or zip, for the portal.

Every array is written block by block into a folder next to the output. A later run keeps finished arrays unless their
source or a parameter has changed. At the end the folder is zipped and checked, and then replaces an earlier submission;
a submission with errors replaces nothing.
"""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from connectomics import __version__
from connectomics.cellmap.crop_table import CropTable
from connectomics.errors import InputError, MissingError, WriteError, first_of, number_of
from connectomics.io.artifacts import about, publish
from connectomics.io.location import StoreError
from connectomics.io.place import S3Path, output_place, place
from connectomics.machine import usable_cores
from connectomics.progress import Progress, named, silent
from connectomics.submission.findings import Finding
from connectomics.submission.onto_grid import Job, blocks_of
from connectomics.submission.pack import CHUNK, PlainArrayWriter, write_group, write_json, zip_folder
from connectomics.submission.sources import Source, find_source, list_sources, own_table
from connectomics.submission.validate import validate_submission
from connectomics.tasks.lock import leading

_MISSING = ("missing-crop", "missing-class")
_WORK = ("data", "state.json", "submission.zip")  # what the working folder holds


@dataclass(frozen=True)
class ExportResult:
    """What an export did. Arrays are named ``crop557/mito``.

    Attributes:
        path: the zip or folder; beside the target (in ``{target}.partial``) if it has errors and an earlier submission
            is at the target (on S3 it is not kept).
        is_zip: whether it is a zip, which is what the portal takes.
        written: arrays in it.
        missing: arrays of the table for which no prediction was found; the portal counts them as nothing found.
        ignored: predictions that the table does not ask for, as ``dataset/crop/class``.
        partial: array -> share of its grid that its source covers, where that is not all.
        resumed: how many of the written arrays were there from a run that was interrupted.
        bytes: of the files in the submission, as the portal counts its unpacked size.
        seconds: wall time.
        findings: what the validation of the written submission found.
        kept: the earlier submission that was not replaced, if any.
        untested: data sets of which the challenge's table has no crop, packed on their own grids.
    """

    path: Path
    is_zip: bool
    written: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]
    partial: Mapping[str, float]
    resumed: int
    bytes: int
    seconds: float
    findings: tuple[Finding, ...]
    kept: Path | None = None
    untested: tuple[str, ...] = ()

    @property
    def has_errors(self) -> bool:
        """Whether the validation found errors in what was written (missing arrays do not count)."""
        return _has_errors(self.findings)

    def summary(self) -> str:
        """The result in a few lines, for the terminal."""
        before = f" ({self.resumed} of them from an interrupted run)" if self.resumed else ""
        where = "this submission, which was not kept" if self.path == self.kept else self.path
        arrays = number_of(len(self.written), "array")
        lines = [f"{where}: {arrays}, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s{before}"]
        if self.kept is not None:
            lines.append(f"{self.kept} is the earlier submission still, since this one has errors")
        if not self.is_zip:
            lines.append("this is a folder; the portal takes a zip of its content: export to a name that ends in .zip")
        if self.untested:
            lines.append(
                f"{', '.join(self.untested)}: not among the challenge's test crops; packed on the predictions' own "
                "grids, for your own use: the portal scores test crops only"
            )
        for names, thing, what in (
            (self.missing, "array", "of the table without a prediction, counted as missed"),
            (self.ignored, "prediction", "left out, not in the table"),
        ):
            if names:
                lines.append(f"{number_of(len(names), thing)} {what}: {first_of(names, 6)}")
        for name, share in self.partial.items():
            lines.append(f"{name}: the prediction covers {share:.1%} of the crop; the rest is background")
        return "\n".join(lines + [str(f) for f in self.findings if f.rule not in _MISSING])


def export_submission(
    predictions_dir: str | Path,
    output_path: str | Path,
    classes: Collection[str] | None = None,
    datasets: Collection[str] | None = None,
    *,
    crops: CropTable | str | Path | None = None,
    data_root: str | None = None,
    probabilities_dir: str | Path | None = None,
    thresholds: Mapping[str, float] | None = None,
    strict: bool = False,
    validate: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Pack predictions for the rows of a crop table.

    Args:
        predictions_dir: ``{dataset}.zarr/{crop}/{class}`` multiscale groups with labels or probabilities (what
            ``decode`` and ``predict`` write), or ``{dataset}/{crop}_{class}.npy`` on the table's grids.
        output_path: a ``.zip``, local or on S3 (packed in ``TMPDIR`` first). Any other name gives a folder, local.
        classes, datasets: only these rows of the table; None means all.
        crops: a `CropTable`, its path, or None for the challenge's table. Data sets that are not in the challenge's
            table are packed on their own grids (``.npy`` files on those of ``data_root``).
        data_root: data root with the crops of ``.npy`` files that no table has.
        probabilities_dir: probabilities that the labels were made from. Semantic classes whose labels are a plain
            threshold are made from them again, which keeps borders on a finer grid.
        thresholds: class -> threshold for probabilities; default: the one of the labels, else 0.5.
        strict: write nothing if a row of the table has no prediction.
        validate: check what was written (`validate_submission`).
        workers: threads; default: one per core, at most 8.

    Raises:
        MissingError: no predictions, or with ``strict`` some missing.
        UnknownNameError: a class or data set that is not in the table.
        InputError, MetadataError, IncompleteError, CorruptDataError: an unusable prediction.
        WriteError: the output cannot be written, is not a submission, or is being packed; existing files stay.
    """
    start = time.monotonic()
    root, target = place(predictions_dir), output_place(output_path)
    finer = None if probabilities_dir is None else place(probabilities_dir)
    for folder, what in ((root, "predictions folder"), (finer, "folder of probabilities")):
        if folder is not None and not folder.is_dir():
            raise MissingError(f"no {what} at {folder}")
    table, untested = _table(root, crops, datasets, data_root)
    table = table.select(classes=classes, datasets=datasets)
    _check_target(target, [root, *([finer] if finer is not None else [])])
    jobs, missing = _jobs(root, finer, table, thresholds or {})
    if not jobs:
        raise MissingError(
            f"no predictions for the crop table in {root}: expected {{dataset}}.zarr/{{crop}}/{{class}} or "
            f"{{dataset}}/{{crop}}_{{class}}.npy with crops such as {table.entries[0].dataset}/"
            f"{table.entries[0].crop_name}; check the data sets' and crops' names"
        )
    if missing and strict:
        raise MissingError(
            f"{len(missing)} of {len(table)} arrays have no prediction in {root}: {', '.join(missing[:5])}, ..."
        )
    asked = {(e.dataset, e.crop_name, e.class_name) for e in table}
    ignored = tuple("/".join(found) for found in list_sources(root) if found not in asked)
    with _working_folder(target) as work, leading(target if isinstance(target, S3Path) else work) as require_lead:
        resumed = _write_arrays(work, jobs, workers or min(8, usable_cores()), progress)
        made, size = _packed(work, target)
        findings = validate_submission(made, table, progress=named(progress or silent, "checking")) if validate else []
        require_lead()
        path, kept = _put(made, work, target, findings)
    return ExportResult(
        path=path, is_zip=target.suffix == ".zip", written=tuple(job.name for job in jobs), missing=tuple(missing),
        ignored=ignored, partial={job.name: share for job in jobs if (share := job.coverage()) < 1.0},
        resumed=resumed, bytes=size, seconds=time.monotonic() - start, findings=tuple(findings), kept=kept,
        untested=untested,
    )  # fmt: skip


def _table(
    root: Path, crops: CropTable | str | Path | None, datasets: Collection[str] | None, data_root: str | None
) -> tuple[CropTable, tuple[str, ...]]:
    """The crop table to pack for, and the data sets of which the challenge has no test crop."""
    if crops is not None:
        return CropTable.resolve(crops), ()
    table = CropTable.challenge()
    if datasets is not None and not {entry.dataset for entry in table} & set(datasets):
        own = own_table(root, datasets, data_root)
        if own is not None:
            return own, tuple(datasets)
    return table, ()


def _jobs(
    root: Path, probabilities_dir: Path | None, table: CropTable, thresholds: Mapping[str, float]
) -> tuple[list[Job], list[str]]:
    """What there is to write, in the order of the submission, and the rows without a prediction."""
    jobs, missing = [], []
    for entry in sorted(table, key=lambda e: (e.crop, e.class_name)):
        source = find_source(root, entry)
        if source is None:
            missing.append(f"{entry.crop_name}/{entry.class_name}")
            continue
        decode = source.about.get("decode", {})
        threshold = thresholds.get(entry.class_name, decode.get("threshold", 0.5))
        if not 0.0 <= threshold <= 1.0:
            raise InputError(f"the threshold of {entry.class_name} must lie between 0 and 1, found {threshold}")
        plain = decode.get("method") == "threshold" and not decode["min_size_nm3"] and not decode["fill_holes"]
        if probabilities_dir is not None and plain and not source.about.get("edited"):
            better = find_source(probabilities_dir, entry)
            if better is not None and better.form == "probability":
                _check_same(source, better)
                # The decoded kind stands: a class that was decoded as a mask is packed as one.
                better.about = {**better.about, "kind": "semantic"}
                source = better
        jobs.append(Job(entry, source, float(threshold)))
    return jobs, missing


def _check_same(labels: Source, probabilities: Source) -> None:
    """`InputError` if the labels were decoded from another prediction than the one that would be packed instead."""
    before = labels.about.get("made_from", {}).get("probabilities")
    if before is not None and before != probabilities.about.get("id", before):
        raise InputError(
            f"{labels.location} was not decoded from {probabilities.location}: that prediction is another one, or was "
            "made again since; run decode on it, or leave --probabilities out"
        )


# -- the folder and the zip ------------------------------------------------------------------------------------------
def _write_arrays(work: Path, jobs: list[Job], workers: int, progress: Progress | None) -> int:
    """Write the jobs' arrays below ``work/data``; returns how many were there already."""
    data = work / "data"
    done = _load_state(work)
    wanted = {job.name: job.fingerprint() for job in jobs}
    for name in [n for n in done if wanted.get(n) != done[n]]:
        del done[name]
    _clear(data, set(done))
    write_group(data)
    write_json(data / ".zattrs", {"connectomics": {"artefact": "submission", "version": __version__}})
    resumed = len(done)
    with ThreadPoolExecutor(workers) as pool:
        for number, job in enumerate(jobs, start=1):
            if job.name not in done:
                if not (data / job.entry.crop_name / ".zgroup").exists():
                    write_group(data / job.entry.crop_name)
                _write_array(data / job.name, job, pool, workers)
                done[job.name] = wanted[job.name]
                write_json(work / "state.json", done)
            if progress is not None:
                progress(number, len(jobs), job.name)
    return resumed


def _write_array(folder: Path, job: Job, pool: ThreadPoolExecutor, workers: int) -> None:
    dtype, block_at = blocks_of(job)
    writer = PlainArrayWriter(folder, job.entry.grid, dtype, job.about())
    blocks = iter(job.entry.grid.blocks(CHUNK))
    while batch := list(islice(blocks, 64 * workers)):  # so that the queue stays short
        list(pool.map(lambda block: writer.write(block[0], block_at(*block)), batch))


def _load_state(work: Path) -> dict[str, str]:
    """Finished arrays of an interrupted run with their fingerprints; {} where there is none that can be read."""
    state = work / "state.json"
    if not state.is_file():
        return {}
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
    except ValueError:  # not ours, or from a crash of the machine: start over
        return {}
    return {str(k): str(v) for k, v in found.items() if (work / "data" / k / ".zarray").is_file()}


def _clear(data: Path, keep: set[str]) -> None:
    """Remove the arrays of an interrupted run that are not to be kept, and crops without any."""
    if not data.is_dir():
        return
    for left in data.rglob(".*.part-*"):  # of a file that was being written
        left.unlink()
    for crop in [p for p in data.iterdir() if p.is_dir()]:
        for array in [p for p in crop.iterdir() if p.is_dir()]:
            if f"{crop.name}/{array.name}" not in keep:
                shutil.rmtree(array)
        if not any(p.is_dir() for p in crop.iterdir()):
            shutil.rmtree(crop)


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """The folder to pack in: beside a local target, where a later run resumes it, or a temporary one."""
    if not isinstance(target, S3Path):
        yield target.with_name(target.name + ".partial")
        return
    with TemporaryDirectory() as folder:
        yield Path(folder) / "submission"


def _check_target(target: Path, sources: list[Path]) -> None:
    """Refuse outputs that would destroy something."""
    for source in sources:
        if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
            raise InputError(f"the output {target} would replace the predictions in {source}; choose another place")
    if isinstance(target, S3Path) and target.suffix != ".zip":
        raise InputError(f"the name of a submission on S3 must end in .zip, got {target}")
    if target.is_dir() and target.suffix == ".zip":
        raise InputError(f"{target} is a folder; choose another name for the zip")
    work = target.with_name(target.name + ".partial")
    foreign = [path for path in work.iterdir() if path.name not in _WORK] if work.is_dir() else []
    if (target.exists() and not _is_ours(target)) or foreign:
        raise WriteError(
            f"{foreign[0] if foreign else target} was not written by export and is left alone; choose another output, "
            "or move it away"
        )


def _is_ours(target: Path) -> bool:
    """Whether a zip or folder is a submission that this program wrote (or an empty folder)."""
    try:
        if target.is_dir():
            return not any(target.iterdir()) or about(target).get("artefact") == "submission"
        with target.open("rb") as file, zipfile.ZipFile(file) as archive:
            return b'"submission"' in archive.read(".zattrs")
    except StoreError:
        raise
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        if isinstance(error.__context__, StoreError):  # zipfile takes any error of reading for a broken zip
            raise error.__context__ from None
        return False


def _packed(work: Path, target: Path) -> tuple[Path, int]:
    """The submission as it will be put at ``target``, a zip or a folder, and the bytes of its files."""
    data = work / "data"
    if target.suffix != ".zip":
        return data, sum(p.stat().st_size for p in data.rglob("*") if p.is_file())
    return work / "submission.zip", zip_folder(data, work / "submission.zip")


def _put(made: Path, work: Path, target: Path, findings: Sequence[Finding]) -> tuple[Path, Path | None]:
    """Move the submission to its target and remove the working folder; one with errors does not replace another.

    Returns where it is, and the earlier submission if that is still at ``target``.
    """
    if _has_errors(findings) and target.exists():
        return target if isinstance(target, S3Path) else made, target
    try:
        if isinstance(target, S3Path):
            with made.open("rb") as file:
                target.put(file)
        elif made.is_dir():
            publish(made, target)
        else:
            made.replace(target)
        shutil.rmtree(work)
    except OSError as error:
        raise WriteError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error
    return target, None


def _has_errors(findings: Iterable[Finding]) -> bool:
    return any(f.severity == "error" and f.rule not in _MISSING for f in findings)
