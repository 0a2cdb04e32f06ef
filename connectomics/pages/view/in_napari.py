"""The same layers in napari, read lazily."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import MissingError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import is_s3
from connectomics.pages.view.layers import Layer, Layers
from connectomics.pages.view.volume_server import MadeVolume


class LazyVolume:
    """A volume that is read when it is sliced, with the attributes of napari's LayerDataProtocol."""

    def __init__(self, grid: VoxelGrid, dtype: np.dtype[Any], read: Any) -> None:
        self.grid, self.dtype, self.shape, self.ndim = grid, dtype, grid.shape, 3
        self.size = math.prod(grid.shape)
        self._read = read

    def __getitem__(self, key: Any) -> NDArray[Any]:
        keys = key if isinstance(key, tuple) else (key,)
        keys = (*keys, *[slice(None)] * (3 - len(keys)))
        spans = [
            k.indices(n) if isinstance(k, slice) else (int(k) % n, int(k) % n + 1, 1)
            for k, n in zip(keys, self.shape, strict=True)
        ]
        block: NDArray[Any] = self._read([s[0] for s in spans], [max(0, s[1] - s[0]) for s in spans])
        steps = (slice(None, None, s[2]) if isinstance(k, slice) else 0 for k, s in zip(keys, spans, strict=True))
        return block[tuple(steps)]


def levels_of(layer: Layer, layers: Layers) -> list[LazyVolume]:
    """Return the resolution levels of a layer, finest first."""
    kind, _, rest = layer.address.partition("/")
    name, _, below = rest.partition("/")
    if kind == "made":
        made = layers.made[name]
        assert isinstance(made, MadeVolume)

        def volume(grid: VoxelGrid) -> LazyVolume:
            dtype = np.dtype(made.dtype)
            return LazyVolume(grid, dtype, lambda begin, shape: made.values(grid.crop(begin, shape)).astype(dtype))

        return [volume(grid) for grid in made.grids]
    source = Multiscale.open(layer.address if is_s3(layer.address) else str(layers.roots[name] / below))

    def level(number: int) -> LazyVolume:
        about = source.levels[number]
        return LazyVolume(about.grid, about.dtype, lambda begin, shape: source.read_level(number, begin, shape)[0])

    return [level(number) for number in range(len(source.levels))]


def add_layers(viewer: Any, layers: Layers) -> None:
    """Add all layers to a napari viewer (or its model, which needs no screen), placed in nm, finest level first."""
    for layer in layers.layers:
        levels = levels_of(layer, layers)
        grid = levels[0].grid
        common = {
            "name": layer.name, "scale": grid.voxel_size, "translate": grid.translation, "visible": layer.visible,
            "multiscale": len(levels) > 1,
        }  # fmt: skip
        data = levels if len(levels) > 1 else levels[0]
        if layer.kind == "ids":
            viewer.add_labels(data, **common)
        else:
            dtype = levels[0].dtype
            limits = (0, 1) if layer.kind == "mask" or dtype.kind == "f" else (0, np.iinfo(dtype).max)
            plain = layer.kind == "raw"
            viewer.add_image(
                data, contrast_limits=limits, blending="translucent" if plain else "additive",
                colormap="gray" if plain else layer.color, **common,
            )  # fmt: skip


def show_in_napari(layers: Layers) -> None:
    """Open napari and wait until it is closed; `MissingError` if it is not installed."""
    try:
        import napari
    except ImportError as error:
        raise MissingError("napari is not installed: run pip install 'napari[all]', or omit --napari") from error
    add_layers(napari.Viewer(title=layers.dataset), layers)
    napari.run()
