"""Every stage in one call: data, training, prediction, decoding, score, submission, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.config import RunConfig, load_config, tutorial
from connectomics.data.volumes import CropVolume
from connectomics.decoding.decode import decode_class
from connectomics.decoding.label_artifact import existing_labels, label_array, label_attrs, write_whole
from connectomics.decoding.parameters import DecodeParameters, decode_parameters
from connectomics.errors import InputError, MissingError
from connectomics.io.artifacts import Provenance, put_aside
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import array_place
from connectomics.io.replacing import not_ours
from connectomics.io.sharded import Storage
from connectomics.io.write import update_attrs, write_file
from connectomics.metrics.challenge.results import SubmissionScore
from connectomics.progress import Progress

MARK = "demo.json"  # marks a folder that `demo` made
#: Everything that `demo` writes into its folder.
PARTS = frozenset(
    {MARK, "data", "cache", "run", "predictions", "labels", "baseline", "crops.csv", "split.yaml", "scores.json"}
    | {"scores_per_class.csv", "scores_per_crop.csv", "scores_per_instance.csv", "submission.zip", "report.html"}
    | {"timings.json"}
)

#: Shows a stage: (what, timings, name) as a context manager.
Stage = Callable[[str, dict[str, float], str], AbstractContextManager[None]]


@dataclass
class Demo:
    """One run through all stages; each reads what the stage before it wrote.

    Attributes:
        out: folder for everything. config: the run. root: data root. table, truth: test crops and their ground truth.
        stage: shows a stage. progress: called while predicting. timings: seconds by stage.
    """

    out: Path
    config: RunConfig
    root: Path
    table: Path
    truth: Path
    stage: Stage
    progress: Progress
    timings: dict[str, float] = field(default_factory=dict)

    def run(self) -> tuple[SubmissionScore, SubmissionScore]:
        """Run every stage; return the scores of the network and of the intensity threshold."""
        from connectomics.pipeline.decode import decode
        from connectomics.pipeline.predict import predict
        from connectomics.pipeline.report import report
        from connectomics.pipeline.train import train

        out, classes = self.out, self.config.dataset.classes
        selected = CropTable(tuple(entry for entry in CropTable.load(self.table) if entry.class_name in classes))
        selected.save(out / "crops.csv")
        with self.stage("training", self.timings, "training"):
            run = train(self.config, out / "run")
        if run.checkpoint is None:
            raise InputError("training left no checkpoint; set checkpoint.save_last=true or checkpoint.save_top_k=1")
        with self.stage("predicting", self.timings, "predicting"):
            probabilities = predict(
                run, out=out / "predictions", config=self.config, crops=selected, progress=self.progress
            )
        with self.stage("decoding", self.timings, "decoding"):
            labels = decode(probabilities, out=out / "labels", config=self.config)
        scores = self._export_and_score(labels.folder, out, probabilities.folder)
        with self.stage("comparing with an intensity threshold", self.timings, "baseline"):
            write_baseline(self.config, str(self.root), selected, out / "baseline/labels")
            baseline = self._export_and_score(out / "baseline/labels", out / "baseline", None)
        with self.stage("writing the report", self.timings, "report"):
            report(
                run, probabilities, labels, out=out / "report.html", title=f"{self.config.name}: from data to score",
                data_root=str(self.root), crop_table=out / "crops.csv", truth=self.truth,
                submission=out / "submission.zip", scores=out / "scores.json",
                baseline_scores=out / "baseline/scores.json", baseline_name="intensity threshold",
                stages=dict(self.timings),
            )  # fmt: skip
        write_file(out / "timings.json", json.dumps(self.timings, indent=1).encode())
        return scores, baseline

    def _export_and_score(self, labels: Path, folder: Path, probabilities: Path | None) -> SubmissionScore:
        """Pack and score; errors that the check of the submission finds end the demo."""
        from connectomics.pipeline.export import export
        from connectomics.pipeline.score import score

        table, submission = self.out / "crops.csv", folder / "submission.zip"
        with self.stage(f"packing {submission}", self.timings, f"packing {folder.name}"):
            packed = export(labels, submission, crops=table, probabilities=probabilities)
        if packed.has_errors:
            raise InputError(f"the portal would refuse the submission {submission}: {packed.summary()}")
        with self.stage(f"scoring {submission}", self.timings, f"scoring {folder.name}"):
            scores = score(submission, self.truth, out=folder, crops=table, rules=self.config.score.rules)
        assert scores.result is not None
        return scores.result


def prepare_demo(
    out: Path,
    *,
    data: Path | None,
    config: Path | None,
    overrides: Sequence[str],
    preset: str,
    overwrite: bool,
    stage: Stage,
    progress: Progress,
) -> Demo:
    """Make the data (or cut those of ``data``) and compose the configuration that fits them.

    Raises:
        InputError: ``out`` is not empty (without ``overwrite``). WriteError: it holds files of something else.
        MissingError: ``data`` is not a data set.
    """
    from connectomics.phantom import PhantomOptions, make_phantom
    from connectomics.pipeline.hold_out import hold_out

    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"{out} is not empty; give another --out, or --overwrite to start over")
        own = PARTS if (out / MARK).is_file() else frozenset()
        foreign = next((path for path in sorted(out.iterdir()) if path.name not in own), None)
        if foreign is not None:
            raise not_ours(foreign, "demo")
    if data is not None:
        data = data.resolve()
        if not (data / f"{data.name}.zarr").is_dir():
            raise MissingError(
                f"{data} is not a data set: expected {data.name}.zarr in it (recon-1/em, recon-1/labels)"
            )
    file = config or tutorial("phantom" if data is None else data.name.replace("-", "_"))
    root, split, chosen = out / "data", out / "split.yaml", PhantomOptions(preset=preset)
    fixed = [f"dataset.data_root={root}"]
    if data is not None:
        fixed += [f"dataset.datasets=[{data.name}]", f"dataset.split_file={split}"]
    # decoded crops belong to the demo's folder
    composed = load_config(file, f"data.cache_dir={out / 'cache'}", overrides, fixed)
    if out.exists():
        put_aside(out)
    write_file(out / MARK, b"{}\n")
    made = Demo(out, composed, root, root / "test_crops.csv", root / "truth.zarr", stage, progress)
    if data is None:
        with stage("making the phantom", made.timings, "making the phantom"):
            make_phantom(root, chosen)
    else:
        train, val = hold_out(data, root, composed.dataset.classes)
        write_file(split, f"train: [{', '.join(train)}]\nval: [{', '.join(val)}]\n".encode())
    return made


# -- the baseline: an interval of raw intensities for each class, then components --------------------------------------
BINS = 256
#: The lowest and the highest raw value of a class, both inside; nothing is found if the first is higher.
Interval = tuple[int, int]


def intensity_histogram(raw: NDArray[Any], label: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return (2, 256) counts of the known voxels by raw value 0 to 255: where the class is absent, and present."""
    values = np.rint(raw[known])
    if values.size and not (values.min() >= 0 and values.max() < BINS):
        raise InputError(f"raw must lie in 0 to 255, got {values.min():.4g} to {values.max():.4g}; rescale it first")
    present = (label[known] > 0).astype(np.int64)
    counts = np.bincount(values.astype(np.int64) + BINS * present, minlength=2 * BINS)
    return counts.reshape(2, BINS).astype(np.int64)


def best_interval(histogram: NDArray[np.int64]) -> Interval:
    """Return the interval with the best Dice; of equals the one with the lowest start, then the lowest end."""
    absent, present = (np.concatenate(([0], np.cumsum(counts))) for counts in histogram)
    if present[-1] == 0:
        return 1, 0
    # for every pair of ends: 2 tp / (2 tp + fp + fn) = 2 tp / (tp + fp + all present)
    tp = present[None, 1:] - present[:-1, None]
    fp = absent[None, 1:] - absent[:-1, None]
    dice = np.where(np.tri(BINS, dtype=np.bool_).T, 2 * tp / np.maximum(tp + fp + present[-1], 1), -1.0)
    low, high = np.unravel_index(int(np.argmax(dice)), dice.shape)
    return int(low), int(high)


def fit_intervals(config: RunConfig, catalog: Catalog) -> dict[str, Interval]:
    """Return the best interval of every class on the annotated crops of a configuration."""
    data = config.dataset
    histograms = {name: np.zeros((2, BINS), np.int64) for name in data.classes}
    for crop in catalog.crops(data.datasets, data.crops, data.classes):
        volume = CropVolume(crop, tuple(data.classes), config.voxel_size)
        for _, block in volume.grid.blocks((128, 128, 128)):
            raw, _ = volume.read_raw(block)
            label, known = volume.read_labels(block)
            for channel, name in enumerate(data.classes):
                histograms[name] += intensity_histogram(raw, label[channel], known[channel])
    return {name: best_interval(histogram) for name, histogram in histograms.items()}


def write_baseline(config: RunConfig, root: str, entries: Iterable[TableEntry], output_dir: Path) -> None:
    """Fit the intervals on annotated crops, and write labels for the entries of a crop table as decode does."""
    catalog, decoding = Catalog.open(root), config.decoding
    parameters = decode_parameters(config.dataset.classes, decoding.default, decoding.classes)
    raw = {name: catalog.raw_location(name) for name in catalog.datasets}
    write_labels(entries, raw, fit_intervals(config, catalog), output_dir, parameters)


def write_labels(
    entries: Iterable[TableEntry],
    raw_locations: Mapping[str, str],
    intervals: Mapping[str, Interval],
    output_dir: Path,
    parameters: Mapping[str, DecodeParameters],
) -> None:
    """Write the labels of a crop table from intervals of raw at ``raw_locations[dataset]``."""
    for entry in entries:
        (low, high), chosen, grid = intervals[entry.class_name], parameters[entry.class_name], entry.grid
        raw, inside = Multiscale.open(raw_locations[entry.dataset]).read_raw(grid)
        values = np.rint(raw)
        labels = decode_class((values >= low) & (values <= high) & inside, grid.voxel_size, chosen)
        source = {"baseline": {"low": low, "high": high}}
        attrs = label_attrs(grid, entry.class_name, chosen, source, Provenance(), int(labels.max(initial=0)))
        location = array_place(output_dir, entry.dataset, entry.crop_name, entry.class_name)
        existing_labels(
            location, chosen, {}, Storage(), overwrite=True
        )  # refuses to replace files that decode did not write
        with label_array(location, [grid], labels.dtype, attrs, Storage()) as writers:
            write_whole(writers, labels)
        update_attrs(location.parent, {"connectomics": {"artefact": "labels", "complete": True}})
