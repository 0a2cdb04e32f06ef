"""A study file: a base configuration, the changes to compare, seeds and folds; and the rows that result from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from connectomics.config import (
    RunConfig,
    as_config,
    check_config,
    config_from_dict,
    config_to_dict,
    known_keys,
    load_config,
)
from connectomics.config.values import Group, one_of, read
from connectomics.errors import ConfigError, ConnectomicsError, MissingError, nearest

BASE = "base"  # name of the arm without a change, in an ablation
#: Keys that say where files are: they do not change a result.
_PLACES = ("output_dir", "name", "data.cache_dir", "dataset.data_root", "dataset.split_file", "logging.mlflow_uri",
           "model.weights")  # fmt: skip
#: Keys that an arm cannot change: all arms are compared on the same held-out data. Split files of arms may differ in
#: what is trained on.
_COMMON = ("data_root", "datasets", "crops", "split", "held_out", "train_val_split")
#: Columns of the tables, besides the scores.
_COLUMNS = re.compile("arm|rows|complete|seed|fold|state|last|steps|cpu_s|device_s|error|identity|folder|code")
_FIXED = ("output_dir", "name", "system.seed", *(f"dataset.{name}" for name in _COMMON))


@dataclass
class FoldsConfig(Group):
    """Cross-validation; see `connectomics.data.run_split.run_folds`."""

    by: Annotated[str, one_of("crop", "box", "dataset")] = "crop"
    number: Annotated[int, Field(ge=2)] = 5  # of folds; not for by: dataset, which has one for each


@dataclass
class HalvingConfig(Group):
    """Stop arms that fall behind: successive halving, https://arxiv.org/abs/1502.07943."""

    steps: list[Annotated[int, Field(ge=1)]] = field(default_factory=list)  # optimizer steps, ascending
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of the arms that continues, rounded up


@dataclass
class StudyFile(Group):
    """The content of a study file."""

    base: Any = None  # a configuration file, by its path from the study file, or its content
    overrides: dict[str, Any] = field(default_factory=dict)  # dotted key -> value, for all arms
    #: dotted key -> list of values, or a name -> {level: {dotted key: value}}; "~key" removes a key
    factors: dict[str, Any] = field(default_factory=dict)
    mode: Annotated[str, one_of("ablation", "grid")] = "ablation"  # the base and single changes | all combinations
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = field(default_factory=lambda: [1])
    folds: FoldsConfig | None = None  # null: one split, as the base has it
    scores: list[str] = field(default_factory=list)  # val/... or evaluate/CLASS/MEASURE; empty: checkpoint.monitor
    best: Annotated[str, one_of("max", "min")] = "max"  # whether a high or a low value of the first score is better
    halving: HalvingConfig | None = None


@dataclass(frozen=True)
class Arm:
    """One thing to compare: a configuration, and what it changes in the base (dotted key -> value).

    ``levels``: factor -> level, in a grid."""

    name: str
    changes: Mapping[str, Any]
    config: RunConfig
    levels: Mapping[str, str] = field(default_factory=dict)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> tuple[StudyFile, RunConfig, list[Arm]]:
    """Return a study file, its base configuration and its arms, all checked.

    Args:
        path: the file. overrides: ``key=value`` for all arms; they win over the file's ``overrides``.

    Raises:
        MissingError: the file or its base does not exist. ConfigError: a key is unknown, a value is not valid, or two
            arms are the same.
    """
    import yaml

    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingError(f"no study file at {file}; expected a YAML file with base, factors and seeds") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    study = read(StudyFile, content, str(file), ConfigError)
    base = _base(study, file, overrides)
    arms = _arms(study, base, file)
    study.scores = study.scores or [base.checkpoint.monitor]
    _check(study, base, file)
    own = [a.name for a in arms if a.config.dataset.split_file != base.dataset.split_file]
    if own and study.folds is not None:
        raise ConfigError(f"{file}: {own[0]} sets dataset.split_file, but folds make the splits; remove one of them")
    return study, base, arms


def _check(study: StudyFile, base: RunConfig, file: Path) -> None:
    steps = [] if study.halving is None else study.halving.steps
    first, monitor = study.scores[0], base.checkpoint
    system = base.system
    devices = system.cpu_processes if system.accelerator == "cpu" else system.num_gpus
    named = study.factors if study.mode == "grid" else ()
    taken = next((name for name in named if _COLUMNS.fullmatch(name) or name.split(" ")[0] in study.scores), None)
    for wrong, message in (
        (taken is not None, f"factor {taken} has the name of a column of the tables; give it another one"),
        (not study.seeds, "seeds is empty; give at least one, as in [1, 2, 3]"),
        (len(set(study.seeds)) < len(study.seeds), f"seeds names a seed twice: {study.seeds}"),
        (
            study.halving is not None and (not steps or steps != sorted(set(steps))),
            f"halving.steps must be numbers of optimizer steps in ascending order, got {steps}",
        ),
        (
            study.halving is not None and first.startswith("evaluate/"),
            f"halving compares arms during training, and the first score is {first}; put a val/ score first",
        ),
        (
            first == monitor.monitor and study.best != monitor.mode,
            f"best is {study.best}, but checkpoint.mode of {first} is {monitor.mode}; make them the same",
        ),
        (
            devices > 1 or system.cpu_processes > 1,
            f"a study trains each row on one device, the base asks for {max(devices, system.cpu_processes)}; set "
            "system.num_gpus=1 and system.cpu_processes=1, and use --workers for several rows at once",
        ),
    ):
        if wrong:
            raise ConfigError(f"{file}: {message}")


def _base(study: StudyFile, file: Path, overrides: Sequence[str]) -> RunConfig:
    if isinstance(study.base, str):
        base = load_config(file.parent / study.base)
    elif isinstance(study.base, Mapping):
        base = config_from_dict(study.base)
    else:
        raise ConfigError(f"{file}: base must be a configuration file or its content, got {study.base!r}")
    return as_config(changed(base, study.overrides, f"{file}, overrides"), overrides)


def changed(config: RunConfig, changes: Mapping[str, Any], where: str) -> RunConfig:
    """Return a configuration with other values: dotted key -> value; a key with ``~`` before it is removed.

    A mapping replaces the mapping that was there. Raises `ConfigError`, beginning with ``where``.
    """
    values = config_to_dict(config)
    for key, value in changes.items():
        *groups, last = key.lstrip("~").split(".")
        place: Any = values
        for group in groups:
            place = place.setdefault(group, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: cannot set {key}: {'.'.join(groups)} holds a value, not keys")
        if not key.startswith("~"):
            place[last] = value
        elif place.pop(last, place) is place:
            raise ConfigError(f"{where}: cannot remove {key[1:]}: there is no such key; it has {', '.join(place)}")
    try:
        found = config_from_dict(values)
        check_config(found)
    except ConnectomicsError as error:
        text = str(error).removeprefix("the configuration: ")
        unknown = re.search(r"unknown key '([^']+)'$", text)
        if unknown and (close := nearest(unknown[1], known_keys())):
            text += f"; did you mean {close!r}?"
        raise ConfigError(f"{where}: {text}") from error
    return found


def _arms(study: StudyFile, base: RunConfig, file: Path) -> list[Arm]:
    factors = {name: _levels(name, levels, file) for name, levels in study.factors.items()}
    if study.mode == "grid":
        chosen = [dict(zip(factors, combination, strict=True)) for combination in product(*factors.values())]
    else:
        chosen = [{}, *({name: level} for name, levels in factors.items() for level in levels)]
    arms: dict[str, Arm] = {}
    for levels in chosen:
        name = " ".join(f"{factor}={level}" for factor, level in levels.items()) or BASE
        changes = {key: value for factor, level in levels.items() for key, value in factors[factor][level].items()}
        arm = Arm(name, changes, changed(base, changes, f"{file}, {name}"), levels if study.mode == "grid" else {})
        content = json.dumps(config_to_dict(arm.config), sort_keys=True)
        if content not in arms:
            arms[content] = arm
        elif arms[content].name != BASE or study.mode == "grid":
            raise ConfigError(f"{file}: {name} and {arms[content].name} are the same configuration; remove one of them")
    return list(arms.values())


def _levels(name: str, levels: Any, file: Path) -> dict[str, dict[str, Any]]:
    """The levels of a factor by name, each with its changes."""
    if isinstance(levels, list) and levels:
        texts = [v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for v in levels]
        found = {text: {name: value} for text, value in zip(texts, levels, strict=True)}
        if len(found) < len(levels):
            raise ConfigError(f"{file}: factor {name} names a value twice: {levels}")
    elif isinstance(levels, Mapping) and levels and all(isinstance(c, Mapping | None) for c in levels.values()):
        found = {str(level): dict(changes or {}) for level, changes in levels.items()}
    else:
        raise ConfigError(
            f"{file}: factor {name} must be a list of values of a dotted key, or {{level: {{dotted key: value}}}}, got "
            f"{levels!r}"
        )
    for key in (key.lstrip("~") for changes in found.values() for key in changes):
        if key in _FIXED:
            other = "give seeds" if key == "system.seed" else "set it in the base"
            raise ConfigError(f"{file}: factor {name} cannot change {key}, which all arms share; {other}")
    return found


# -- rows ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """One training: an arm with a seed on a fold.

    Attributes:
        identity: hash of the configuration, the split and the data; a row with another identity is another row.
        folder: its run folder, whose name ends with the identity. weights: identity of those that it starts from, see
            `connectomics.pipeline.study_row.weights_identity`. levels: of its arm.
    """

    arm: str
    seed: int
    fold: str
    config: RunConfig = field(repr=False, hash=False)
    identity: str
    folder: Path
    weights: str = ""
    levels: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    @property
    def name(self) -> str:
        """The row in words."""
        return f"{self.arm}, seed {self.seed}" + (f", fold {self.fold}" if self.fold else "")


def make_row(arm: Arm, seed: int, fold: str, split: tuple[Sequence[str], Sequence[str], Path],
             made_of: tuple[str, str], out: Path) -> Row:  # fmt: skip
    """Return the row of an arm.

    Args:
        split: entries for training and validation, and their file. made_of: identity of the data, and of the weights
            that it starts from ("": none). out: the study's folder.
    """
    train, held, file = split
    dataset = replace(arm.config.dataset, split="crop", held_out=[], split_file=str(file))
    system = replace(arm.config.system, seed=seed)
    config = replace(arm.config, dataset=dataset, system=system, name="row", output_dir=str(out))
    values = asdict(config)
    for key in _PLACES:
        *groups, last = key.split(".")
        place = values
        for group in groups:
            place = place[group]
        place.pop(last)
    content = json.dumps([values, list(train), list(held), "".join(made_of)], sort_keys=True, default=str)
    identity = hashlib.sha256(content.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.=-]+", "_", f"{arm.name}-{fold}-{seed}" if fold else f"{arm.name}-{seed}")[-80:]
    return Row(arm.name, seed, fold, config, identity, out / "rows" / f"{name}-{identity}", made_of[1], arm.levels)
