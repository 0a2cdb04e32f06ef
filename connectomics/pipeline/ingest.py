"""Import volumes of other formats into a data root."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from connectomics.cellmap.annotation import class_and_kind
from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.ingest import Drawn, Known, drawn_by_table, ingest_labels, ingest_raw, unlisted_values
from connectomics.errors import InputError
from connectomics.geometry import Triple
from connectomics.io.formats import open_volume
from connectomics.pipeline.proposals import ingest_proposals
from connectomics.progress import Progress, Shown, showing

log = logging.getLogger(__name__)

_SOURCES = "give --dataset with --raw, --labels CLASS=FILE or --label-map, or give --proposals"


def ingest(
    root: str | Path,
    dataset: str | None = None,
    *,
    raw: str | None = None,
    labels: Mapping[str, str] | None = None,
    label_map: str | None = None,
    values: str | Path | None = None,
    proposals: str | Path | None = None,
    done: Collection[int] = (),
    crop: str = "crop1",
    voxel_size: Triple | None = None,
    begin: Sequence[float] | None = None,
    value_range: Sequence[float] | None = None,
    unknown: int | None = None,
    known: str | None = None,
    slices: frozenset[int] | None = None,
    format_name: str | None = None,
    overwrite: bool = False,
    written: Callable[[Path], object] | None = None,
    shown: Shown | None = None,
    progress: Progress | None = None,
) -> Catalog:
    """Import raw and labels (TIFF, HDF5, MRC, NRRD, npy, N5, precomputed, Zarr) into the CellMap layout, with pyramids.

    Args:
        root: data root, created if it does not exist.
        dataset: name of the data set in it (not for ``proposals``).
        raw: raw volume, such as ``stack.tif`` or ``raw.h5:/volume``.
        labels: class -> volume; ``mito:instance`` or ``mito:semantic`` states the kind.
        label_map, values: one volume with the labels of all classes, and the CSV that says what its values mean.
        proposals: folder of `propose`, instead: import the labels of its boxes that are ``done``, with 255 for unknown.
        done: ranks of proposals that are done, too; this is written into their table.
        crop: crop for the labels, ``crop1``.
        voxel_size: nm, z y x; None: the file's (labels: else the raw's).
        begin: offset of the labels from the raw's first face, nm z y x; None: the file's, or 0.
        value_range: raw values that become 0 and 255 of uint8; None keeps values and dtype.
        unknown: the label value of voxels that nobody annotated.
        known, slices: a mask volume, nonzero where annotated; annotated sections (z, from 0), all others are unknown.
        format_name: the format, if the file name does not tell.
        written: called with the location of each volume once it is written.
        progress, shown: called while volumes are written; or a progress for each of them.

    Returns:
        The catalog of the root.

    Raises:
        InputError, MissingError, MetadataError, WriteError: the input; a volume exists (without ``overwrite``).
    """
    volumes = raw is not None or bool(labels) or label_map is not None
    if proposals is not None and (dataset is not None or volumes):
        raise InputError("--proposals names data sets and files itself; leave out --dataset, --raw and labels")
    if proposals is None and (dataset is None or done or not volumes):
        raise InputError(f"nothing to ingest: {_SOURCES}")
    if (label_map is None) != (values is None):
        raise InputError("--label-map needs --values, which says what its values mean (and the other way around)")
    place, show, tell = Path(root).expanduser(), shown or showing(progress), written or (lambda _: None)
    if proposals is not None or dataset is None:
        ingest_proposals(place, Path(proposals or ""), done, overwrite=overwrite, tell=tell, show=show)
        return Catalog.open(str(root))
    with ExitStack() as stack:
        if raw is not None:
            source = stack.enter_context(open_volume(raw, format_name))
            with show(f"raw {source.location}") as advance:
                where = (place, dataset, source, voxel_size, value_range)
                tell(ingest_raw(*where, overwrite=overwrite, progress=advance))
        files = {head: stack.enter_context(open_volume(file, format_name)) for head, file in (labels or {}).items()}
        drawn = [Drawn(name, volume, kind) for head, volume in files.items() for name, kind in [class_and_kind(head)]]
        together = None if label_map is None else stack.enter_context(open_volume(label_map, format_name))
        listed = [] if together is None or values is None else drawn_by_table(together, Path(values))
        mask = None if known is None else stack.enter_context(open_volume(known, format_name))
        annotated = Known(unknown, mask, slices)
        for item in (*drawn, *listed):
            with show(f"labels of {item.class_name}") as advance:
                what = (place, dataset, crop, item, voxel_size, begin, annotated)
                tell(ingest_labels(*what, overwrite=overwrite, progress=advance))
        if listed:
            _name_unlisted(listed, annotated, str(values))
    return Catalog.open(str(root))


def _name_unlisted(drawn: Sequence[Drawn], annotated: Known, table: str) -> None:
    if others := unlisted_values(drawn[0].source, drawn, annotated):
        log.warning(
            "%s holds %s, but %s does not say what they mean, so they are none of its classes; give --unknown for the "
            "value of voxels that nobody annotated", drawn[0].source.location, ", ".join(map(str, others)), table,
        )  # fmt: skip
