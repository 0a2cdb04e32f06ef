"""Coarser levels of a volume that is written already, made block by block as `connectomics.io.levels` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.io.levels import halve_labels, halve_raw, level_grids
from connectomics.io.store import Location, normalize, read_json
from connectomics.io.write import ArrayWriter, Kind, create_array, multiscales_attrs, update_attrs


def build_levels(location: Location, levels: int, kind: Kind) -> None:
    """Add levels s1 .. s(levels - 1) to a multiscale of this program whose s0 is written, block by block.

    The group names the new levels only once they are whole; levels left by a killed run are made anew. Memory: a few
    chunks of source, whatever the volume's size.

    Args:
        location: local path of the group. kind: "raw" (mean) or "label" (most of eight).
    """
    path = Path(normalize(location))
    if kind not in ("raw", "label"):
        raise InputError(f"kind must be 'raw' or 'label', found {kind!r}")
    source = ArrayWriter.open(path / "s0")
    if source.grid is None:
        raise MetadataError(f"{path}/s0 has no voxel_size and translation; make it with create_multiscale")
    grids = level_grids(source.grid, levels)
    finest = source
    halve = halve_raw if kind == "raw" else halve_labels
    for k in range(1, levels):
        target = create_array(
            path / f"s{k}",
            grids[k].shape,
            source.dtype,
            chunks=finest.chunks,
            fill_value=finest.fill_value,
            overwrite=True,
            grid=grids[k],
        )
        for begin, block in grids[k].blocks(target.chunks):
            target.write(begin, halve(_doubled_read(source, begin, block.shape)))
        source = target
    name = (read_json(path / ".zattrs") or {}).get("multiscales", [{}])[0].get("name", path.name)
    update_attrs(path, multiscales_attrs(grids, name))


def _doubled_read(source: ArrayWriter, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
    first = [2 * b for b in begin]
    return source.read(first, [min(2 * n, m - b) for n, m, b in zip(shape, source.shape, first, strict=True)])
