"""Semi-supervised training: the options of the mean teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from connectomics.config.values import Group


@dataclass
class MeanTeacherConfig(Group):
    """Agreement with the averaged weights (`training.ema`, the teacher) on raw without labels."""

    weight: Annotated[float, Field(ge=0)] = 0.0  # of the consistency loss after the ramp; 0: no mean teacher
    ramp_steps: Annotated[int, Field(ge=0)] = 1000  # optimizer steps until the weight is reached
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.9  # a voxel counts if the teacher says p or 1 - p >= this
    strength: Annotated[float, Field(ge=0, le=2)] = 1.5  # of the intensity part of preset em in the student's view
    datasets: list[str] | None = None  # raw to take patches from; None: the data sets of the training crops
