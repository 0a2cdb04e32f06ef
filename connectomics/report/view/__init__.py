"""Volumes in neuroglancer, served from this machine to this machine."""

from connectomics.report.view.layers import Layer, ViewSources, collect_layers
from connectomics.report.view.server import VolumeServer
from connectomics.report.view.viewer import Viewing, open_viewer, state_of

__all__ = ["Layer", "ViewSources", "Viewing", "VolumeServer", "collect_layers", "open_viewer", "state_of"]
