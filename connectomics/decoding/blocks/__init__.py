"""Connected components of volumes of any size, block by block, equal to those of the whole array."""

from connectomics.decoding.blocks.run import run_components_task
from connectomics.decoding.blocks.task import ComponentsTask

__all__ = ["ComponentsTask", "run_components_task"]
