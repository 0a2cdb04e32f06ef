"""CellMap volumes from disk to a scored submission, on PyTorch Lightning, MONAI and Hydra."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from connectomics.lightning.module import ConnectomicsModule

__version__ = "0.1.0"


def load_model(path: str | PathLike[str]) -> ConnectomicsModule:
    """The network of a model package (`pytc package`) or of a checkpoint, on the CPU, in evaluation mode.

    A package is checked first: its sums, and its answer to the input that lies in it. ``model.config`` says how it was
    trained, ``model.classes`` what its channels are, ``model.probabilities(image)`` gives (B, C, D, H, W) float32 for
    images (B, 1, D, H, W) at ``model.config.dataset.resolution`` nm, and ``model.normalization(dataset).input(raw)``
    makes the image, float32, of raw values.

    Raises `MissingError`, `CorruptDataError`, `InputError`, `ConfigError`.
    """
    from connectomics.lightning.checkpoints import load_module

    return load_module(str(path))


__all__ = ["__version__", "load_model"]
