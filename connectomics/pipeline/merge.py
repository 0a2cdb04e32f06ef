"""Merge the predictions of several runs: for each class the best one, or the mean of several, up to a submission."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.config import RunConfig
from connectomics.config.schema import EngineConfig
from connectomics.config.values import plain
from connectomics.decoding.average_task import AverageTask
from connectomics.decoding.parameters import DecodeParameters, decode_parameters
from connectomics.decoding.prediction import find_arrays, networks_of, open_prediction
from connectomics.errors import InputError, MissingError, WriteError, as_write_error, number_of
from connectomics.geometry import VoxelGrid
from connectomics.io.artifacts import about, publish
from connectomics.io.location import local_path
from connectomics.io.place import array_place, remove_tree
from connectomics.io.replacing import contains, has_keys, link_or_copy, not_ours, require_own, unfinished_folder
from connectomics.io.sharded import Storage
from connectomics.io.write import ensure_group, write_file, write_json
from connectomics.lightning.run_state import STATE_FILE
from connectomics.pipeline.decode import decode_jobs, do_jobs
from connectomics.pipeline.merge_choice import Candidate, Choice, choose
from connectomics.pipeline.results import Labels, Probabilities
from connectomics.pipeline.runs import Run, open_run
from connectomics.pipeline.targets import predicted_classes
from connectomics.pipeline.tune_results import run_scores, tuned_scores
from connectomics.progress import Progress, named, silent
from connectomics.submission import ExportResult, export_submission
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.lock import leading

log = logging.getLogger(__name__)


_MARK = "# written by pytc merge"


@dataclass(frozen=True, repr=False)
class Merged:
    """The result of `merge`.

    Attributes:
        probabilities: the merged probabilities.
        choices: what was used, by class.
        labels, submission: decoded from them, and packed; None if ``out`` is a folder of probabilities.
    """

    probabilities: Probabilities
    choices: Mapping[str, Choice]
    labels: Labels | None = None
    submission: ExportResult | None = None

    def __repr__(self) -> str:
        where = self.submission.path if self.submission else self.probabilities.folder
        return f"Merged({str(where)!r}: {number_of(len(self.choices), 'class')})"


def merge(
    sources: Sequence[Run | Probabilities | str | Path],
    *,
    out: str | Path,
    tuned: Sequence[str | Path] = (),
    crops: CropTable | str | Path | None = None,
    classes: Collection[str] | None = None,
    average: int = 1,
    config: RunConfig | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Merged:
    """Make one submission of several runs: for each class the best by validation score, or the mean of the best.

    Rerun the same call to resume it: merged, decoded and packed arrays are kept. Means are computed block by block.

    Args:
        sources: folders of probabilities. A run, its folder, a checkpoint or a package is predicted first.
        out: ``.zip``: decode, pack and check a submission; what was merged and decoded is in a folder beside it
            (``submission.merge``). Another name: a folder for the merged probabilities, for `pytc tune`.
        tuned: folders of `pytc tune`, one for each source: validation scores and decoding parameters. Without them, the
            scores of runs are their validation Dice.
        crops: crop table, its path or "challenge" (the default for a submission): the grids of means and submission.
        classes: only these.
        average: number of predictions to average, the best by score.
        config: its ``decoding.classes`` replaces the tuned parameters, and what it says in ``decoding`` those of the
            runs; ``engine`` runs the blocks.
        overwrite: replace merged probabilities and labels that were made from others, and remove those of other runs.

    Raises:
        InputError, MissingError: nothing to merge, scores that cannot be compared, or a prediction that does not cover
            a mean.
        WriteError: another output is in the way. Also what `predict`, `decode` and `export` raise.
    """
    if not sources:
        raise InputError("nothing to merge: give run folders or folders that predict wrote")
    if tuned and len(tuned) != len(sources):
        raise InputError(f"--tuned: expected one folder for each of the {len(sources)} sources, got {len(tuned)}")
    target, settings = local_path(out), config or RunConfig()
    if (target / STATE_FILE).exists():
        raise not_ours(target, "merge")
    packs = target.suffix == ".zip"
    table = CropTable.resolve(crops or "challenge") if crops is not None or packs else None
    work = target.with_suffix(".merge") if packs else target
    folder = work / "probabilities" if packs else target
    with leading(work):
        candidates = _candidates(sources, tuned, work / "predicted", table)
        own = settings.decoding
        decoding = decode_parameters({name for c in candidates for name in c.classes}, own.default, own.classes)
        stated = decoding if own.default else {name: decoding[name] for name in own.classes if name in decoding}
        choices = choose(candidates, average=average, classes=classes, parameters=stated, fixed=own.classes)
        for one in candidates:
            if one.network is not None:
                from connectomics.pipeline.predict import predict

                predict(
                    one.network, out=one.folder, crops=table, overwrite=overwrite, resume=overwrite, progress=progress
                )
        _require_order(candidates, tuned)
        if classes is None:
            _remove_others(choices, folder, "probability", overwrite)
            if packs:
                _remove_others(choices, work / "labels", "labels", overwrite)
        _combine(choices, folder, table, settings.engine, overwrite, named(progress, "merging"))
        _write_choices(work, choices)
        probabilities = Probabilities(folder, settings, table)
        if not packs:
            return Merged(probabilities, choices)
        labels = work / "labels"
        parameters = {name: choice.parameters for name, choice in choices.items()}
        jobs = decode_jobs(
            folder, labels, parameters, classes=list(choices), blockwise_above=own.blockwise_above, table=own.table
        )
        do_jobs(jobs, settings.engine, overwrite=overwrite, resume=overwrite, progress=progress)
        selected = None if table is None else CropTable(tuple(row for row in table if row.class_name in choices))
        result = export_submission(
            labels, target, crops=selected if classes is not None else table, probabilities_dir=folder,
            progress=named(progress, "packing"),
        )  # fmt: skip
    return Merged(probabilities, choices, Labels(labels, settings, table), result)


def _candidates(
    sources: Sequence[Run | Probabilities | str | Path],
    tuned: Sequence[str | Path],
    place: Path,
    table: CropTable | None,
) -> list[Candidate]:
    """Return the sources as folders of predictions with scores; networks are to be predicted below ``place``."""
    found: list[Candidate] = []
    for number, source in enumerate(sources):
        path = source.folder if isinstance(source, Run | Probabilities) else Path(source).expanduser()
        if not path.exists():
            raise MissingError(f"{path} does not exist; expected a run folder, or a folder that predict wrote")
        if any(path.resolve() == (other.network or other.folder).resolve() for other in found):
            raise InputError(f"{path} is given twice; give each prediction once")
        run = open_run(path) if (path / "config.yaml").is_file() else None
        scores = tuned_scores(Path(tuned[number])) if tuned else {} if run is None else run_scores(run)
        if run is None and not path.is_file():
            names = {name for _, _, name in find_arrays(path)}
            made_by = source.config if isinstance(source, Probabilities) else None
            found.append(Candidate(path, scores, decoding=_decoding(made_by, names)))
            continue
        from connectomics.pipeline.network_task import network_and_config

        made_by = network_and_config(path, None, ())[0]
        names = set(predicted_classes(made_by))
        asked = names if table is None else names.intersection(row.class_name for row in table)
        place_of_it = place / f"{number + 1}-{path.stem}"
        found.append(
            Candidate(place_of_it, scores, path, frozenset(asked or names), _decoding(made_by, asked or names))
        )
    return found


def _decoding(config: RunConfig | None, classes: Collection[str]) -> dict[str, DecodeParameters]:
    return {} if config is None else decode_parameters(classes, config.decoding.default, config.decoding.classes)


def _require_order(candidates: Sequence[Candidate], tuned: Sequence[str | Path]) -> None:
    """Raise `InputError` if a folder of `pytc tune` is of the network of another candidate; warn if it is of none."""
    places = [[array_place(c.folder, *array) for array in find_arrays(c.folder)] for c in candidates]
    own = [set().union(*(networks_of(about(place)) for place in of)) for of in places]
    for candidate, networks, folder in zip(candidates, own, tuned, strict=False):
        of = {network for score in candidate.scores.values() for network in score.networks}
        if not of or not networks or of & networks:
            continue
        other = next((c.folder for c, n in zip(candidates, own, strict=True) if of & n), None)
        if other is not None:
            raise InputError(
                f"--tuned: {folder} was tuned on predictions of the network of {other}, not of that of "
                f"{candidate.folder}; give the folders in the order of the predictions"
            )
        log.warning("%s was tuned on predictions of another network than %s", folder, candidate.folder)


def _combine(
    choices: Mapping[str, Choice],
    folder: Path,
    table: CropTable | None,
    engine: EngineConfig,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Write the chosen probabilities of all crops below ``folder``."""
    there = {root: set(find_arrays(root)) for choice in choices.values() for root in choice.ranked}
    if folder.resolve() in {root.resolve() for root in there}:
        raise InputError(f"cannot merge into {folder}, which is one of the predictions; choose another output")
    grids = {} if table is None else {(row.dataset, row.crop_name, row.class_name): row.grid for row in table}
    arrays = sorted(array for array in set().union(*there.values()) if array[2] in choices)
    with open_engine(engine) as workers:
        for done, array in enumerate(arrays, start=1):
            choice = choices[array[2]]
            roots = [root for root in choice.ranked if array in there[root]][: choice.average]
            if roots[0] != choice.ranked[0] and choice.average == 1:
                log.warning(
                    "%s: %s is from %s, since %s lacks the crop, but is decoded with the parameters of the latter",
                    "/".join(array[:2]), array[2], roots[0], choice.ranked[0],
                )  # fmt: skip
            places, target = [array_place(root, *array) for root in roots], array_place(folder, *array)
            how = Storage.like(places[0])
            if len(places) == 1:
                open_prediction(roots[0], *array)  # refuses what is not complete
                _link(places[0], target, overwrite)
            else:
                grid, dtype = _grid_and_dtype(roots, array)
                task = AverageTask(tuple(map(str, places)), str(target), grids.get(array, grid), dtype, storage=how)
                run_task(task, workers, overwrite=overwrite, resume=overwrite)
            progress(done, len(arrays), "/".join(array))


def _remove_others(choices: Mapping[str, Choice], folder: Path, kind: str, overwrite: bool) -> None:
    """Remove what an earlier merge of others left in ``folder``; `WriteError` without ``overwrite``."""
    wanted = {(root, name) for name, choice in choices.items() for root in choice.ranked}
    there = {array for root, name in wanted for array in find_arrays(root) if array[2] == name}
    for array in find_arrays(folder) if folder.is_dir() else ():
        place = array_place(folder, *array)
        if array in there:
            continue
        if about(place).get("artefact") != kind:
            raise not_ours(place, "merge")
        if not overwrite:
            raise WriteError(
                f"{folder} holds {'/'.join(array)} of an earlier merge; remove it (--overwrite), or choose other output"
            )
        remove_tree(place)


def _grid_and_dtype(roots: Sequence[Path], array: tuple[str, str, str]) -> tuple[VoxelGrid, str]:
    """Return the finest grid of several predictions of one array, and the more precise of their types."""
    levels = [open_prediction(root, *array).levels[0] for root in roots]
    finest = min(levels, key=lambda level: max(level.grid.voxel_size))
    return finest.grid, "float16" if any(level.dtype.kind == "f" for level in levels) else "uint8"


def _link(source: Path, target: Path, overwrite: bool) -> None:
    """Put a class with its heads at ``target``: hard links on the same disk, copies on another."""
    there = about(target)
    if target.exists():
        if there.get("artefact") != "probability":
            raise not_ours(target, "merge")
        if there.get("id") and there.get("id") == about(source).get("id"):
            return
        if not overwrite:
            raise WriteError(f"{target} holds another prediction; overwrite it (--overwrite), or choose other output")
    ensure_group(target.parent, zarr_format=Storage.like(source).zarr_format)
    with unfinished_folder(target) as part, as_write_error(f"cannot write {target}"):
        shutil.copytree(source, part, copy_function=link_or_copy)
        publish(part, target)


def _write_choices(folder: Path, choices: Mapping[str, Choice]) -> None:
    """Write ``merge.json`` (what was used, and why) and ``decoding.yaml`` (for `pytc decode --config`)."""
    import yaml

    rows = {
        name: {
            "used": [str(root) for root in choice.used], "measure": choice.measure, "scores": dict(choice.scores),
            "parameters": plain(choice.parameters),
        }
        for name, choice in choices.items()
    }  # fmt: skip
    write_json(require_own(folder / "merge.json", has_keys("classes"), "merge"), {"classes": rows})
    text = yaml.safe_dump({"decoding": {"classes": {name: row["parameters"] for name, row in rows.items()}}})
    write_file(require_own(folder / "decoding.yaml", contains(_MARK), "merge"), f"{_MARK}\n{text}".encode())
