"""The whole way in one command: data, training, prediction, decoding, score, submission, report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import InOption, OutOption

if TYPE_CHECKING:
    from connectomics.cellmap.crop_table import CropTable
    from connectomics.config import RunConfig


_MARK = "demo.json"  # in a folder that demo made
#: everything that demo makes in its folder
_PARTS = frozenset(
    {_MARK, "data", "cache", "run", "predictions", "labels", "baseline", "crops.csv", "split.yaml", "scores.json"}
    | {"scores_per_class.csv", "scores_per_crop.csv", "scores_per_instance.csv", "submission.zip", "report.html"}
    | {"timings.json"}
)


def demo(
    out: Annotated[Path, OutOption(help="Folder for everything that is made.")] = Path("outputs/demo"),
    data: Annotated[
        Path | None,
        InOption(help="A labelled data set of yours ({name}/{name}.zarr); default: the phantom.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, InOption(help="Configuration; default: tutorials/phantom.yaml, or the data set's own.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...", show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="The phantom's size: tiny, small or large.")] = "small",
    overwrite: Annotated[bool, typer.Option(help="Begin anew where OUT exists.")] = False,
) -> None:
    """Go all the way: data, a short training, prediction, decoding, score, submission, report.

    With --data, each labelled crop is cut into a training, a validation and a test part.

    Examples:

      pytc demo --out outputs/demo

      pytc demo --data data/fib25-medulla --out outputs/fib25 training.max_epochs=20
    """
    from connectomics.errors import InputError
    from connectomics.io.replacing import not_ours

    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"{out} is not empty; give another --out, or --overwrite to begin anew")
        own = _PARTS if (out / _MARK).is_file() else frozenset()
        foreign = next((path for path in sorted(out.iterdir()) if path.name not in own), None)
        if foreign is not None:
            raise not_ours(foreign, "demo")
    way = _prepare(out, data, config, overrides or [], preset)
    way.run()


@dataclass
class Way:
    """One run all the way; each step reads what the step before wrote."""

    out: Path
    config: RunConfig
    root: Path
    table: Path
    truth: Path
    timings: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Every step, then the summary."""
        from connectomics.decoding.parameters import decode_parameters

        checkpoint = self.train()
        self.predict(checkpoint)
        decoding = decode_parameters(
            self.config.dataset.classes, self.config.decoding.default, self.config.decoding.classes
        )
        from connectomics.pipeline.decode import decode_predictions

        with show.stage("decoding", self.timings):
            above = self.config.decoding.blockwise_above
            decode_predictions(self.out / "predictions", self.out / "labels", decoding, blockwise_above=above)
        self.export(self.out / "labels", self.out / "submission.zip", self.out / "predictions")
        scores = self.score(self.out / "submission.zip", self.out)
        with show.stage("the intensity threshold to compare with", self.timings, "baseline"):
            self.baseline(decoding)
            self.export(self.out / "baseline/labels", self.out / "baseline/submission.zip")
            baseline = self.score(self.out / "baseline/submission.zip", self.out / "baseline")
        self.report()
        self.summary(scores, baseline)

    def train(self) -> Path:
        """Train; the checkpoint to predict with."""
        from connectomics.errors import InputError
        from connectomics.pipeline.train import train

        with show.stage("training", self.timings):
            result = train(self.config, self.out / "run")
        if result.checkpoint is None:
            raise InputError("training left no checkpoint; set checkpoint.save_last=true or checkpoint.save_top_k=1")
        return result.checkpoint

    def selected(self) -> CropTable:
        """The table's rows of the classes that were trained."""
        from connectomics.cellmap.crop_table import CropTable

        return CropTable.load(self.table).select(classes=self.config.dataset.classes)

    def predict(self, checkpoint: Path) -> None:
        """Probabilities of the test crops."""
        from connectomics.pipeline.predict import predict_cellmap_crops, targets_of

        with show.stage("predicting", self.timings):
            targets = targets_of(self.config, crop_table=self.selected())
            out = self.out / "predictions"
            predict_cellmap_crops(None, self.config, checkpoint, out, targets=targets, progress=progress.stages)

    def export(self, labels: Path, submission: Path, probabilities: Path | None = None) -> None:
        """Pack and check; errors of the check end the demo."""
        from connectomics.errors import InputError
        from connectomics.submission import export_submission

        table = self.selected()
        with show.stage(f"packing {submission}", self.timings, f"packing {submission.parent.name}"):
            result = export_submission(labels, submission, crops=table, probabilities_dir=probabilities)
        if result.has_errors:
            raise InputError(f"the submission {submission} would be refused: {result.summary()}")

    def score(self, submission: Path, folder: Path) -> Any:
        """Score; writes scores.json and the tables into ``folder``."""
        from connectomics.metrics.challenge import score_submission
        from connectomics.metrics.tables import write_scores

        with show.stage(f"scoring {submission}", self.timings, f"scoring {submission.parent.name}"):
            table = self.out / "crops.csv"
            self.selected().save(table)
            config = self.config
            result = score_submission(
                submission, self.truth, table, classes=config.dataset.classes, rules=config.score.rules
            )
            write_scores(result, folder)
        return result

    def baseline(self, decoding: dict[str, Any]) -> None:
        """Per class the best interval of raw intensities on the training crops, then connected components."""
        import numpy as np

        from connectomics.cellmap.catalog import Catalog
        from connectomics.data.volumes import CropVolume
        from connectomics.geometry import triple
        from connectomics.pipeline.demo_baseline import best_interval, intensity_histogram, write_baseline

        cfg = self.config.dataset
        catalog = Catalog.open(str(self.root))
        size = triple(cfg.voxel_size, "dataset.voxel_size")
        histograms: dict[str, Any] = {}
        for crop in catalog.crops(cfg.datasets, cfg.crops, cfg.classes):
            volume = CropVolume(crop, tuple(cfg.classes), size)
            for _, block in volume.grid.blocks((128, 128, 128)):
                raw, _ = volume.read_raw(block)
                label, known = volume.read_labels(block)
                for channel, name in enumerate(cfg.classes):
                    found = intensity_histogram(raw, label[channel], known[channel])
                    histograms[name] = np.add(histograms[name], found) if name in histograms else found
        intervals = {name: best_interval(histogram) for name, histogram in histograms.items()}
        table = self.selected()
        raws = {name: catalog.raw_location(name) for name in sorted({e.dataset for e in table})}
        write_baseline(table, raws, intervals, self.out / "baseline/labels", decoding)

    def report(self) -> None:
        """The page."""
        from connectomics.report import ReportSources, build_report

        with show.stage("writing the report", self.timings, "report"):
            build_report(
                self.out / "report.html",
                ReportSources(
                    title=f"{self.config.name}: from data to score",
                    run=self.out / "run",
                    data_root=str(self.root),
                    crop_table=self.out / "crops.csv",
                    truth=self.truth,
                    labels=self.out / "labels",
                    probabilities=self.out / "predictions",
                    submission=self.out / "submission.zip",
                    scores=self.out / "scores.json",
                    baseline_scores=self.out / "baseline/scores.json",
                    baseline_name="intensity threshold",
                    stages=dict(self.timings),
                ),
            )

    def summary(self, scores: Any, baseline: Any) -> None:
        """What came out, and where it is."""
        rows = [
            [name, _percent(getattr(scores, key)), _percent(getattr(baseline, key))]
            for name, key in (
                ("overall", "overall_score"),
                ("instances", "overall_instance_score"),
                ("semantic", "overall_semantic_score"),
            )
        ]
        for name, score in scores.label_scores.items():
            rows.append([name, _percent(score.score), _percent(baseline.label_scores[name].score)])
        show.table([f"score (rules {scores.rules})", "network", "intensity threshold"], rows)
        (self.out / "timings.json").write_text(json.dumps(self.timings, indent=1), encoding="utf-8")
        print()
        for name in ("scores.json", "submission.zip", "report.html"):
            print(f"  {self.out / name}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _begin(out: Path) -> None:
    """An empty folder that is marked as demo's."""
    from connectomics.io.artifacts import put_aside
    from connectomics.io.write import write_file

    if out.exists():
        put_aside(out)
    write_file(out / _MARK, b"{}\n")


def _own_cache(out: Path) -> list[str]:
    """Decoded crops live and go with the demo's folder."""
    return [f"data.cache_dir={out / 'cache'}"]


def _prepare(out: Path, data: Path | None, config: Path | None, overrides: list[str], preset: str) -> Way:
    """Data, table and truth (made or carved), and the configuration that fits them."""
    from connectomics.config import load_config, tutorial
    from connectomics.errors import MissingError

    if data is None:
        from connectomics.phantom import PhantomOptions, make_phantom

        root = out / "data"
        timings: dict[str, float] = {}
        composed = load_config(
            config or tutorial("phantom"), [*_own_cache(out), *overrides, f"dataset.data_root={root}"]
        )
        options = PhantomOptions(preset=preset)
        _begin(out)
        with show.stage("making the phantom", timings):
            make_phantom(root, options)
        return Way(out, composed, root, root / "test_crops.csv", root / "truth.zarr", timings)

    from connectomics.cellmap.carve import carve

    data = data.resolve()
    if not (data / f"{data.name}.zarr").is_dir():
        raise MissingError(
            f"{data} is not a data set: expected {data.name}.zarr in it (with recon-1/em and recon-1/labels)"
        )
    file = config or tutorial(data.name.replace("-", "_"))
    base = load_config(file, overrides)
    _begin(out)
    carved = carve(data.parent, out / "data", [data.name], base.dataset.classes)
    split = out / "split.yaml"
    lines = [f"train: [{', '.join(carved.train)}]", f"val: [{', '.join(carved.val)}]"]
    split.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fixed = [f"dataset.data_root={carved.root}", f"dataset.datasets=[{data.name}]", f"dataset.split_file={split}"]
    composed = load_config(file, [*_own_cache(out), *overrides, *fixed])
    return Way(out, composed, carved.root, carved.crop_table, carved.truth)
