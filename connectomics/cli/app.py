"""All verbs, in the order of use."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.main import get_command

from connectomics.cli import data_verbs, label_verbs, look_verbs, plan_verbs, predict_verbs, score_verbs, train_verbs

WAY = """Segment cells in volume electron microscopy, from volumes to a scored submission.

The usual order:

\b
  pytc doctor                            check this machine
  pytc ingest data --dataset A --raw F   import your own volumes (or: pytc phantom, or pytc fetch for public data)
  pytc describe data                     data sets, crops, classes, what is annotated
  pytc plan data --class mito            write a configuration that fits data and machine
  pytc train FILE.yaml                   train a network
  pytc predict --checkpoint RUN          predict probabilities of crops, boxes or whole volumes
  pytc decode PREDICTIONS LABELS         turn them into labels and instances
  pytc evaluate LABELS data              compare with annotated crops
  pytc view data --labels LABELS         look at all of it in a browser
  pytc export LABELS submission.zip      pack a submission; pytc validate checks one
  pytc report                            write one page with all of it

`pytc demo` runs all of it on synthetic data. Example configurations: tutorials/*.yaml. Every verb has --help.
"""

app = typer.Typer(
    name="pytc",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=WAY,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def loudness(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also print the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only results, warnings and errors.")] = False,
) -> None:
    """Set how much all verbs print."""
    if verbose and quiet:
        raise typer.BadParameter("-v and -q exclude each other; give one of them")
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("connectomics").setLevel(level)


for name, verb, text in (
    ("doctor", train_verbs.doctor, "Check this machine, and advise."),
    ("demo", data_verbs.demo, "Run everything on synthetic data, with a score and a report."),
    ("phantom", data_verbs.phantom, "Make a synthetic data root with known ground truth."),
    ("fetch", data_verbs.fetch, "Fetch public challenge data: labels, and raw around them."),
    ("ingest", data_verbs.ingest, "Import volumes: TIFF, HDF5, NRRD, MRC, N5, precomputed, Zarr."),
    ("describe", data_verbs.describe, "Print data sets, crops, voxel sizes, classes, annotations."),
    ("annotate", look_verbs.annotate, "Draw labels of a crop in a browser."),
    ("inspect", look_verbs.inspect, "Show training batches as the network gets them."),
    ("cache", look_verbs.cache, "List, verify or remove crops decoded for training."),
    ("plan", plan_verbs.plan, "Measure data and machine, and write configurations that fit."),
    ("pretrain", train_verbs.pretrain, "Pre-train a network on raw, without labels."),
    ("train", train_verbs.train, "Train a network."),
    ("study", train_verbs.study, "Compare configurations over seeds and folds, in one table."),
    ("runs", train_verbs.runs, "List runs with their state and score, or compare some."),
    ("package", train_verbs.package, "Pack a trained network into one file."),
    ("predict", predict_verbs.predict, "Predict crops, boxes or whole volumes, block by block."),
    ("decode", label_verbs.decode, "Turn probabilities into labels and instances."),
    ("apply-edits", label_verbs.apply_edits, "Merge, split, delete or reclassify instances by a log."),
    ("measure", label_verbs.measure, "Measure volume, surface and contacts of every instance."),
    ("mesh", label_verbs.mesh, "Write a closed surface of every instance."),
    ("run-task", predict_verbs.run_task, "Do the missing blocks of a stored task."),
    ("status", predict_verbs.status, "Print blocks done and failed, rate and time left of an output."),
    ("array", predict_verbs.array, "Run a command as a job array of SLURM or LSF."),
    ("evaluate", score_verbs.evaluate, "Compare labels with annotated crops."),
    ("tune", score_verbs.tune, "Choose decoding parameters by the challenge's score."),
    ("propose", data_verbs.propose, "Propose what to annotate next, with labels to correct."),
    ("merge", plan_verbs.merge, "Make one submission of several runs."),
    ("export", score_verbs.export, "Pack labels into the zip that the portal takes."),
    ("validate", score_verbs.validate, "Check a submission before uploading it."),
    ("score", score_verbs.score, "Score a submission exactly as the challenge does."),
    ("report", score_verbs.report, "Write one self-contained page of a run and its results."),
    ("view", look_verbs.view, "View volumes in neuroglancer or napari."),
):
    app.command(name, short_help=text)(verb)


def command() -> Any:
    """Return the parser of all verbs, also of those that plugins added; building it takes longer than many a verb."""
    return _command(tuple(verb.callback for verb in app.registered_commands))


@functools.cache
def _command(verbs: tuple[Callable[..., Any] | None, ...]) -> Any:
    return get_command(app)
