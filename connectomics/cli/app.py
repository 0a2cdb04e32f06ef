"""All verbs, in the order in which one uses them."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from connectomics.cli import (
    cache_verb,
    data_verbs,
    demo_verb,
    doctor_verb,
    fetch_verb,
    ingest_verb,
    inspect_verb,
    measure_verb,
    mesh_verb,
    package_verb,
    plan_verb,
    result_verbs,
    run_task_verb,
    run_verbs,
    runs_verb,
    tune_verb,
    view_verb,
)

WAY = """CellMap volumes from disk to a scored submission.

The way through:

\b
  pytc doctor                            what this machine has, and what to change
  pytc fetch data --for FILE.yaml        bring what a configuration reads (or: pytc phantom data/phantom)
  pytc describe data                     data sets, crops, classes, what is annotated
  pytc train FILE.yaml                   a network
  pytc predict FILE.yaml --checkpoint X  probabilities of whole crops or boxes
  pytc decode PREDICTIONS LABELS         labels and instances
  pytc evaluate LABELS data              the challenge's score on annotated crops
  pytc export LABELS submission.zip      what the portal takes; pytc validate says what it would refuse
  pytc report                            one page with all of it

`pytc demo` goes all the way on made data. Files to begin with: tutorials/*.yaml; every verb has --help with examples.
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
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also show where an error comes from.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only results, warnings and errors.")] = False,
) -> None:
    """Set how much all verbs say."""
    if verbose and quiet:
        raise typer.BadParameter("-v says more and -q says less: give one of them")
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("connectomics").setLevel(level)


app.command("doctor", short_help="What this machine has, and what to change.")(doctor_verb.doctor)
app.command("demo", short_help="All the way on made data, with a score and a report.")(demo_verb.demo)
app.command("phantom", short_help="Make a synthetic data root whose truth is known.")(data_verbs.phantom)
app.command("fetch", short_help="Bring public challenge data: labels, and raw around them.")(fetch_verb.fetch)
app.command("ingest", short_help="Bring your own: TIFF, HDF5, NRRD, MRC, N5, precomputed, Zarr.")(ingest_verb.ingest)
app.command("describe", short_help="Data sets, crops, voxel sizes, classes, what is annotated.")(data_verbs.describe)
app.command("inspect", short_help="Show training batches as the network gets them.")(inspect_verb.inspect)
app.command("cache", short_help="List the crops decoded for training, check or clear them.")(cache_verb.cache)
app.command("plan", short_help="Measure data and machine, and write configurations that fit.")(plan_verb.plan)
app.command("train", short_help="Train a network.")(run_verbs.train)
app.command("runs", short_help="List runs with their state and score, or compare some.")(runs_verb.runs)
app.command("package", short_help="Make one file of a trained network.")(package_verb.package)
app.command("predict", short_help="Probabilities of whole crops or boxes, block by block.")(run_verbs.predict)
app.command("decode", short_help="Turn probabilities into labels and instances.")(run_verbs.decode)
app.command("measure", short_help="Volume, surface, contacts of every instance, as a table.")(measure_verb.measure)
app.command("mesh", short_help="Write a closed surface of every instance.")(mesh_verb.mesh)
app.command("run-task", short_help="Run a stored task: what is missing of its output is done.")(run_task_verb.run_task)
app.command("evaluate", short_help="Measure labels against annotated crops.")(run_verbs.evaluate)
app.command("tune", short_help="Choose decoding parameters by the challenge's own score.")(tune_verb.tune)
app.command("export", short_help="Pack labels into the zip that the portal takes.")(result_verbs.export)
app.command("validate", short_help="Say beforehand what the portal would refuse.")(result_verbs.validate)
app.command("score", short_help="Score a submission exactly as the challenge does.")(result_verbs.score)
app.command("report", short_help="One self-contained page of a run and its results.")(result_verbs.report)
app.command("view", short_help="Look at volumes in neuroglancer or napari.")(view_verb.view)
