"""Compose a YAML file and ``key=value`` overrides to a checked `RunConfig` with Hydra."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from connectomics.config.heads import heads_of
from connectomics.config.schema import RunConfig
from connectomics.config.values import flat, read
from connectomics.errors import ConfigError, MissingError, UnknownNameError, nearest

Overrides = str | Sequence[str] | None
_PRIMARY = "connectomics_run"
#: Files of Hydra's own settings: not read, since a composed configuration has none of them, and they take half the time
_UNUSED = ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env")


def load_config(path: str | Path | None = None, *overrides: Overrides) -> RunConfig:
    """Compose a configuration file (with the files in its ``defaults:`` list) and overrides onto the schema.

    Args:
        path: the file; None: the schema's defaults.
        overrides: ``key=value`` in Hydra's grammar (``a.b=3``, ``a.list=[1,2]``), each as text or in a list. They win
            over the file, the file over its defaults list, and that over the schema.

    Raises:
        MissingError: the file does not exist.
        ConfigError: a key is unknown (the message names the nearest key), or a value has the wrong type or is out of
            range.
    """
    if path is None:
        return as_config(RunConfig(), *overrides)
    file = Path(path).expanduser()
    _check_file(file)
    # include the file in a primary configuration, so that its own defaults list needs no _self_
    config = _composed({"defaults": [file.stem, "_self_"]}, file.parent, overrides, str(file))
    if config.name == RunConfig.name:
        config.name = file.stem
    return config


def as_config(config: RunConfig | str | Path, *overrides: Overrides) -> RunConfig:
    """Return `load_config` of a file, or a configuration with overrides."""
    if not isinstance(config, RunConfig):
        return load_config(config, *overrides)
    if not any(overrides):  # no Hydra without need: its import takes longer than many a verb
        return config
    return _composed(asdict(config), Path(), overrides)


def _composed(
    node: dict[str, Any], folder: Path, overrides: Sequence[Overrides], where: str = "the configuration"
) -> RunConfig:
    """Compose values, or a ``defaults`` list of files in a folder, and overrides onto the schema."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = [text for item in overrides for text in ([item] if isinstance(item, str) else item or ())]
    defaults = [*node.get("defaults", ["_self_"]), *({f"override hydra/{group}": None} for group in _UNUSED)]
    ConfigStore.instance().store(name=_PRIMARY, node={**node, "defaults": defaults})
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder.resolve()), version_base="1.3"):
            composed = compose(config_name=_PRIMARY, overrides=[_override(o) for o in given])
        # interpolations (${dataset.voxel_size}) may refer to defaults of the schema
        renamed = _renamed(cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False)))
        values = _merged(asdict(RunConfig()), renamed)
        if "${" in str(renamed):
            values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(values), resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{where}: {reason}") from error
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = previous
    try:
        config = read(RunConfig, values, where, ConfigError)
        _check_parts(config, where)
    except ConfigError as error:
        raise _refusal(error, given) from error
    return config


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``under`` with the values of ``over``, group by group."""
    groups = [key for key, value in over.items() if isinstance(value, Mapping) and isinstance(under.get(key), dict)]
    return {**under, **over, **{key: _merged(under[key], over[key]) for key in groups}}


def _check_file(file: Path) -> None:
    """Check that the file exists and is YAML: Hydra's own message names neither the file nor the line."""
    import yaml

    if file.is_dir():
        raise ConfigError(f"{file} is a folder; give a configuration, a .yaml file")
    if not file.is_file():
        near = nearest(file.stem, [p.stem for p in file.parent.glob("*.yaml")]) if file.parent.is_dir() else None
        hint = f"; did you mean {file.parent / (near + '.yaml')}?" if near else ""
        raise MissingError(f"no configuration file at {file}{hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not a text file (UTF-8); give a YAML configuration") from error
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        line = f" at line {mark.line + 1}" if mark else ""
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise ConfigError(f"{file} is not valid YAML{line}: {problem}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file} must hold keys and values, got {type(content).__name__}")
    listed = (content or {}).get("defaults")
    for name in listed if isinstance(listed, list) else ():
        if str(name).startswith("/") and not Path(f"{file.parent}{name}.yaml").is_file():
            raise ConfigError(f"{file}: defaults: expected names of files in {file.parent} (without .yaml), got {name}")


def tutorial(name: str) -> Path:
    """Return the path of a configuration that comes with the package, such as ``phantom`` or ``cellmap_cos7``.

    Raises `MissingError` with the nearest name if there is none.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [f for f in (package / "tutorials", package.parent / "tutorials") if f.is_dir()]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(p.stem for folder in folders for p in folder.glob("*.yaml"))
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise MissingError(f"no tutorial configuration {name!r}{hint} Known: {', '.join(known)}; or give --config FILE")


def check_config(config: RunConfig) -> None:
    """Raise `ConfigError` if a value of a configuration is out of range, or its parts contradict each other.

    `load_config` does this; a configuration that a program builds or changes is checked before training.
    """
    _check_parts(read(RunConfig, asdict(config), "the configuration", ConfigError), "the configuration")


def _check_parts(config: RunConfig, where: str) -> None:
    """Check the rules that concern several keys; the schema has the rules of single keys."""
    classes, data, model, engine = config.dataset.classes, config.data, config.model, config.engine
    scheduler, training = config.scheduler, config.training
    given_for = "adapters" if model.weights_format == "connectomics" else f"weights_format={model.weights_format}"
    queue = engine.cluster != "local"
    given = {"address": engine.address is not None, "cluster": queue, "options": bool(engine.options)}
    unused = next((key for key, is_given in given.items() if is_given and engine.name == "local"), None)
    for wrong, message in (
        (not classes, "dataset.classes is empty; name at least one class"),
        (len(set(classes)) != len(classes), f"dataset.classes names a class twice: {classes}"),
        (
            config.dataset.name == "cellmap" and config.channels != len(classes),
            f"model.out_channels is {config.channels} but dataset.classes has {len(classes)} classes; set "
            "model.out_channels=null to use one channel per class",
        ),
        (
            len(model.loss_functions) != len(model.loss_weights),
            f"model.loss_functions has {len(model.loss_functions)} names, model.loss_weights "
            f"{len(model.loss_weights)} numbers; give one weight for each loss",
        ),
        (
            bool(model.heads) and config.dataset.name != "cellmap",
            f"model.heads needs dataset.name=cellmap, got {config.dataset.name}",
        ),
        (
            data.patches_per_epoch is not None and data.patches_per_epoch < data.batch_size,
            f"data.patches_per_epoch is {data.patches_per_epoch}, less than one batch (data.batch_size "
            f"{data.batch_size}): an epoch would have no step; increase the one or decrease the other",
        ),
        (
            scheduler.min_lr > config.optimizer.lr,
            f"scheduler.min_lr must be at most optimizer.lr ({config.optimizer.lr}), got {scheduler.min_lr}",
        ),
        (
            training.max_epochs < 0
            and training.max_steps < 0
            and training.max_minutes is None
            and training.max_cpu_minutes is None
            and scheduler.name != "constant",
            f"scheduler.name={scheduler.name} needs an end; set training.max_epochs, max_steps, max_minutes or "
            "max_cpu_minutes, or scheduler.name=constant",
        ),
        (
            scheduler.warmup_epochs > 0 and scheduler.warmup_steps > 0,
            f"scheduler.warmup_epochs is {scheduler.warmup_epochs} and scheduler.warmup_steps is "
            f"{scheduler.warmup_steps}; set one of them to 0",
        ),
        (
            training.mean_teacher.weight > 0 and not training.ema,
            "training.mean_teacher needs averaged weights, which are its teacher; set training.ema, such as 0.99",
        ),
        (
            model.weights is None and (model.weights_format != "connectomics" or model.adapters.rank > 0),
            f"model.{given_for} needs model.weights, which is not set; give a file or a run folder",
        ),
        (unused is not None, f"engine.{unused} needs engine.name=dask, got engine.name=local"),
        (
            queue and engine.workers < 1,
            f"engine.workers must be at least 1 with engine.cluster={engine.cluster}, got {engine.workers}",
        ),
        (
            engine.address is not None and (queue or bool(engine.options)),
            "engine.address names a scheduler that has its own workers; remove engine.cluster and engine.options, or "
            "the address",
        ),
        (
            bool(engine.options) and not queue,
            "engine.options apply to a queue only; set engine.cluster=slurm or lsf, or remove them",
        ),
    ):
        if wrong:
            raise ConfigError(f"{where}: {message}")
    for key, value in flat(asdict(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key} must be a finite number, got {value}")
    try:
        heads_of(config)
    except (ConfigError, UnknownNameError) as error:
        raise ConfigError(f"{where}: {error}") from error


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write a configuration as YAML that `load_config` reads back to the same values."""
    from omegaconf import OmegaConf

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), encoding="utf-8")
    temporary.replace(target)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as plain containers, for checkpoints and JSON."""
    return asdict(config)


def config_from_dict(data: Mapping[str, Any]) -> RunConfig:
    """Return the configuration from `config_to_dict`; raise `ConfigError` for keys that this version does not know."""
    return read(RunConfig, _renamed(data), "the configuration", ConfigError)


def known_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, groups included."""
    keys: list[str] = []
    hints = get_type_hints(schema)
    for entry in fields(schema):
        kind = hints[entry.name]
        keys.append(f"{prefix}{entry.name}")
        if isinstance(kind, type) and is_dataclass(kind):
            keys += known_keys(kind, f"{prefix}{entry.name}.")
    return keys


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the older keys ``resolution``, ``use_cache`` and ``inference.pyramid`` by those of the schema, which win
    if both are given."""
    renamed = {key: dict(group) if isinstance(group, Mapping) else group for key, group in data.items()}
    dataset, values = renamed.get("dataset"), renamed.get("data")
    inputs = values.get("inputs") if isinstance(values, dict) else None
    if isinstance(values, dict) and isinstance(inputs, list):
        values["inputs"] = [dict(item) if isinstance(item, Mapping) else item for item in inputs]
        inputs = values["inputs"]
    for group in (dataset, *(inputs or ())):
        if isinstance(group, dict) and "resolution" in group:
            old = group.pop("resolution")
            group.setdefault("voxel_size", old)
    if isinstance(values, dict):
        use_cache = values.pop("use_cache", False)
        if not isinstance(use_cache, bool):
            raise ConfigError(f"data.use_cache must be true or false, got {use_cache!r}")
        if values.get("cache") is None:
            values["cache"] = "disk" if use_cache else "none"
    inference = renamed.get("inference")
    if isinstance(inference, dict) and (pyramid := inference.pop("pyramid", False)):  # false was the default
        output = renamed.setdefault("output", {})
        output.setdefault("pyramid", pyramid)
    return renamed


def _override(text: str) -> str:
    """Return the override with the schema's key and Hydra's ++ ("add or override"), which does not require that a file
    sets the key. A value that Hydra's grammar cannot parse, such as a path with umlauts, becomes text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = text.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(f"override {text!r}: expected key=value, such as training.max_epochs=3")
    if key.startswith("~"):
        return text
    key = key.lstrip("+")
    if key == "dataset.resolution":
        key = "dataset.voxel_size"
    if key == "inference.pyramid":
        key = "output.pyramid"
    if key == "data.use_cache" and value.lower() in ("true", "false"):
        key, value = "data.cache", "disk" if value.lower() == "true" else "none"
    override = f"++{key}={value}"
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        if not value.startswith(("[", "{", "'", '"')):
            quoted = value.replace("'", "\\'")
            override = f"++{key}='{quoted}'"
    return override


def _refusal(error: ConfigError, overrides: Sequence[str]) -> ConfigError:
    """Add to an error the override that caused it, and for an unknown key the nearest key of any group."""
    text = str(error)
    unknown = re.search(r"unknown key '([^']+)'", text)
    if unknown:
        leaf, known = unknown[1].split(".")[-1], known_keys()
        # the same name in another group comes first: for data.lr it is optimizer.lr
        close = next((k for k in known if k.split(".")[-1] == leaf), None) or nearest(unknown[1], known)
        hint = f"; did you mean {close!r}?" if close else ""
        text = re.sub(r"unknown key '[^']+'.*", f"unknown key {unknown[1]!r}{hint}", text)
    key = unknown[1] if unknown else text.partition(": ")[2].split(" ")[0]
    blamed = [o for o in overrides if re.split(r"[=\[]", o.lstrip("+~"))[0] == re.split(r"[\[]", key)[0]]
    return ConfigError(f"override {blamed[-1]!r}: {text}" if blamed else text)


def import_plugins(names: Sequence[str]) -> None:
    """Import the user's modules (``plugins``), which register what they add (`connectomics.models.register_model`).

    Modules must be installed or in a folder of PYTHONPATH. No other folder is searched, so that a checkpoint or package
    from elsewhere cannot run a file that happens to be next to it.

    Raises:
        MissingError: a module, or one that it imports, is not installed.
        ConfigError: its import fails.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            absent = str(error.name)
            if name == absent or name.startswith(f"{absent}."):
                raise MissingError(
                    f"plugins: there is no module {name!r}; install it, or add its folder to PYTHONPATH "
                    "(PYTHONPATH=FOLDER pytc ...)"
                ) from error
            raise MissingError(f"plugins: {name} needs {absent}, which is not installed; install it") from error
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"plugins: {name} cannot be imported: {type(error).__name__}: {reason}") from error
