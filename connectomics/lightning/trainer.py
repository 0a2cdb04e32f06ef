"""The Lightning trainer of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from connectomics.config import RunConfig
from connectomics.errors import ConfigError
from connectomics.lightning.averaging import AveragedWeights
from connectomics.lightning.callbacks import BestCheckpoint, EndWorkers, PicturePanel
from connectomics.lightning.devices import Machine, this_machine
from connectomics.lightning.hard_examples import HardExamples
from connectomics.lightning.metrics_table import MetricsTable
from connectomics.lightning.resuming import EpochSums, LatestState, RandomState, ResumeTable
from connectomics.lightning.schedule import Schedule
from connectomics.lightning.timing import LossBar, PlainProgress, Timing


def build_trainer(
    config: RunConfig,
    run_dir: str | Path,
    *,
    fast_dev_run: bool = False,
    validate: bool = True,
    machine: Machine | None = None,
    callbacks: Sequence[Callback] = (),
) -> pl.Trainer:
    """Return the trainer of a run.

    Args:
        config: the run. callbacks: further callbacks.
        run_dir: folder for ``checkpoints/``, ``metrics.csv``, ``tensorboard/`` and ``timing.json``.
        fast_dev_run: train one batch, validate a part of one crop, write no file.
        validate: whether there is a crop to validate on; without one, only the latest state is kept.
        machine: devices and precision; None: `this_machine`.
    """
    folder = Path(run_dir)
    chosen = this_machine(config) if machine is None else machine
    training = config.training
    bar = sys.stdout.isatty()
    device = "cuda" if chosen.accelerator == "gpu" else None  # which one of several, Lightning sets
    averaging = [AveragedWeights(training.ema, device)] if training.ema else []
    return pl.Trainer(
        accelerator=chosen.accelerator,
        devices=chosen.devices,
        strategy=chosen.strategy,
        precision="32-true" if chosen.precision == "32" else chosen.precision,  # type: ignore[arg-type]
        max_epochs=training.max_epochs,
        max_steps=-1,  # see `Schedule`; with its own limit Lightning restores its loops wrongly
        gradient_clip_val=training.gradient_clip_val or None,
        accumulate_grad_batches=training.accumulate_grad_batches,
        check_val_every_n_epoch=training.val_every_n_epochs,
        num_sanity_val_steps=0,  # a validation step is a whole crop
        limit_val_batches=None if validate else 0,
        log_every_n_steps=config.logging.log_every_n_steps,
        logger=[] if fast_dev_run else _loggers(config, folder),
        callbacks=[*averaging, *_callbacks(config, folder, fast_dev_run, validate, bar), *callbacks],
        enable_checkpointing=not fast_dev_run,
        enable_progress_bar=bar,
        enable_model_summary=False,
        fast_dev_run=fast_dev_run,
        use_distributed_sampler=False,  # our sampler gives every process its share
        sync_batchnorm=chosen.accelerator == "gpu" and chosen.devices > 1,
        benchmark=chosen.accelerator == "gpu",  # patches have one size
        default_root_dir=str(folder),
    )


def _loggers(config: RunConfig, folder: Path) -> list[Logger]:
    loggers: list[Logger] = [MetricsTable(folder / "metrics.csv")]
    if config.logging.use_tensorboard:
        loggers.append(TensorBoardLogger(save_dir=str(folder), name="tensorboard", version=""))
    if config.logging.use_wandb:
        from pytorch_lightning.loggers import WandbLogger

        try:
            loggers.append(WandbLogger(project="connectomics", name=config.name, save_dir=str(folder)))
        except ModuleNotFoundError as error:
            raise ConfigError("logging.use_wandb=true needs wandb: pip install wandb, or set it to false") from error
    if config.logging.use_mlflow:
        loggers.append(_mlflow(config, folder))
    return loggers


def _mlflow(config: RunConfig, folder: Path) -> Logger:
    """Return MLflow's logger; without an address it writes files next to the runs."""
    from pytorch_lightning.loggers import MLFlowLogger

    uri = config.logging.mlflow_uri or f"file:{Path(config.output_dir).resolve() / 'mlruns'}"
    if uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 requires it
    try:
        return MLFlowLogger(experiment_name=config.name, run_name=folder.name, tracking_uri=uri)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "logging.use_mlflow=true needs MLflow: pip install 'connectomics-cellmap[mlflow]', or set it to false"
        ) from error


def _callbacks(config: RunConfig, folder: Path, fast_dev_run: bool, validate: bool, bar: bool) -> list[Callback]:
    progress = LossBar() if bar else PlainProgress()
    callbacks: list[Callback] = [RandomState(), EndWorkers(), Schedule(config), progress]
    if fast_dev_run:
        return callbacks
    callbacks += [Timing(folder / "timing.json"), ResumeTable(), EpochSums()]
    if config.data.sampling.get("hard", 0) > 0:
        callbacks.append(HardExamples())
    if config.logging.images and config.logging.use_tensorboard:
        callbacks.append(PicturePanel())
    if validate and config.early_stopping.patience > 0:
        stopping = config.early_stopping
        # the means over an epoch are known only after its validation
        at_end = True if stopping.monitor.startswith("train/") else None
        callbacks.append(
            EarlyStopping(
                stopping.monitor, mode=stopping.mode, patience=stopping.patience, check_on_train_epoch_end=at_end
            )
        )
    if validate and config.checkpoint.save_top_k != 0:
        scored = _scored_checkpoint(config, folder / "checkpoints")
        callbacks += [BestCheckpoint(scored), scored]
    if config.checkpoint.save_last or config.checkpoint.every_n_steps or not validate:
        callbacks.append(LatestState(folder / "checkpoints", config.checkpoint.every_n_steps))
    return callbacks


def _scored_checkpoint(config: RunConfig, folder: Path) -> ModelCheckpoint:
    """Keep the best ``save_top_k`` states, named by epoch and score: ``epoch0012-dice0.7311.ckpt``."""
    monitor = config.checkpoint.monitor
    name = monitor.rsplit("/", 1)[-1]
    return ModelCheckpoint(
        dirpath=str(folder),
        filename=f"epoch{{epoch:04d}}-{name}{{{monitor}:.4f}}",
        auto_insert_metric_name=False,
        monitor=monitor,
        mode=config.checkpoint.mode,
        save_top_k=config.checkpoint.save_top_k,
        every_n_epochs=config.training.val_every_n_epochs,  # between validations there is no new score
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
