"""The verb ingest: volumes of other formats into a data root."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import progress
from connectomics.cli.paths import InOption, OutArgument

if TYPE_CHECKING:
    from connectomics.cellmap.ingest import Drawn, Known
    from connectomics.io.formats import VolumeSource


def ingest(
    root: Annotated[Path, OutArgument(help="Data root; made where it is not there.")],
    dataset: Annotated[str, typer.Option(help="Name of the data set in the root.")],
    raw: Annotated[str | None, typer.Option(help="Raw volume.", metavar="FILE")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=FILE", help="Labels of one class (CLASS:instance=FILE, CLASS:semantic=FILE); again."
        ),
    ] = None,
    label_map: Annotated[str | None, typer.Option(metavar="FILE", help="One volume with the labels of all.")] = None,
    values: Annotated[
        Path | None, InOption(metavar="CSV", help="What the numbers of --label-map are: value,class[,kind].")
    ] = None,
    crop: Annotated[str, typer.Option(help="Where labels go: crop1, crop2, ...")] = "crop1",
    voxel_size: Annotated[
        str | None, typer.Option(help="nm, 8 or z,y,x; default: what the file says (labels: else the raw's).")
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option(help="Labels: nm z,y,x from the raw's first face to theirs; default: the file's, or 0."),
    ] = None,
    value_range: Annotated[
        str | None, typer.Option("--range", metavar="LOW,HIGH", help="Raw values that become 0 and 255 of uint8.")
    ] = None,
    unknown: Annotated[int | None, typer.Option(help="Labels: the value that means 'nobody looked'.")] = None,
    known: Annotated[
        str | None, typer.Option(metavar="FILE", help="Labels: a mask, not 0 where somebody looked.")
    ] = None,
    slices: Annotated[
        str | None, typer.Option(metavar="0,5,10-12", help="Labels: the sections that were drawn; all others unknown.")
    ] = None,
    format_name: Annotated[str | None, typer.Option("--format", help="Where a name does not say it.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Bring your own: TIFF (pages or a folder of sections), HDF5, MRC, NRRD, npy, N5, precomputed or Zarr into the
    CellMap layout, with pyramids, in bounded memory. Then describe, train and all others work on it.

    Examples:

      pytc ingest data --dataset my-cell --raw stack.tif --voxel-size 8

      pytc ingest data --dataset my-cell --labels mito=mito.h5:/labels --labels er=er.tif --begin 400,0,0

      pytc ingest data --dataset my-cell --label-map all.nrrd --values classes.csv --slices 0,10,20
    """
    from connectomics.cellmap.ingest import ingest_labels, ingest_raw
    from connectomics.cli.data_verbs import voxel_size_of
    from connectomics.errors import InputError
    from connectomics.io.formats import open_volume

    if raw is None and not labels and label_map is None:
        raise InputError("nothing to ingest: give --raw, --labels CLASS=FILE or --label-map")
    if (label_map is None) != (values is None):
        raise InputError("--label-map and --values go together: the second says which number is which class")
    size = None if voxel_size is None else voxel_size_of(voxel_size)
    place = root.expanduser()
    with ExitStack() as stack:
        if raw is not None:
            source = stack.enter_context(open_volume(raw, format_name))
            chosen = None if value_range is None else _pair(value_range)
            with progress.counted(f"raw {source.location}") as advance:
                written = ingest_raw(place, dataset, source, size, chosen, overwrite=overwrite, progress=advance)
            print(written)
        drawn = [d for d in _drawn(labels or [], label_map, values, format_name, stack)]
        looked = _known(unknown, known, slices, format_name, stack)
        start = None if begin is None else _three(begin)
        for item in drawn:
            with progress.counted(f"labels of {item.class_name}") as advance:
                written = ingest_labels(
                    *(place, dataset, crop, item, size, start, looked), overwrite=overwrite, progress=advance
                )
            print(written)


def _drawn(
    labels: list[str], label_map: str | None, values: Path | None, format_name: str | None, stack: ExitStack
) -> Iterator[Drawn]:
    from connectomics.cellmap.ingest import Drawn, drawn_by_table
    from connectomics.errors import InputError
    from connectomics.io.formats import open_volume

    def opened(place: str) -> VolumeSource:
        return stack.enter_context(open_volume(place, format_name))

    for text in labels:
        head, equals, place = text.partition("=")
        name, _, kind = head.partition(":")
        if not equals or not name or kind not in ("", "semantic", "instance"):
            raise InputError(f"--labels takes CLASS=FILE, CLASS:instance=FILE or CLASS:semantic=FILE, found {text!r}")
        if kind == "instance":
            yield Drawn(name, opened(place), "instance")
        else:
            yield Drawn(name, opened(place), "semantic" if kind else None)
    if label_map is not None and values is not None:
        yield from drawn_by_table(opened(label_map), values)


def _known(
    unknown: int | None, mask: str | None, slices: str | None, format_name: str | None, stack: ExitStack
) -> Known:
    from connectomics.cellmap.ingest import Known
    from connectomics.io.formats import open_volume

    there = None if mask is None else stack.enter_context(open_volume(mask, format_name))
    return Known(unknown, there, None if slices is None else _sections(slices))


def _sections(text: str) -> frozenset[int]:
    """``0,5,10-12`` as numbers."""
    from connectomics.errors import InputError

    found: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found |= set(range(int(first), int(last) + 1)) if dash else {int(first)}
    except ValueError as error:
        raise InputError(f"--slices takes numbers and ranges, as 0,5,10-12, found {text!r}") from error
    return frozenset(found)


def _three(text: str) -> tuple[float, float, float]:
    from connectomics.errors import InputError
    from connectomics.geometry import triple

    try:
        return triple([float(part) for part in text.split(",")], "--begin")
    except ValueError as error:
        raise InputError(f"--begin takes z,y,x in nm, found {text!r}") from error


def _pair(text: str) -> tuple[float, float]:
    from connectomics.errors import InputError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--range takes LOW,HIGH, found {text!r}") from error
    return low, high
