"""Predict a region of a data set: one frozen description, run to files by any engine, block by block.

`PredictTask` says everything that the output depends on. Its first stage goes through the blocks of every distinct
target grid: probabilities on the network's lattice (`connectomics.inference.sliding`), resampled to the target's voxels
and stored (`connectomics.inference.artifact`). Further stages make the levels of a pyramid
(`connectomics.tasks.pyramid`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, require_known
from connectomics.geometry import Box, Index, Triple, VoxelGrid, triple
from connectomics.inference import artifact, gaps
from connectomics.inference.augmented import UNCERTAINTIES, Network, OrientedAverages
from connectomics.inference.layout import Layout
from connectomics.inference.predict_worker import MOST_ON_CPU, PredictWorker
from connectomics.inference.raw import RawSource
from connectomics.inference.sliding import Plan
from connectomics.inference.symmetry import Symmetry, channel_maps, require_unchanged, symmetries, windows_seen
from connectomics.inference.windows import BLENDINGS, WindowFit, Windows, overlap_per_axis, whole_index
from connectomics.io.artifacts import Provenance, is_complete, put_aside
from connectomics.io.fingerprint import content_identity
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization
from connectomics.io.place import place
from connectomics.io.sharded import Storage
from connectomics.io.write import ensure_group, update_attrs
from connectomics.progress import Progress
from connectomics.tasks import BlockTask, Cost, Worker, run_task
from connectomics.tasks.pyramid import Pyramid, PyramidStage, pyramid_stages

PREDICT = "predict"  # the first stage
_PRECISIONS = ("32", "bf16", "fp16")
_OF_MODEL = (
    "checkpoint", "classes", "voxel_size", "window", "overlap", "multiple", "blending", "context", "precision",
    "views", "symmetries", "dropout_samples", "skip_empty", "normalization", "seen_in_training",
)  # fmt: skip
_WORKER_BYTES = 320 << 20  # that a worker holds besides its block: kernels, pieces being written, caches of the reader


@dataclass(frozen=True)
class PredictTask(BlockTask):
    """One region to predict: what is read, what is written, and with which parameters.

    Attributes:
        raw, output: the raw multiscale group, and the folder to write, ``{out}/{dataset}.zarr/{crop}``.
        classes, targets: names of the network's output channels, in order, and grid to write for each requested one.
        voxel_size, window: of the network, nm, and voxels that it sees at once (see `windows_seen`), z y x.
        checkpoint, checkpoints: hash of the networks' weights, and their files; none if they were given in memory.
        normalization: how raw values become the network's input.
        overlap, blending, context, batch_size: see `predict_blocks`; batch_size also ``auto``: by trial in each worker.
        multiple, block_size: of `WindowFit`, None: windows do not shrink; voxels in memory at once, None: see `Layout`.
        precision, compile: ``32``, or ``bf16`` or ``fp16`` (automatic mixed precision); whether to use `torch.compile`.
        channels_last: memory format of the network; None: if it pays (a GPU with mixed precision).
        dtype, pyramid: ``uint8`` (255 p) or ``float16`` (p); also coarser levels, if need be of a finished prediction.
        inputs: further inputs of the network, each its voxel size (nm) and shape (voxels), z y x; in JSON ``views``.
        symmetries: in which the network sees each window, as text (``"-zyx"``, see `Symmetry`); the mean is stored.
        uncertainty: also written: ``variance`` over symmetries and networks, ``entropy`` of the probabilities, or
            ``dropout``: variance over ``dropout_samples`` passes of each with active dropout layers; or ``none``.
        skip_empty: leave out windows whose raw is constant or absent; probability is 0 where there are no others.
        mask: location of a multiscale group: leave out windows wholly where it is 0, or beyond it.
        allow_missing_raw: whether voxels of the region may lack raw; they get probability 0.
        seen_in_training: whether the networks were trained on a part of the region, as far as it is known.
        about: attributes of channels that are no classes (``artefact``, ``class_name``, ...).
        storage: of arrays.
    """

    kind: ClassVar[str] = "predict"
    free: ClassVar[frozenset[str]] = frozenset({"batch_size", "allow_missing_raw", "pyramid", "seen_in_training"})
    places: ClassVar[frozenset[str]] = frozenset({"raw", "output", "mask", "checkpoints"})
    networks: ClassVar[tuple[Network, ...]] = ()  # of `given`: in this process only, neither stored nor compared

    raw: str
    output: str
    classes: tuple[str, ...]
    targets: Mapping[str, VoxelGrid] = field(hash=False)
    voxel_size: Triple
    window: Index
    checkpoint: str
    checkpoints: tuple[str, ...] = ()
    normalization: Normalization = Normalization()  # noqa: RUF009 (frozen)
    overlap: Triple | float = 0.25
    multiple: Index | None = None
    blending: str = "gaussian"
    context: Index | None = None
    block_size: Index | None = None
    batch_size: int | str = 1
    precision: str = "32"
    channels_last: bool | None = None
    compile: bool = False
    dtype: str = "uint8"
    pyramid: bool = False
    inputs: tuple[tuple[Triple, Index], ...] = ()
    symmetries: tuple[str, ...] = ("zyx",)
    uncertainty: str = "none"
    dropout_samples: int = 0
    skip_empty: bool = False
    mask: str | None = None
    allow_missing_raw: bool = False
    seen_in_training: bool = False
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    storage: Storage = Storage()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        chosen = symmetries(self.symmetries)
        values = {
            "classes": tuple(self.classes),
            "checkpoints": tuple(self.checkpoints),
            "targets": dict(self.targets),
            "voxel_size": triple(self.voxel_size, "voxel_size"),
            "window": whole_index(self.window, "window", 1),
            "block_size": None if self.block_size is None else whole_index(self.block_size, "block_size", 1),
            "overlap": overlap_per_axis(self.overlap),
            "multiple": None if self.multiple is None else whole_index(self.multiple, "multiple", 1),
            "context": None if self.context is None else whole_index(self.context, "context", 0),
            "inputs": tuple((triple(size, "inputs"), whole_index(n, "inputs", 1)) for size, n in self.inputs),
            "symmetries": tuple(map(str, chosen)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._require_valid()
        require_unchanged(chosen, self.voxel_size, "the voxel size")
        for sides in (sides for pair in self.inputs for sides in pair):
            require_unchanged(chosen, sides, "a further input of")
        for together in self._windows_seen.values():
            channel_maps(together, self._channel_attributes)  # refuses affinities without a counterpart

    def _require_valid(self) -> None:
        if not self.targets:
            raise InputError(f"nothing to predict for {self.output}: no target grid is given")
        for name, grid in self.targets.items():
            require_known("class", [name], self.classes, "the network's output")
            if grid.size == 0:
                raise InputError(f"the target grid of {name} for {self.output} is empty ({grid}); leave it out")
        words = {"blending": BLENDINGS, "precision": _PRECISIONS, "dtype": artifact.UNITS, "uncertainty": UNCERTAINTIES}
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.batch_size != "auto" and not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise InputError(f"batch_size must be at least 1, or auto, got {self.batch_size!r}")
        samples, kind = self.dropout_samples, self.uncertainty
        if samples < 2 if kind == "dropout" else samples != 0:
            raise InputError(
                f"dropout_samples must be at least 2 with 'dropout' and 0 without, got {samples} with {kind!r}"
            )

    def settings(self) -> dict[str, Any]:
        return artifact.as_before(super().settings())

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        data["views"] = data.pop("inputs")  # the name that stored tasks and attributes have
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        return super().from_dict({"inputs" if name == "views" else name: v for name, v in data.items()}, where)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without the cached properties

    @property
    def model(self) -> dict[str, Any]:
        """What the attributes say of the model."""
        return {name: value for name, value in self.to_dict().items() if name in _OF_MODEL}

    def made_from(self) -> dict[str, str]:
        whole = max((layout.target for layout, _ in self.layouts), key=lambda grid: grid.size)
        found = {"raw": content_identity(Multiscale.open(self.raw), whole)}
        if self.mask is not None:
            found["mask"] = content_identity(Multiscale.open(self.mask), whole)
        return found

    @property
    def name(self) -> str:
        """The region, for messages: ``crop557 of jrc_ctl-id8-1``."""
        return f"{self.folder.name} of {self.folder.parent.stem}"

    @property
    def folder(self) -> Path:
        return place(self.output)

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(folder / self.folder.parent.name / self.folder.name))

    @property
    def channels(self) -> int:
        """Values that are blended for each voxel: probabilities, and variances if requested."""
        return len(self.classes) * (1 + self._needs_variance)

    @property
    def _needs_variance(self) -> bool:
        return self.uncertainty in ("variance", "dropout")

    @property
    def _windows_seen(self) -> dict[Index, tuple[Symmetry, ...]]:
        return windows_seen(symmetries(self.symmetries), self.window)

    @property
    def _channel_attributes(self) -> list[Mapping[str, Any]]:
        return [self.about.get(name, {}) for name in self.classes]

    @cached_property
    def layouts(self) -> list[tuple[Layout, tuple[str, ...]]]:
        """Every distinct target grid with the channels that are written on it, in order."""
        grids: dict[VoxelGrid, list[str]] = {}
        for name in self.classes:
            if name in self.targets:
                grids.setdefault(self.targets[name], []).append(name)
        volume = RawSource(self.raw, self.normalization).volume(self.voxel_size)
        fit = self.multiple and WindowFit(self.multiple)
        windows = Windows(self.window, overlap_per_axis(self.overlap), fit, self.blending == "crop")
        seen = tuple(map(windows.seen_by, self._windows_seen.values()))
        how = (self.voxel_size, seen, self.context, self.block_size, volume)
        return [(Layout(grid, self.channels, *how, self.storage), tuple(names)) for grid, names in grids.items()]

    @cached_property
    def groups(self) -> list[artifact.Group]:
        """All groups to write; a group inside another comes after it."""
        found = []
        layouts = {name: layout for layout, names in self.layouts for name in names}
        for channel, name in enumerate(self.classes):
            if name not in layouts:
                continue
            what = {"class_name": name, "grid": self.targets[name].to_dict(), "model": self.model}
            place, what = self.folder / name, what | dict(self.about.get(name, {}))
            found.append(artifact.Group(place, layouts[name], channel, "", self.dtype, self.pyramid, what))
            if self.uncertainty != "none":
                found.append(replace(found[-1], place=place / artifact.UNCERTAINTY, uncertainty=self.uncertainty))
        return found

    @cached_property
    def _missing_raw(self) -> NDArray[np.int64]:
        return gaps.missing_raw(self)  # cached: a large volume has many chunks

    @property
    def members(self) -> int:
        """Networks that are averaged."""
        return max(1, len(self.networks or self.checkpoints))

    def averages(self, networks: Sequence[Network]) -> OrientedAverages:
        """Return the averages of the networks that the task asks for."""
        return OrientedAverages(
            networks, self._windows_seen, samples=self.dropout_samples,
            variance=self._needs_variance, about=self._channel_attributes,
        )  # fmt: skip

    def plan(self) -> list[Plan]:
        """Return what each distinct target grid costs, without running anything."""
        batch = MOST_ON_CPU if isinstance(self.batch_size, str) else self.batch_size
        passes = [self.members * max(1, self.dropout_samples) * len(s) for s in self._windows_seen.values()]
        return [layout.plan(batch, passes, self.dtype, self.uncertainty) for layout, _ in self.layouts]

    def locate(self, block: int) -> tuple[int, int]:
        """Return the index of the layout that a block of the first stage belongs to, and its number there."""
        for index, (layout, _) in enumerate(self.layouts):
            if block < len(layout.blocks):
                return index, block
            block -= len(layout.blocks)
        raise InputError(f"{self.name} does not have that many blocks: {block} beyond the last")

    @property
    def stages(self) -> tuple[str, ...]:
        return (PREDICT, *pyramid_stages(self._pyramids))

    @property
    def _pyramids(self) -> list[Pyramid]:
        return [group.levels for group in self.groups]

    def check(self, *, overwrite: bool = False) -> bool:
        self.averages([lambda *inputs: inputs[0]] * self.members)  # refuses the variance over one pass
        _ = [layout.block_shape for layout, _ in self.layouts]  # refuses shards that no block holds
        there = artifact.require_own_output(self, overwrite)
        places = (self.folder, *(group.place for group in self.groups))
        if there and not overwrite and all(map(is_complete, places)) and all(g.has_levels for g in self.groups):
            return False
        gaps.require_raw(self, self._missing_raw)
        return True

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite and self.folder.exists():
            put_aside(self.folder)
        self.go_on()

    def prepare(self, stage: str) -> None:
        if stage == PREDICT:
            ensure_group(self.folder, {"connectomics": self._attributes(None)}, self.storage.zarr_format)
            if not all(group.is_made for group in self.groups):  # someone may have removed an array
                gaps.forget(self.folder)
            for group in self.groups:  # in this order: making a group removes what lies in it
                if not group.is_made:
                    group.make()
            gaps.keep_missing(self, self._missing_raw)
            return
        if (levels := PyramidStage.of(stage, self._pyramids)) is not None:
            levels.prepare(self, stage)

    def blocks(self, stage: str) -> int:
        if (levels := PyramidStage.of(stage, self._pyramids)) is not None:
            return levels.blocks
        return sum(len(layout.blocks) for layout, _ in self.layouts)

    def run_length(self, stage: str) -> int:
        if stage != PREDICT:
            return 1
        # blocks along x share windows and raw; splitting smaller grids elsewhere only runs some windows twice
        layout = max((layout for layout, _ in self.layouts), key=lambda layout: len(layout.blocks))
        return math.ceil(layout.target.shape[2] / layout.block_shape[2])

    def cost(self, stage: str) -> Cost:
        if (levels := PyramidStage.of(stage, self._pyramids)) is not None:
            return levels.cost
        stored = len(self.groups) * np.dtype(self.dtype).itemsize
        written = max(math.prod(layout.block_shape) for layout, _ in self.layouts) * stored
        read = max(RawSource(self.raw, self.normalization).bytes_behind(layout.seen) for layout, _ in self.layouts)
        memory = max(plan.bytes for plan in self.plan()) + 3 * written // len(self.groups)  # of one array at a time
        return Cost(read=read, written=written, memory=memory + _WORKER_BYTES)

    @contextmanager
    def open_worker(self, stage: str, device: str) -> Iterator[Worker]:
        if (levels := PyramidStage.of(stage, self._pyramids)) is not None:
            yield levels
        else:
            with self.open_networks(device) as networks:
                yield PredictWorker(self, networks, device)

    def open_networks(self, device: str) -> AbstractContextManager[Sequence[Network]]:
        """Return the networks, ready on a device; raises `InputError` if this process cannot load them."""
        if self.networks:
            return nullcontext(self.networks)
        raise InputError(
            f"the network of {self.output} was given in memory, not as a file: call run_predict_task with it again"
        )

    def block_box(self, stage: str, block: int) -> Box | None:
        if stage != PREDICT:
            return None
        index, inside = self.locate(block)
        return self.layouts[index][0].blocks[inside][1].box

    def accepts(self, stage: str) -> str:
        return f"{self.folder.parent.stem}/{self.folder.name}" if stage == PREDICT else ""

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
        return {**artifact.common_attributes(provenance), "classes": classes, "model": self.model}


def given(task: PredictTask, networks: Sequence[Network]) -> PredictTask:
    """Return the task with its networks, which are ready on the device: for engines that work in this process."""
    found = PredictTask(**{f.name: getattr(task, f.name) for f in fields(PredictTask)})
    object.__setattr__(found, "networks", tuple(networks))
    return found


def run_predict_task(
    task: PredictTask,
    network: Network | Sequence[Network],
    device: str = "cpu",
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    accept: Collection[int] = (),
) -> bool:
    """Write the missing probabilities of ``task`` in this process; return whether anything was missing.

    Args:
        network: takes (B, 1, d, h, w) float32 on ``device`` (and the task's further inputs, likewise), returns
            probabilities (B, len(task.classes), d, h, w); several are averaged. With the task's uncertainty ``dropout``
            their dropout layers must be active, see `dropout_on`.
        progress, overwrite, accept: see `connectomics.tasks.run_task`, as are the errors.

    Raises:
        InputError: raw is missing in the region and that is not allowed, the network gives no probabilities, or a
            variance is requested of one pass.
    """
    networks = [network] if callable(network) else network
    return run_task(given(task, networks), None, progress, device=device, overwrite=overwrite, accept=accept)
