"""One crop and class as a PNG for a page of documentation: raw, truth, prediction and errors of one slice.

``python docs/make_panel.py OUT.png CROP CLASS --root DATA_ROOT --truth TRUTH --crops TABLE --labels FOLDER`` draws it
as the report does.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from connectomics.errors import InputError, unknown_name
from connectomics.io.write import write_file
from connectomics.pages import figures
from connectomics.pages.report import crops as pictures
from connectomics.pages.report.library import Library
from connectomics.pages.report.sources import ReportOptions, ReportSources
from connectomics.pages.report.volumes import examine, read_plane


def write_panel(
    out: str | Path, sources: ReportSources, crop: str, class_name: str, *, axis: int = 0, longest: int = 320
) -> Path:
    """Write raw, truth, prediction and errors of one slice side by side, as the report shows them.

    Args:
        out: the PNG. sources: ``data_root``, truth and labels are used. crop: ``crop101``.
        axis: the axis normal to the slice (0: xy, 1: xz, 2: yz), at the position that the report chooses.
        longest: pixels of the longer side of each picture.

    Raises:
        UnknownNameError: no such crop and class. InputError: there is no raw to show.
    """
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
    scale = longest / max(plane.extent)  # pixels per nm
    shape = (max(1, round(plane.extent[0] * scale)), max(1, round(plane.extent[1] * scale)))
    gray = figures.resize(figures.to_gray(plane.raw), shape, "linear")
    shown = {"raw": figures.scale_bar(gray, plane.extent[1] / shape[1])}
    for kind, layer in pictures.layers(item, plane, found).items():
        if kind in ("truth", "prediction", "errors"):
            shown[kind] = figures.overlay(gray, figures.resize(layer, shape, "nearest"))
    size = max(10, longest // 20)
    panel = figures.side_by_side([figures.letter(picture, kind, (5, 3), size) for kind, picture in shown.items()])
    stream = io.BytesIO()
    Image.fromarray(panel).save(stream, "PNG", optimize=True)
    write_file(Path(out), stream.getvalue())
    return Path(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(prog="python docs/make_panel.py", description=__doc__)
    parser.add_argument("out", type=Path, help="the PNG")
    parser.add_argument("crop")
    parser.add_argument("class_name", metavar="class")
    for name in ("root", "truth", "crops", "labels"):
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args(arguments)
    sources = ReportSources(data_root=given.root, truth=given.truth, crop_table=given.crops, labels=given.labels)
    print(write_panel(given.out, sources, given.crop, given.class_name))


if __name__ == "__main__":
    main()
