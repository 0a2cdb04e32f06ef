"""The typed schema that every configuration file is checked against.

There is one dataclass per group; a field that is not here does not exist. Lengths are in nanometers if the name ends in
``_nm``, in voxels of the run's grid otherwise; axes are z, y, x.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from connectomics.config.few_labels import AdaptersConfig, MeanTeacherConfig, PretrainingConfig
from connectomics.config.intensity_range import check_intensity_range
from connectomics.config.output import OutputConfig
from connectomics.config.values import Group, Shape, Size, checked, one_of
from connectomics.geometry import Index, Triple, index, triple

#: Patches per epoch if ``data.patches_per_epoch`` is null: at batch size 2, a thousand steps between validations,
#: which take at most a thousand windows and no backward pass (``data.validation_windows``).
EPOCH_PATCHES = 2000


def _is_tta(value: Any) -> bool:
    """Whether ``value`` is a named set or distinct symmetries: z, y, x in some order with signs."""
    if isinstance(value, str) and value in ("none", "flips", "section", "planes", "all"):
        return True
    given = [str(text) for text in value] if isinstance(value, list | tuple) else [str(value)]
    valid = all(re.fullmatch("(-?[zyx]){3}", text) and len(set(text) & set("zyx")) == 3 for text in given)
    return bool(given) and valid and len(set(given)) == len(given)


def _is_overlap(value: Any) -> bool:
    shares = value if isinstance(value, list | tuple) and len(value) == 3 else [value]
    return all(type(share) in (int, float) and 0 <= share < 1 for share in shares)


def _are_class_weights(value: Any) -> bool:
    if value == "inverse_frequency":
        return True
    numbers = value.values() if isinstance(value, dict) else ["?"]
    return all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < float("inf") for n in numbers)


_LOCAL = checked(lambda place: place is None or "://" not in place, "must be a folder on a local disk")
_TTA = checked(
    _is_tta,
    "must be none, flips, section, planes, all, or a list of symmetries, none twice, each z, y, x in some order with "
    "signs, as in [zyx,-zyx,x-yz]",
)
_BATCH = checked(lambda n: n == "auto" or (type(n) is int and n >= 1), "must be at least 1, or auto")
_BIAS = checked(
    lambda bias: bias in (None, "prevalence") or (type(bias) in (int, float) and math.isfinite(bias)),
    "must be prevalence, a number, or null",
)
_GROUPS = checked(
    lambda given: isinstance(given, bool) or (isinstance(given, list) and all(isinstance(name, str) for name in given)),
    "must be true, false or a list of classes",
)
_BETAS = checked(lambda two: len(two) == 2 and all(0 <= n < 1 for n in two), "must be two numbers from 0 to below 1")
_LENGTHS = checked(lambda by: all(0 < float(nm) < math.inf for nm in by.values()), "must be lengths above 0 by class")
_FROM_0 = Field(ge=0)
_FROM_1 = Field(ge=1)
_POSITIVE = Field(gt=0)
_MODE = one_of("min", "max")


@dataclass
class SystemConfig(Group):
    """The machine."""

    num_gpus: Annotated[int, _FROM_0] = 1  # number of GPUs; if fewer are available, training uses those
    num_cpus: Annotated[int, _FROM_0] = 8  # CPU threads of the main process; never more than the machine has
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    accelerator: Annotated[str, one_of("auto", "gpu", "cpu")] = "auto"
    cpu_processes: Annotated[int, _FROM_1] = 1  # data-parallel processes if training runs on the CPU


@dataclass
class DatasetConfig(Group):
    """Which data, and at which voxel size."""

    name: Annotated[str, one_of("cellmap", "cellmap_single")] = "cellmap"  # cellmap_single: a sample has one class
    data_root: str = "data"
    datasets: list[str] | None = None  # None: all data sets of the root
    crops: list[str] | None = None  # None: all training crops
    classes: list[str] = field(default_factory=lambda: ["nuc", "mito", "er"])
    voxel_size: Size = field(default_factory=lambda: [8.0, 8.0, 8.0])  # nm, z y x
    train_val_split: Annotated[float, Field(gt=0, le=1)] = 0.85  # share of the annotated volume used for training
    split: Annotated[str, one_of("crop", "dataset", "leave_one_out")] = "crop"
    held_out: list[str] = field(default_factory=list)  # data sets to validate on (split: dataset, leave_one_out)
    split_file: str | None = None  # read if it exists, else written; None: in the run folder
    coarse_labels: bool = False  # also read labels stored at more than twice the voxel size of the run
    crop_table: str | None = None  # test crops: path of a table, or "challenge" for the shipped one


@dataclass
class HeadConfig(Group):
    """Further output channels about the objects of one class."""

    kind: Annotated[str, one_of("affinities", "boundary", "distance", "lsd")] = "affinities"
    class_name: str = "mito"  # one of dataset.classes, annotated with ids
    offsets_nm: list[Any] = field(default_factory=list)  # affinities: lists z, y, x; empty: 1, 3, 9 voxels per axis
    scale_nm: float | None = None  # width of a boundary, scale of a distance, sigma of lsd; None: by the voxel size
    losses: list[str] = field(default_factory=list)  # as model.loss_functions; empty: by the kind
    weight: Annotated[float, _POSITIVE] = 1.0  # weight of its loss; the loss of the classes has weight 1
    write: bool | None = None  # whether predict stores it; None: all but lsd


@dataclass
class ModelConfig(Group):
    """The network and its loss."""

    architecture: str = "mednext"
    in_channels: int = 1
    out_channels: int | None = None  # without the channels of heads; None: one per class
    mednext_size: str = "B"  # S | B | M | L
    mednext_kernel_size: int = 3  # 3 | 5
    deep_supervision: bool = False
    dropout: Annotated[float | None, Field(ge=0, lt=1)] = None  # share of channels to drop; None: the network's default
    #: how data.inputs enter the network: encoder (one per input, registered) | channels (stacked)
    fusion: Annotated[str, one_of("encoder", "channels")] = "encoder"
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the network's constructor
    weights: str | None = None  # start from this run folder, checkpoint or package; output channels by class name
    #: who wrote them: connectomics | nnunet (residual encoder, for residual_unet) | state_dict (the same tensor names)
    weights_format: Annotated[str, one_of("connectomics", "nnunet", "state_dict")] = "connectomics"
    freeze: list[str] = field(default_factory=list)  # patterns (*, ?) of names of parameters that do not train
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    update_batch_norm: bool = False  # with weights: measure the statistics of batch normalization on the new data
    #: output bias of each class at the start: prevalence (by its share of voxels) | a number; None: random
    init_bias: Annotated[Any, _BIAS] = None
    loss_functions: list[str] = field(default_factory=lambda: ["DiceLoss", "BCEWithLogitsLoss"])
    loss_weights: list[float] = field(default_factory=lambda: [1.0, 1.0])
    loss_options: dict[str, Any] = field(default_factory=dict)  # loss name -> its keyword arguments
    #: weights of classes in the loss, by name (default 1), or inverse_frequency: by their share of training voxels
    class_weights: Annotated[Any, checked(_are_class_weights, "must be inverse_frequency, or numbers by class")] = (
        field(default_factory=dict)
    )
    class_weight_cap: Annotated[float, Field(ge=1)] = 10.0  # inverse_frequency: most, relative to the smallest weight
    heads: list[HeadConfig] = field(default_factory=list)  # their channels come after those of the classes


@dataclass
class InputConfig(Group):
    """A further input of the network: a patch with the same center at another voxel size."""

    voxel_size: Size = field(default_factory=lambda: [32.0, 32.0, 32.0])  # nm, z y x
    patch_size: Shape = field(default_factory=lambda: [64, 64, 64])  # voxels of that size, z y x


@dataclass
class AugmentationConfig(Group):
    """A named set of augmentations; ``data.augmentations`` and ``data.intensity`` override it by name."""

    preset: Annotated[str, one_of("none", "em")] = "none"
    strength: Annotated[float, Field(ge=0, le=2)] = 1.0  # of probabilities and ranges; 0: flips and right angles only


@dataclass
class DataConfig(Group):
    """Patches, loaders, augmentation."""

    patch_size: Shape = field(default_factory=lambda: [128, 128, 128])  # voxels, z y x
    batch_size: Annotated[int, _FROM_1] = 2
    patches_per_epoch: Annotated[int | None, _FROM_1] = None  # of all processes together; None: 2000
    validation_windows: Annotated[int | None, _FROM_1] = 1000  # at most, a fixed subset; None: all of every crop
    num_workers: Annotated[int, _FROM_0] = 8
    persistent_workers: bool = True
    pin_memory: bool = True
    worker_start: Annotated[str, one_of("forkserver", "spawn")] = "forkserver"  # how loader workers start
    cache: Annotated[str, one_of("none", "memory", "disk")] = "none"  # decoded crops; use_cache: true means disk
    cache_dir: Annotated[str | None, _LOCAL] = None  # None: a folder for the user's caches
    cache_context: Annotated[int | None, _FROM_0] = None  # voxels of raw around a crop; None: as far as patches reach
    cache_gb: Annotated[float | None, _FROM_0] = None  # limit of cache_dir; drops the least recently used crops
    chunk_cache_mb: Annotated[int, _FROM_0] = 64  # decoded chunks per process, without the crop cache
    allow_missing_raw: bool = False  # train and predict if some raw chunks are missing (masked; probability 0)
    sampling: dict[str, float] = field(default_factory=dict)  # class | dataset | volume | uniform | instance | hard
    class_weights: dict[str, float] = field(default_factory=dict)  # of sampling by class or instance; default 1
    #: training: whether a voxel of which exactly half is present counts as present, or every other one does
    label_ties: Annotated[str, one_of("present", "alternate")] = "present"
    soft_labels: bool = False  # training: the target of a voxel that a boundary cuts is the share that is present
    #: class with IDs -> nm: its voxels this near another object are not trained as present, so that objects stay apart
    gap_nm: Annotated[dict[str, float], _LENGTHS] = field(default_factory=dict)
    gap_state: Annotated[str, one_of("absent", "unknown")] = "absent"  # what the voxels of gap_nm become
    min_known: Annotated[float, Field(ge=0, le=1)] = 0.0  # least share of known voxels in a patch, if possible
    inputs: list[InputConfig] = field(default_factory=list)  # further inputs at other voxel sizes
    #: auto | table | [low, high], or one of these by data set; null: table, else auto
    intensity_range: Annotated[Any, AfterValidator(check_intensity_range)] = None
    normalization: dict[str, Any] = field(default_factory=dict)  # by data set; training measures and stores it
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    intensity: dict[str, Any] = field(default_factory=dict)  # augmentations on the device, name -> arguments
    augmentations: dict[str, Any] = field(default_factory=dict)  # MONAI dictionary transforms, name -> arguments


@dataclass
class OptimizerConfig(Group):
    """The optimizer; SGD uses Nesterov momentum."""

    name: Annotated[str, one_of("AdamW", "Adam", "RAdam", "SGD")] = "AdamW"
    lr: Annotated[float, _FROM_0] = 1e-3
    weight_decay: Annotated[float, _FROM_0] = 1e-5
    momentum: Annotated[float, _FROM_0] = 0.9  # SGD
    betas: Annotated[list[float], _BETAS] = field(default_factory=lambda: [0.9, 0.999])  # Adam, AdamW, RAdam
    decay_norm_and_bias: bool = True  # false: no weight decay for biases and the scales of norms
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # factor of lr for each stage away from the output


@dataclass
class SchedulerConfig(Group):
    """The learning rate, by epochs, steps, or the time of a training."""

    name: Annotated[str, one_of("constant", "cosine", "polynomial")] = "constant"
    warmup_epochs: Annotated[int, _FROM_0] = 0  # or:
    warmup_steps: Annotated[int, _FROM_0] = 0  # optimizer steps
    power: Annotated[float, _POSITIVE] = 0.9  # polynomial
    min_lr: Annotated[float, _FROM_0] = 0.0


@dataclass
class TrainingConfig(Group):
    """The training loop."""

    max_epochs: int = 1000
    max_steps: int = -1  # optimizer steps; -1: no limit
    max_minutes: Annotated[float | None, _POSITIVE] = None  # on the clock, validation included; not reproducible
    max_cpu_minutes: Annotated[float | None, _POSITIVE] = None  # processor time of all processes; not reproducible
    precision: Annotated[str, one_of("16-mixed", "bf16-mixed", "32")] = "16-mixed"
    gradient_clip_val: Annotated[float | None, _FROM_0] = 1.0
    accumulate_grad_batches: Annotated[int, _FROM_1] = 1
    channels_last: bool = False  # memory format of the weights; unet_2d works in it anyway
    compile: bool = False  # train with torch.compile
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the moving average of weights that is kept; 0: none
    mean_teacher: MeanTeacherConfig = field(default_factory=MeanTeacherConfig)
    val_every_n_epochs: Annotated[int, _FROM_1] = 1
    val_score: bool = False  # also decode validation crops and log the challenge's score: val/score, val/<class>/score


@dataclass
class CheckpointConfig(Group):
    """Which checkpoints are kept."""

    monitor: str = "val/dice"
    mode: Annotated[str, _MODE] = "max"
    save_top_k: Annotated[int, Field(ge=-1)] = 3
    save_last: bool = True
    every_n_steps: Annotated[int | None, _FROM_1] = None  # also save last.ckpt every so many optimizer steps


@dataclass
class EarlyStoppingConfig(Group):
    """When to stop before the last epoch."""

    monitor: str = "val/dice"
    patience: Annotated[int, _FROM_0] = 0  # end after so many validations without a better value; 0: never
    mode: Annotated[str, _MODE] = "max"


@dataclass
class LoggingConfig(Group):
    """What is logged, and how often."""

    use_tensorboard: bool = True
    use_wandb: bool = False
    use_mlflow: bool = False
    mlflow_uri: str | None = None  # of a tracking server; None: files in {output_dir}/mlruns
    log_every_n_steps: int = 50
    images: bool = True  # a picture panel at each validation


@dataclass
class InferenceConfig(Group):
    """The network over a volume."""

    window: Shape | None = None  # voxels; None: data.patch_size
    #: share of a window that the next window also covers: one number, or z y x; 0 along z for a 2-D network. With crop,
    #: half of it is dropped at each face; weights need about 0.25
    overlap: Annotated[Any, checked(_is_overlap, "must be one or three numbers, at least 0 and below 1")] = 0.125
    #: crop: each voxel from one window | gaussian, constant: the mean of overlapping windows with these weights
    blending: Annotated[str, one_of("crop", "gaussian", "constant")] = "crop"
    batch_size: Annotated[Any, _BATCH] = 1  # windows per forward pass; auto: predict finds the fastest number
    block_size: Shape | None = None  # voxels in memory at a time, at most; None: 256 each, or with crop whole cores
    context: Annotated[int | None, _FROM_0] = None  # voxels of raw beyond the box; None: half the overlap, at least 8
    #: test-time augmentation: none | flips (8) | section (16) | planes (12, for 2-D networks) | all (48) | a list as
    #: [zyx, -zyx]
    tta: Annotated[Any, _TTA] = "none"
    uncertainty: Annotated[str, one_of("none", "variance", "entropy", "dropout")] = "none"  # variance: tta, checkpoints
    dropout_samples: Annotated[int, Field(ge=2)] = 8  # passes with active dropout, for uncertainty=dropout
    #: predict: also write group classes as unions of predicted atoms: true (all that follow) | names
    groups: Annotated[Any, _GROUPS] = False
    skip_empty: bool = True  # predict: skip windows of constant raw (padding) or without raw; they become 0
    mask: str | None = None  # predict: skip voxels where this label volume is 0; a path, or one in {dataset}.zarr
    dtype: Annotated[str, one_of("uint8", "float16")] = "uint8"  # of stored probabilities: uint8 (255 p) | float16 (p)
    channels_last: bool | None = None  # memory format; None: on a GPU, mixed precision; mednext: as trained
    compile: bool = False  # predict with torch.compile


@dataclass
class EngineConfig(Group):
    """The worker processes of predict, decode and measure."""

    name: Annotated[str, one_of("local", "dask")] = "local"
    workers: Annotated[int, _FROM_0] = 1  # processes; local: 1 is this process itself, 0 one per GPU
    share: bool = False  # local: other processes may run the same command and do other blocks (job arrays)
    attempts: Annotated[int, _FROM_1] = 3  # how often a block is tried
    block_timeout_s: Annotated[float | None, _POSITIVE] = None  # replace a worker that needs longer for one block
    memory_gb: Annotated[float | None, _POSITIVE] = None  # replace a worker that uses more memory
    address: str | None = None  # dask: of a running scheduler; None: start a cluster
    cluster: Annotated[str, one_of("local", "slurm", "lsf")] = "local"  # dask, if there is no address
    options: dict[str, Any] = field(default_factory=dict)  # dask: arguments of dask-jobqueue's cluster


@dataclass
class DecodingConfig(Group):
    """Probabilities to labels: parameters for every class, then by class."""

    default: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)  # class name -> parameters
    blockwise_above: Annotated[int, _FROM_0] = 256**3  # voxels (a block): larger arrays are decoded block by block
    table: Annotated[str, one_of("csv", "parquet")] = "csv"  # parquet: also write instance tables as Parquet


#: Values of ``score.rules``; see `connectomics.metrics.challenge.rules`.
SCORE_RULES = ("2026-06", "2026-07", "2026-07-exponential", "2026-07-affine", "pq")


@dataclass
class ScoreConfig(Group):
    """How results are scored: by score, evaluate and tune, and by training.val_score."""

    #: 2026-06 (verified) | 2026-07-exponential (also: 2026-07) | 2026-07-affine | pq
    rules: Annotated[str, one_of(*SCORE_RULES)] = "2026-06"


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
    output: OutputConfig = field(default_factory=OutputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    output_dir: Annotated[str, _LOCAL] = "outputs"  # runs go to {output_dir}/{name}/version_N
    name: str = "run"  # set from the file's name
    plugins: list[str] = field(default_factory=list)  # importable modules that add networks, losses, decoders

    @property
    def channels(self) -> int:
        """Number of output channels for the classes, one each; those of ``model.heads`` come after them."""
        return self.model.out_channels if self.model.out_channels is not None else len(self.dataset.classes)

    @property
    def voxel_size(self) -> Triple:
        """Voxel size of the run, nm, z y x."""
        return triple(self.dataset.voxel_size, "dataset.voxel_size")

    @property
    def patch(self) -> Index:
        """Shape of a training patch, voxels z y x."""
        return index(self.data.patch_size)

    @property
    def window(self) -> Index:
        """Shape of what the network sees at once in validation and prediction, voxels z y x."""
        return index(self.inference.window or self.patch)
