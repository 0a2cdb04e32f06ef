"""Read checkpoints, with one clear line if that fails, and build the network or the module that they hold.

Nothing here imports PyTorch Lightning, except `load_module`.
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
from connectomics.config.heads import heads_of
from connectomics.data.normalization import before_it_was_kept, with_normalization
from connectomics.errors import ConfigError, CorruptDataError, InputError, MissingError, nearest
from connectomics.inference.trained_network import TrainedNetwork
from connectomics.lightning.model_package import check_test, is_package, open_package, package_weights
from connectomics.lightning.network import build_network

if TYPE_CHECKING:
    from connectomics.lightning.module import ConnectomicsModule

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "connectomics"  # what of a checkpoint is ours and not Lightning's
CHECKPOINT_FORMAT = 2  # 1: without normalization, nothing was centered


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of this program, or of a model package, on the CPU. Nothing but tensors and plain
    values is unpickled.

    Raises:
        MissingError: no such file.
        CorruptDataError: truncated, or no checkpoint at all.
        InputError: a checkpoint of something else, or of a later version of this program.
    """
    file = Path(path)
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.ckpt")]) if file.parent.is_dir() else None
        hint = f"; did you mean {file.parent / near}?" if near else ""
        raise MissingError(f"no checkpoint at {file}{hint}")
    if is_package(file):
        package = open_package(file)
        ours = {name: package.about[name] for name in ("format", "version", "classes", "voxel_size", "config")}
        return {"state_dict": package_weights(package), CHECKPOINT_KEY: ours}
    if not zipfile.is_zipfile(file):
        raise CorruptDataError(
            f"{file} ({file.stat().st_size} bytes) is no PyTorch checkpoint, or a truncated one; take another, for "
            "instance last.ckpt of the same run"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds Python objects that are not unpickled for safety: it is not a checkpoint of `pytc train`"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptDataError(f"checkpoint {file} cannot be read ({reason}); take another of the same run") from error
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
    """The configuration that a checkpoint was trained with; `ConfigError` where this version does not know it."""
    try:
        config = config_from_dict(content[CHECKPOINT_KEY]["config"])
        if content[CHECKPOINT_KEY]["format"] < 2:
            config = with_normalization(config, before_it_was_kept(config))
        return config
    except ConfigError as error:
        version = content[CHECKPOINT_KEY]["version"]
        raise ConfigError(f"the configuration in checkpoint {path} (written by version {version}): {error}") from error


def check_classes(path: str | Path, trained: Sequence[str], asked: Sequence[str]) -> None:
    """Raises `InputError` where a checkpoint's classes are not, in order, those that are asked for."""
    if list(trained) != list(asked):
        raise InputError(
            f"checkpoint {path} was trained for classes {list(trained)}, the configuration asks for {list(asked)}; "
            "set dataset.classes to the former, or train again"
        )


def check_heads(path: str | Path, trained: RunConfig, config: RunConfig) -> None:
    """Raises `InputError` where a checkpoint's heads give other channels than the configuration's ``model.heads``.

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
    """Raises `InputError` where a checkpoint's network takes further inputs at other voxel sizes than asked for."""
    found, asked = ([list(view.voxel_size) for view in of.data.inputs] for of in (trained, config))
    if found != asked:
        raise InputError(
            f"checkpoint {path} was trained with further inputs (data.inputs) at {found} nm, the configuration has "
            f"them at {asked} nm; set data.inputs as in training, or leave this checkpoint out"
        )


def load_network(path: str | Path, config: RunConfig | None = None) -> TrainedNetwork:
    """Return the network of a checkpoint or a package, on the CPU, in evaluation mode.

    Args:
        path: the file; it holds its own configuration.
        config: a configuration to use with it: its `dataset.classes`, the channels of its `model.heads` and the voxel
            sizes of its `data.inputs` must be those of the checkpoint; the rest of its `model` is replaced by the
            checkpoint's, all else (data, inference, decoding) is kept. None: the checkpoint's own.

    Raises:
        MissingError, CorruptDataError, InputError, ConfigError: see `read_checkpoint`; also if classes or inputs
            differ.
    """
    chosen, weights = _configured(path, config)
    import_plugins(chosen.plugins)
    channels = chosen.channels + sum(head.channels for head in heads_of(chosen))
    network = TrainedNetwork(chosen, build_network(chosen, channels))
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
    """Return the configuration to build the network with, and the state dictionary."""
    content = read_checkpoint(path)
    trained = checkpoint_config(content, path)
    if config is not None:
        check_classes(path, trained.dataset.classes, config.dataset.classes)
        check_heads(path, trained, config)
        check_inputs(path, trained, config)
        if list(trained.dataset.voxel_size) != list(config.dataset.voxel_size):
            log.warning(
                "checkpoint %s was trained at %s nm, the configuration asks for %s nm: expect worse results",
                path,
                trained.dataset.voxel_size,
                config.dataset.voxel_size,
            )
    return _merged(trained, config), content["state_dict"]


def _fill(module: TrainedNetwork | ConnectomicsModule, weights: Mapping[str, Any], path: str | Path) -> None:
    """Load the weights, set evaluation mode, and compare the answer to a package's test input."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise InputError(
            f"the weights in checkpoint {path} do not fit the network that its configuration names"
        ) from error
    module.eval()
    if is_package(path):
        check_test(open_package(path), module)


def _merged(trained: RunConfig, config: RunConfig | None) -> RunConfig:
    if config is None:
        return trained
    # the same heads; the given configuration decides whether they are written
    plugins = list(dict.fromkeys([*config.plugins, *trained.plugins]))
    merged = replace(config, model=replace(trained.model, heads=config.model.heads), plugins=plugins)
    return with_normalization(merged, trained.data.normalization)  # it belongs to the model


def check_resumable(path: str | Path, module: ConnectomicsModule) -> None:
    """Raises as `load_module` does, and `InputError` where a run of ``module`` cannot go on from a checkpoint."""
    content = read_checkpoint(path)
    trained = checkpoint_config(content, path)
    check_classes(path, trained.dataset.classes, module.classes)
    check_heads(path, trained, module.config)
    expected = {name: value.shape for name, value in module.state_dict().items()}
    found = {name: value.shape for name, value in content["state_dict"].items()}
    if expected != found:
        raise InputError(
            f"checkpoint {path} holds a {describe(trained)}, the configuration a {describe(module.config)}: give the "
            "run the same `model`, or start without the checkpoint"
        )
    if not content.get("optimizer_states"):
        raise InputError(f"checkpoint {path} holds weights only, no optimizer: training cannot go on from it")


def describe(config: RunConfig) -> str:
    """The network of a configuration in a few words, for messages."""
    model = config.model
    size = f" {model.mednext_size}{model.mednext_kernel_size}" if model.architecture == "mednext" else ""
    deep = ", deep supervision" if model.deep_supervision else ""
    return f"{model.architecture}{size} network ({config.channels} classes{deep}, options {model.options})"


class FromCheckpoint:
    """`load_from_checkpoint` as Lightning's modules have it; checkpoints hold their own configuration."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        config: RunConfig | None = None,
        cfg: RunConfig | None = None,
    ) -> ConnectomicsModule:
        """Return the module of a checkpoint or a package, in evaluation mode; see `load_module` for what it raises.

        ``config`` (``cfg`` is the same) replaces the checkpoint's own as far as it fits; ``map_location`` is the device
        of the module, by default the CPU.
        """
        if config is not None and cfg is not None:
            raise InputError("load_from_checkpoint takes config or cfg, which are the same; got both")
        module = load_module(checkpoint_path, config if config is not None else cfg)
        return module if map_location is None else module.to(map_location)
