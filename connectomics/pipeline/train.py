"""Train the network of a configuration."""

from __future__ import annotations

import errno
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.config import RunConfig, check_config, save_config
from connectomics.config.values import flat, plain
from connectomics.errors import ConfigError, InputError, WriteError
from connectomics.io.location import local_path
from connectomics.lightning.run_state import RunState
from connectomics.machine import is_first_process
from connectomics.pipeline.runs import Run, open_run
from connectomics.pipeline.targets import crop_target, predicted_classes, with_trained
from connectomics.progress import Progress
from connectomics.tasks.memory import keep_freed_memory

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from connectomics.lightning.devices import Machine
    from connectomics.lightning.module import ConnectomicsModule

log = logging.getLogger(__name__)

#: Groups of keys, and exceptions, that change what is trained.
_OF_TRAINING = ("dataset.", "model.", "data.", "optimizer.", "scheduler.", "training.")
_NOT_OF_TRAINING = ("training.max_", "data.cache", "data.num_workers", "dataset.data_root", "dataset.split_file")

_SEEN = "validation is on what model.weights was trained on; set dataset.split_file to the split.yaml of its run"
_RUN_DIR_VARIABLE = "CONNECTOMICS_RUN_DIR"


def choose_run_dir(config: RunConfig, checkpoint: str | Path | None = None) -> Path:
    """Return the folder of a run: ``{output_dir}/{name}/version_N`` with the first free N.

    A run that resumes from a checkpoint in ``RUN/checkpoints/`` continues in ``RUN``. The further processes of a
    data-parallel run use the folder of the first one.
    """
    inherited = os.environ.get(_RUN_DIR_VARIABLE)
    if inherited and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(inherited)
    folder = None if checkpoint is None else Path(checkpoint).resolve().parent
    resumes = folder is not None and folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
    chosen = folder.parent if folder is not None and resumes else _next_version(config)
    os.environ[_RUN_DIR_VARIABLE] = str(chosen.resolve())
    return chosen


def _next_version(config: RunConfig) -> Path:
    base = local_path(config.output_dir) / config.name
    job = os.environ.get("SLURM_JOB_ID")
    if job and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return base / f"job_{job}"  # the tasks start at the same time and could not agree on a number
    taken = [re.fullmatch(r"version_(\d+)", p.name) for p in base.glob("version_*")]
    return base / f"version_{max((int(m[1]) + 1 for m in taken if m), default=0)}"


def train(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fast_dev_run: bool = False,
    datamodule: pl.LightningDataModule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    progress: Progress | None = None,
) -> Run:
    """Train the network of a configuration.

    Args:
        config: the run.
        out: run folder, see `Run` for its files; None: `choose_run_dir`.
        checkpoint: resume from this checkpoint: weights, optimizer, epoch, random state.
        resume: resume from the run folder's last checkpoint; start if there is none.
        overwrite: train in a folder that holds a run, and replace its checkpoints.
        fast_dev_run: train one batch and validate a part of one crop, to test whether it runs; write no file.
        datamodule: provides the batches of `ConnectomicsModule`; None: `CellMapDataModule` of the configuration.
        callbacks: further callbacks of the trainer.
        progress: called while crops are decoded into the cache; None: log a line from time to time.

    Returns:
        The run.

    Raises:
        ConnectomicsError: configuration, data or checkpoint are not valid; raised before training if possible.
        WriteError: the folder holds another run, cannot be written or is in use, or the disk is full.
    """
    import pytorch_lightning as pl
    import torch

    from connectomics.lightning.adapters import add_adapters
    from connectomics.lightning.checkpoints import check_resumable
    from connectomics.lightning.devices import set_threads, this_machine
    from connectomics.lightning.fine_tuning import begin_with
    from connectomics.lightning.pretraining import module_of
    from connectomics.lightning.run_state import keep_state, require_run_folder, save_environment

    check_config(config)
    predicted_classes(config)  # refuses groups that do not follow, before training
    folder = local_path(out) if out is not None else choose_run_dir(config, checkpoint)
    checkpoint = _start(folder, checkpoint, resume, overwrite or fast_dev_run)
    with _clear_errors(folder), _without_noise(), _log_file(None if fast_dev_run else folder / "run.log"):
        machine = this_machine(config)
        set_threads(config, machine.devices if machine.accelerator == "cpu" else 1)
        if machine.accelerator == "cpu":
            keep_freed_memory()
        else:
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions use by default
        pl.seed_everything(config.system.seed, workers=True, verbose=False)
        module = module_of(config if checkpoint is None else _continued(config, checkpoint))
        config = module.config
        module.only_a_look = fast_dev_run
        if checkpoint is None and config.model.weights is not None:
            begin_with(config.model.weights, module)
        if config.model.adapters.rank:
            add_adapters(module)
        if checkpoint is not None:
            check_resumable(checkpoint, module)
        kept = not fast_dev_run and is_first_process()
        if kept:
            require_run_folder(folder)
        with keep_state(folder) if kept else nullcontext():
            if kept:
                save_config(config, folder / "config.yaml")
                save_environment(folder)
                (folder / "run.log").touch()
            place = None if fast_dev_run else folder
            data = datamodule or _cellmap_data(config, place, checkpoint, overwrite, progress)
            replaces = overwrite and checkpoint is None and kept
            trainer = _fit(config, folder, module, data, machine, checkpoint, fast_dev_run, replaces, callbacks)
    return _result(config, folder, trainer, fast_dev_run)


def _start(folder: Path, checkpoint: str | Path | None, resume: bool, overwrite: bool) -> str | Path | None:
    """Return the checkpoint to resume from, None to start; refuse to replace the checkpoints of another run."""
    from connectomics.lightning.run_state import latest_checkpoint

    if checkpoint is not None and resume:
        raise ConfigError("--resume uses the run folder's last checkpoint, --checkpoint another one; give one of them")
    last = latest_checkpoint(folder)
    if resume:
        log.info("starting in %s: it has no checkpoint", folder) if last is None else log.info("resuming %s", last)
        return last
    if last is not None and checkpoint is None and not overwrite and is_first_process():
        raise WriteError(
            f"{folder} holds a run; resume it with --resume (or --checkpoint {last}), or give another --run-dir"
        )
    return checkpoint


def _continued(config: RunConfig, checkpoint: str | Path) -> RunConfig:
    """Return the configuration with the checkpoint's normalization, which a resumed run does not measure again.

    Logs what else of the training differs from the checkpoint's configuration.
    """
    from connectomics.data.normalization import with_normalization
    from connectomics.lightning.checkpoints import checkpoint_config, read_checkpoint

    trained = checkpoint_config(read_checkpoint(checkpoint), checkpoint)
    config = with_normalization(config, trained.data.normalization)
    before, now = flat(plain(trained)), flat(plain(config))
    changed = [
        f"{key}={value} ({before.get(key)} before)"
        for key, value in now.items()
        if before.get(key) != value and key.startswith(_OF_TRAINING) and not key.startswith(_NOT_OF_TRAINING)
    ]
    if changed:
        log.warning("resuming with other settings: %s", ", ".join(changed))
    return config


def _fit(
    config: RunConfig,
    folder: Path,
    module: ConnectomicsModule,
    data: pl.LightningDataModule,
    machine: Machine,
    checkpoint: str | Path | None,
    fast_dev_run: bool,
    replaces: bool,
    callbacks: Sequence[pl.Callback],
) -> pl.Trainer:
    """Train and return the trainer; raise `KeyboardInterrupt` for Ctrl-C.

    ``replaces``: remove the checkpoints of another run first, of which ``best.ckpt`` would be taken for this one's."""
    from connectomics.data.normalization import with_normalization
    from connectomics.lightning.fine_tuning import update_batch_norm
    from connectomics.lightning.monitors import check_monitored_classes
    from connectomics.lightning.network import prepare_training
    from connectomics.lightning.trainer import build_trainer

    data.setup("fit")
    found = getattr(data, "normalization", None)
    if found and not fast_dev_run and is_first_process():  # it is known now, and belongs to the run
        entries = {name: chosen.to_dict() for name, chosen in found.items()}
        save_config(with_normalization(config, entries), folder / "config.yaml")
    crops = data.val_dataloader().dataset
    validate = len(crops) > 0
    if validate and not fast_dev_run:
        check_monitored_classes(config, (crops[number] for number in range(len(crops))))
    elif not validate:
        log.warning("no crop to validate on: only the latest state is kept, and training does not stop early")
    if checkpoint is None and config.model.weights is not None and config.model.update_batch_norm:
        update_batch_norm(module, _first_batches(data, "model.update_batch_norm", "set it to false"))
    if checkpoint is None and config.model.init_bias is not None:
        _set_output_bias(config, module, data)
    prepare_training(module.network, config.training)
    trainer = build_trainer(
        config, folder, fast_dev_run=fast_dev_run, validate=validate, machine=machine, callbacks=callbacks
    )
    resumed = None if checkpoint is None else str(checkpoint)
    for file in (folder / "checkpoints").glob("*.ckpt") if replaces else ():
        file.unlink()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    except SystemExit as end:  # Lightning converts Ctrl-C
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    return trainer


def _set_output_bias(config: RunConfig, module: ConnectomicsModule, data: pl.LightningDataModule) -> None:
    """Set the output biases by ``model.init_bias``; channels that ``model.weights`` has keep theirs."""
    from connectomics.lightning.output_bias import begin_at_prevalence

    batches: Iterable[dict[str, Any]] = ()
    if config.model.init_bias == "prevalence":
        batches = _first_batches(data, "model.init_bias=prevalence", "give a number instead")
    begin_at_prevalence(module, batches, module.begun_outputs)


def _first_batches(data: pl.LightningDataModule, key: str, hint: str) -> Iterator[dict[str, Any]]:
    if not hasattr(data, "first_batches"):
        raise ConfigError(f"{key} needs a data module with first_batches(); {hint}")
    found: Iterator[dict[str, Any]] = data.first_batches()
    return found


def _cellmap_data(
    config: RunConfig, folder: Path | None, checkpoint: str | Path | None, overwrite: bool, progress: Progress | None
) -> pl.LightningDataModule:
    """Return the data module of the configuration, set up, and write its split to the run folder.

    Raises `ConfigError` if a resumed run would validate on other crops, which it may have trained on.
    """
    from connectomics.data.datamodule import CellMapDataModule
    from connectomics.data.splits import Split
    from connectomics.lightning.model_package import split_of
    from connectomics.lightning.run_state import weights_file

    # the split of a run that is replaced is not read
    data = CellMapDataModule(config, None if overwrite and checkpoint is None else folder, progress)
    data.setup("fit")
    if data.split is None or folder is None:
        return data
    before = None if checkpoint is None else Path(checkpoint).resolve().parent.parent / "split.yaml"
    if before is not None and before.is_file() and set(Split.load(before).val) != set(data.split.val):
        raise ConfigError(
            f"the run of {checkpoint} validates on the crops in {before}, and now it would on others, which it may "
            f"have trained on; set dataset.split_file={before}, or start a new run with model.weights"
        )
    weights, seen = config.model.weights, Split.load(before).seen if before is not None and before.is_file() else ()
    if before is None and weights is not None and config.model.weights_format == "connectomics":
        held = [crop_target(volume.crop, config.dataset.classes) for volume in data.val_volumes]
        with_trained(held, config, [weights_file(weights)], _SEEN)
        before_it = split_of(weights_file(weights))
        seen = before_it.all_trained if before_it else ()
    target = folder / "split.yaml"
    split = replace(data.split, seen=seen)
    if is_first_process() and not (target.is_file() and Split.load(target) == split):
        split.save(target)
    return data


def _result(config: RunConfig, folder: Path, trainer: pl.Trainer, fast_dev_run: bool) -> Run:
    epochs, steps = trainer.current_epoch, trainer.global_step
    if not fast_dev_run:
        return replace(open_run(folder), epochs=epochs, steps=steps)
    now, monitor = datetime.now(UTC), config.checkpoint.monitor
    return Run(folder, asdict(config), epochs, steps, now, monitor, None, {}, {}, RunState("finished", "fast_dev_run"))


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """Convert errors of a full disk and a full GPU to clear messages."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the run does not fit in GPU memory; decrease data.batch_size or data.patch_size, or set "
            "training.precision=16-mixed, or (mednext) +model.options.gradient_checkpointing=true"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM):
            remedy = "raise the limit of file sizes (ulimit -f)" if error.errno == errno.EFBIG else "free space"
            raise WriteError(f"cannot write the run to {folder}: {error.strerror}; {remedy} and resume") from error
        raise


class _LateFile(logging.FileHandler):
    """A log file that is created, with its folder, by its first line, so that a refused run leaves no file."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


@contextmanager
def _log_file(path: Path | None) -> Iterator[None]:
    """Also write the log and warnings of the first process to a file."""

    if path is None or not is_first_process():
        yield
        return
    handler = _LateFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("connectomics", "pytorch_lightning", "py.warnings")]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()


@contextmanager
def _without_noise() -> Iterator[None]:
    """Silence hints of Lightning about settings that are intentional or that this package reports itself."""
    known = (
        r"The '\w+_dataloader' does not have many workers",
        r"The number of training batches .* is smaller than the logging interval",
        r"Checkpoint directory .* exists and is not empty",
        r"The `srun` command is available",
        r"You have overridden `\w+` in `LightningModule`",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    )
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    with warnings.catch_warnings():
        for pattern in known:
            warnings.filterwarnings("ignore", message=pattern)
        lightning.setLevel(logging.WARNING)
        try:
            yield
        finally:
            lightning.setLevel(level)
