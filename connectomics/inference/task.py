"""Predicting a region of a data set: one frozen description, run to files, and resumed where it was killed.

`PredictTask` says everything that the output depends on; it is stored as ``task.json`` beside the output and can be run
from there again. `run_predict_task` goes through each distinct target grid block by block: probabilities on the
network's lattice (`connectomics.inference.sliding`), resampled to the target's voxels (linear where they are finer,
averaged over their box where they are coarser), stored as uint8 ``round(255 p)``. Several target grids for one region
are done one after the other, each with the whole network; in the challenge a crop has one.

On disk, under ``output``::

    {class}/s0           the probabilities, Zarr v2, in an OME-NGFF 0.4 multiscale group
    {class}/.zattrs      multiscales, and connectomics: artefact, class_name, complete, grid, model, version
    {class}/uncertainty  the class's uncertainty where it is asked for, a multiscale group like its parent; its
                         attributes also say the kind and the scale (the value that 1 stands for)
    .zattrs              connectomics: artefact, complete, classes, model, version
    task.json            the task
    .done-{key}          one byte per block of a target grid (`connectomics.tasks.done`)

Raw is read ahead of the network and finished blocks are written behind it (`connectomics.inference.threads`).
``complete`` is false until the last block is written. Resuming is safe against a killed process; after a crash of the
whole machine, when written files may not have reached the disk, run with ``overwrite``.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import connectomics
from connectomics.errors import (
    IncompleteError,
    InputError,
    MetadataError,
    MissingError,
    WriteError,
    unknown_name,
)
from connectomics.geometry import Index, Triple, VoxelGrid, triple
from connectomics.inference.augmented import (
    LARGEST,
    UNCERTAINTIES,
    Averaged,
    Network,
    Symmetry,
    entropy,
    require_unchanged,
    symmetries,
)
from connectomics.inference.layout import Layout
from connectomics.inference.output import write_probability
from connectomics.inference.raw import RawSource
from connectomics.inference.rows import planned_reads
from connectomics.inference.sliding import Plan, predict_regions
from connectomics.inference.threads import ReadAhead, WriteBehind
from connectomics.inference.views import View
from connectomics.inference.windows import BLENDINGS
from connectomics.io import store
from connectomics.io.write import ArrayWriter, create_multiscale, ensure_group, update_attrs, write_file
from connectomics.tasks.done import DoneMap

if TYPE_CHECKING:
    import torch

TASK_FILE = "task.json"
ARTEFACT = "probability"
UNCERTAINTY = "uncertainty"  # the artefact, and its group below that of the class
PRECISIONS = ("32", "bf16", "fp16")

# a block on its way to the disk: where it belongs, its classes and their arrays, the done-map, its number and values
_Item = tuple[Layout, tuple[str, ...], list[list[ArrayWriter]], DoneMap, int, NDArray[np.float32]]

# fields that a resumed run may change: they decide how fast it is, not what it writes
_FREE = {"batch_size"}


@dataclass(frozen=True)
class PredictTask:
    """One region to predict: what is read, what is written, and with which parameters.

    Attributes:
        raw: location of the raw multiscale group.
        output: local folder of the region's group, ``{out}/{dataset}.zarr/{crop}``.
        classes: classes of the network's output channels, in their order.
        targets: grid to write for each class that is wanted; others are not written.
        voxel_size: voxel size that the network works at, nm, z y x.
        window: voxels that the network sees at once, z y x.
        checkpoint: hash of the checkpoint's content, recorded with the output.
        intensity_range: raw values that become 0 and 1 at the network's input (values beyond are clipped).
        overlap, blending, context, batch_size: see `connectomics.inference.sliding.predict_blocks`.
        block_size: voxels of the network's lattice in memory at once, z y x, at most (see `Layout`).
        precision: ``32``, or ``bf16`` or ``fp16`` for automatic mixed precision.
        dtype: of the stored probabilities: ``uint8``.
        views: further inputs of the network, each its voxel size (nm) and its shape (voxels), z y x.
        symmetries: in which the network sees each window, as text (``"-zyx"``, see `Symmetry`); the mean is stored.
        uncertainty: written too: ``variance`` over symmetries and networks, ``entropy`` of the probabilities, or
            ``dropout``: variance over ``dropout_samples`` passes of each with dropout layers on; or ``none``.
        skip_empty: windows whose raw is constant, or absent everywhere, are not run; probability (and uncertainty) is 0
            where there are no others.
    """

    raw: str
    output: str
    classes: tuple[str, ...]
    targets: Mapping[str, VoxelGrid] = field(hash=False)
    voxel_size: Triple
    window: Index
    checkpoint: str
    intensity_range: tuple[float, float] = (0.0, 255.0)
    overlap: float = 0.25
    blending: str = "gaussian"
    context: Index | None = None
    block_size: Index = (256, 256, 256)
    batch_size: int = 1
    precision: str = "32"
    dtype: str = "uint8"
    views: tuple[tuple[Triple, Index], ...] = ()
    symmetries: tuple[str, ...] = ("zyx",)
    uncertainty: str = "none"
    dropout_samples: int = 0
    skip_empty: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "targets", dict(self.targets))
        object.__setattr__(self, "voxel_size", triple(self.voxel_size, "voxel_size"))
        for name in ("window", "block_size", "context"):
            value = getattr(self, name)
            if value is not None:
                z, y, x = (int(v) for v in value)
                object.__setattr__(self, name, (z, y, x))
        views = tuple((triple(size, "views"), (int(n[0]), int(n[1]), int(n[2]))) for size, n in self.views)
        object.__setattr__(self, "views", views)
        low, high = (float(v) for v in self.intensity_range)
        object.__setattr__(self, "intensity_range", (low, high))
        if not high > low:
            raise InputError(f"intensity_range must be two ascending values, found {self.intensity_range}")
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
            ("dtype", self.dtype, ("uint8",)),
            ("uncertainty", self.uncertainty, UNCERTAINTIES),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, found {value!r}")
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
        samples = self.dropout_samples
        if samples < 2 if self.uncertainty == "dropout" else samples != 0:
            raise InputError(
                f"dropout_samples must be at least 2 with uncertainty 'dropout' and 0 without, found "
                f"{samples} with {self.uncertainty!r}"
            )

    # -- to and from JSON --------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["targets"] = {name: grid.to_dict() for name, grid in self.targets.items()}
        data["views"] = [[list(size), list(shape)] for size, shape in self.views]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> PredictTask:
        """The inverse of `to_dict`; raises `MetadataError` naming ``where`` for keys that are unknown or absent."""
        known = {f.name for f in fields(cls)}
        # what tasks of before there were such keys stand for
        data = {"views": [], "symmetries": ["zyx"], "uncertainty": "none", "dropout_samples": 0, **data}
        data.setdefault("skip_empty", False)
        if wrong := sorted(set(data) ^ known):
            raise MetadataError(f"{where} must have the keys {sorted(known)}; unknown or absent: {', '.join(wrong)}")
        targets = {name: VoxelGrid.from_dict(grid) for name, grid in data["targets"].items()}
        return cls(**{**data, "targets": targets})

    @classmethod
    def load(cls, path: str | Path) -> PredictTask:
        """The task stored in a ``task.json``; `MissingError`, `MetadataError`."""
        data = store.read_json(path)
        if data is None:
            raise MissingError(f"no task at {path}")
        return cls.from_dict(data, str(path))

    def save(self, path: str | Path) -> None:
        """Store as JSON, in one step."""
        write_file(Path(path), json.dumps(self.to_dict(), indent=2).encode())

    def differences(self, other: PredictTask) -> list[str]:
        """Names of the fields that make the output of the two tasks different."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if name not in _FREE and mine[name] != theirs[name]]

    # -- what is to be done ------------------------------------------------------------------------------------------
    def layouts(self) -> list[tuple[Layout, tuple[str, ...]]]:
        """Every distinct target grid with the classes that are written on it, in the order of the channels."""
        grids: dict[VoxelGrid, list[str]] = {}
        for name in self.classes:
            if name in self.targets:
                grids.setdefault(self.targets[name], []).append(name)
        how = (self.channels, self.voxel_size, self.window, self.overlap, self.context, self.block_size)
        return [(Layout(grid, *how), tuple(names)) for grid, names in grids.items()]

    @property
    def channels(self) -> int:
        """Values that are blended for each voxel: probabilities, and variances where they are wanted."""
        return len(self.classes) * (2 if self.uncertainty in ("variance", "dropout") else 1)

    @property
    def _symmetries(self) -> tuple[Symmetry, ...]:
        return symmetries(self.symmetries)

    def averaged(self, networks: Sequence[Network]) -> Averaged:
        """The networks, averaged as the task says."""
        wanted = self.uncertainty in ("variance", "dropout")
        return Averaged(networks, self._symmetries, samples=self.dropout_samples, variance=wanted)

    def plan(self) -> list[Plan]:
        """What each distinct target grid costs, without running anything; with one pass for each window."""
        return [layout.plan(self.batch_size) for layout, _ in self.layouts()]

    @property
    def name(self) -> str:
        """What is predicted, for messages: ``crop557 of jrc_ctl-id8-1``."""
        output = Path(self.output)
        return f"{output.name} of {output.parent.name.removesuffix('.zarr')}"

    @property
    def model(self) -> dict[str, Any]:
        """What the artefact says of its origin."""
        names = (
            "checkpoint", "classes", "voxel_size", "window", "overlap", "blending", "context", "precision", "views",
            "symmetries", "dropout_samples", "skip_empty",
        )  # fmt: skip
        data = self.to_dict()
        return {name: data[name] for name in names}


def run_predict_task(
    task: PredictTask,
    network: Network | Sequence[Network],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the probabilities of ``task``, or what is still missing of them.

    Raw is read and blocks are written in two further threads, which end with the call, however it ends.

    Args:
        network: takes (B, 1, d, h, w) float32 on ``device`` (and the task's views, likewise), gives probabilities (B,
            len(task.classes), d, h, w); several are averaged. With the task's uncertainty ``dropout`` their dropout
            layers must be on, see `dropout_on`.
        progress: called with the numbers of finished and of all blocks, at the start and after every block.
        overwrite: begin anew where an output of another task (or a finished one) is there.

    Raises:
        WriteError: an output of another task is there, or the disk is full.
        InputError: there is no raw in the region, the network's output is not finite or no probability, or a variance
            is asked for of one pass.
        CorruptDataError: raw cannot be decoded or is not finite.
    """
    output = Path(task.output)
    averaged = task.averaged([network] if callable(network) else network)
    if _refuse_others(task, output, overwrite) and not overwrite and _is_complete(task, output):
        if progress is not None:
            total = sum(len(layout.blocks) for layout, _ in task.layouts())
            progress(total, total)
        return
    source = _source_of(task)
    _claim(task, output, overwrite)
    jobs = []
    ensure_group(output, {"connectomics": _attrs(task, complete=False)})
    for layout, names in task.layouts():
        done = DoneMap(output / f".done-{layout.key}", len(layout.blocks), layout.key)
        if done.count and not all(_has_array(place) for name in names for place in _places(task, name)):
            done.clear()  # someone removed an array: what the map says of it holds no longer
        jobs.append((layout, names, [_writers(task, layout, name) for name in names], done))
    total = sum(len(done) for *_, done in jobs)
    finished = sum(done.count for *_, done in jobs)
    if progress is not None:
        progress(finished, total)

    def write(item: _Item) -> None:
        layout, names, writers, done, number, block = item
        _write_block(task, layout, names, writers, number, block)
        done.mark([number])

    def written() -> None:
        nonlocal finished
        finished += 1
        if progress is not None:
            progress(finished, total)

    with WriteBehind(write, written) as behind:
        for layout, names, writers, done in jobs:
            todo = done.missing.tolist()
            with closing(_blocks(task, source, averaged, device, layout, todo)) as blocks:
                for number in todo:
                    block = next(blocks)
                    behind.put((layout, names, writers, done, number, block))
                    del block  # the writer has it; here it would be held while the next one is computed
    for _, names, _, _ in jobs:
        for name in names:
            for place, about in _places(task, name).items():
                update_attrs(place, {"connectomics": {**_attrs(task, complete=True, class_name=name), **about}})
    update_attrs(output, {"connectomics": _attrs(task, complete=True)})


def _blocks(
    task: PredictTask, source: RawSource, averaged: Averaged, device: str, layout: Layout, todo: Sequence[int]
) -> Generator[NDArray[np.float32], None, None]:
    """The values of the blocks ``todo``, with raw read ahead of the network."""
    regions = [layout.regions[number] for number in todo]
    with ReadAhead(source.read, planned_reads(layout.lattice, regions)) as read:
        yield from predict_regions(
            read,
            layout.lattice,
            averaged,
            regions,
            channels=task.channels,
            blending=task.blending,
            batch_size=task.batch_size,
            device=device,
            autocast=_autocast(task.precision),
            views=[View(source.read, size, shape) for size, shape in task.views],
            skip_empty=task.skip_empty,
        )


def _write_block(
    task: PredictTask,
    layout: Layout,
    names: Sequence[str],
    writers: Sequence[Sequence[ArrayWriter]],
    number: int,
    block: NDArray[np.float32],
) -> None:
    """Store a block's classes, each with its uncertainty where it is asked for."""
    for name, arrays in zip(names, writers, strict=True):
        channel = task.classes.index(name)
        write_probability(layout, number, block[channel], arrays[0])
        if task.uncertainty != "none":
            write_probability(layout, number, _uncertainty(task, block, channel), arrays[1])


def check_predict_task(task: PredictTask, *, overwrite: bool = False) -> None:
    """Raise what `run_predict_task` would raise at once: no raw in the region, or another output in its place."""
    _refuse_others(task, Path(task.output), overwrite)
    _source_of(task)


def require_complete(location: str | Path) -> dict[str, Any]:
    """The ``connectomics`` attributes of a finished artefact (a region's group, or one class in it).

    Raises:
        MissingError: nothing is there. MetadataError: it is no artefact of this program.
        IncompleteError: the stage that makes it has not come to its end.
    """
    ours = store.read_attrs(store.normalize(str(location))).get("connectomics")
    if not isinstance(ours, dict) or "complete" not in ours:
        raise MetadataError(f"{location} has no attribute connectomics.complete: it was not written by this program")
    if ours["complete"] is not True:
        raise IncompleteError(
            f"{location} is only half written ({ours.get('artefact', 'artefact')}); run the stage that makes it again "
            f"with the same options to finish it"
        )
    return ours


def _autocast(precision: str) -> torch.dtype | None:
    if precision == "32":
        return None
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _source_of(task: PredictTask) -> RawSource:
    source = RawSource(task.raw, task.intensity_range)
    for layout, _ in task.layouts():
        source.require_any(layout, task.name)
    return source


def _refuse_others(task: PredictTask, output: Path, overwrite: bool) -> bool:
    """Whether an output of this task (with ``overwrite``: of any) is there; `WriteError` for anything else."""
    if not (output.exists() and any(output.iterdir())):
        return False
    file = output / TASK_FILE
    if not file.exists():
        raise WriteError(f"{output} is there and was not written by a prediction: remove it, or choose another place")
    if not overwrite and (differing := task.differences(PredictTask.load(file))):
        raise WriteError(
            f"{output} holds a prediction with other settings ({', '.join(differing)} differ); "
            f"overwrite it, or choose another output folder"
        )
    return True


def _claim(task: PredictTask, output: Path, overwrite: bool) -> None:
    """Make ``output`` this task's own, by its file; what is there (see `_refuse_others`) is kept or thrown away."""
    there = output.exists() and any(output.iterdir())
    if there and overwrite:
        old = output.with_name(f".{output.name}.old-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        output.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    elif there:
        return
    task.save(output / TASK_FILE)


def _is_complete(task: PredictTask, output: Path) -> bool:
    try:
        for location in (output, *(place for name in task.targets for place in _places(task, name))):
            require_complete(location)
    except (IncompleteError, MissingError, MetadataError):
        return False
    return True


def _has_array(location: Path) -> bool:
    """Whether the array of a class was made to its end: its group's attributes are written last."""
    return (location / ".zattrs").exists() and "multiscales" in store.read_attrs(str(location))


def _places(task: PredictTask, name: str) -> dict[Path, dict[str, Any]]:
    """The groups of one class, the one that holds the others first, and what they say of themselves in particular."""
    location = Path(task.output) / name
    places: dict[Path, dict[str, Any]] = {location: {}}
    if task.uncertainty != "none":
        scale = LARGEST[task.uncertainty] / 255
        places[location / UNCERTAINTY] = {"artefact": UNCERTAINTY, "kind": task.uncertainty, "scale": scale}
    return places


def _writers(task: PredictTask, layout: Layout, name: str) -> list[ArrayWriter]:
    """The arrays of one class, made where they are not there."""
    writers = []
    for place, about in _places(task, name).items():
        if _has_array(place):
            writers.append(ArrayWriter.open(place / "s0"))
            continue
        attrs = {"connectomics": {**_attrs(task, complete=False, class_name=name), **about}}
        writers += create_multiscale(
            place, [layout.target], task.dtype, chunks=layout.chunks, attrs=attrs, name=place.name, overwrite=True
        )
    return writers


def _uncertainty(task: PredictTask, block: NDArray[np.float32], channel: int) -> NDArray[np.float32]:
    """Of one class of a block, from 0 to 1: as a share of the largest that can be."""
    if task.uncertainty == "entropy":
        return entropy(block[channel])
    return block[len(task.classes) + channel] / np.float32(LARGEST[task.uncertainty])


def _attrs(task: PredictTask, *, complete: bool, class_name: str | None = None) -> dict[str, Any]:
    what: dict[str, Any] = {"classes": [name for name in task.classes if name in task.targets]}
    if class_name is not None:
        what = {"class_name": class_name, "grid": task.targets[class_name].to_dict()}
    version = connectomics.__version__
    return {"artefact": ARTEFACT, "complete": complete, **what, "model": task.model, "version": version}
