"""A phantom named as the user's plan names its data: the plan's commands and code then run as they are written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

NAMES = {"phantom-iso": "jrc_cos7-1a", "phantom-aniso": "jrc_cos7-1b"}
CROPS = {"phantom-iso": ("crop234", "crop236"), "phantom-aniso": ("crop247", "crop292")}


def named_root(phantom: Path, out: Path) -> Path:
    """A data root with the first two crops of each data set of a phantom, under the plan's names."""
    for old, new in NAMES.items():
        zarr = out / new / f"{new}.zarr"
        shutil.copytree(phantom / old / f"{old}.zarr", zarr)
        truth = zarr / "recon-1/labels/groundtruth"
        crops = sorted((p for p in truth.iterdir() if p.is_dir()), key=lambda p: int(re.sub(r"\D", "", p.name)))
        for crop, name in zip(crops, (*CROPS[old], None, None, None, None), strict=False):
            if name is None:
                shutil.rmtree(crop)
            else:
                crop.rename(truth / name)
    return out


#: Beside the plan's own overrides: a network that a CPU trains in seconds, one step.
TINY = [
    "model.architecture=unet", "model.options={channels:[4,8],strides:[2],num_res_units:0}",
    "model.deep_supervision=false", "data.patch_size=[16,16,16]", "inference.window=[16,16,16]", "data.batch_size=1",
    "data.patches_per_epoch=1", "data.num_workers=0", "training.accumulate_grad_batches=1", "training.precision='32'",
    "system.num_gpus=0", "system.num_cpus=2", "system.accelerator=cpu", "inference.block_size=[64,64,64]",
    "logging.use_tensorboard=false", "logging.images=false",
]  # fmt: skip
