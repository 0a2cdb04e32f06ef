"""Verbs that run a configuration: train, predict, decode, evaluate."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import evaluation_tables, progress, show
from connectomics.cli.paths import InArgument, InOption, OutArgument, OutOption

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig, RunConfig
    from connectomics.decoding.decode import DecodeJob

# text, since without a configuration an override stands in its place, which may hold a URL
Config = Annotated[
    str | None, typer.Argument(help="Configuration, for instance tutorials/cellmap_cos7.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value ..., as in training.max_epochs=3", show_default=False)
]

RESUME_HELP = (
    "Only resume: an error if nothing was begun. With --overwrite: replace output of other settings, keep that of "
    "these."
)


def train(
    config: Config = None,
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, InOption(help="Go on from this checkpoint.")] = None,
    run_dir: Annotated[Path | None, OutOption(help="Run folder; default {output_dir}/{name}/version_N.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint; begin where there is none.")
    ] = False,
    fast_dev_run: Annotated[bool, typer.Option("--fast-dev-run", help="One batch of everything.")] = False,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="Print the architectures, with FILE its plugins' too, and stop.")
    ] = False,
) -> None:
    """Train a network.

    Examples:

      pytc train tutorials/cellmap_cos7.yaml data.batch_size=4 system.num_gpus=4

      pytc train tutorials/cellmap_cos7.yaml --checkpoint outputs/cellmap_cos7/version_0/checkpoints/last.ckpt

      pytc train tutorials/cellmap_cos7.yaml --run-dir runs/cos7 --resume
    """
    if list_models:
        from connectomics.config import import_plugins, load_config
        from connectomics.models.registry import list_models as models

        if config is not None:
            import_plugins(load_config(config, overrides or []).plugins)
        for name, text in models().items():
            print(f"{name:16} {text}")
        return
    if config is None:
        raise typer.BadParameter("give a configuration file (or --list-models)")
    from connectomics.config import load_config

    if resume:
        checkpoint = _resumed(run_dir, checkpoint)
    composed = load_config(config, overrides or [])
    from connectomics.pipeline.train import choose_run_dir
    from connectomics.pipeline.train import train as run

    folder = run_dir or choose_run_dir(composed, checkpoint)
    if checkpoint is None and not fast_dev_run:
        _refuse_trained(folder)
    decoding = progress.when_needed("decoding crops into the cache")
    with _saying_how_to_go_on(["pytc", "train", str(config), *(overrides or [])], folder, resume):
        result = run(composed, folder, checkpoint=checkpoint, fast_dev_run=fast_dev_run, progress=decoding)
    if fast_dev_run:
        print("the run works: one batch and one validation crop went through")
        return
    print(f"run folder: {folder}")
    if result.best_checkpoint is not None:
        print(f"best checkpoint: {result.best_checkpoint} ({composed.checkpoint.monitor} {result.best})")
    if result.last_checkpoint is not None:
        print(f"last checkpoint: {result.last_checkpoint}")


def _refuse_trained(folder: Path) -> None:
    """`WriteError` where a run was trained: another one would take the place of its checkpoints."""
    from connectomics.errors import WriteError
    from connectomics.lightning.machine import is_first_process
    from connectomics.lightning.run_state import latest_checkpoint

    last = latest_checkpoint(folder)
    if last is not None and is_first_process():
        raise WriteError(
            f"{folder} holds a run; go on with it by --resume (or by --checkpoint {last}), or give another --run-dir"
        )


def _resumed(run_dir: Path | None, checkpoint: Path | None) -> Path | None:
    """The checkpoint that ``--resume`` goes on from, None where the run is to begin."""
    from connectomics.errors import ConfigError
    from connectomics.lightning.run_state import latest_checkpoint

    if checkpoint is not None:
        raise ConfigError("--resume goes on from the run folder's last checkpoint, --checkpoint says which: give one")
    if run_dir is None:
        raise ConfigError("--resume goes on in a run folder: say which by --run-dir")
    found = latest_checkpoint(run_dir)
    progress.say(f"beginning in {run_dir}: it has no checkpoint" if found is None else f"going on from {found}")
    return found


@contextmanager
def _saying_how_to_go_on(command: Sequence[str], folder: Path, resume: bool) -> Iterator[None]:
    """Ctrl-C in training ends with the command that goes on with this very run."""
    from connectomics.cli.interrupts import InterruptError
    from connectomics.lightning.machine import is_first_process
    from connectomics.lightning.run_state import latest_checkpoint

    try:
        yield
    except KeyboardInterrupt:
        if not is_first_process():  # one of them says it
            raise InterruptError("") from None
        last = latest_checkpoint(folder)
        if last is None:
            raise InterruptError("interrupted; nothing is kept yet: run the same command again") from None
        if resume:
            raise InterruptError(f"interrupted; run the same command again: it goes on from {last}") from None
        again = shlex.join([*command, "--run-dir", str(folder), "--checkpoint", str(last)])
        raise InterruptError(f"interrupted; to go on: {again}") from None


def predict(
    config: Config = None,
    overrides: Overrides = None,
    checkpoint: Annotated[
        list[Path] | None, InOption(help="Checkpoint of the network; given several times, they are averaged.")
    ] = None,
    model: Annotated[
        Path | None, InOption(help="Model package (pytc package) instead; needs no configuration.")
    ] = None,
    out: Annotated[Path, OutOption(help="Folder for {dataset}.zarr/{crop}/{class}.")] = Path("outputs/predictions"),
    crops: Annotated[
        str | None,
        typer.Option(
            help="Crop table (.csv, .json, or 'challenge'), or 'val': crops that the checkpoint was not trained on; "
            "default: the catalog's crops."
        ),
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="DATASET:z0,y0,x0:z1,y1,x1 in nm, instead of crops.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what another run predicted.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    accept_failed: Annotated[
        list[str] | None,
        typer.Option(
            help="Blocks that may fail: CROP:12,40, or 12,40 of one crop; stored as unknown. May be repeated.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; nothing is done.")] = False,
) -> None:
    """Predict whole crops by sliding window, block by block; a killed run goes on where it stopped.

    Examples:

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt --crops challenge --out outputs/predictions

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt --box jrc_cos7-1a:0,0,0:800,800,800

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint a.ckpt --checkpoint b.ckpt inference.tta=flips

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint runs/first/checkpoints/last.ckpt --crops val --out out/val

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt engine.workers=0 --dry-run

      pytc predict --model mito.pytc dataset.data_root=data --box jrc_cos7-1a:0,0,0:800,800,800
    """
    from connectomics.errors import ConfigError

    if crops is not None and box is not None:
        raise ConfigError("--crops and --box each say what to predict: give one of them")
    composed, checkpoint = _network_of(config, overrides, checkpoint, model)
    from connectomics.pipeline.predict import (
        chosen_device,
        kept_out_targets,
        predict_cellmap_crops,
        prediction_tasks,
        targets_of,
    )
    from connectomics.tasks.failures import parse_accepted

    accepted = parse_accepted(accept_failed or ())
    if crops == "val":
        targets = kept_out_targets(composed, checkpoint)
    else:
        targets = targets_of(composed, crop_table=crops, box=box)
    if dry_run:
        from connectomics.cli.run_task_verb import show_estimate
        from connectomics.tasks.estimate import estimate

        with show.stage("trying a block"):
            tasks = prediction_tasks(composed, checkpoint, out, targets=targets, device=device)
            where = chosen_device(composed, device)
            found = estimate(tasks, composed.engine, where, overwrite=overwrite, resume=resume)
        show_estimate(found)
        return
    with show.stage("predicting"):
        written = predict_cellmap_crops(
            None,
            composed,
            checkpoint,
            out,
            targets=targets,
            device=device,
            overwrite=overwrite,
            resume=resume,
            progress=progress.stages,
            accept_failed=accepted,
        )
    for location in written:
        print(location)


def _network_of(
    config: str | None, overrides: list[str] | None, checkpoint: list[Path] | None, model: Path | None
) -> tuple[RunConfig, list[Path]]:
    """The configuration and the checkpoints that ``predict`` was given, or those of its model package."""
    from connectomics.config import load_config
    from connectomics.errors import ConfigError

    given = list(overrides or [])
    if model is not None:
        from connectomics.lightning.model_package import open_package, package_config

        if checkpoint:
            raise ConfigError(
                "--model is a network of its own: leave --checkpoint out, or give packages to --checkpoint"
            )
        if config is not None and "=" in config:  # without a configuration the first override stands in its place
            given = [config, *given]
            config = None
        open_package(model)
        return package_config(model, given) if config is None else load_config(config, given), [model]
    if config is None or not checkpoint:
        raise typer.BadParameter("give a configuration file and --checkpoint, or --model")
    return load_config(config, given), checkpoint


def decode(
    predictions: Annotated[Path, InArgument(help="Folder that predict wrote.")],
    out: Annotated[Path, OutArgument(help="Folder for the labels, in the same layout.")],
    config: Annotated[Path | None, InOption(help="Configuration with decoding.default and decoding.classes.")] = None,
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Decode again what is there already.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; nothing is done.")] = False,
) -> None:
    """Turn probabilities into labels: thresholds, and instances by components, watershed or affinities. Large arrays
    are decoded block by block on the engine; a killed run goes on where it stopped.

    Examples:

      pytc decode outputs/predictions outputs/labels --config tutorials/cellmap_mito.yaml

      pytc decode outputs/predictions outputs/labels --class mito decoding.classes.mito.threshold=0.6

      pytc decode outputs/predictions outputs/labels engine.workers=8 --dry-run
    """
    from connectomics.config import load_config
    from connectomics.decoding.decode import decode_jobs, decode_predictions, find_arrays
    from connectomics.decoding.parameters import decode_parameters

    composed = load_config(config, overrides or ())
    there = sorted({name for _, _, name in find_arrays(predictions)})
    parameters = decode_parameters(there, composed.decoding.default, composed.decoding.classes)
    above, table = composed.decoding.blockwise_above, composed.decoding.table
    if dry_run:
        jobs = decode_jobs(predictions, out, parameters, classes=class_name, blockwise_above=above, table=table)
        _show_decoding(jobs, composed.engine, overwrite, resume)
        return
    with show.stage("decoding"):
        done = decode_predictions(
            predictions,
            out,
            parameters,
            classes=class_name,
            overwrite=overwrite,
            resume=resume,
            blockwise_above=above,
            block_progress=progress.when_needed("block by block"),
            engine=composed.engine,
            table=table,
        )
    for item in done:
        print(item.location)


def _show_decoding(jobs: Sequence[DecodeJob], engine: EngineConfig, overwrite: bool, resume: bool) -> None:
    """Print what is left to decode."""
    from connectomics.cli.run_task_verb import show_estimate
    from connectomics.tasks.estimate import estimate

    anew = [job.starts_over(overwrite=overwrite, resume=resume) for job in jobs]
    left = [job for job, again in zip(jobs, anew, strict=True) if job.finished(overwrite=again) is None]
    tasks = [job.task for job in left if job.task is not None]
    finished, whole = len(jobs) - len(left), len(left) - len(tasks)
    print(f"{len(jobs)} array(s): {finished} decoded already, {whole} to decode whole, {len(tasks)} block by block")
    if tasks:
        with show.stage("trying a block"):
            # what is begun goes on; where another output is in the way it is replaced
            replaces = overwrite or not all(task.is_begun for task in tasks)
            found = estimate(tasks, engine, overwrite=replaces, resume=resume)
        show_estimate(found)


def rules_of(config: Path | None, overrides: Sequence[str] | None, given: str | None) -> str:
    """The rules that ``--rules`` names, else ``score.rules`` of a configuration with overrides."""
    from connectomics.config import load_config

    more = [] if given is None else [f"score.rules={given}"]
    return load_config(config, [*(overrides or []), *more]).score.rules


def evaluate(
    labels: Annotated[Path, InArgument(help="Folder of labels that decode wrote.")],
    root: Annotated[str, typer.Argument(help="Data root with the truth of those crops.")],
    overrides: Overrides = None,
    config: Annotated[Path | None, InOption(help="Configuration whose score.rules to use.")] = None,
    out: Annotated[Path | None, OutOption(help="Write the numbers here, as JSON, and CSV tables beside it.")] = None,
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    crop: Annotated[list[str] | None, typer.Option(help="Only this crop; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    rules: Annotated[str | None, typer.Option(help="Short for score.rules=...")] = None,
) -> None:
    """Measure labels against annotated crops over known voxels only: the challenge's score, Dice, IoU, precision,
    recall, Rand error, VOI; by class, data set and crop, with 95 % intervals over crops.

    Examples:

      pytc evaluate outputs/labels data/phantom

      pytc evaluate outputs/labels data/phantom --class mito --out outputs/evaluation.json score.rules=pq
    """
    from connectomics.pipeline.evaluate import evaluate_labels

    chosen = rules_of(config, overrides, rules)
    if out is not None:  # before the work
        evaluation_tables.evaluation_files(out)
    with progress.counted("evaluating") as advance:
        result = evaluate_labels(labels, root, class_name, crops=crop, datasets=dataset, rules=chosen, progress=advance)
    evaluation_tables.show_evaluation(result)
    if out is not None:
        for path in evaluation_tables.write_evaluation(result, out):
            print(path)
