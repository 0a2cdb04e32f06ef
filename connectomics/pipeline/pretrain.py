"""Pre-train the network of a configuration on raw, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.config import RunConfig
from connectomics.config.few_labels import pretraining_config
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from connectomics.progress import Progress

if TYPE_CHECKING:
    import pytorch_lightning as pl


def pretrain(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fast_dev_run: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    progress: Progress | None = None,
) -> Run:
    """Train the network of a configuration to reconstruct raw, see its group ``pretraining``.

    Start a training with it by ``model.weights={run folder}``.

    Args:
        config: the training to prepare; `connectomics.config.few_labels.pretraining_config` says what is used.
        out, checkpoint, resume, overwrite, fast_dev_run, callbacks, progress: as in `train`.

    Returns:
        The run; it also has ``reconstruction.png`` of its latest validation.

    Raises:
        ConnectomicsError: configuration, data or checkpoint are not valid.
        WriteError: the folder holds another run, cannot be written or is in use, or the disk is full.
    """
    return train(
        pretraining_config(config), out, checkpoint=checkpoint, resume=resume, overwrite=overwrite,
        fast_dev_run=fast_dev_run, callbacks=callbacks, progress=progress,
    )  # fmt: skip
