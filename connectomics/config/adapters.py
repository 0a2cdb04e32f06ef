"""Fine-tuning with few weights: the options of the adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from connectomics.config.values import Group


@dataclass
class AdaptersConfig(Group):
    """Updates of low rank for the weights of `model.weights`, which stay as they are (LoRA, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=0)] = 0  # of each update; 0: no adapters, all weights train
    scale: Annotated[float, Field(gt=0)] = 1.0  # factor of the updates
    layers: list[str] = field(default_factory=lambda: ["*"])  # patterns of names of weights that get an update
    train: list[str] = field(default_factory=list)  # patterns of parameters that train in full, as the output does
