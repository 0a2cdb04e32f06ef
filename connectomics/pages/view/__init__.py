"""``pytc view``: volumes in neuroglancer, served from this machine to this machine."""

from connectomics.pages.view.layers import Layer, ViewSources, collect_layers
from connectomics.pages.view.neuroglancer_page import Viewing, open_viewer, state_of
from connectomics.pages.view.summary import summary
from connectomics.pages.view.volume_server import VolumeServer

__all__ = ["Layer", "ViewSources", "Viewing", "VolumeServer", "collect_layers", "open_viewer", "state_of", "summary"]
