"""Segmentation of volumes of any size, block by block: a base for stitched tasks, and connected components."""

from connectomics.decoding.blocks.components import ComponentsTask
from connectomics.decoding.blocks.mask import MaskTask
from connectomics.decoding.blocks.stitched import Labelled, StitchedTask

__all__ = ["ComponentsTask", "Labelled", "MaskTask", "StitchedTask"]
