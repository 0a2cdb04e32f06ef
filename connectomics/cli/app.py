"""All verbs, in the order in which one uses them."""

from __future__ import annotations

import typer

from connectomics.cli import (
    bench_verb,
    cache_verb,
    data_verbs,
    demo_verb,
    fetch_verb,
    inspect_verb,
    measure_verb,
    result_verbs,
    run_task_verb,
    run_task_verb,
    run_verbs,
    tune_verb,
)

app = typer.Typer(
    name="pytc",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "CellMap volumes from disk to a scored submission.\n\n"
        "The way through: fetch (or phantom, or your data root), describe, inspect, train, predict, decode, evaluate, "
        "export, validate, score, report. `pytc demo` goes all the way on made data."
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo")(demo_verb.demo)
app.command("phantom")(data_verbs.phantom)
app.command("fetch")(fetch_verb.fetch)
app.command("describe")(data_verbs.describe)
app.command("inspect")(inspect_verb.inspect)
app.command("cache")(cache_verb.cache)
app.command("train")(run_verbs.train)
app.command("predict")(run_verbs.predict)
app.command("decode")(run_verbs.decode)
app.command("measure")(measure_verb.measure)
app.command("run-task")(run_task_verb.run_task)
app.command("run-task")(run_task_verb.run_task)
app.command("evaluate")(run_verbs.evaluate)
app.command("tune")(tune_verb.tune)
app.command("export")(result_verbs.export)
app.command("validate")(result_verbs.validate)
app.command("score")(result_verbs.score)
app.command("report")(result_verbs.report)
app.add_typer(bench_verb.bench, name="bench")
