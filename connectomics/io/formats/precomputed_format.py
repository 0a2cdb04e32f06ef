"""Neuroglancer's precomputed format: its finest scale; resolution and offset are part of it."""

from __future__ import annotations

import json
from pathlib import Path

from connectomics.errors import CorruptDataError
from connectomics.io.formats.n5_format import tensorstore_source
from connectomics.io.formats.source import VolumeSource


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """The finest scale of a local folder (``inner``: another one, by its key)."""
    try:
        scales = json.loads((path / "info").read_text(encoding="utf-8"))["scales"]
        names = [scale["key"] for scale in scales]
        scale = scales[names.index(inner) if inner else 0]
        x, y, z = (float(v) for v in scale["resolution"])
        bx, by, bz = (float(v) for v in scale.get("voxel_offset", (0, 0, 0)))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CorruptDataError(f"{path}/info does not describe a precomputed volume: {error!r}") from error
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "scale_index": scales.index(scale),
    }
    return tensorstore_source(spec, str(path), voxel_size=(z, y, x), begin=(bz * z, by * y, bx * x))
