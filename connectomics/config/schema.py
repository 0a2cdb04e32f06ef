"""What a run is: the typed schema that every configuration file is checked against.

One dataclass a group; a field that is not here does not exist, and nothing here is unread. Defaults are those of
``tutorials/cellmap_base.yaml`` where that file sets the key, else the value that works without thinking.
Lengths are nanometres where the name ends in ``_nm``, voxels of the run's grid otherwise; axes are z, y, x.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field

from connectomics.config.intensity_range import check_intensity_range
from connectomics.config.values import STRICT_KEYS, checked, one_of

#: Patches of an epoch where ``data.patches_per_epoch`` is null: at batch size 2, a thousand steps between validations,
#: which take at most a thousand windows and no backward pass (``data.validation_windows``).
EPOCH_PATCHES = 2000


def _is_triple(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(0 < n < math.inf for n in value)


_THREE = checked(_is_triple, "must be three positive numbers (z, y, x)")
_LOCAL = checked(lambda place: place is None or "://" not in place, "must be a folder on a local disk")
_SHARE = Field(ge=0, le=1)
_SIZE = Annotated[list[float], _THREE]
_SHAPE = Annotated[list[int], _THREE]
_TTA = ("none", "flips", "section", "all")
_TTA_RULE = (
    "must be none, flips, section, all, or a list of symmetries, none twice, each z, y, x in some order with signs, "
    "as in [zyx,-zyx,x-yz]"
)


def _is_tta(value: Any) -> bool:
    """A named set, or symmetries as text: z, y, x in some order with signs, none twice."""
    if isinstance(value, str) and value in _TTA:
        return True
    given = [str(text) for text in value] if isinstance(value, list | tuple) else [str(value)]
    fine = all(re.fullmatch("(-?[zyx]){3}", text) and len(set(text) & set("zyx")) == 3 for text in given)
    return bool(given) and fine and len(set(given)) == len(given)


def _is_batch_size(value: Any) -> bool:
    return value == "auto" or (type(value) is int and value >= 1)


class Group:
    """What all groups of a configuration have."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, ``default`` where there is no such key."""
        return getattr(self, key, default) if key in getattr(self, "__dataclass_fields__", ()) else default


@dataclass
class SystemConfig(Group):
    """The machine."""

    num_gpus: int = 1  # GPUs to train on; where there are fewer, what is there is used, and said
    num_cpus: int = 8  # CPU threads of the main process; never more than the machine has
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    accelerator: Annotated[str, one_of("auto", "gpu", "cpu")] = "auto"  # auto | gpu | cpu
    cpu_processes: int = 1  # data-parallel processes where training runs on the CPU


@dataclass
class DatasetConfig(Group):
    """Which data, and at which voxel size."""

    name: Annotated[str, one_of("cellmap", "cellmap_single")] = (
        "cellmap"  # cellmap (all classes a sample) | cellmap_single (one class a sample)
    )
    data_root: str = "data"
    datasets: list[str] | None = None  # None: all that the root has
    crops: list[str] | None = None  # None: all training crops
    classes: list[str] = field(default_factory=lambda: ["nuc", "mito", "er"])
    voxel_size: _SIZE = field(default_factory=lambda: [8.0, 8.0, 8.0])  # nm, z y x
    train_val_split: Annotated[float, Field(gt=0, le=1)] = 0.85  # share of the annotated volume that is trained on
    split: Annotated[str, one_of("crop", "dataset", "leave_one_out")] = "crop"  # crop | dataset | leave_one_out
    held_out: list[str] = field(default_factory=list)  # data sets to validate on (split: dataset, leave_one_out)
    split_file: str | None = None  # read where it exists, else written; None: beside the run
    coarse_labels: bool = False  # also read labels stored at more than twice the voxel size of the run
    crop_table: str | None = None  # test crops: a table's path, or "challenge" for the shipped one


@dataclass
class HeadConfig(Group):
    """What the network gives beside a class, to tell one of its objects from the next."""

    kind: str = "affinities"  # affinities | boundary | distance | lsd
    class_name: str = "mito"  # one of dataset.classes, annotated with ids
    offsets_nm: list[Any] = field(default_factory=list)  # affinities: lists z, y, x; empty: 1, 3, 9 voxels an axis
    scale_nm: float | None = None  # width of a boundary, scale of a distance, sigma of lsd; None: by the voxel size
    losses: list[str] = field(default_factory=list)  # as model.loss_functions; empty: by the kind
    weight: float = 1.0  # of its loss, beside 1 for the classes
    write: bool | None = None  # predict stores it; None: all but lsd


@dataclass
class ModelConfig(Group):
    """The network and its loss."""

    architecture: str = "mednext"
    in_channels: int = 1
    out_channels: int | None = None  # without those of heads; None: as many as there are classes
    mednext_size: str = "B"  # S | B | M | L
    mednext_kernel_size: int = 3  # 3 | 5
    deep_supervision: bool = False
    fusion: Annotated[str, one_of("encoder", "channels")] = (
        "encoder"  # how data.inputs come in: encoder (of their own, registered) | channels (stacked)
    )
    options: dict[str, Any] = field(default_factory=dict)  # handed to the network's constructor
    weights: str | None = None  # begin with those of this checkpoint or package, output channels by class name
    loss_functions: list[str] = field(default_factory=lambda: ["DiceLoss", "BCEWithLogitsLoss"])
    loss_weights: list[float] = field(default_factory=lambda: [1.0, 1.0])
    loss_options: dict[str, Any] = field(default_factory=dict)  # loss name -> its keyword arguments
    heads: list[HeadConfig] = field(default_factory=list)  # their channels come after those of the classes


@dataclass
class InputConfig(Group):
    """A further view of a patch's place: same middle, another voxel size."""

    voxel_size: _SIZE = field(default_factory=lambda: [32.0, 32.0, 32.0])  # nm, z y x
    patch_size: _SHAPE = field(default_factory=lambda: [64, 64, 64])  # voxels of that size, z y x


@dataclass
class DataConfig(Group):
    """Patches, loaders, augmentation."""

    patch_size: _SHAPE = field(default_factory=lambda: [128, 128, 128])  # voxels, z y x
    batch_size: Annotated[int, Field(ge=1)] = 2
    patches_per_epoch: Annotated[int | None, Field(ge=1)] = (
        None  # training patches of an epoch, of all processes together; None: 2000
    )
    validation_windows: Annotated[int | None, Field(ge=1)] = (
        1000  # most windows of one validation, a fixed subset; None: all of every crop
    )
    num_workers: Annotated[int, Field(ge=0)] = 8
    persistent_workers: bool = True
    pin_memory: bool = True
    worker_start: Annotated[str, one_of("forkserver", "spawn")] = "forkserver"  # how loader workers start
    cache: Annotated[str, one_of("none", "memory", "disk")] = "none"  # decoded crops; use_cache: true means disk
    cache_dir: Annotated[str | None, _LOCAL] = None  # None: a folder for the user's caches
    cache_context: Annotated[int | None, Field(ge=0)] = (
        None  # voxels of raw kept around a crop; None: as far as patches can reach
    )
    cache_gb: Annotated[float | None, Field(ge=0)] = (
        None  # most that cache_dir may hold; least recently used crops go; None: no limit
    )
    chunk_cache_mb: Annotated[int, Field(ge=0)] = (
        64  # decoded chunks that each process keeps while it reads volumes without the crop cache
    )
    allow_missing_raw: bool = False  # train and predict where some raw chunks are not stored (masked; probability 0)
    sampling: dict[str, float] = field(default_factory=dict)  # weights of class | dataset | volume | uniform
    class_weights: dict[str, float] = field(default_factory=dict)  # of sampling by class; a class not named: 1
    min_known: Annotated[float, _SHARE] = (
        0.0  # least share of a patch's voxels at which something is known, where the crop allows it
    )
    inputs: list[InputConfig] = field(default_factory=list)  # further views of the same place at other voxel sizes
    intensity_range: Annotated[Any, AfterValidator(check_intensity_range)] = (
        None  # auto | table | [low, high], or one of these by data set; null: table, else auto
    )
    normalization: dict[str, Any] = field(default_factory=dict)  # by data set, worked out by training and kept
    intensity: dict[str, Any] = field(default_factory=dict)  # augmentations on the device, name -> arguments
    augmentations: dict[str, Any] = field(default_factory=dict)  # MONAI dictionary transforms, name -> arguments


@dataclass
class OptimizerConfig(Group):
    """How weights move."""

    name: str = "AdamW"  # AdamW | Adam | SGD
    lr: float = 1e-3
    weight_decay: float = 1e-5
    momentum: float = 0.9  # SGD
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # Adam, AdamW


@dataclass
class SchedulerConfig(Group):
    """How the learning rate moves, by epoch."""

    name: str = "constant"  # constant | cosine | polynomial
    warmup_epochs: int = 0
    power: float = 0.9  # polynomial
    min_lr: float = 0.0


@dataclass
class TrainingConfig(Group):
    """The loop."""

    max_epochs: int = 1000
    max_steps: int = -1  # optimizer steps; -1: no limit
    precision: str = "16-mixed"  # 16-mixed | bf16-mixed | 32
    gradient_clip_val: Annotated[float | None, Field(ge=0)] = 1.0
    accumulate_grad_batches: int = 1
    val_every_n_epochs: int = 1
    val_score: bool = False  # also decode validation crops and log the challenge's score: val/score, val/<class>/score


@dataclass
class CheckpointConfig(Group):
    """Which states are kept."""

    monitor: str = "val/dice"
    mode: str = "max"
    save_top_k: Annotated[int, Field(ge=-1)] = 3
    save_last: bool = True
    every_n_steps: Annotated[int | None, Field(ge=1)] = (
        None  # also keep the latest state within an epoch, every so many optimizer steps
    )


@dataclass
class EarlyStoppingConfig(Group):
    """When to stop before the last epoch."""

    monitor: str = "val/dice"
    patience: Annotated[int, Field(ge=0)] = 50  # validations without a better value; 0: never stop early
    mode: str = "max"


@dataclass
class LoggingConfig(Group):
    """What is written down, and how often."""

    use_tensorboard: bool = True
    use_wandb: bool = False
    use_mlflow: bool = False
    mlflow_uri: str | None = None  # of a tracking server; None: files in {output_dir}/mlruns
    log_every_n_steps: int = 50
    images: bool = True  # a picture panel at each validation


@dataclass
class InferenceConfig(Group):
    """The network over a volume."""

    window: Annotated[list[int], _THREE] | None = None  # voxels; None: data.patch_size
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25  # share of a window that its neighbour sees too
    blending: Annotated[str, one_of("gaussian", "constant")] = "gaussian"  # gaussian | constant
    batch_size: Annotated[Any, checked(_is_batch_size, "must be at least 1, or auto")] = (
        1  # windows at a time, or auto: predict finds out how many pay
    )
    block_size: _SHAPE = field(default_factory=lambda: [256, 256, 256])  # voxels held at once
    context: Annotated[int | None, Field(ge=0)] = (
        None  # voxels of raw read beyond the box; None: half the overlap, at least 8
    )
    #: test-time augmentation: none | flips (8) | section (16) | all (48) | a list as [zyx, -zyx]
    tta: Annotated[Any, checked(_is_tta, _TTA_RULE)] = "none"
    uncertainty: Annotated[str, one_of("none", "variance", "entropy", "dropout")] = (
        "none"  # none | variance (over tta and checkpoints) | entropy | dropout
    )
    dropout_samples: Annotated[int, Field(ge=2)] = 8  # passes with dropout on, for uncertainty=dropout
    skip_empty: bool = True  # predict: windows of constant raw (padding) or without raw are not run and give 0
    mask: str | None = None  # predict: not run where this label volume is 0; a path, or one in {dataset}.zarr
    dtype: Annotated[str, one_of("uint8", "float16")] = "uint8"  # of stored probabilities: uint8 (255 p) | float16 (p)
    pyramid: bool = False  # predict: coarser levels too, for looking at
    channels_last: bool | None = None  # memory format of the network; None: on a GPU with mixed precision
    compile: bool = False  # predict with torch.compile


@dataclass
class EngineConfig(Group):
    """Who works on the blocks of predict, decode and measure."""

    name: Annotated[str, one_of("local", "dask")] = "local"  # local | dask
    workers: Annotated[int, Field(ge=0)] = 1  # processes; local: 1 is this process itself, 0 one for each GPU
    attempts: Annotated[int, Field(ge=1)] = 3  # times that a block is tried
    block_timeout_s: Annotated[float | None, Field(gt=0)] = (
        None  # a worker that takes longer for a block is replaced; None: no limit
    )
    memory_gb: Annotated[float | None, Field(gt=0)] = None  # a worker that holds more is replaced; None: no limit
    address: str | None = None  # dask: of a scheduler that runs already; None: a cluster of its own
    cluster: Annotated[str, one_of("local", "slurm", "lsf")] = "local"  # dask, without address: local | slurm | lsf
    options: dict[str, Any] = field(default_factory=dict)  # dask: handed to dask-jobqueue's cluster


@dataclass
class DecodingConfig(Group):
    """Probabilities to labels: parameters for every class, then by class."""

    default: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)  # class name -> parameters
    blockwise_above: Annotated[int, Field(ge=0)] = 256**3  # voxels (a block): larger arrays are decoded block by block
    table: Annotated[str, one_of("csv", "parquet")] = "csv"  # csv | parquet: tables of instances also as Parquet


#: What ``score.rules`` may be; `connectomics.metrics.challenge.rules` has what they are.
SCORE_RULES = ("2026-06", "2026-07", "2026-07-exponential", "2026-07-affine", "pq")


@dataclass
class ScoreConfig(Group):
    """How results are scored: by score, evaluate and tune, and by training.val_score."""

    rules: Annotated[str, one_of(*SCORE_RULES)] = (
        "2026-06"  # 2026-06 (verified) | 2026-07-exponential (also: 2026-07) | 2026-07-affine | pq
    )


@dataclass
class RunConfig(Group):
    """A whole run."""

    system: SystemConfig = field(default_factory=SystemConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    output_dir: Annotated[str, _LOCAL] = "outputs"  # runs go to {output_dir}/{name}/version_N
    name: str = "run"  # set from the file's name
    plugins: list[str] = field(default_factory=list)  # modules of yours that add networks, losses, decoders

    @property
    def channels(self) -> int:
        """Channels that the network gives for the classes: one each. Those of ``model.heads`` come after them."""
        return self.model.out_channels if self.model.out_channels is not None else len(self.dataset.classes)
