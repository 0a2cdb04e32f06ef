"""From a YAML file and ``key=value`` overrides to a checked `RunConfig`, by Hydra's composition."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from connectomics.config.finite import check_finite
from connectomics.config.intensity_range import check_intensity_range
from connectomics.config.schema import SCORE_RULES, EngineConfig, RunConfig
from connectomics.errors import ConfigError, MissingError, UnknownNameError, nearest

_SCHEMA = "connectomics_schema"
_PRIMARY = "connectomics_run"


def known_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, groups included."""
    keys: list[str] = []
    hints = get_type_hints(schema)
    for entry in fields(schema):
        kind = hints[entry.name]
        keys.append(f"{prefix}{entry.name}")
        if isinstance(kind, type) and is_dataclass(kind):
            keys += known_keys(kind, f"{prefix}{entry.name}.")
    return keys


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Compose ``path`` (with the files in its ``defaults:`` list) and ``overrides`` onto the schema.

    Later wins: schema defaults, then the files of the defaults list, then the file itself, then the overrides (Hydra's
    grammar: ``a.b=3``, ``a.list=[1,2]``; keys of free-form groups such as ``data.intensity`` are added or overridden
    alike). An unknown key or a value of the wrong type raises
    `ConfigError` in one line, naming the nearest known key. Without a path, the schema's defaults.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = None if path is None else Path(path).expanduser()
    if file is not None and not file.is_file():
        near = nearest(file.stem, [p.stem for p in file.parent.glob("*.yaml")]) if file.parent.is_dir() else None
        hint = f"; did you mean {file.parent / (near + '.yaml')}?" if near else ""
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; give a configuration, a .yaml file")
        raise MissingError(f"no configuration file at {file}{hint}")
    if file is not None:
        _check_yaml(file)
    store = ConfigStore.instance()
    store.store(name=_SCHEMA, node=RunConfig)
    defaults: list[Any] = [_SCHEMA, *([file.stem] if file else []), "_self_"]
    store.store(name=_PRIMARY, node={"defaults": defaults})
    folder = (file.parent if file else Path.cwd()).resolve()
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = compose(config_name=_PRIMARY, overrides=[_open(o) for o in overrides])
            config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, file, overrides)) from error
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = previous
    assert isinstance(config, RunConfig)  # the schema is first in the defaults list
    extra = next(_extra_keys(config), None)
    if extra is not None:
        raise ConfigError(_unknown_key(extra, str(file or "the configuration")))
    if file is not None and config.name == RunConfig.name:
        config.name = file.stem
    check_config(config, str(file or "the configuration"))
    return config


def tutorial(name: str) -> Path:
    """The path of a configuration that comes with the program (``phantom``, ``cellmap_cos7``), from a checkout or an
    installed package; `MissingError` with the nearest name where there is none."""
    package = Path(__file__).resolve().parents[1]
    folders = [f for f in (package / "tutorials", package.parent / "tutorials") if f.is_dir()]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(p.stem for folder in folders for p in folder.glob("*.yaml"))
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise MissingError(f"no tutorial configuration {name!r}{hint} There are: {', '.join(known)}; or give --config FILE")


def check_config(config: RunConfig, where: str) -> None:
    """Raise `ConfigError` where the parts of a configuration do not fit each other."""
    n_classes = len(config.dataset.classes)
    if n_classes == 0:
        raise ConfigError(f"{where}: dataset.classes is empty; name at least one class")
    if len(set(config.dataset.classes)) != n_classes:
        raise ConfigError(f"{where}: dataset.classes names a class twice: {config.dataset.classes}")
    if config.dataset.name == "cellmap" and config.channels != n_classes:
        raise ConfigError(
            f"{where}: model.out_channels is {config.channels} but dataset.classes has {n_classes} classes; "
            "set them alike, or model.out_channels=null to take one channel a class"
        )
    for key, value, length in (
        ("dataset.resolution", config.dataset.resolution, 3),
        ("data.patch_size", config.data.patch_size, 3),
        ("inference.block_size", config.inference.block_size, 3),
    ):
        if len(value) != length or min(value) <= 0:
            raise ConfigError(f"{where}: {key} must be three positive numbers (z, y, x), found {value}")
    for key, place in (("output_dir", config.output_dir), ("data.cache_dir", config.data.cache_dir)):
        if place is not None and "://" in place:
            raise ConfigError(f"{where}: {key} must be a folder on a local disk, got the URL {place}")
    _check_ranges(config, where)
    if len(config.model.loss_functions) != len(config.model.loss_weights):
        raise ConfigError(
            f"{where}: model.loss_functions has {len(config.model.loss_functions)} names, model.loss_weights "
            f"{len(config.model.loss_weights)} numbers; give one weight for each loss"
        )
    _check_heads(config, where)
    if not 0.0 <= config.inference.overlap < 1.0:
        raise ConfigError(
            f"{where}: inference.overlap must be at least 0 and below 1, found {config.inference.overlap}"
        )
    _one_of(where, "dataset.name", config.dataset.name, ("cellmap", "cellmap_single"))
    _one_of(where, "dataset.split", config.dataset.split, ("crop", "dataset", "leave_one_out"))
    _one_of(where, "system.accelerator", config.system.accelerator, ("auto", "gpu", "cpu"))
    _one_of(where, "data.worker_start", config.data.worker_start, ("forkserver", "spawn", "fork"))
    _one_of(where, "data.cache", config.data.cache or "none", ("none", "memory", "disk"))
    _one_of(where, "model.fusion", config.model.fusion, ("encoder", "channels"))
    _one_of(where, "decoding.table", config.decoding.table, ("csv", "parquet"))
    _one_of(where, "inference.blending", config.inference.blending, ("gaussian", "constant"))
    _one_of(where, "inference.uncertainty", config.inference.uncertainty, ("none", "variance", "entropy", "dropout"))
    _one_of(where, "inference.dtype", config.inference.dtype, ("uint8", "float16"))
    _one_of(where, "score.rules", config.score.rules, SCORE_RULES)
    _check_tta(where, config.inference.tta)
    batch = config.inference.batch_size
    if batch != "auto" and not (type(batch) is int and batch >= 1):
        raise ConfigError(f"{where}: inference.batch_size must be at least 1, or auto, found {batch!r}")
    _check_engine(where, config.engine)
    if not 0.0 < config.dataset.train_val_split <= 1.0:
        raise ConfigError(
            f"{where}: dataset.train_val_split must be above 0 and at most 1, found {config.dataset.train_val_split}"
        )


def _check_heads(config: RunConfig, where: str) -> None:
    from connectomics.config.heads import heads_of  # which imports the schema, as this module does

    if config.model.heads and config.dataset.name != "cellmap":
        raise ConfigError(f"{where}: model.heads needs dataset.name=cellmap, found {config.dataset.name}")
    try:
        heads_of(config)
    except (ConfigError, UnknownNameError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_ranges(config: RunConfig, where: str) -> None:
    """Numbers that would make no run, or that a library would refuse with a traceback long after the start."""
    data, training, inference = config.data, config.training, config.inference
    least: tuple[tuple[str, float | None, float], ...] = (
        ("system.seed", config.system.seed, 0),
        ("data.batch_size", data.batch_size, 1),
        ("data.patches_per_epoch", data.patches_per_epoch, 1),
        ("data.validation_windows", data.validation_windows, 1),
        ("data.num_workers", data.num_workers, 0),
        ("data.cache_context", data.cache_context, 0),
        ("data.cache_gb", data.cache_gb, 0),
        ("data.chunk_cache_mb", data.chunk_cache_mb, 0),
        ("checkpoint.every_n_steps", config.checkpoint.every_n_steps, 1),
        ("training.gradient_clip_val", training.gradient_clip_val, 0),
        ("early_stopping.patience", config.early_stopping.patience, 0),
        ("checkpoint.save_top_k", config.checkpoint.save_top_k, -1),
        ("inference.dropout_samples", inference.dropout_samples, 2),
        ("inference.context", inference.context, 0),
        ("decoding.blockwise_above", config.decoding.blockwise_above, 0),
    )
    check_finite(config, where)
    for key, number, low in least:
        if number is not None and number < low:
            raise ConfigError(f"{where}: {key} must be at least {low}, found {number}")
    if config.system.seed >= 2**32:
        raise ConfigError(f"{where}: system.seed must be below 2^32, found {config.system.seed}")
    if not 0.0 <= data.min_known <= 1.0:
        raise ConfigError(f"{where}: data.min_known is a share, from 0 to 1, found {data.min_known}")
    if data.cache not in (None, "disk") and data.use_cache:
        raise ConfigError(
            f"{where}: data.use_cache=true means data.cache=disk, found data.cache={data.cache}; keep one"
        )
    for number, view in enumerate(data.inputs):
        for key, values in (("resolution", view.resolution), ("patch_size", view.patch_size)):
            if len(values) != 3 or min(values) <= 0:
                raise ConfigError(
                    f"{where}: data.inputs[{number}].{key} must be three positive numbers (z, y, x), found {values}"
                )
    if data.patches_per_epoch is not None and data.patches_per_epoch < data.batch_size:
        raise ConfigError(
            f"{where}: data.patches_per_epoch is {data.patches_per_epoch}, less than one batch (data.batch_size "
            f"{data.batch_size}): an epoch would have no step; raise the one or lower the other"
        )
    try:
        check_intensity_range(data.intensity_range)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    window = inference.window
    if window is not None and (len(window) != 3 or min(window) < 1):
        raise ConfigError(f"{where}: inference.window must be three positive numbers (z, y, x), found {window}")


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the composed configuration as YAML that `load_config` reads back to the same values."""
    from omegaconf import OmegaConf

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
    temporary.replace(target)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain containers, for checkpoints and JSON."""
    from dataclasses import asdict

    return asdict(config)


def config_from_dict(data: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_dict`; raises `ConfigError` on keys that this version does not know."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), data))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, None, ())) from error
    assert isinstance(config, RunConfig)
    return config


def _open(override: str) -> str:
    """The override with Hydra's "add or override" before keys below a free-form group (``data.intensity.noise={}``):
    which of the two it is depends on the file, and is nothing to bother with on a command line. A value that its
    grammar has no place for, as a path with umlauts or brackets, is taken as text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(f"{override!r} sets nothing: an override is key=value, as in training.max_epochs=3")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        if not value.startswith(("[", "{", "'", '"')):
            text = value.replace("'", "\\'")
            override = f"{key}='{text}'"
    return f"++{override}" if any(key.startswith(f"{group}.") or key == group for group in _free_groups()) else override


def _free_groups(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Dotted keys whose value maps free names to values."""
    groups: list[str] = []
    hints = get_type_hints(schema)
    for entry in fields(schema):
        kind = hints[entry.name]
        if get_origin(kind) is dict:
            groups.append(f"{prefix}{entry.name}")
        elif isinstance(kind, type) and is_dataclass(kind):
            groups += _free_groups(kind, f"{prefix}{entry.name}.")
    return groups


def _check_tta(where: str, tta: Any) -> None:
    """A named set, or a list of symmetries as text, each z, y, x in some order with signs."""
    if isinstance(tta, str):
        _one_of(where, "inference.tta", tta, ("none", "flips", "section", "all"))
        return
    given = list(tta) if isinstance(tta, list | tuple) else [tta]
    fine = all(re.fullmatch("(-?[zyx]){3}", str(text)) and len(set(str(text)) & set("zyx")) == 3 for text in given)
    if not given or not fine or len(set(map(str, given))) != len(given):
        raise ConfigError(
            f"{where}: inference.tta must be none, flips, section, all, or a list of symmetries, none twice, each z, "
            f"y, x in some order with signs, as in [zyx,-zyx,x-yz]; found {tta}"
        )


def _check_engine(where: str, engine: EngineConfig) -> None:
    """Numbers that make no engine, and keys that only another one reads."""
    _one_of(where, "engine.name", engine.name, ("local", "dask"))
    _one_of(where, "engine.cluster", engine.cluster, ("local", "slurm", "lsf"))
    queue = engine.cluster != "local"
    least = 1 if queue else 0
    if engine.workers < least:
        reason = f" with engine.cluster={engine.cluster}" if queue else ""
        raise ConfigError(f"{where}: engine.workers must be at least {least}{reason}, found {engine.workers}")
    if engine.attempts < 1:
        raise ConfigError(f"{where}: engine.attempts must be at least 1, found {engine.attempts}")
    for key, limit in (("block_timeout_s", engine.block_timeout_s), ("memory_gb", engine.memory_gb)):
        if limit is not None and limit <= 0:
            raise ConfigError(f"{where}: engine.{key} must be above 0, or null for no limit, found {limit}")
    given = {"address": engine.address is not None, "cluster": queue, "options": bool(engine.options)}
    idle = next((key for key, is_given in given.items() if is_given), None)
    if engine.name == "local" and idle is not None:
        raise ConfigError(
            f"{where}: engine.{idle} is of engine.name=dask, found engine.name=local; set the one or drop the other"
        )
    if engine.address is not None and (queue or engine.options):
        raise ConfigError(
            f"{where}: engine.address is of a scheduler that has its workers; "
            "drop engine.cluster and engine.options, or the address"
        )
    if engine.options and not queue:
        raise ConfigError(
            f"{where}: engine.options are those of a queue; set engine.cluster=slurm or lsf, or drop them"
        )


def _one_of(where: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = nearest(value, allowed)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"{where}: {key} is {value!r}{hint} Allowed: {', '.join(allowed)}")


def _check_yaml(file: Path) -> None:
    """Syntax first, and by name: Hydra's own message for a broken file names neither the file nor the line."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text file (UTF-8); give a YAML configuration") from error
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        line = f" at line {mark.line + 1}" if mark else ""
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise ConfigError(f"{file} is not valid YAML{line}: {problem}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file} must hold keys and values, found {type(content).__name__}")


def _explain(error: Exception, file: Path | None, overrides: Sequence[str]) -> str:
    """One line for what Hydra or OmegaConf refused, with the nearest known key."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:  # OmegaConf makes some their own cause
        chain.append(chain[-1].__cause__)
    # under a debugger or coverage OmegaConf adds a last link whose message is still a template without the full key
    cause = next((e for e in chain if "full_key" in str(e)), chain[-1])
    text = f"{error}\n{cause}"
    where = str(file) if file else "the configuration"
    key = _offending_key(text)
    # the last one wins, so it is the last one that is to blame
    named = [o for o in overrides if key and o.lstrip("+~").split("=")[0].endswith(key.split(".")[-1])]
    blamed = named[-1] if named else None
    place = f"override {blamed!r}" if blamed else where
    if key and key not in known_keys() and re.split(r"[.\[]", key)[0] not in _item_keys():
        return _unknown_key(key, place)
    reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    return f"{place}: {key + ': ' if key else ''}{reason}"


def _extra_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys that the schema does not have: Hydra's ``+key=value`` adds them without asking it."""
    for name, value in vars(config).items():
        if name not in type(config).__dataclass_fields__:
            yield f"{prefix}{name}"
        elif is_dataclass(value):
            yield from _extra_keys(value, f"{prefix}{name}.")


def _unknown_key(key: str, place: str) -> str:
    leaf = key.split(".")[-1]
    known = [*known_keys(), *_item_keys()]
    # the right name in the wrong group comes first: `data.lr` means `optimizer.lr`
    close = next((k for k in known if k.split(".")[-1] == leaf), None) or nearest(key, known)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"unknown key {key!r} in {place}{hint}"


def _item_keys(schema: type = RunConfig) -> list[str]:
    """Keys of the items of lists (``model.heads``, ``data.inputs``): errors in them come without the list's name."""
    keys: list[str] = []
    for kind in get_type_hints(schema).values():
        item = next(iter(get_args(kind)), None) if get_origin(kind) is list else kind
        if isinstance(item, type) and is_dataclass(item):
            keys += [entry.name for entry in fields(item)] if item is not kind else _item_keys(item)
    return keys


def _offending_key(text: str) -> str | None:
    for pattern in (r"full_key:\s*([\w.\[\]]+)", r"Key '([\w.]+)'", r"Could not override '([\w.]+)'"):
        found = re.findall(pattern, text)
        if found:
            return re.sub(r"\[\d+\]$", "", str(max(found, key=len)))  # an item of a list: the list's key
    return None
