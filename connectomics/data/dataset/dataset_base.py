"""What every data set of patches has: its augmentation and what it is for."""

from __future__ import annotations

from typing import Any, Literal

from torch.utils.data import Dataset

from connectomics.errors import require_known

Mode = Literal["train", "val", "test"]


class BaseDataset(Dataset[Any]):
    """``augmentor`` (MONAI transforms, or None) and ``mode`` (train, val or test) of a data set, ours or your own."""

    def __init__(self, augmentor: Any = None, mode: Mode = "train") -> None:
        """Raises `UnknownNameError` for another mode."""
        require_known("mode", [mode], ("train", "val", "test"))
        self.augmentor = augmentor
        self.mode: Mode = mode
