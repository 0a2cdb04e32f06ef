"""One optimizer step on four patches, cut up in different ways; also a script, for runs in two processes."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config


def step(folder: str | Path, processes: int, accumulate: int) -> dict[str, Tensor]:
    """The weights after one plain gradient step.

    The second class is unknown in patches 1 and 3, which are all that the second of two processes sees.
    """
    config = tiny_config(
        system__cpu_processes=processes,
        model__options={"channels": [4, 8], "strides": [2], "num_res_units": 1},
        optimizer__name="SGD",
        optimizer__lr=1.0,
        optimizer__momentum=0.0,
        training__accumulate_grad_batches=accumulate,
        training__gradient_clip_val=None,
        training__max_epochs=1,
    )
    data = MadeUpData(patches=4, crops=0, batch_size=4 // processes // accumulate)
    result = train(config, folder, datamodule=data)
    assert result.steps == 1
    assert result.checkpoint is not None
    return dict(read_checkpoint(result.checkpoint)["state_dict"])


if __name__ == "__main__":
    step(sys.argv[1], processes=2, accumulate=1)
