"""Neuroglancer with the layers, and its state as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from connectomics.errors import InputError, MissingError
from connectomics.io.store import is_s3
from connectomics.pages.local_server import LOOPBACK
from connectomics.pages.view.layers import Layer, Layers
from connectomics.pages.view.volume_server import VolumeServer

_DIMENSIONS: dict[str, Any] = {axis: [1e-9, "m"] for axis in "xyz"}
_BOXES = "#ffffff"  # color of the boxes of crops
_PIXELS = 600  # of the window that the first view should fit into

_RAW = "#uicontrol invlerp normalized\nvoid main() { emitGrayscale(normalized()); }\n"
_COLORED = """#uicontrol vec3 color color(default="{color}")
#uicontrol float opacity slider(min=0, max=1, default=0.6)
void main() {{ float p = toNormalized(getDataValue()){scale}; emitRGBA(vec4(color, opacity * p)); }}
"""


@dataclass
class Viewing:
    """A page that is being served; ``viewer`` is neuroglancer's own object, ``state`` its JSON when it opened."""

    url: str
    state: dict[str, Any]
    viewer: Any
    server: VolumeServer

    def close(self) -> None:
        """Stop serving; neuroglancer's own server ends with the process."""
        self.server.close()


def state_of(layers: Layers, url: str) -> dict[str, Any]:
    """Return neuroglancer's state as JSON, with nm as unit; ``url``: of the `VolumeServer` that serves the layers."""
    return {
        "dimensions": _DIMENSIONS,
        "position": list(reversed(layers.position)),
        "crossSectionScale": max(layers.extent / _PIXELS, 1e-3),
        "projectionScale": 2 * layers.extent,
        "layers": [*(_layer(layer, layers, url) for layer in layers.layers), *_crops(layers)],
        "layout": "4panel",
        "selectedLayer": {"visible": True, "layer": layers.layers[0].name},
        "showAxisLines": True,
        "showScaleBar": True,
    }


def open_viewer(layers: Layers, address: str = LOOPBACK, port: int = 0) -> Viewing:
    """Serve the layers and neuroglancer's page.

    Args:
        address: who may connect; default: only this machine. port: of the page; 0: any free port.

    Raises:
        MissingError: neuroglancer is not installed. InputError: the address or the port is not available.
    """
    try:
        import neuroglancer
    except ImportError as error:
        raise MissingError("neuroglancer is not installed: run pip install 'connectomics-cellmap[view]'") from error
    try:
        server = VolumeServer(layers.roots, layers.made, address)
    except OSError as error:  # an unknown name, an address of another machine
        raise InputError(f"cannot serve at {address}: {error.strerror}; give an address of this machine") from error
    state = state_of(layers, server.url)
    neuroglancer.set_server_bind_address(address, port)
    try:
        viewer = neuroglancer.Viewer()
    except OSError as error:  # a port that another program or the system uses
        server.close()
        wrong = f"cannot serve the page at port {port} of {address}: {error.strerror}"
        raise InputError(f"{wrong}; give another --port, or 0 for any free port") from error
    viewer.set_state(state)
    return Viewing(viewer.get_viewer_url(), state, viewer, server)


def _layer(layer: Layer, layers: Layers, url: str) -> dict[str, Any]:
    place = layer.address if is_s3(layer.address) else f"{url}/{layer.address}"
    sources = [f"{_scheme(layer, layers)}://{place}", *(f"precomputed://{url}/{address}" for address in layer.more)]
    source: Any = sources[0] if len(sources) == 1 else [{"url": one} for one in sources]
    common: dict[str, Any] = {"name": layer.name, "source": source, "visible": layer.visible}
    if layer.kind == "ids":
        return {**common, "type": "segmentation", "selectedAlpha": 0.4, "notSelectedAlpha": 0.3}
    if layer.kind == "raw":
        return {**common, "type": "image", "shader": _RAW}
    scale = " * 255.0" if layer.kind == "mask" else ""
    return {**common, "type": "image", "blend": "default", "shader": _COLORED.format(color=layer.color, scale=scale)}


def _scheme(layer: Layer, layers: Layers) -> str:
    """Return the kind of source: Zarr v2 (what is made, OME-Zarr 0.4) or v3 (0.5)."""
    kind, _, rest = layer.address.partition("/")
    name, _, below = rest.partition("/")
    is_v3 = kind == "files" and (layers.roots[name] / below / "zarr.json").exists()
    return "zarr3" if is_v3 else "zarr2"


def _crops(layers: Layers) -> list[dict[str, Any]]:
    """Return the layer with the boxes of the crops."""
    boxes = [
        {
            "type": "axis_aligned_bounding_box", "id": name, "description": name,
            "pointA": list(reversed(box.begin)), "pointB": list(reversed(box.end)),
        }
        for name, box in layers.boxes.items()
    ]  # fmt: skip
    source = {"url": "local://annotations", "transform": {"outputDimensions": _DIMENSIONS}}
    layer = {"name": "crops", "type": "annotation", "source": source, "annotations": boxes, "annotationColor": _BOXES}
    return [layer] if boxes else []
