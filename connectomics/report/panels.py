"""One crop and class as a PNG for a README or a page of documentation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from connectomics.errors import InputError, unknown_name
from connectomics.io.write import write_file
from connectomics.report import figures, pictures
from connectomics.report.library import Library
from connectomics.report.sources import ReportOptions, ReportSources
from connectomics.report.volumes import examine, read_plane


def write_panel(
    out: str | Path, sources: ReportSources, crop: str, class_name: str, *, axis: int = 0, longest: int = 320
) -> Path:
    """Write raw, truth, prediction and errors of one slice side by side, as the report shows them.

    Args:
        out: the PNG. sources: as for the report; ``data_root``, truth and labels are used.
        crop: ``crop101``. axis: the axis that is cut across (0: xy, 1: xz, 2: yz), where the report would cut it.
        longest: pixels of the longer side of each of the pictures.

    Raises:
        UnknownNameError: no such crop and class. MissingError, MetadataError, CorruptDataError: what it needs is not
        there or cannot be read. InputError: there is no raw to show.
    """
    if axis not in (0, 1, 2):
        raise InputError(f"axis must be 0 (xy), 1 (xz) or 2 (yz), found {axis}")
    library = Library.open(sources)
    try:
        known = {f"{w.crop}/{w.class_name}": w for w in library.wanted()}
        if f"{crop}/{class_name}" not in known:
            raise unknown_name("crop and class", f"{crop}/{class_name}", known, "the sources")
        item = library.item(known[f"{crop}/{class_name}"])
        found = examine(item, ReportOptions().max_voxels)
        plane = read_plane(item, axis, found.position[axis], longest)
    finally:
        library.close()
    if plane.raw is None:
        raise InputError(f"{crop}/{class_name}: no raw to show ({'; '.join(library.problems) or 'give a data root'})")
    rows, columns = (a for a in range(3) if a != axis)
    pixel = (plane.grid.voxel_size[rows], plane.grid.voxel_size[columns])
    shape = figures.true_shape(plane.truth.shape, pixel, longest)
    gray = figures.resize(figures.to_gray(plane.raw), shape, "linear")
    shown = [figures.letter(figures.scale_bar(gray, plane.extent[1] / shape[1]), "raw", (5, 3), max(10, longest // 20))]
    for kind in ("truth", "prediction", "errors"):
        layer = pictures.layers(item, plane, found).get(kind)
        if layer is not None:
            picture = figures.overlay(gray, figures.resize(layer, shape, "nearest"))
            shown.append(figures.letter(picture, kind, (5, 3), max(10, longest // 20)))
    path = Path(out)
    write_file(path, _png(figures.side_by_side(shown)))
    return path


def _png(picture: figures.Picture) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, "PNG", optimize=True)
    return stream.getvalue()
