"""Prediction with trained networks: the task that loads them where it works."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.errors import InputError
from connectomics.inference.augmented import Network, dropout_on
from connectomics.inference.predict_task import PredictTask

if TYPE_CHECKING:
    import torch

    from connectomics.lightning.module import ConnectomicsModule


@dataclass(frozen=True)
class NetworkPredictTask(PredictTask):
    """A prediction that any process can do: its networks are the checkpoints."""

    def check(self, *, overwrite: bool = False) -> bool:
        """As `PredictTask.check`; before an output is replaced its networks are looked at."""
        todo = super().check(overwrite=overwrite)
        if todo and overwrite and self.checkpoints and Path(self.output).exists():
            self.modules()
        return todo

    @contextmanager
    def open_networks(self, device: str) -> Iterator[Sequence[Network]]:
        """The checkpoints' networks on a device; what `modules` raises."""
        with ready(list(self.modules().values()), self, device) as networks:
            yield networks

    def modules(self) -> dict[str, ConnectomicsModule]:
        """The checkpoints' modules, on the CPU (see `load_members`).

        Raises:
            InputError: they hold other weights or classes than when the prediction was begun, or there is no checkpoint
                since the network was given in memory. MissingError, CorruptDataError: see `read_checkpoint`.
        """
        if not self.checkpoints:
            raise InputError(
                f"the network of {self.output} was given in memory, and its task names no checkpoint: predict again "
                "from the program that has it, or from a checkpoint"
            )
        found_modules = load_members(self.checkpoints)
        where = ", ".join(self.checkpoints)
        for module in found_modules.values():
            found = channels_of(module)
            if found != self.classes:
                raise InputError(
                    f"{where}: the network gives {', '.join(found)}, the prediction {self.output} was begun with "
                    f"{', '.join(self.classes)}; put the checkpoint of then in its place, or predict anew"
                )
        if (found_hash := common_hash(list(found_modules))) != self.checkpoint:
            raise InputError(
                f"{where}: the weights are not those that the prediction {self.output} was begun with (hash "
                f"{found_hash}, expected {self.checkpoint}); put that checkpoint in its place, or predict anew"
            )
        return found_modules


@contextmanager
def ready(modules: Sequence[ConnectomicsModule], task: PredictTask, device: str) -> Iterator[list[Network]]:
    """The modules' probabilities as a task wants them: evaluated on ``device``, with dropout or without, in its memory
    format, compiled or not. The modules are then in their mode and format of before, and stay on the device.

    Raises `InputError` where dropout is asked for and a network has none.
    """
    import torch

    last = task.channels_last
    if last is None:
        last = device.startswith("cuda") and task.precision != "32"
    with ExitStack() as stack:
        networks: list[Network] = []
        for module in modules:
            stack.callback(module.train, module.training)
            module.eval().to(device)
            if last:
                module.to(memory_format=torch.channels_last_3d)
                stack.callback(module.to, memory_format=torch.contiguous_format)
            if task.uncertainty == "dropout":
                stack.enter_context(dropout_on(module))
            run: Callable[..., torch.Tensor] = module.probabilities
            networks.append(torch.compile(run) if task.compile else run)
        yield networks


def channels_of(module: ConnectomicsModule) -> tuple[str, ...]:
    """What the module's network gives, by name: its classes, then the channels of its heads."""
    from connectomics.config.heads import channel_names

    return channel_names(module.config)


def load_members(paths: Sequence[str | Path]) -> dict[str, ConnectomicsModule]:
    """The networks of checkpoints, with their own configuration, on the CPU, by `weights_hash` and in its order: sums
    are then the same to the bit whichever is named first."""
    from connectomics.lightning.checkpoints import load_module

    found = {weights_hash(module): module for module in map(load_module, paths)}
    return {key: found[key] for key in sorted(found)}


def weights_hash(module: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits of the SHA-256 over names, shapes and bytes of all weights and buffers.

    Of the weights and not of the file, so that copies of a checkpoint count as the same.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


def common_hash(hashes: Sequence[str]) -> str:
    """That of a single network itself; of several one that does not depend on their order."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()[:16]
