"""Write configurations that train on a data root with this machine, with the reason for each choice.

`connectomics.pipeline.data_facts` measures the data, `connectomics.pipeline.trial_step` a training step; this module
looks at cores, memory, GPU memory and free disk.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.config import EPOCH_PATCHES, RunConfig, config_from_dict
from connectomics.errors import InputError
from connectomics.io.replacing import contains, require_own
from connectomics.io.store import is_s3
from connectomics.io.write import write_file
from connectomics.machine import cpu_has_bfloat16, existing, usable_cores
from connectomics.pipeline.data_facts import ClassFacts, DataFacts, data_facts
from connectomics.pipeline.trial_step import try_step
from connectomics.progress import Progress, silent

#: First line of the configurations that are written.
MARK = "# written by pytc plan"
#: Voxel sizes to choose from, nm, if data sets differ: those at which most EM is stored.
SIZES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
#: Voxels that a mean chord should span in a 3-D network: with fewer, thin parts break; with more, a patch has too
#: little context.
CHORD_VOXELS = 4.0
#: The same in the first stage of a 2-D network, which sees one section, but a wider part of it.
CHORD_PIXELS = 12.0
#: Sections at least this much thicker than pixels are not interchangeable with the other planes.
ANISOTROPIC = 1.5
#: Share of the faces of instances that are shared with another instance, above which the network learns boundaries.
TOUCHING = 0.02
_INVERTED_FROM = 30  # CPU minutes of training from which more inverted patches cost nothing
_CPU_MINUTES = 120.0
_EPOCHS = 300
_VIEW_NM = 1000.0  # width of a patch that is enough to recognize large organelles
_PIXELS = 256  # side of a 2-D patch at most
_BATCH_PIXELS = 2**19  # of a training step of the 2-D network


@dataclass(frozen=True)
class MachineFacts:
    """Cores, GPU, bytes of memory, GPU memory and free disk, and whether the CPU computes in bfloat16 at full speed."""

    cores: int
    memory: int
    gpu: str | None
    gpu_memory: int
    disk: int
    cpu_bf16: bool = False


@dataclass
class Plan:
    """A run for classes with the same best voxel size.

    Attributes:
        settings: values by dotted key of the configuration.
        reasons: a sentence for each choice.
        step_seconds, step_memory: of one training step, if it was tried; bytes.
    """

    voxel_nm: float
    classes: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    step_seconds: float | None = None
    step_memory: int | None = None

    @property
    def name(self) -> str:
        """Name of its file, such as ``plan_8nm``."""
        return f"plan_{self.voxel_nm:g}nm"

    def choose(self, key: str, value: Any, reason: str) -> None:
        """Set a key, with the reason."""
        self.settings[key] = value
        self.reasons.append(f"{key} = {value}: {reason}")

    def _groups(self) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for key, value in self.settings.items():
            group, _, name = key.partition(".")
            nested.setdefault(group, {})[name] = value
        return nested

    def config(self) -> RunConfig:
        """Return the configuration, checked against the schema."""
        return config_from_dict({**self._groups(), "name": self.name})

    def to_yaml(self) -> str:
        """Return the configuration file, with the reasons as comments at its top."""
        import yaml

        head = "".join(f"# {reason}\n" for reason in self.reasons)
        return f"{MARK}\n{head}" + yaml.safe_dump(self._groups(), sort_keys=False, default_flow_style=None, width=110)


@dataclass(frozen=True, repr=False)
class Plans:
    """The result of `plan`: measurements, the plans by name, coarsest first, and their files by name."""

    data: DataFacts
    machine: MachineFacts
    plans: Mapping[str, Plan]
    files: Mapping[str, Path]

    def __repr__(self) -> str:
        rows = "; ".join(f"{file}: {', '.join(self.plans[name].classes)}" for name, file in self.files.items())
        return f"Plans({rows})"


def plan(
    root: str,
    classes: Sequence[str],
    *,
    out: str | Path = ".",
    datasets: Sequence[str] | None = None,
    minutes: float | None = None,
    trial: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Plans:
    """Measure data and machine, and write configurations that train: one for each voxel size that classes need.

    Args:
        root: data root, a folder or an ``s3://`` URL.
        classes: classes to segment.
        datasets: use only these.
        out: folder for ``plan_{N}nm.yaml``.
        minutes: time of each training: on the clock with a GPU, of all cores together (CPU minutes) without one; None:
            120 CPU minutes, or 300 epochs on a GPU.
        trial: run a training step of each, which measures batch size, memory and hours.

    Raises:
        InputError: no class is present in any crop.
        WriteError: a file exists (without ``overwrite``), or is not a plan.
    """
    folder = Path(out)
    data, machine = data_facts(root, list(classes), datasets, progress), machine_facts(folder)
    place = root if is_s3(root) else str(Path(root).expanduser().resolve())
    found = {item.name: item for item in propose(data, machine, place, minutes=minutes)}
    plans = Plans(data, machine, found, {name: folder / f"{name}.yaml" for name in found})
    write_plans(plans, datasets, trial=trial, overwrite=overwrite, progress=progress)
    return plans


def write_plans(
    plans: Plans, datasets: Sequence[str] | None, *, trial: bool, overwrite: bool, progress: Progress
) -> None:
    """Try a step of each plan if asked, and write its file; the arguments are those of `plan`."""
    for file in plans.files.values():
        require_own(file, contains(MARK), "plan", overwrite=overwrite)
    for number, item in enumerate(plans.plans.values()):
        if datasets:
            item.choose("dataset.datasets", list(datasets), "as given")
        if trial:
            progress(number, len(plans.plans), f"trying a step of {item.name}")
            try_step(item, plans.machine)
        write_file(plans.files[item.name], item.to_yaml().encode())


def machine_facts(folder: Path) -> MachineFacts:
    """Measure this machine; ``folder`` is the place of runs and cache."""
    import psutil
    import torch

    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(existing(folder)).free
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return MachineFacts(
        usable_cores(), memory, card.name if card else None, card.total_memory if card else 0, disk, cpu_has_bfloat16()
    )


def propose(data: DataFacts, machine: MachineFacts, root: str, *, minutes: float | None = None) -> list[Plan]:
    """Return one plan per voxel size that classes need, coarsest first; raise `InputError` if no class is present."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"the minutes of a training must be positive, got {minutes}")
    groups: dict[float, list[tuple[ClassFacts, str]]] = {}
    stems: dict[float, int] = {}
    for facts in data.classes:
        if facts.chord_nm is not None:
            size, stem, why = _voxel_size(facts, data, planes=machine.gpu is None)
            groups.setdefault(size, []).append((facts, why))
            stems[size] = min(stem, stems.get(size, stem))  # the finest structure decides the first stage
    if not groups:
        raise InputError("no crop contains any of the classes: there is nothing to learn; see `pytc describe`")
    return [
        _plan(size, stems[size], groups[size], data, machine, root, minutes) for size in sorted(groups, reverse=True)
    ]


def hours(plan: Plan, cores: int = 1) -> float | None:
    """Return the hours of the whole training: those of its time limit, else by the measured step, else None."""
    if (limit := plan.settings.get("training.max_cpu_minutes")) is not None:
        return float(limit) / 60 / cores
    if (limit := plan.settings.get("training.max_minutes")) is not None:
        return float(limit) / 60
    if plan.step_seconds is None:
        return None
    patches = plan.settings["data.patches_per_epoch"]
    return plan.settings["training.max_epochs"] * patches / plan.settings["data.batch_size"] * plan.step_seconds / 3600


# -- the choices -----------------------------------------------------------------------------------------------------
def _voxel_size(facts: ClassFacts, data: DataFacts, *, planes: bool) -> tuple[float, int, str]:
    """Return the voxel size of the run for a class (nm, of y and x), the stem of a 2-D network, and the reason.

    A 2-D network works at the coarsest size at which the class still spans `CHORD_PIXELS`; if raw is finer, a stem of 2
    makes it see and return voxels of half that size at nearly the same cost.
    """
    assert facts.chord_nm is not None
    if data.raw_voxel is None:
        sizes: tuple[float, ...] = SIZES
        finest = max(data.raw_nm, min(SIZES))
    else:
        finest = min(data.raw_voxel)
        sizes = tuple(finest * 2**n for n in range(6))
    wanted = facts.chord_nm / (CHORD_PIXELS if planes else CHORD_VOXELS)
    fitting = [size for size in sizes if finest * 0.99 <= size <= max(wanted, finest) * 1.001] or [finest]
    size = max(fitting)
    across = facts.chord_nm / size
    why = f"{facts.name} is {facts.chord_nm:.0f} nm thick on average, {across:.1f} voxels of {size:g} nm"
    if facts.test_nm is not None and size > 2 * facts.test_nm:
        size = max(s for s in sizes if s <= max(2 * facts.test_nm, finest))
        why += f"; the challenge scores it at {facts.test_nm:g} nm, so {size:g} nm was chosen, at most twice that"
    if not planes or size < 2 * finest * 0.99:
        return size, 1, why
    return size / 2, 2, why


def _plan(
    size: float,
    stem: int,
    group: Sequence[tuple[ClassFacts, str]],
    data: DataFacts,
    machine: MachineFacts,
    root: str,
    minutes: float | None,
) -> Plan:
    classes = tuple(facts.name for facts, _ in group)
    plan = Plan(size, classes)
    plan.settings |= {"dataset.data_root": root, "dataset.classes": list(classes)}
    # sections that are thicker than that stay as they are
    thickness = size if data.raw_voxel is None else max(size, data.raw_voxel[0])
    voxel = [thickness if thickness >= ANISOTROPIC * size else size, size, size]
    plan.choose("dataset.voxel_size", voxel, "; ".join(why for _, why in group))
    if machine.gpu is None:
        _choose_2d(plan, stem, voxel, data, machine, minutes)
    else:
        _choose_3d(plan, voxel, data, machine, minutes)
    for facts, _ in group:
        if facts.touching > TOUCHING:
            _choose_instances(plan, facts, planes=machine.gpu is None)
        elif facts.small_nm3 and facts.test_nm is None:
            _decode(plan, facts, {"method": "cc3d"}, "its labels are instances, and they do not touch")
        if facts.small_nm3:
            _decode(plan, facts, {"min_size_nm3": float(f"{facts.small_nm3:.1e}")}, "95 % of its instances are larger")
    _choose_training(plan)
    voxels = data.volume_um3 * 1e9 / math.prod(voxel)
    disk = voxels * 3 * 8  # raw and labels, with as much context again on each side
    reason = f"decoded crops take about {disk / 1e9:.1f} GB, {machine.disk / 1e9:.0f} GB are free"
    plan.choose("data.cache", "disk" if disk < machine.disk / 2 else "none", reason)
    workers = max(1, min(8, machine.cores - 1))
    plan.choose("data.num_workers", workers, f"cores: {machine.cores}, one of them for the network's process")
    rare = [facts.name for facts, _ in group if facts.share < 0.01]
    if rare:
        plan.choose("data.sampling", {"class": 1.0}, f"{', '.join(rare)} fill less than 1 % of the known voxels")
        if machine.gpu is None:  # batches of many patches
            pooled = {"DiceLoss": {"pooled": True}}
            plan.choose("model.loss_options", pooled, "Dice of whole batches, since most patches lack a rare class")
    return plan


def _choose_2d(
    plan: Plan, stem: int, voxel: Sequence[float], data: DataFacts, machine: MachineFacts, minutes: float | None
) -> None:
    plan.choose("model.architecture", "unet_2d", "there is no GPU: planes give most samples for the time of a CPU")
    reason = f"a stem of 2 lets it see and return voxels of {voxel[1]:g} nm" if stem == 2 else "as above"
    plan.choose("model.options", {"features": [16, 32, 64, 128], "stem": stem}, reason)
    reason = "the CPU has instructions for it" if machine.cpu_bf16 else "the CPU has no instructions for bfloat16"
    plan.choose("training.precision", "bf16-mixed" if machine.cpu_bf16 else "32", reason)
    most = min(data.extents_nm[1:]) / voxel[1]
    unit = 16 * stem  # the network needs multiples of half of this, and two pixels at its coarsest stage
    side = max(unit, min(_PIXELS, int(most) // unit * unit))
    extents = "x".join(f"{v:.0f}" for v in data.extents_nm)
    plan.choose("data.patch_size", [1, side, side], f"{side * voxel[1]:.0f} nm; crops are {extents} nm (median)")
    plan.choose("data.batch_size", max(8, _BATCH_PIXELS // side**2), f"{_BATCH_PIXELS} pixels in a step")
    epoch = 400 * plan.settings["data.batch_size"]
    plan.choose("data.patches_per_epoch", epoch, "400 steps between validations")
    plan.choose("inference.window", [16, 2 * side, 2 * side], "16 planes, twice a patch wide; smaller in small volumes")
    reason = f"planes are independent; within them, {round(side * 0.0625)} voxels at each face of a window are dropped"
    plan.choose("inference.overlap", [0.0, 0.0625, 0.0625], reason)
    isotropic = voxel[0] == voxel[1]
    if isotropic:
        plan.choose("inference.tta", "planes", "the average over the planes along z, y and x, in four orientations")
    else:
        plan.choose("inference.tta", ["zyx", "z-yx", "zy-x", "z-y-x"], "sections are thick: in-plane flips only")
    plan.choose("optimizer.lr", 2e-3, "docs/recipe.md")
    plan.choose("optimizer.weight_decay", 1e-2, "docs/recipe.md")
    plan.choose("training.max_cpu_minutes", _CPU_MINUTES if minutes is None else minutes, _said(minutes))
    if plan.settings["training.max_cpu_minutes"] >= _INVERTED_FROM:
        reason = "for raw of the opposite contrast; shorter trainings lose by it (docs/recipe.md)"
        plan.choose("data.intensity", {"invert": {"prob": 0.3}}, reason)


def _choose_3d(
    plan: Plan, voxel: Sequence[float], data: DataFacts, machine: MachineFacts, minutes: float | None
) -> None:
    gb, large = machine.gpu_memory / 1e9, machine.gpu_memory >= 24e9 and minutes is None
    sections = voxel[0] / voxel[1]  # thickness in pixels
    if sections > 1:
        reason = f"{machine.gpu} with {gb:.0f} GB; sections are {sections:.1f} times as thick as pixels"
        plan.choose("model.architecture", "residual_unet", reason)
        options = {"size": "M" if large else "S", "strides": "auto"}
        plan.choose("model.options", options, "strides and kernels of each stage by the voxel size (docs/networks.md)")
        units = (4, 32, 32)
    else:
        plan.choose("model.architecture", "mednext", f"{machine.gpu} with {gb:.0f} GB")
        reason = "10.5 M weights" if large else "5.6 M weights: less memory, and more steps in a given time"
        plan.choose("model.mednext_size", "B" if large else "S", reason)
        units = (16, 16, 16)
    plan.choose("training.precision", "bf16-mixed", "half the memory of float32, with its range")
    edge = 128 if machine.gpu_memory >= 12e9 else 96 if machine.gpu_memory >= 8e9 else 64
    wanted = edge * np.array([sections ** (-2 / 3), sections ** (1 / 3), sections ** (1 / 3)])  # as wide along all axes
    sides = np.minimum(wanted, np.divide(data.raw_extents_nm, voxel))
    patch = [max(unit, round(side / unit) * unit) for unit, side in zip(units, sides.tolist(), strict=True)]
    wide = "x".join(f"{n * size:.0f}" for n, size in zip(patch, voxel, strict=True))
    plan.choose("data.patch_size", patch, f"{wide} nm, about the same along all axes, as far as there is raw")
    if patch[-1] * voxel[-1] < _VIEW_NM / 2:
        plan.reasons.append(f"for more context than {wide} nm, add a coarser input (data.inputs)")
    if min(patch) >= 96 and sections == 1:
        plan.reasons.append("windows of 208 voxels predict larger volumes, at 1.3 times their voxels (docs/guide.md)")
    plan.choose("inference.tta", "flips", "the mean over eight mirror images, for eight times the time; none is faster")
    plan.choose("data.batch_size", 1, "a starting point")
    plan.choose("data.patches_per_epoch", EPOCH_PATCHES, "the default")
    if minutes is None:
        plan.choose("training.max_epochs", _EPOCHS, "a fixed length; the learning rate falls to zero over it")
    else:
        plan.choose("training.max_minutes", minutes, _said(minutes))


def _said(minutes: float | None) -> str:
    return "the default; the learning rate falls to zero over it" if minutes is None else "as given"


def _choose_instances(plan: Plan, facts: ClassFacts, *, planes: bool) -> None:
    """Add a head that separates the instances of a class, and decode with it (docs/instances.md)."""
    assert facts.chord_nm is not None
    head = {"kind": "boundary" if planes else "affinities", "class_name": facts.name}
    watershed = {"method": "watershed", "height": "boundary", "min_distance_nm": round(facts.chord_nm / 2)}
    why = f"{facts.touching:.0%} of the faces of {facts.name} instances touch another instance"
    plan.choose("model.heads", [*plan.settings.get("model.heads", []), head], why)
    _decode(plan, facts, watershed if planes else {"method": "mutex_watershed"}, "it is separated by the head")


def _decode(plan: Plan, facts: ClassFacts, how: dict[str, Any], why: str) -> None:
    """Add decoding parameters of a class."""
    classes = plan.settings.setdefault("decoding.classes", {})
    classes[facts.name] = {**classes.get(facts.name, {}), **how}
    plan.reasons += [f"decoding.classes.{facts.name}.{key} = {value}: {why}" for key, value in how.items()]


def _choose_training(plan: Plan) -> None:
    """Set what holds for every network; docs/recipe.md has the measurements."""
    if "training.max_epochs" not in plan.settings:
        plan.choose("training.max_epochs", -1, "the time ends the training")
    plan.choose("optimizer.decay_norm_and_bias", False, "decay is for the weights of convolutions")
    plan.choose("scheduler.name", "cosine", "a finished schedule gains more than a longer training")
    plan.choose("scheduler.warmup_steps", 50, "as above")
    plan.choose("training.ema", 0.99, "averaged weights validate smoothly")
    plan.choose("model.init_bias", "prevalence", "training does not begin with learning how rare a class is")
    plan.choose("data.augmentation", {"preset": "em", "strength": 1.0}, "docs/recipe.md")
