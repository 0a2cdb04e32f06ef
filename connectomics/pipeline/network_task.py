"""Prediction with trained networks: the task that loads them in each worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.cellmap.classes import atoms_of
from connectomics.config import RunConfig, as_config, load_config
from connectomics.config.heads import channel_names
from connectomics.errors import InputError, MissingError, OutOfMemoryError
from connectomics.inference.augmented import Network, dropout_on
from connectomics.inference.predict_task import PredictTask
from connectomics.lightning.run_state import weights_file
from connectomics.pipeline.runs import Run
from connectomics.tasks.memory import is_out_of_memory
from connectomics.tasks.pool import one_line

if TYPE_CHECKING:
    import torch

    from connectomics.inference.trained_network import TrainedNetwork


@dataclass(frozen=True)
class NetworkPredictTask(PredictTask):
    """A prediction that any process can do: its networks are the checkpoints."""

    def check(self, *, overwrite: bool = False) -> bool:
        """As `PredictTask.check`; loads the networks before an output is replaced."""
        todo = super().check(overwrite=overwrite)
        if todo and overwrite and self.checkpoints and Path(self.output).exists():
            self.trained_networks()
        return todo

    @contextmanager
    def open_networks(self, device: str) -> Iterator[Sequence[Network]]:
        """Yield the checkpoints' networks, ready on a device; raises what `trained_networks` raises."""
        with ready(self.trained_networks(), self, device) as networks:
            yield networks

    def trained_networks(self) -> list[TrainedNetwork]:
        """Return the checkpoints' networks, on the CPU, in the order of their hashes.

        Raises:
            InputError: their weights or classes differ from those that the prediction was started with, or there is no
                checkpoint because the network was given in memory. MissingError, CorruptDataError: see
                `connectomics.lightning.checkpoints.read_checkpoint`.
        """
        from connectomics.inference.trained_network import common_hash

        if not self.checkpoints:
            raise InputError(
                f"the network of {self.output} was given in memory, and its task names no checkpoint: predict again "
                "from the program that has it, or from a checkpoint"
            )
        found = load_networks(self.checkpoints)
        where = ", ".join(self.checkpoints)
        remedy = "restore the original checkpoint, or rerun the prediction with --overwrite"
        for network in found.values():
            channels, unions = _channels(network, self)
            if (*channels, *unions) != self.classes:
                raise InputError(
                    f"{where}: the network gives {', '.join(channels)}, but the prediction {self.output} was started "
                    f"with {', '.join(self.classes)}; {remedy}"
                )
        if (found_hash := common_hash(list(found))) != self.checkpoint:
            raise InputError(
                f"{where}: the weights are not those that the prediction {self.output} was started with (hash "
                f"{found_hash}, expected {self.checkpoint}); {remedy}"
            )
        return list(found.values())


@contextmanager
def ready(networks: Sequence[TrainedNetwork], task: PredictTask, device: str) -> Iterator[list[Network]]:
    """Yield the networks' probabilities as a task needs them: on ``device``, in evaluation mode or with dropout, in its
    memory format, compiled or not. Mode and format are restored at the end; the networks stay on the device.

    Raises `InputError` if the task needs dropout and a network has none, `OutOfMemoryError` if a network does not fit.
    """
    import torch

    from connectomics.inference.trained_network import with_unions
    from connectomics.models.memory_format import prefers_channels_last, set_channels_last

    half = device.startswith("cuda") and task.precision != "32"
    with ExitStack() as stack:
        runs: list[Network] = []
        for network in networks:
            stack.callback(network.train, network.training)
            try:
                network.eval().to(device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(f"no memory for the network on {device} ({one_line(error)})") from error
            last = half and prefers_channels_last(network, network.config.training.channels_last)
            if last if task.channels_last is None else task.channels_last:
                set_channels_last(network)
                stack.callback(set_channels_last, network, False)
            if task.uncertainty == "dropout":
                stack.enter_context(dropout_on(network))
            run: Callable[..., torch.Tensor] = network.probabilities
            runs.append(with_unions(torch.compile(run) if task.compile else run, *_channels(network, task)))
        yield runs


def _channels(network: TrainedNetwork, task: PredictTask) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the network's channels, and the group classes of a task that are unions of them."""
    channels = channel_names(network.config)
    others = (name for name in task.classes if name not in channels)
    return channels, tuple(name for name in others if set(atoms_of(name)) <= set(channels))


def load_networks(paths: Sequence[str | Path], config: RunConfig | None = None) -> dict[str, TrainedNetwork]:
    """Return the networks of checkpoints, on the CPU, by `weights_hash`; ``config``: their classes must be its own.

    They are sorted by the hash, so that sums are the same to the bit whichever is named first. Raises `InputError` if
    there is no checkpoint, or if two hold the same weights.
    """
    from connectomics.inference.trained_network import weights_hash
    from connectomics.lightning.checkpoints import load_network

    if not paths:
        raise InputError("nothing to predict with: give a model or a checkpoint")
    found: dict[str, TrainedNetwork] = {}
    origin: dict[str, str | Path] = {}
    for path in paths:
        network = load_network(path, config)
        key = weights_hash(network)
        if key in found:
            raise InputError(f"checkpoints {origin[key]} and {path} hold the same weights; give each network once")
        found[key], origin[key] = network, path
    return dict(sorted(found.items()))


def network_and_config(
    network: Run | str | Path | Sequence[str | Path], config: RunConfig | str | Path | None, overrides: Sequence[str]
) -> tuple[RunConfig, list[Path]]:
    """Return the configuration to predict with, and the checkpoint or package files."""
    from connectomics.lightning.model_package import is_package, open_package

    given = [network] if isinstance(network, Run | str | Path) else list(network)
    folders = [item.folder if isinstance(item, Run) else Path(item) for item in given]
    paths = [weights_file(folder) for folder in folders]
    if config is not None:
        return as_config(config, overrides), paths
    if is_package(paths[0]):
        return as_config(open_package(paths[0]).config, overrides), paths
    if not paths[0].exists():
        raise MissingError(f"no checkpoint at {paths[0]}; give a run folder, a checkpoint or a model package")
    file = paths[0].resolve().parent.parent / "config.yaml"
    if not file.is_file():
        raise MissingError(f"{paths[0]} is not in a run folder (no {file}); give a configuration as well")
    return load_config(file, overrides), paths
