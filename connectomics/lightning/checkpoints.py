"""Read checkpoints, and build the network or the module that they hold.

Only `load_module` imports PyTorch Lightning.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from connectomics.config import RunConfig, config_from_dict, import_plugins
from connectomics.config.few_labels import AdaptersConfig, is_pretraining
from connectomics.config.heads import channel_groups, heads_of
from connectomics.config.values import plain
from connectomics.data.normalization import before_it_was_kept, with_normalization
from connectomics.errors import ConfigError, CorruptDataError, InputError, MissingError, nearest
from connectomics.inference.trained_network import TrainedNetwork
from connectomics.lightning.adapters import merged
from connectomics.lightning.foreign_weights import refuse_text
from connectomics.lightning.model_package import check_test, is_package, open_package, package_tensors
from connectomics.lightning.network import build_network

if TYPE_CHECKING:
    from connectomics.lightning.module import ConnectomicsModule

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "connectomics"  # key of this package's entries in a Lightning checkpoint
_KEPT = ("dataset.voxel_size", "training.ema", "optimizer.decay_norm_and_bias", "optimizer.layer_decay",
         "model.freeze", "model.adapters")  # fmt: skip
CHECKPOINT_FORMAT = 2  # 1: without normalization and without centering


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint or a model package, on the CPU; only tensors and plain values are unpickled.

    Raises:
        MissingError: the file does not exist.
        CorruptDataError: it is truncated, or not a checkpoint.
        InputError: the checkpoint belongs to another program, or to a later version of this package.
    """
    file = Path(path)
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.ckpt")]) if file.parent.is_dir() else None
        hint = f"; did you mean {file.parent / near}?" if near else ""
        raise MissingError(f"no checkpoint at {file}{hint}")
    if is_package(file):
        package = open_package(file)
        ours = {name: package.about[name] for name in ("format", "version", "classes", "voxel_size", "config")}
        return {"state_dict": package_tensors(package), CHECKPOINT_KEY: ours}
    if not zipfile.is_zipfile(file):
        refuse_text(file)
        raise CorruptDataError(
            f"{file} ({file.stat().st_size} bytes) is not a PyTorch checkpoint, or it is truncated; use another one, "
            "such as last.ckpt of the same run"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds Python objects, which are not unpickled for safety: it is not a checkpoint of `pytc train`"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptDataError(
            f"checkpoint {file} cannot be read ({reason}); use another one of the same run"
        ) from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        raise InputError(f"{file} is a PyTorch file but not a checkpoint of `pytc train`: it has no {CHECKPOINT_KEY!r}")
    found = content[CHECKPOINT_KEY]["format"]
    if found > CHECKPOINT_FORMAT:
        raise InputError(
            f"checkpoint {file} has format {found}, written by version {content[CHECKPOINT_KEY]['version']}; this "
            f"version reads up to {CHECKPOINT_FORMAT}: update connectomics"
        )
    return content


def checkpoint_config(content: dict[str, Any], path: str | Path) -> RunConfig:
    """Return the configuration of a checkpoint's training; raise `ConfigError` if this version cannot read it."""
    try:
        config = config_from_dict(content[CHECKPOINT_KEY]["config"])
        if content[CHECKPOINT_KEY]["format"] < 2:
            config = with_normalization(config, before_it_was_kept(config))
        return config
    except ConfigError as error:
        version = content[CHECKPOINT_KEY]["version"]
        raise ConfigError(f"the configuration in checkpoint {path} (written by version {version}): {error}") from error


def check_classes(path: str | Path, trained: Sequence[str], asked: Sequence[str]) -> None:
    """Raise `InputError` unless a checkpoint has the requested classes in the same order."""
    if list(trained) != list(asked):
        raise InputError(
            f"checkpoint {path} was trained for classes {list(trained)}, the configuration has {list(asked)}; "
            "set dataset.classes as in training, or train again"
        )


def check_heads(path: str | Path, trained: RunConfig, config: RunConfig) -> None:
    """Raise `InputError` unless a checkpoint's heads have the channels of the configuration's ``model.heads``.

    Weights, losses, and whether a prediction stores them may differ.
    """
    found, asked = ([head.predicts for head in heads_of(of)] for of in (trained, config))
    if found != asked:
        raise InputError(
            f"checkpoint {path} was trained with {_heads(found)}, the configuration has {_heads(asked)}; set "
            "model.heads as in training, or train again"
        )


def _heads(heads: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for head in heads:
        details = head.get("offsets") or f"{head['scale_nm']:g} nm"
        parts.append(f"{head['class']}/{head['kind']} ({details})")
    return f"heads {', '.join(parts)}" if parts else "no heads"


def check_inputs(path: str | Path, trained: RunConfig, config: RunConfig) -> None:
    """Raise `InputError` unless a checkpoint's network has further inputs at the voxel sizes of ``data.inputs``."""
    found, asked = ([list(item.voxel_size) for item in of.data.inputs] for of in (trained, config))
    if found != asked:
        raise InputError(
            f"checkpoint {path} was trained with further inputs (data.inputs) at {found} nm, the configuration has "
            f"them at {asked} nm; set data.inputs as in training, or remove this checkpoint"
        )


def name_voxel_sizes(path: str | Path, trained: RunConfig, config: RunConfig) -> None:
    """Warn if a checkpoint was trained at other voxel sizes, also of further inputs, than the configuration's."""
    both = ([of.dataset.voxel_size, *(item.voxel_size for item in of.data.inputs)] for of in (trained, config))
    found, asked = ([list(size) for size in sizes] for sizes in both)
    if found != asked:
        message = "checkpoint %s was trained at %s nm, the configuration has %s nm: expect worse results"
        log.warning(message, path, *(" and ".join(map(str, sizes)) for sizes in (found, asked)))


def load_network(path: str | Path, config: RunConfig | None = None) -> TrainedNetwork:
    """Return the network of a checkpoint or a package, on the CPU, in evaluation mode.

    Args:
        path: the file, which holds its own configuration.
        config: None: the checkpoint's own. Else a configuration with the checkpoint's `dataset.classes`, channels of
            `model.heads` and voxel sizes of `data.inputs`; the checkpoint replaces the rest of its `model`.

    Raises:
        MissingError, CorruptDataError, InputError, ConfigError: see `read_checkpoint`; also if classes, heads or inputs
            differ.
    """
    chosen, weights = _configured(path, config)
    import_plugins(chosen.plugins)
    network = TrainedNetwork(chosen, build_network(chosen, sum(channel_groups(chosen))))
    _fill(network, {name: value for name, value in weights.items() if name.startswith("network.")}, path)
    return network


def load_module(path: str | Path, config: RunConfig | None = None) -> ConnectomicsModule:
    """Return the Lightning module of a checkpoint or a package, to train or validate it; see `load_network`."""
    from connectomics.lightning.module import ConnectomicsModule

    chosen, weights = _configured(path, config)
    module = ConnectomicsModule(chosen)
    _fill(module, weights, path)
    return module


def _configured(path: str | Path, config: RunConfig | None) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration to build the network with, and the state dictionary; adapters are merged into it."""
    content = read_checkpoint(path)
    trained = checkpoint_config(content, path)
    if is_pretraining(trained):
        raise InputError(
            f"{path} was pre-trained without labels and predicts no class; train with model.weights={path}"
        )
    weights = merged(content["state_dict"], trained.model.adapters)
    trained = replace(trained, model=replace(trained.model, adapters=AdaptersConfig()))
    if config is not None:
        check_classes(path, trained.dataset.classes, config.dataset.classes)
        check_heads(path, trained, config)
        check_inputs(path, trained, config)
        name_voxel_sizes(path, trained, config)
        # the heads are the same; the given configuration decides whether they are written
        model = replace(trained.model, heads=config.model.heads)
        plugins = list(dict.fromkeys([*config.plugins, *trained.plugins]))
        normalization = trained.data.normalization  # it belongs to the model
        trained = with_normalization(replace(config, model=model, plugins=plugins), normalization)
    return trained, weights


def _fill(module: TrainedNetwork, weights: Mapping[str, Any], path: str | Path) -> None:
    """Load the weights, set evaluation mode, and check the answer to a package's test input."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise InputError(f"the weights in checkpoint {path} do not fit the network of its configuration") from error
    module.eval()
    if is_package(path):
        check_test(open_package(path), module)


def check_resumable(path: str | Path, module: ConnectomicsModule) -> None:
    """Raise what `load_module` raises, and `InputError` if a run of ``module`` cannot resume from a checkpoint."""
    content = read_checkpoint(path)
    trained = checkpoint_config(content, path)
    check_classes(path, trained.dataset.classes, module.classes)
    check_heads(path, trained, module.config)
    both = [plain(trained), plain(module.config)]
    for key in _KEPT:
        group, name = key.split(".")
        before, now = (values[group][name] for values in both)
        if bool(before) != bool(now) if key == "training.ema" else before != now:
            raise InputError(
                f"the run of checkpoint {path} has {key}={before}, the configuration {key}={now}; use the run's value, "
                "or start a new run with model.weights"
            )
    expected = {name: value.shape for name, value in module.state_dict().items()}
    found = {name: value.shape for name, value in content["state_dict"].items()}
    if expected != found:
        raise InputError(
            f"checkpoint {path} holds a {describe(trained)}, the configuration a {describe(module.config)}; use "
            "the same `model` settings, or start without the checkpoint"
        )
    if not content.get("optimizer_states"):
        raise InputError(f"checkpoint {path} holds weights only, no optimizer: training cannot resume from it")


def describe(config: RunConfig) -> str:
    """Describe the network of a configuration in a few words, for messages."""
    model = config.model
    size = f" {model.mednext_size}{model.mednext_kernel_size}" if model.architecture == "mednext" else ""
    deep = ", deep supervision" if model.deep_supervision else ""
    return f"{model.architecture}{size} network ({config.channels} classes{deep}, options {model.options})"
