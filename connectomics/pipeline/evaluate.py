"""Labels against annotated crops, over known voxels only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from connectomics.cellmap.catalog import Catalog, Crop, open_root
from connectomics.cellmap.classes import CLASSES, is_scored_by_instances
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.decoding.label_artifact import unknown_share
from connectomics.decoding.prediction import trained_on
from connectomics.errors import MissingError
from connectomics.io.artifacts import require_complete
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import array_place
from connectomics.io.replacing import has_column, has_keys, require_own
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.results import moves
from connectomics.metrics.challenge.rules import DEFAULT_RULES, RULES, Rules, get_rules
from connectomics.metrics.evaluate import LabelEvaluation, evaluate_label, score_of, summarize, totals
from connectomics.metrics.tables import write_csv, write_json
from connectomics.pipeline.results import Labels, Scores, chosen_arrays
from connectomics.pipeline.targets import name_trained
from connectomics.progress import Progress

_BLOCK = (128, 128, 128)


def evaluate(
    labels: Labels | str | Path,
    root: str | Path | Catalog,
    *,
    out: str | Path | None = None,
    classes: Sequence[str] | None = None,
    crops: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    rules: str = DEFAULT_RULES,
    samples: int = 1000,
    progress: Progress | None = None,
) -> Scores:
    """Compare labels with annotated crops, each array on its own grid, over known voxels only.

    Args:
        labels: what `decode` returned, or its folder.
        root: data root with the annotation of those crops.
        out: JSON file to write; CSV tables by class, data set and crop go beside it. None writes nothing. classes,
            crops (``crop7`` or ``7``), datasets: only these.
        rules: version of the challenge's rules (``score.rules``).
        samples: draws of the bootstrap over crops.

    Returns:
        Scores with the keys ``classes``: class -> pooled measures (`connectomics.metrics.evaluate.summarize`) with
        ``dice_interval`` and ``score_interval`` (95 %, over crops); ``datasets``: such rows by data set and class;
        ``crops``: a row per crop and class; ``totals``: the challenge's totals over these crops; ``left_out``: arrays
        without annotation, ``dataset/crop/class``; ``unknown``: the share of an array that was not predicted (accepted
        failed blocks), which counts as predicted absent; ``made_from``: the ``id`` of each array; ``rules``, and
        whether they are ``verified``; ``by_rules``: the overall score by each version of the rules.

    Raises:
        MissingError: nothing can be compared.
        IncompleteError: half-written labels.
        MetadataError: probabilities instead of labels.
        UnknownNameError: no label has this class, crop or data set.
        WriteError: ``out`` holds something else.
    """
    files, version = None if out is None else evaluation_files(out), get_rules(rules)  # before the work
    folder, catalog = Labels.open(labels).folder, open_root(root)
    found = chosen_arrays(folder, datasets, crops, classes)
    rows, left_out, unknown, made_from = list[LabelEvaluation](), list[str](), dict[str, float](), dict[str, str]()
    trained = list[tuple[str, bool]]()
    for done, (dataset, crop, name) in enumerate(found, start=1):
        key, row, about = f"{dataset}/{crop}/{name}", None, dict[str, Any]()
        if dataset in catalog.datasets and crop in catalog.crop_names(dataset):
            location = array_place(folder, dataset, crop, name)
            about = require_complete(location, "labels")
            row = _compare(Multiscale.open(location), catalog.crop(dataset, crop), name, rules)
        if row is None:
            left_out.append(key)
        else:
            rows.append(row)
            trained.append((f"{dataset}/{crop}", trained_on(about)))
            made_from[key] = str(about.get("id", ""))
            if share := unknown_share(about):
                unknown[key] = share
        if progress is not None:
            progress(done, len(found), key)
    if not rows:
        raise MissingError(
            f"none of the labels in {folder} is of an annotated crop of {catalog.root}; nothing to compare: predict "
            "annotated crops (without --box)"
        )
    own = {row.class_name for row in rows if row.instances is not None and row.class_name not in CLASSES}
    rows = [replace(row, by_instances=row.class_name in own) for row in rows]
    name_trained(trained)
    content = _summary(rows, version, samples) | {"left_out": left_out, "unknown": unknown, "made_from": made_from}
    if files is None:
        return Scores(content)
    trust = {"rules": content["rules"], "verified": content["verified"]}
    tables = {
        "class": [{"class": name, **row} for name, row in content["classes"].items()],
        "dataset": content["datasets"],
        "crop": content["crops"],
    }
    write_json(files["json"], content)
    for name, rows in tables.items():
        write_csv(files[name], [{k: v for k, v in row.items() if not k.endswith("_interval")} | trust for row in rows])
    return Scores(content, files["json"])


def evaluation_files(out: str | Path) -> dict[str, Path]:
    """Return the files that `evaluate` writes, ``json`` and tables; `WriteError` if one holds something else."""
    path = local_path(out)
    files = {"json": require_own(path, has_keys("rules", "classes", "totals"), "evaluate")}
    for name, column in {"class": "class", "dataset": "dataset", "crop": "dataset"}.items():  # and their first columns
        files[name] = require_own(path.with_name(f"{path.stem}_per_{name}.csv"), has_column(column), "evaluate")
    return files


def _summary(rows: Sequence[LabelEvaluation], version: Rules, samples: int) -> dict[str, Any]:
    options: dict[str, Any] = {"samples": samples, "rules": version.version}
    total = totals(rows, **options)
    overall = {name: totals(rows, samples=1, rules=other)["overall"] for name, other in RULES.items()}
    return {
        "rules": version.version,
        "verified": version.verified,
        "by_rules": moves(overall, total["overall"]),
        "totals": total,
        "classes": {row.pop("class"): _with_intervals(row) for row in summarize(rows, ("class",), **options)},
        "datasets": [_with_intervals(row) for row in summarize(rows, ("dataset", "class"), **options)],
        "crops": [
            row.to_dict() | ({} if (item := row.scored(version)) is None else {"score": score_of(item)}) for row in rows
        ],
    }


def _with_intervals(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its ends of intervals put together, as the report reads them."""
    pairs = [name for name in ("dice", "score") if f"{name}_low" in row]
    return row | {f"{name}_interval": [row[f"{name}_low"], row[f"{name}_high"]] for name in pairs}


def _compare(prediction: Multiscale, crop: Crop, name: str, rules: str) -> LabelEvaluation | None:
    """One class in one crop, None where nothing of it is known.

    Semantic classes are counted block by block; instances need whole volumes (about 20 bytes a voxel).
    """
    grid = prediction.levels[0].grid
    by_ids = is_scored_by_instances(name, prediction.attrs["connectomics"]["kind"])
    if by_ids and name in crop.labels and crop.labels[name].annotation.kind == "instance":
        ids, known = read_instances(crop, name, grid)
        found, _ = prediction.read_level(0, (0, 0, 0), grid.shape)
        return evaluate_label(
            found, ids, known, voxel_size=grid.voxel_size, dataset=crop.dataset, crop=crop.name, class_name=name,
            rules=rules,
        )  # fmt: skip
    counts = Counts()
    for begin, block in grid.blocks(_BLOCK):
        truth = read_labels(crop, [name], block)
        found, _ = prediction.read_level(0, begin, block.shape)
        counts = counts + Counts.of(found, truth.present_of(name), truth.known_of(name))
    return LabelEvaluation(crop.dataset, crop.name, name, counts) if counts.known else None
