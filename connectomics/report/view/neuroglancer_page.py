"""The page: neuroglancer with the layers, its state as a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from connectomics.errors import InputError, MissingError
from connectomics.io.store import is_s3
from connectomics.report.view.layers import Layer, Layers
from connectomics.report.view.server import LOOPBACK, VolumeServer

_PIXELS = 600  # of the window, on which what is looked at first should fit

_RAW = "#uicontrol invlerp normalized\nvoid main() { emitGrayscale(normalized()); }\n"
_COLOURED = """#uicontrol vec3 colour color(default="{colour}")
#uicontrol float opacity slider(min=0, max=1, default=0.6)
void main() {{ float p = toNormalized(getDataValue()){scale}; emitRGBA(vec4(colour, opacity * p)); }}
"""


@dataclass
class Viewing:
    """A page that is being served.

    Attributes:
        url: to open in a browser. state: of the page when it opened, JSON. viewer: neuroglancer's own object.
    """

    url: str
    state: dict[str, Any]
    viewer: Any
    server: VolumeServer

    def close(self) -> None:
        """Stop serving; neuroglancer's own server ends with the process."""
        self.server.close()


def state_of(layers: Layers, url: str) -> dict[str, Any]:
    """Neuroglancer's state as JSON: units nm, axes z y x as in the files, each layer with its colour.

    Args:
        url: address of the `VolumeServer` that serves the layers.
    """
    nm = [1e-9, "m"]
    zoom = max(layers.extent / _PIXELS, 1e-3)
    return {
        "dimensions": {"x": nm, "y": nm, "z": nm},
        "position": list(reversed(layers.position)),
        "crossSectionScale": zoom,
        "projectionScale": 2 * layers.extent,
        "layers": [_layer(layer, url) for layer in layers.layers],
        "layout": "4panel",
        "selectedLayer": {"visible": True, "layer": layers.layers[0].name},
        "showAxisLines": True,
        "showScaleBar": True,
    }


def open_viewer(layers: Layers, address: str = LOOPBACK, port: int = 0) -> Viewing:
    """Serve the layers and neuroglancer's page.

    Args:
        address: who may connect: the loopback, unless someone else should. port: of the page; 0: any that is free.

    Raises `MissingError` where neuroglancer is not installed, `InputError` for an address or a port that cannot be had.
    """
    try:
        import neuroglancer
    except ImportError as error:
        raise MissingError("neuroglancer is not installed: pip install 'connectomics[view]'") from error
    try:
        server = VolumeServer(layers.roots, layers.made, address)
    except OSError as error:  # a name that is none, an address of another machine
        raise InputError(f"cannot serve at {address}: {error.strerror}; give an address of this machine") from error
    state = state_of(layers, server.url)
    neuroglancer.set_server_bind_address(address, port)
    try:
        viewer = neuroglancer.Viewer()
    except OSError as error:  # a port that another program has, or that is the system's
        server.close()
        raise InputError(
            f"cannot serve the page at port {port} of {address}: {error.strerror}; give another --port, or 0 for any "
            f"that is free"
        ) from error
    viewer.set_state(state)
    return Viewing(viewer.get_viewer_url(), state, viewer, server)


def _layer(layer: Layer, url: str) -> dict[str, Any]:
    place = layer.address if is_s3(layer.address) else f"{url}/{layer.address}"
    common: dict[str, Any] = {"name": layer.name, "source": f"zarr2://{place}", "visible": layer.visible}
    if layer.kind == "ids":
        return {**common, "type": "segmentation", "selectedAlpha": 0.4, "notSelectedAlpha": 0.3}
    if layer.kind == "raw":
        return {**common, "type": "image", "shader": _RAW}
    scale = " * 255.0" if layer.kind == "mask" else ""
    return {**common, "type": "image", "blend": "default", "shader": _COLOURED.format(colour=layer.colour, scale=scale)}
