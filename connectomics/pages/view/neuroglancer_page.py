"""Neuroglancer with the layers, and its state as JSON."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Serve the layers and neuroglancer's page; see `open_viewers`."""
    return open_viewers([layers], address, port)[0]


def open_viewers(
    pages: Sequence[Layers], address: str = LOOPBACK, port: int = 0, tokens: Sequence[str | None] = ()
) -> list[Viewing]:
    """Serve one page of neuroglancer for each of some layers; to close one closes all.

    Args:
        pages: what each page shows; the same name of a root, or of what is made, is the same thing in all.
        address: who may connect; default: only this machine. port: of the pages; 0: any free port.
        tokens: the secret in the address of each page, ``http://{address}:{port}/v/{token}/``; None: a new one.

    Raises:
        MissingError: neuroglancer is not installed. InputError: the address or the port is not available.
    """
    try:
        import neuroglancer
    except ImportError as error:
        raise MissingError("neuroglancer is not installed: run pip install 'connectomics-cellmap[view]'") from error
    try:
        server = VolumeServer(
            dict(item for layers in pages for item in layers.roots.items()),
            dict(item for layers in pages for item in layers.made.items()),
            address,
        )
    except OSError as error:  # an unknown name, an address of another machine
        raise InputError(f"cannot serve at {address}: {error.strerror}; give an address of this machine") from error
    neuroglancer.set_server_bind_address(address, port)
    try:
        viewers = [neuroglancer.Viewer(token=token) for token in tokens or [None] * len(pages)]
    except OSError as error:  # a port that another program or the system uses
        server.close()
        wrong = f"cannot serve the page at port {port} of {address}: {error.strerror}"
        raise InputError(f"{wrong}; give another --port, or 0 for any free port") from error
    found = []
    for layers, viewer in zip(pages, viewers, strict=True):
        state = state_of(layers, server.url)
        viewer.set_state(state)
        found.append(Viewing(viewer.get_viewer_url(), state, viewer, server))
    return found


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
