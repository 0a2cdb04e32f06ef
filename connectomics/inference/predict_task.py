"""Predicting a region of a data set: one frozen description, run to files by any engine, block by block.

`PredictTask` says everything that the output depends on; it is stored as ``task.json`` beside the output and can be run
from there again. Its first stage goes through the blocks of every distinct target grid: probabilities on the network's
lattice (`connectomics.inference.sliding`), resampled to the target's voxels (linear where they are finer, averaged over
their box where they are coarser) and stored (`connectomics.inference.artifact`). Several target grids for one region
are done one after the other, each with the whole network; in the challenge a crop has one. Where a pyramid is asked
for, further stages make its levels, three at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError, WriteError, unknown_name
from connectomics.geometry import Box, Index, Triple, VoxelGrid, triple
from connectomics.inference import gaps
from connectomics.inference.artifact import UNCERTAINTY, Group, marks
from connectomics.inference.augmented import (
    UNCERTAINTIES,
    Averaged,
    Network,
    turns_of,
)
from connectomics.inference.batching import MOST_ON_CPU
from connectomics.inference.layout import Layout
from connectomics.inference.output import UNITS
from connectomics.inference.predict_worker import PredictWorker
from connectomics.inference.pyramid import LEVELS_AT_ONCE, PyramidWorker, cubes
from connectomics.inference.raw import RawSource
from connectomics.inference.sliding import Plan
from connectomics.inference.symmetry import Symmetry, require_unchanged, symmetries
from connectomics.inference.windows import BLENDINGS
from connectomics.io.artifacts import Provenance, about, is_complete, put_aside, require_complete
from connectomics.io.fingerprint import content_identity
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization
from connectomics.io.write import ensure_group, update_attrs
from connectomics.tasks import BlockTask, Cost, Worker, run_task
from connectomics.tasks.block_task import TASK_FILE
from connectomics.tasks.lattice import Lattice

__all__ = ["TASK_FILE", "PredictTask", "given", "require_complete", "run_predict_task"]

PRECISIONS = ("32", "bf16", "fp16")
PREDICT = "predict"  # the first stage
_PYRAMID = "pyramid-"  # and the others, with a number from 1
_BESIDE = 256 << 20  # bytes that a worker holds beside its block: pieces being written, caches of the reader


@dataclass(frozen=True)
class PredictTask(BlockTask):
    """One region to predict: what is read, what is written, and with which parameters.

    Attributes:
        raw: location of the raw multiscale group.
        output: local folder of the region's group, ``{out}/{dataset}.zarr/{crop}``.
        classes: names of the network's output channels, in their order.
        targets: grid to write for each channel that is wanted; others are not written.
        voxel_size: voxel size that the network works at, nm, z y x.
        window: voxels that the network sees at once, z y x.
        checkpoint: hash of the networks' weights.
        checkpoints: files of the networks; none where they were given in memory.
        normalization: how raw values become the network's input.
        overlap, blending, context: see `connectomics.inference.sliding.predict_blocks`.
        batch_size: windows that go through the network together; ``auto``: found by trial, in each worker.
        block_size: voxels of the network's lattice in memory at once, z y x, at most (see `Layout`).
        precision: ``32``, or ``bf16`` or ``fp16`` for automatic mixed precision.
        channels_last: memory format of the network; None: where it pays (a GPU with mixed precision).
        compile: whether the network is compiled (`torch.compile`).
        dtype: of the stored probabilities: ``uint8`` (255 p) or ``float16`` (p).
        pyramid: whether coarser levels, by averaging, are written too.
        views: further inputs of the network, each its voxel size (nm) and its shape (voxels), z y x.
        symmetries: in which the network sees each window, as text (``"-zyx"``, see `Symmetry`); the mean is stored.
        uncertainty: written too: ``variance`` over symmetries and networks, ``entropy`` of the probabilities, or
            ``dropout``: variance over ``dropout_samples`` passes of each with dropout layers on; or ``none``.
        skip_empty: windows whose raw is constant, or absent everywhere, are not run; probability (and uncertainty) is 0
            where there are no others.
        mask: location of a multiscale group: windows that lie wholly where it is 0, or beyond it, are not run either.
        allow_missing_raw: whether a region may be predicted of which some voxels have no raw; they get probability 0.
        about: of channels that are no classes what their attributes say (``artefact``, ``class_name``, ...).
    """

    kind: ClassVar[str] = "predict"
    free: ClassVar[frozenset[str]] = frozenset({"batch_size", "allow_missing_raw"})
    places: ClassVar[frozenset[str]] = frozenset({"raw", "output", "mask", "checkpoints"})

    raw: str
    output: str
    classes: tuple[str, ...]
    targets: Mapping[str, VoxelGrid] = field(hash=False)
    voxel_size: Triple
    window: Index
    checkpoint: str
    checkpoints: tuple[str, ...] = ()
    normalization: Normalization = Normalization()  # noqa: RUF009 (frozen)
    overlap: float = 0.25
    blending: str = "gaussian"
    context: Index | None = None
    block_size: Index = (256, 256, 256)
    batch_size: int | str = 1
    precision: str = "32"
    channels_last: bool | None = None
    compile: bool = False
    dtype: str = "uint8"
    pyramid: bool = False
    views: tuple[tuple[Triple, Index], ...] = ()
    symmetries: tuple[str, ...] = ("zyx",)
    uncertainty: str = "none"
    dropout_samples: int = 0
    skip_empty: bool = False
    mask: str | None = None
    allow_missing_raw: bool = False
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("classes", "checkpoints"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "targets", dict(self.targets))
        object.__setattr__(self, "voxel_size", triple(self.voxel_size, "voxel_size"))
        for name in ("window", "block_size", "context"):
            value = getattr(self, name)
            if value is not None:
                z, y, x = (int(v) for v in value)
                object.__setattr__(self, name, (z, y, x))
        views = tuple((triple(size, "views"), (int(n[0]), int(n[1]), int(n[2]))) for size, n in self.views)
        object.__setattr__(self, "views", views)
        if not self.targets:
            raise InputError(f"nothing to predict for {self.output}: no target grid is given")
        for name, grid in self.targets.items():
            if name not in self.classes:
                raise unknown_name("class", name, self.classes, "the network's output")
            if grid.size == 0:
                raise InputError(f"the target grid of {name} for {self.output} is empty ({grid})")
        for name, value, known in (
            ("blending", self.blending, BLENDINGS),
            ("precision", self.precision, PRECISIONS),
            ("dtype", self.dtype, tuple(UNITS)),
            ("uncertainty", self.uncertainty, UNCERTAINTIES),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, found {value!r}")
        if self.batch_size != "auto" and not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise InputError(f"batch_size must be at least 1, or auto, found {self.batch_size!r}")
        self._check_passes()

    def _check_passes(self) -> None:
        """Symmetries that the network's inputs do not have, and samples that nothing would take."""
        chosen = self._symmetries
        object.__setattr__(self, "symmetries", tuple(str(symmetry) for symmetry in chosen))
        for sizes, what in [
            (self.window, "a window of"),
            (self.voxel_size, "the voxel size"),
            *((sizes, "a further input of") for view in self.views for sizes in view),
        ]:
            require_unchanged(chosen, sizes, what)
        turns_of(chosen, [self.about.get(name, {}) for name in self.classes])  # affinities without a counterpart
        samples = self.dropout_samples
        if samples < 2 if self.uncertainty == "dropout" else samples != 0:
            raise InputError(
                f"dropout_samples must be at least 2 with uncertainty 'dropout' and 0 without, found "
                f"{samples} with {self.uncertainty!r}"
            )

    # -- to and from JSON --------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(PredictTask)}
        data["targets"] = {name: grid.to_dict() for name, grid in self.targets.items()}
        data["views"] = [[list(size), list(shape)] for size, shape in self.views]
        data["about"] = {name: dict(about) for name, about in self.about.items()}
        data["normalization"] = self.normalization.to_dict()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        known = {f.name for f in fields(PredictTask)}
        if wrong := sorted(set(data) ^ known):
            raise MetadataError(f"{where} must have the keys {sorted(known)}; unknown or absent: {', '.join(wrong)}")
        targets = {name: VoxelGrid.from_dict(grid) for name, grid in data["targets"].items()}
        normalization = Normalization.from_dict(data["normalization"], where)
        return cls(**{**data, "targets": targets, "normalization": normalization})

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without what is worked out from them

    @property
    def model(self) -> dict[str, Any]:
        """What the artefact says of its origin."""
        names = (
            "checkpoint", "classes", "voxel_size", "window", "overlap", "blending", "context", "precision", "views",
            "symmetries", "dropout_samples", "skip_empty", "normalization",
        )  # fmt: skip
        data = self.to_dict()
        return {name: data[name] for name in names}

    def made_from(self) -> dict[str, str]:
        whole = max((layout.target for layout, _ in self.layouts), key=lambda grid: grid.size)
        found = {"raw": content_identity(Multiscale.open(self.raw), whole)}
        if self.mask is not None:
            found["mask"] = content_identity(Multiscale.open(self.mask), whole)
        return found

    # -- what is to be done ------------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """What is predicted, for messages: ``crop557 of jrc_ctl-id8-1``."""
        output = Path(self.output)
        return f"{output.name} of {output.parent.name.removesuffix('.zarr')}"

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(folder / self.folder.parent.name / self.folder.name))

    @property
    def channels(self) -> int:
        """Values that are blended for each voxel: probabilities, and variances where they are wanted."""
        return len(self.classes) * (2 if self.uncertainty in ("variance", "dropout") else 1)

    @cached_property
    def layouts(self) -> list[tuple[Layout, tuple[str, ...]]]:
        """Every distinct target grid with the channels that are written on it, in their order."""
        grids: dict[VoxelGrid, list[str]] = {}
        for name in self.classes:
            if name in self.targets:
                grids.setdefault(self.targets[name], []).append(name)
        volume = RawSource(self.raw, self.normalization).volume(self.voxel_size)
        how = (self.channels, self.voxel_size, self.window, self.overlap, self.context, self.block_size, volume)
        return [(Layout(grid, *how), tuple(names)) for grid, names in grids.items()]

    @cached_property
    def groups(self) -> list[Group]:
        """All that is written; a group that lies in another comes after it."""
        found = []
        layouts = {name: layout for layout, names in self.layouts for name in names}
        for channel, name in enumerate(self.classes):
            if name not in layouts:
                continue
            what = {"class_name": name, "grid": self.targets[name].to_dict(), "model": self.model}
            what |= self.about.get(name, {})
            place = self.folder / name
            places = {place: ""} if self.uncertainty == "none" else {place: "", place / UNCERTAINTY: self.uncertainty}
            for where, kind in places.items():
                found.append(Group(where, layouts[name], channel, kind, self.dtype, self.pyramid, what))
        return found

    @cached_property
    def _missing_raw(self) -> NDArray[np.int64]:
        return gaps.missing_raw(self)  # asked for once: a large volume has many chunks

    @property
    def _symmetries(self) -> tuple[Symmetry, ...]:
        return symmetries(self.symmetries)

    @property
    def members(self) -> int:
        """Networks that are averaged."""
        return max(1, len(self.checkpoints))

    @property
    def passes(self) -> int:
        """Forward passes for each window."""
        return self.members * len(self.symmetries) * max(1, self.dropout_samples)

    def averaged(self, networks: Sequence[Network]) -> Averaged:
        """The networks, averaged as the task says."""
        wanted = self.uncertainty in ("variance", "dropout")
        about = [self.about.get(name, {}) for name in self.classes]
        return Averaged(networks, self._symmetries, samples=self.dropout_samples, variance=wanted, about=about)

    def plan(self) -> list[Plan]:
        """What each distinct target grid costs, without running anything."""
        batch = self.batch_size if isinstance(self.batch_size, int) else MOST_ON_CPU
        return [layout.plan(batch).times(self.passes) for layout, _ in self.layouts]

    def locate(self, block: int) -> tuple[int, int]:
        """The layout that a block of the first stage belongs to, and its number there."""
        for index, (layout, _) in enumerate(self.layouts):
            if block < len(layout.blocks):
                return index, block
            block -= len(layout.blocks)
        raise InputError(f"{self.name} has no block so far: {block} beyond the last")

    # -- its life ----------------------------------------------------------------------------------------------------
    @property
    def stages(self) -> tuple[str, ...]:
        levels = max(len(group.grids) for group in self.groups) - 1
        return (PREDICT, *(f"{_PYRAMID}{n + 1}" for n in range(math.ceil(levels / LEVELS_AT_ONCE))))

    def check(self, *, overwrite: bool = False) -> bool:
        self.averaged([_nothing] * self.members)  # refuses the variance over one pass
        there = self._refuse_others(overwrite)
        if there and not overwrite and all(map(is_complete, (self.folder, *(group.place for group in self.groups)))):
            return False
        gaps.require_raw(self, self._missing_raw)
        return True

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite and self.folder.exists():
            put_aside(self.folder)
        if not (self.folder / TASK_FILE).exists():
            self.begin()

    def prepare(self, stage: str) -> None:
        if stage == PREDICT:
            ensure_group(self.folder, {"connectomics": self._attributes(None)})
            missing = [group for group in self.groups if not group.is_made]
            if missing:  # also where someone removed an array: what the done-maps say of it holds no longer
                gaps.forget(self.folder)
            for group in self.groups:  # in this order, since making a group removes what lies in it
                if not group.is_made:
                    group.make()
            gaps.keep_missing(self, self._missing_raw)
            return
        for group, level, _ in self._cubes(stage):
            last = min(level + LEVELS_AT_ONCE, len(group.grids) - 1)
            if any([group.make_level(n) for n in range(level + 1, last + 1)]):
                (self.folder / f".done-{stage}").unlink(missing_ok=True)

    def _cubes(self, stage: str) -> list[tuple[Group, int, Lattice]]:
        return cubes(self.groups, int(stage.removeprefix(_PYRAMID)) - 1)

    def blocks(self, stage: str) -> int:
        if stage == PREDICT:
            return sum(len(layout.blocks) for layout, _ in self.layouts)
        return sum(len(lattice) for *_, lattice in self._cubes(stage))

    def run_length(self, stage: str) -> int:
        """Blocks along x share windows and raw. Where target grids differ in their number, that of most blocks counts;
        the rows of the others are then cut at other places, which only costs windows that are run twice."""
        if stage != PREDICT:
            return 1
        layout = max((layout for layout, _ in self.layouts), key=lambda layout: len(layout.blocks))
        return math.ceil(layout.target.shape[2] / layout.block_shape[2])

    def cost(self, stage: str) -> Cost:
        if stage != PREDICT:
            lattices = self._cubes(stage)
            voxels = max(math.prod(lattice.region(0)[1]) for *_, lattice in lattices)
            size = voxels * np.dtype(self.dtype).itemsize
            return Cost(read=size, written=size // 7, memory=size + _BESIDE)
        stored = len(self.groups) * np.dtype(self.dtype).itemsize
        written = max(math.prod(layout.block_shape) for layout, _ in self.layouts) * stored
        source = RawSource(self.raw, self.normalization)
        read = max(source.bytes_behind(layout.seen) for layout, _ in self.layouts)
        return Cost(read=read, written=written, memory=max(plan.bytes for plan in self.plan()) + _BESIDE)

    @contextmanager
    def open_worker(self, stage: str, device: str) -> Iterator[Worker]:
        if stage != PREDICT:
            yield PyramidWorker(self._cubes(stage))
            return
        with self.open_networks(device) as networks:
            yield PredictWorker(self, networks, device)

    def open_networks(self, device: str) -> AbstractContextManager[Sequence[Network]]:
        """The networks, on a device, ready for windows; raises `InputError` where they cannot be had here."""
        raise InputError(
            f"the network of {self.output} was given in memory and is on no disk: call run_predict_task with it again"
        )

    def block_box(self, stage: str, block: int) -> Box | None:
        if stage != PREDICT:
            return None
        index, inside = self.locate(block)
        return self.layouts[index][0].blocks[inside][1].box

    def accepts(self, stage: str) -> str:
        output = Path(self.output)
        return f"{output.parent.name.removesuffix('.zarr')}/{output.name}" if stage == PREDICT else ""

    def accept(self, stage: str, failed: Mapping[int, str]) -> None:
        gaps.give_up(self, failed)

    def finish(self) -> None:
        gaps.confirm_missing(self)
        provenance = self.provenance
        for group in self.groups:
            group.close(provenance, gaps.attributes(self, group.layout))
        update_attrs(self.folder, {"connectomics": {**self._attributes(provenance), **gaps.attributes(self)}})

    def _attributes(self, provenance: Provenance | None) -> dict[str, Any]:
        classes = [name for name in self.classes if name in self.targets and name not in self.about]
        return {**marks(provenance), "classes": classes, "model": self.model}

    def _refuse_others(self, overwrite: bool) -> bool:
        """Whether an output of this task (with ``overwrite``: of any) is there; `WriteError` for anything else."""
        there = [] if not self.folder.exists() else [p for p in self.folder.iterdir() if ".part-" not in p.name]
        if not there:
            return False
        file = self.folder / TASK_FILE
        if not file.exists():
            raise WriteError(
                f"{self.folder} is there and was not written by a prediction: remove it, or choose another place"
            )
        if overwrite:
            if foreign := [path for path in there if not _is_ours(path)]:
                raise WriteError(
                    f"{foreign[0]} lies in the prediction to be replaced and was not written by predict; move it away, "
                    "or choose another output folder"
                )
            return True
        try:
            difference = self.difference(file)
        except MetadataError as error:
            raise WriteError(
                f"{self.folder} holds a prediction whose task cannot be read ({error}); overwrite it, or choose "
                "another output folder"
            ) from error
        if difference:
            raise WriteError(
                f"{self.folder} holds a prediction {difference}; overwrite it, or choose another output folder"
            )
        return True


def _is_ours(path: Path) -> bool:
    """Whether predict writes such a thing into a region's folder."""
    if path.name.startswith(".") or path.name == TASK_FILE:
        return True
    return about(path).get("artefact") not in (None, "labels")


@dataclass(frozen=True)
class _GivenTask(PredictTask):
    """A task with its networks, for this process only."""

    networks: tuple[Network, ...] = field(default=(), hash=False, compare=False)

    @property
    def members(self) -> int:
        return len(self.networks)

    def open_networks(self, device: str) -> AbstractContextManager[Sequence[Network]]:
        return nullcontext(self.networks)


def given(task: PredictTask, networks: Sequence[Network]) -> PredictTask:
    """The task with its networks, which are on the device and ready: for engines that work in this process."""
    return _GivenTask(**{f.name: getattr(task, f.name) for f in fields(PredictTask)}, networks=tuple(networks))


def run_predict_task(
    task: PredictTask,
    network: Network | Sequence[Network],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
    accept: Collection[int] = (),
) -> bool:
    """Write the probabilities of ``task``, or what is still missing of them, in this process. Returns whether anything
    was missing.

    Args:
        network: takes (B, 1, d, h, w) float32 on ``device`` (and the task's views, likewise), gives probabilities (B,
            len(task.classes), d, h, w); several are averaged. With the task's uncertainty ``dropout`` their dropout
            layers must be on, see `dropout_on`. It is tried on a window of noise first.
        progress: called with the numbers of finished and of all blocks of each stage.
        overwrite: begin anew where an output of another task (or a finished one) is there.
        accept: blocks that may fail; they are then stored as 0 and recorded as unknown.

    Raises:
        WriteError: an output of another task is there, or the disk is full.
        StoreError, OutOfMemoryError: raw cannot be read, or memory does not suffice; what is done is kept.
        InputError: there is no raw in the region, or not everywhere and that is not allowed, the network gives no
            probabilities, or a variance is asked for of one pass.
        BlocksFailedError: blocks failed (raw that cannot be decoded or is not finite); all others are done.
    """
    networks = [network] if callable(network) else network
    told = None if progress is None else (lambda stage, done, blocks: progress(done, blocks))
    return run_task(given(task, networks), None, told, device=device, overwrite=overwrite, accept=accept)


def _nothing(*inputs: Any) -> Any:
    """Stands for a network that is not called."""
