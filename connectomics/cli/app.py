"""All verbs, in the order in which one uses them."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from connectomics.cli import (
    bench_verb,
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


app.command("doctor")(doctor_verb.doctor)
app.command("demo")(demo_verb.demo)
app.command("phantom")(data_verbs.phantom)
app.command("fetch")(fetch_verb.fetch)
app.command("ingest")(ingest_verb.ingest)
app.command("describe")(data_verbs.describe)
app.command("inspect")(inspect_verb.inspect)
app.command("cache")(cache_verb.cache)
app.command("plan")(plan_verb.plan)
app.command("train")(run_verbs.train)
app.command("runs")(runs_verb.runs)
app.command("package")(package_verb.package)
app.command("predict")(run_verbs.predict)
app.command("decode")(run_verbs.decode)
app.command("measure")(measure_verb.measure)
app.command("mesh")(mesh_verb.mesh)
app.command("run-task")(run_task_verb.run_task)
app.command("evaluate")(run_verbs.evaluate)
app.command("tune")(tune_verb.tune)
app.command("export")(result_verbs.export)
app.command("validate")(result_verbs.validate)
app.command("score")(result_verbs.score)
app.command("report")(result_verbs.report)
app.command("view")(view_verb.view)
app.add_typer(bench_verb.bench, name="bench")
