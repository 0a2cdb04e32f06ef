"""The verb pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import terminal
from connectomics.cli.options import InOption, OutOption, Overrides
from connectomics.cli.train_verbs import explaining_how_to_resume


def pretrain(
    config: Annotated[str, typer.Argument(help="Configuration file of the training to prepare.")],
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, InOption(help="Resume from this checkpoint.")] = None,
    run_dir: Annotated[
        Path | None, OutOption(help="Run folder; default {output_dir}/{name}_pretrained/version_N.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the run folder's last checkpoint; start if there is none.")
    ] = False,
    fast_dev_run: Annotated[bool, typer.Option("--fast-dev-run", help="Run one batch of everything.")] = False,
) -> None:
    """Pre-train the network of a configuration on raw, without labels: it reconstructs hidden voxels.

    Examples:

      pytc pretrain tutorials/lucchi.yaml --run-dir runs/raw training.max_cpu_minutes=30

      pytc pretrain tutorials/cellmap_mito.yaml --run-dir runs/raw pretraining.block_nm=[64,64,64] --resume

      pytc pretrain tutorials/lucchi.yaml pretraining.objective=denoise
    """
    from connectomics.config import load_config
    from connectomics.config.pretraining import pretraining_config
    from connectomics.errors import ConfigError

    if resume and run_dir is None:
        raise ConfigError("--resume needs the run folder; give --run-dir")
    composed = pretraining_config(load_config(config, overrides or []))
    from connectomics.pipeline.pretrain import pretrain as run
    from connectomics.pipeline.train import choose_run_dir

    folder = run_dir or choose_run_dir(composed, checkpoint)
    command = ["pytc", "pretrain", config, *(overrides or [])]
    decoding = terminal.stages("decoding raw into the cache")
    with explaining_how_to_resume(command, folder, resume), decoding as advance:
        run(composed, folder, checkpoint=checkpoint, resume=resume, fast_dev_run=fast_dev_run, progress=advance)
    if fast_dev_run:
        print("the run works: one batch of training and one of validation passed")
        return
    print(f"run folder: {folder}\nto start with it: pytc train FILE.yaml model.weights={folder}")
