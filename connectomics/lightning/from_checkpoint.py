"""Lightning's way to load a checkpoint, for our module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.errors import InputError

if TYPE_CHECKING:
    from connectomics.config import RunConfig
    from connectomics.lightning.module import ConnectomicsModule


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
        """The module of a checkpoint or a package, in evaluation mode; see `load_module`, which says what it raises.

        ``config`` (``cfg`` is the same) is one to use with it instead of its own, as far as it fits; ``map_location``
        is the device to put it on, the CPU by default.
        """
        from connectomics.lightning.checkpoints import load_module

        if config is not None and cfg is not None:
            raise InputError("load_from_checkpoint takes config or cfg, which are the same; found both")
        module = load_module(checkpoint_path, config if config is not None else cfg)
        return module if map_location is None else module.to(map_location)
