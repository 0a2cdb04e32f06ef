"""Plan a whole challenge submission: a configuration for each voxel size, and the run book that uses them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.classes import CLASSES, unions_of
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.fetch import PUBLIC
from connectomics.config import RunConfig
from connectomics.data.normalization import table as gray_ranges
from connectomics.errors import InputError
from connectomics.inference.symmetry import symmetries
from connectomics.inference.windows import overlap_per_axis
from connectomics.io import store
from connectomics.io.replacing import contains, require_own
from connectomics.io.write import write_file
from connectomics.pipeline.data_facts import DataFacts, data_facts
from connectomics.pipeline.file_templates import from_template
from connectomics.pipeline.plan import MachineFacts, Plan, Plans, hours, machine_facts, propose, write_plans
from connectomics.pipeline.targets import predicted_classes
from connectomics.progress import Progress, silent

#: Operations of a training step per forward pass: the backward pass takes twice as many.
_PASSES = 3


@dataclass(frozen=True)
class TargetGpu:
    """A GPU that is not in this machine: its memory in bytes, and its sustained operations per second in training."""

    memory: int
    flops: float


@dataclass(frozen=True)
class PlanCost:
    """Expected cost of one configuration.

    Attributes:
        train_hours: of all steps, without loading.
        predict_hours: of the crop table. None if nothing was measured.
        flops: operations of a training step.
        by: what the hours were computed from.
    """

    train_hours: float | None
    predict_hours: float | None
    flops: float
    by: str


@dataclass(frozen=True)
class ChallengePlan:
    """The result of `plan_challenge`.

    Attributes:
        plans: measurements, configurations and their files.
        run_book: the Makefile.
        unions: groups that each configuration predicts as unions of atoms.
        costs: by name of the configuration.
        absent: classes without a present voxel, which no network can learn.
    """

    plans: Plans
    run_book: Path
    unions: Mapping[str, tuple[str, ...]]
    costs: Mapping[str, PlanCost]
    absent: tuple[str, ...]


def plan_challenge(
    root: str,
    *,
    out: str | Path = ".",
    classes: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    crops: str | Path | None = None,
    data_root: str | Path | None = None,
    minutes: float | None = None,
    from_atoms: bool = False,
    gpu: TargetGpu | None = None,
    trial: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ChallengePlan:
    """Write a configuration for each voxel size that the scored classes need, and a Makefile from data to submission.

    A group class whose atoms are all in the same configuration is predicted as their union (``inference.groups``) if no
    crop would be lost by that: where only the group is annotated, atoms learn nothing of its inside.

    Args:
        root: data root.
        out: folder for ``plan_{N}nm.yaml`` and ``Makefile``.
        classes: only these; None: all 48 scored classes.
        datasets: only these.
        crops: crop table of the submission; None: ``test_crops.csv`` of the root, else the challenge's.
        data_root: local data root to train on, if ``root`` is an ``s3://`` URL; the run book fetches into it.
        minutes: time of each training, as for `plan`.
        from_atoms: predict every group as a union whose atoms are all in one configuration.
        gpu: plan for this GPU instead of this machine's, without a trial.
        trial: run a training step of each configuration, which measures batch size and hours.

    Raises:
        InputError: no class is present in any crop.
        WriteError: a file exists (without ``overwrite``), or was not written by this verb.
    """
    folder = Path(out)
    remote = root if store.is_s3(root) else None
    if data_root is not None and remote is None:
        raise InputError(f"--data-root is for a remote ROOT (s3://...), got {root}; leave it out to train on {root}")
    place = remote if remote and data_root is None else str(Path(data_root or root).expanduser().resolve())
    table_name = _crop_table(remote or place, crops)
    table = CropTable.resolve(table_name)
    wanted = list(classes) if classes is not None else [c.name for c in CLASSES.values() if c.scored]
    data, machine = data_facts(root, wanted, datasets, progress), machine_facts(folder)
    if gpu is not None:
        machine = replace(machine, gpu=f"a GPU with {gpu.memory / 1e9:.0f} GB", gpu_memory=gpu.memory)
    found = propose(data, machine, place, minutes=minutes)
    unions = _share_atoms(found, data, from_atoms)
    found = [item for item in found if item.classes]
    files = {item.name: folder / f"{item.name}.yaml" for item in found}
    plans = Plans(data, machine, {item.name: item for item in found}, files)
    require_own(folder / "Makefile", contains(MARK), "plan", overwrite=overwrite)
    write_plans(plans, datasets, trial=trial and gpu is None, overwrite=overwrite, progress=progress)
    costs = {item.name: plan_cost(item, table, machine, gpu) for item in found}
    absent = tuple(facts.name for facts in data.classes if facts.chord_nm is None)
    notes = from_template("plan_notes", plans=found, unions=unions, costs=costs, absent=absent).splitlines()
    source = remote if data_root is not None else None
    # the table has all of the challenge's data sets
    if remote is None and set(datasets or Catalog.open(root).datasets) <= gray_ranges().keys():
        source = PUBLIC
    planned = {name for item in found for name in (*item.classes, *unions.get(item.name, ()))}
    asked = {row.class_name for row in table}
    part = () if asked <= planned else sorted(asked & planned)
    write_file(folder / "Makefile", run_book(place, table_name, list(files), notes, source, part).encode())
    return ChallengePlan(plans, folder / "Makefile", unions, costs, absent)


def forward_flops(config: RunConfig) -> float:
    """Return the floating-point operations of a forward pass of one patch, counted without computing anything."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from connectomics.data.dataset.build import inputs_of
    from connectomics.lightning.network import build_network

    shapes = [tuple(config.data.patch_size), *(shape for _, shape in inputs_of(config))]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = build_network(config, len(config.dataset.classes))
        network(*(torch.empty(1, 1, *shape) for shape in shapes))
    return float(counter.get_total_flops())


def plan_cost(plan: Plan, table: CropTable, machine: MachineFacts, gpu: TargetGpu | None = None) -> PlanCost:
    """Return the expected hours: for the given GPU from its speed, else from the step that was tried, if any."""
    config, batch = plan.config(), int(plan.settings["data.batch_size"])
    flops = _PASSES * batch * forward_flops(config)
    seconds, by = plan.step_seconds, f"a training step that was measured on {machine.gpu or 'this CPU'}"
    if gpu is not None:
        seconds, by = flops / gpu.flops, f"{gpu.flops / 1e12:g} TFLOP/s, as given"
    if seconds is None:
        by = "nothing: no step was tried and no speed given"
    if {"training.max_minutes", "training.max_cpu_minutes"} & plan.settings.keys():
        by = f"the time limit of training; prediction: {by}"
    train = hours(replace(plan, step_seconds=seconds), 1 if machine.gpu else machine.cores)
    return PlanCost(train, None if seconds is None else _predict_hours(config, table, seconds / batch), flops, by)


def _predict_hours(config: RunConfig, table: CropTable, seconds: float) -> float:
    """Return the hours of predicting the crops of a table that ask for a class of the network, if a training step takes
    ``seconds`` for a patch."""
    window, size = config.inference.window or config.data.patch_size, config.dataset.voxel_size
    overlap = overlap_per_axis(config.inference.overlap)
    stride = [max(1.0, n * (1 - share)) * s for n, share, s in zip(window, overlap, size, strict=True)]
    asked = CropTable(tuple(row for row in table if row.class_name in predicted_classes(config)))
    windows = sum(
        math.prod(math.ceil(e / step) for e, step in zip(box.extent, stride, strict=True))
        for box in asked.boxes().values()
    )
    passes = windows * len(symmetries(config.inference.tta)) * math.prod(window) / math.prod(config.data.patch_size)
    return passes * seconds / _PASSES / 3600


def _crop_table(root: str, crops: str | Path | None) -> str:
    if crops is not None:
        return "challenge" if str(crops) == "challenge" else str(Path(crops).expanduser().resolve())
    own = store.join(root, "test_crops.csv")
    return own if not store.is_s3(root) and store.exists(own) else "challenge"


def _share_atoms(plans: Sequence[Plan], data: DataFacts, always: bool) -> dict[str, tuple[str, ...]]:
    """Take groups out of the plans that follow from the atoms of one plan; return these by the name of that plan."""
    crops = {facts.name: facts.crops for facts in data.classes}
    found: dict[str, tuple[str, ...]] = {}
    for plan in plans:
        atoms = [name for name in plan.classes if name in CLASSES and not CLASSES[name].is_group]
        follow = []
        for name, parts in unions_of(atoms, True).items():
            owner = next((other for other in plans if name in other.classes), None)
            loses = owner is None or owner is not plan or crops[name] > min(crops[part] for part in parts)
            if owner is None or (loses and not always):
                continue
            if name in {str(head.get("class_name")) for head in owner.settings.get("model.heads", [])}:
                continue  # heads describe classes of their network
            owner.classes = tuple(other for other in owner.classes if other != name)
            for key, value in owner.settings.items():  # weights of classes
                if isinstance(value, dict) and name in value and key != "decoding.classes":
                    owner.settings[key] = {other: weight for other, weight in value.items() if other != name}
            owner.settings["dataset.classes"] = list(owner.classes)
            follow.append(name)
        if follow:
            plan.choose("inference.groups", follow, "unions of their atoms, which this network predicts")
            found[plan.name] = tuple(follow)
    return found


def gpu_of(memory_gb: float | None, tflops: float | None) -> TargetGpu | None:
    """Return the GPU of ``--gpu-memory`` and ``--gpu-tflops``; raise `InputError` if only one is given."""
    if memory_gb is None and tflops is None:
        return None
    if memory_gb is None or tflops is None or not (memory_gb > 0 and tflops > 0):
        raise InputError(
            f"give --gpu-memory (GB) and --gpu-tflops together, both above 0, got {memory_gb} and {tflops}"
        )
    return TargetGpu(int(memory_gb * 1e9), tflops * 1e12)


# -- the run book ------------------------------------------------------------------------------------------------------
#: First line of the Makefiles that are written.
MARK = "# written by pytc plan --challenge"


def run_book(
    root: str, crops: str, plans: Sequence[str], notes: Sequence[str], source: str | None, classes: Sequence[str] = ()
) -> str:
    """Return the text of the Makefile.

    Args:
        root: data root.
        crops: crop table of the submission, its path or "challenge".
        plans: names of configurations beside the Makefile.
        notes: lines for its top.
        classes: what to validate; none: all that the table asks for.
        source: where `pytc fetch` finds the data, ``s3://bucket``; None: nowhere, the step does nothing.
    """
    return from_template(
        "Makefile", mark=MARK, data=_word(root), crops=_word(crops), plans=plans, notes=notes, classes=classes,
        source=None if source is None else _word(source),
    )  # fmt: skip


def _word(text: str) -> str:
    """Quote a text for the shell, and its dollar signs for make."""
    return shlex.quote(text).replace("$", "$$")
