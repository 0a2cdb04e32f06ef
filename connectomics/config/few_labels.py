"""Training with few labels: adapters, the mean teacher, and pre-training with what it changes in a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from connectomics.config.values import Group, Shape, Size, one_of
from connectomics.errors import ConfigError

if TYPE_CHECKING:
    from connectomics.config.schema import RunConfig

#: The only class of a network in pre-training: its output channel is normalized raw, and other runs have no such class.
RECONSTRUCTION = "reconstruction"


@dataclass
class AdaptersConfig(Group):
    """Updates of low rank for the weights of `model.weights`, which stay as they are (LoRA, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=0)] = 0  # of each update; 0: no adapters, all weights train
    scale: Annotated[float, Field(gt=0)] = 1.0  # factor of the updates
    layers: list[str] = field(default_factory=lambda: ["*"])  # patterns of names of weights that get an update
    train: list[str] = field(default_factory=list)  # patterns of parameters that train in full, as the output does


@dataclass
class MeanTeacherConfig(Group):
    """Agreement with the averaged weights (`training.ema`, the teacher) on raw without labels."""

    weight: Annotated[float, Field(ge=0)] = 0.0  # of the consistency loss after the ramp; 0: no mean teacher
    ramp_steps: Annotated[int, Field(ge=0)] = 1000  # optimizer steps until the weight is reached
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.9  # a voxel counts if the teacher says p or 1 - p >= this
    strength: Annotated[float, Field(ge=0, le=2)] = 1.5  # of the intensity part of preset em in the student's view
    datasets: list[str] | None = None  # raw to take patches from; None: the data sets of the training crops


@dataclass
class PretrainingConfig(Group):
    """What `pytc pretrain` hides from the network, and where it takes raw from."""

    #: masked: blocks of raw are set to the mean | denoise: single voxels are replaced by a neighbor
    objective: Annotated[str, one_of("masked", "denoise")] = "masked"
    ratio: Annotated[float | None, Field(gt=0, lt=1)] = None  # share of hidden voxels; None: 0.6, denoise: 0.02
    block_size: Shape = field(default_factory=lambda: [8, 8, 8])  # voxels of a hidden block, z y x
    block_nm: Size | None = None  # nm of a hidden block, z y x; replaces block_size
    #: raw to learn from, DATASET:z0,y0,x0:z1,y1,x1 in nm; empty: all stored raw of dataset.datasets
    boxes: list[str] = field(default_factory=list)


def is_pretraining(config: RunConfig) -> bool:
    """Return whether a run reconstructs raw."""
    return config.dataset.classes == [RECONSTRUCTION]


def pretraining_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the pre-training for a run: the same network with one output channel, the same data
    path, optimizer and schedule; what concerns labels is left out, and ``val/loss`` is monitored.

    Raises `ConfigError` for ``data.inputs``: at another voxel size they would show what is hidden.
    """
    if config.data.inputs:
        raise ConfigError("pre-training takes one input; set data.inputs=[] (the other inputs would show hidden raw)")
    sampling = {name: share for name, share in config.data.sampling.items() if name in ("dataset", "volume", "uniform")}
    return replace(
        config,
        name=f"{config.name.removesuffix('_pretrained')}_pretrained",
        dataset=replace(config.dataset, classes=[RECONSTRUCTION], crops=None, split_file=None),
        model=replace(
            config.model, out_channels=None, heads=[], deep_supervision=False, init_bias=None, class_weights={}
        ),
        data=replace(
            config.data, sampling=sampling or {"volume": 1.0}, class_weights={}, min_known=0.0, gap_nm={},
            label_ties="present", soft_labels=False, allow_missing_raw=True,
        ),
        training=replace(config.training, val_score=False, mean_teacher=MeanTeacherConfig()),
        checkpoint=replace(config.checkpoint, monitor="val/loss", mode="min"),
        early_stopping=replace(config.early_stopping, monitor="val/loss", mode="min"),
        inference=replace(config.inference, groups=False),
    )  # fmt: skip
