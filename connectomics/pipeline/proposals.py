"""The folder that `propose` writes and a person corrects: ``proposals.csv`` and label files, and how they come back."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation, Kind
from connectomics.cellmap.catalog import GROUND_TRUTH, Catalog
from connectomics.cellmap.crop_table import csv_rows
from connectomics.cellmap.ingest import Drawn, Known, drawn_by_table, ingest_labels, unlisted_values
from connectomics.data.splits import Split
from connectomics.errors import InputError, MetadataError, MissingError, WriteError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.io.formats import VolumeSource, open_volume
from connectomics.io.formats.tiff import write_tiff
from connectomics.io.multiscale import Multiscale
from connectomics.io.replacing import write_file
from connectomics.io.store import read_attrs
from connectomics.io.write import update_attrs, write_multiscale
from connectomics.progress import Shown

log = logging.getLogger(__name__)

TABLE, LABELS, SPLIT = "proposals.csv", "labels", "split.yaml"
FORMATS = ("zarr", "tiff")
UNKNOWN = 255  # in every label file: nobody looked at this voxel
MAP = "label_map"  # one volume of all classes, and in column ``classes``: take it instead of the classes' own files
PORT = 8473  # of the links, so that they are known before anything is served
_AXES = "zyx"
_GRID = [f"{what}_{axis}{unit}" for what, unit in (("begin", "_nm"), ("shape", ""), ("voxel", "_nm")) for axis in _AXES]
COLUMNS = ("rank", "dataset", "crop", *_GRID, "score", "uncertainty", "novelty", "reason", "link", "classes", "done")


@dataclass(frozen=True)
class Proposal:
    """A box to annotate.

    Attributes:
        rank: 1 is the best.
        dataset: its data set.
        crop: name of the crop that it becomes.
        grid: its voxels.
        reason: why it was chosen.
        score, uncertainty, novelty: see `connectomics.data.candidates.choose_uncertain`; NaN for other methods.
        classes: class -> ``semantic`` or ``instance``: whose files count once it is done; {} for the label map.
        done: whether somebody looked at all of it, except where a label is 255.
        link: where `pytc view --proposals` shows it; "" in tables of earlier versions.
    """

    rank: int
    dataset: str
    crop: str
    grid: VoxelGrid
    reason: str = ""
    score: float = float("nan")
    uncertainty: float = float("nan")
    novelty: float = float("nan")
    classes: Mapping[str, Kind] = field(default_factory=dict, hash=False)
    done: bool = False
    link: str = ""

    @property
    def key(self) -> str:
        """``dataset/crop``."""
        return f"{self.dataset}/{self.crop}"

    def file(self, folder: Path, name: str, file_format: str) -> Path:
        """Return the place of the labels of a class, of `MAP`, or of the raw, in a folder of proposals."""
        if file_format == "zarr":
            return folder / LABELS / self.dataset / f"{self.dataset}.zarr" / GROUND_TRUTH / self.crop / name
        return folder / LABELS / self.dataset / self.crop / f"{name}.tif"

    def values_table(self, folder: Path, file_format: str) -> Path:
        """Return the place of the table that says what the values of the label map mean."""
        return self.file(folder, MAP, file_format).with_name(f"{MAP}.csv")


def link_of(secret: str, rank: int) -> str:
    """Return the address at which `pytc view --proposals` shows a proposal, on this machine."""
    return f"http://127.0.0.1:{PORT}/v/{secret}-{rank}/"


# -- the table ---------------------------------------------------------------------------------------------------------
def write_table(path: Path, proposals: Sequence[Proposal]) -> None:
    """Write ``proposals.csv`` in one step; positions are faces in nm, z y x, as ``pytc predict --box`` takes them."""
    stream = StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in proposals:
        numbers = ["" if np.isnan(v) else f"{v:.4g}" for v in (one.score, one.uncertainty, one.novelty)]
        place = [*map(repr, one.grid.box.begin), *one.grid.shape, *map(repr, one.grid.voxel_size)]
        classes = " ".join(f"{name}:{kind}" for name, kind in one.classes.items()) or MAP
        done = "yes" if one.done else "no"
        writer.writerow([one.rank, one.dataset, one.crop, *place, *numbers, one.reason, one.link, classes, done])
    write_file(path, stream.getvalue().encode())


def read_table(folder: str | Path) -> list[Proposal]:
    """Return the rows of ``proposals.csv`` in a folder.

    Raises `MissingError` if there is no such file, `MetadataError` naming the row that cannot be read.
    """
    file = Path(folder) / TABLE
    if not file.is_file():
        raise MissingError(f"no {TABLE} in {folder}; give a folder that `pytc propose` wrote")
    needed = ("rank", "dataset", "crop", *_GRID, "classes", "done")
    rows = [_row(row, place) for place, row in csv_rows(file.read_text(encoding="utf-8-sig"), needed, str(file))]
    for number, row in enumerate(rows):
        if row.key in {other.key for other in rows[:number]}:
            raise MetadataError(f"{file}: {row.key} is listed twice; give each proposal its own crop")
    return rows


def _row(row: Mapping[str, str], place: str) -> Proposal:
    try:
        begin, shape, size = ([float(row[name]) for name in _GRID[k : k + 3]] for k in (0, 3, 6))
        first = [b + s / 2 for b, s in zip(begin, size, strict=True)]
        grid = VoxelGrid(size, first, shape)  # type: ignore[arg-type]
        rank = int(row["rank"])
        score, uncertainty, novelty = (float(row.get(name) or "nan") for name in ("score", "uncertainty", "novelty"))
    except (ValueError, OverflowError) as error:
        raise MetadataError(f"{place}: expected numbers for rank, begin, shape, voxel and scores ({error})") from error
    done = row["done"].strip().lower()
    if done not in ("yes", "no"):
        raise MetadataError(f"{place}: done must be yes or no, got {row['done']!r}")
    if not re.fullmatch(r"crop\d+", row["crop"]):
        raise MetadataError(f"{place}: a crop's name is crop and a number, as crop12, got {row['crop']!r}")
    classes: dict[str, Kind] = {}
    for word in row["classes"].split() if row["classes"].strip() != MAP else []:
        name, _, kind = word.partition(":")
        if kind not in ("semantic", "instance"):
            raise MetadataError(f"{place}: classes must be CLASS:semantic or CLASS:instance, or {MAP}, got {word!r}")
        classes[name] = "semantic" if kind == "semantic" else "instance"
    box, why = (rank, row["dataset"], row["crop"], grid), row.get("reason") or ""
    return Proposal(*box, why, score, uncertainty, novelty, classes, done == "yes", row.get("link") or "")


# -- label files -------------------------------------------------------------------------------------------------------
def write_labels(folder: Path, proposal: Proposal, labels: Mapping[str, NDArray[Any]], file_format: str) -> None:
    """Write the labels of each class, (D, H, W) on the proposal's grid, and a map of all if no two classes overlap."""
    for name, values in labels.items():
        kind = proposal.classes[name]
        _write(proposal, proposal.file(folder, name, file_format), without_unknown(values), name, kind)
    if len(labels) < 2 or len(labels) >= UNKNOWN or sum((v != 0).astype(np.uint8) for v in labels.values()).max() > 1:
        return
    together = np.zeros(proposal.grid.shape, np.uint8)
    for value, found in enumerate(labels.values(), start=1):
        together[found != 0] = value
    _write(proposal, proposal.file(folder, MAP, file_format), together, MAP, None)
    lines = ["value,class,kind", *(f"{value},{name},semantic" for value, name in enumerate(labels, start=1))]
    write_file(proposal.values_table(folder, file_format), ("\n".join(lines) + "\n").encode())


def section_of(folder: Path, proposal: Proposal, name: str) -> NDArray[Any]:
    """Return the middle section of the labels of a class that `write_labels` wrote, (1, H, W)."""
    depth, height, width = proposal.grid.shape
    path = next(p for p in (proposal.file(folder, name, f) for f in FORMATS) if p.exists())
    with open_volume(path) as source:
        return source.read((depth // 2, 0, 0), (1, height, width))


def without_unknown(ids: NDArray[Any]) -> NDArray[Any]:
    """Return labels in the narrowest unsigned type, with 1 added to all from 255 on: no object is called unknown."""
    moved = np.where(ids >= UNKNOWN, ids.astype(np.uint64) + np.uint64(1), ids.astype(np.uint64))
    return moved.astype(np.min_scalar_type(int(moved.max(initial=0))))


def _write(proposal: Proposal, place: Path, values: NDArray[Any], name: str, kind: Kind | None) -> None:
    if place.suffix == ".tif":
        write_tiff(place, values, values.dtype, proposal.grid)
        return
    attrs = {}
    if kind is not None:
        counts = {"absent": int((values == 0).sum()), "unknown": 0}
        attrs = Annotation(name, kind, 0, UNKNOWN, counts).to_attrs()
    write_multiscale(place, values, proposal.grid, kind="label", attrs=attrs)
    if attrs:
        update_attrs(place / "s0", attrs)


# -- back into a data root ---------------------------------------------------------------------------------------------
def ingest_proposals(
    root: Path,
    folder: Path,
    ranks: Collection[int] = (),
    *,
    overwrite: bool,
    tell: Callable[[Path], object],
    show: Shown,
) -> None:
    """Write the labels of all proposals that are ``done`` as crops of a data root.

    ``ranks`` are done, too; the table then says so. Labels that are in the data root already are kept, or replaced with
    ``overwrite``. Where a label is 255, and for classes that are not in the column ``classes``, nothing is known. All
    files are checked before the first is written. If the folder has a ``split.yaml``, the crops are added to its
    training side.

    Raises:
        InputError: nothing is done, or a file does not fit its row.
        MissingError, MetadataError: a file, or the table.
        WriteError: another crop has the name.
    """
    catalog = Catalog.open(str(root))
    rows = read_table(folder)
    if wrong := sorted(set(ranks) - {row.rank for row in rows}):
        raise InputError(f"{folder / TABLE} has no proposal of rank {wrong[0]}; it has 1 to {len(rows)}")
    if ranks:
        rows = [replace(row, done=row.done or row.rank in ranks) for row in rows]
    done = [row for row in rows if row.done]
    if not done:
        raise InputError(f"{folder / TABLE}: no proposal is done; correct the labels of one, then write yes in its row")
    with ExitStack() as stack:
        jobs = list[tuple[Proposal, Drawn]]()
        for row in done:
            there, opened = _there(catalog, row), _drawn(folder, row, stack)
            jobs += [(row, d) for d in opened if overwrite or d.class_name not in there]
            if overwrite and (others := sorted(set(there) - {d.class_name for d in opened})):
                log.warning(
                    "%s has labels of %s in the data root, but not in its row of %s; remove them if they do not count",
                    row.key, ", ".join(others), TABLE,
                )  # fmt: skip
            if there and not overwrite:
                log.info("%s is in the data root already and is kept; --overwrite replaces it", row.key)
        for row, drawn in jobs:
            raw = Multiscale.open(catalog.raw_location(row.dataset)).grid
            begin = np.subtract(row.grid.box.begin, raw.box.begin).tolist()
            with show(f"{row.key}: {drawn.class_name}") as advance:
                known = _known(row.file(folder, drawn.class_name, "zarr"))
                place = ingest_labels(
                    root, row.dataset, row.crop, drawn, row.grid.voxel_size, begin, known, overwrite=overwrite,
                    progress=advance,
                )  # fmt: skip
            tell(place)
    if ranks:
        write_table(folder / TABLE, rows)
    if (folder / SPLIT).is_file():
        split = Split.load(folder / SPLIT)
        write = [row.key for row in done if row.key not in split.train]
        replace(split, train=(*split.train, *write)).save(folder / SPLIT)


def _there(catalog: Catalog, row: Proposal) -> Collection[str]:
    """The classes of a proposal that are in the data root; `WriteError` if a crop of its name lies elsewhere."""
    if row.crop not in catalog.crop_names(row.dataset):
        return ()
    crop = catalog.crop(row.dataset, row.crop)
    if crop.labels and not np.allclose([*crop.box.begin, *crop.box.end], [*row.grid.box.begin, *row.grid.box.end]):
        raise WriteError(
            f"{row.key} is another crop of {catalog.root} ({crop.box}); give this one a free number, in {TABLE} "
            f"and as the name of its folder in {LABELS}/"
        )
    return crop.labels.keys()


def _drawn(folder: Path, row: Proposal, stack: ExitStack) -> list[Drawn]:
    """The labels of a proposal, opened and checked."""
    if row.classes:
        _name_newer_map(folder, row, stack)
        return [Drawn(name, opened_labels(folder, row, name, stack)[0], kind) for name, kind in row.classes.items()]
    source, file_format = opened_labels(folder, row, MAP, stack)
    found = drawn_by_table(source, row.values_table(folder, file_format))
    if wrong := unlisted_values(source, found, Known(UNKNOWN)):
        table = row.values_table(folder, file_format)
        raise InputError(f"{source.location} holds {wrong}, but {table} does not say what they mean; add them there")
    return found


def _known(place: Path) -> Known:
    """Return what counts in a label file: `pytc annotate` says so in its attributes, else 255 is unknown."""
    said = read_attrs(place).get("cellmap", {}).get("annotation", {}) if place.exists() else {}
    return Known((said.get("annotation_type") or {}).get("encoding", {}).get("unknown", UNKNOWN))


def _name_newer_map(folder: Path, row: Proposal, stack: ExitStack) -> None:
    """Warn if the label map was corrected, but the files of the classes are taken."""
    form = next((form for form in FORMATS if row.file(folder, MAP, form).exists()), FORMATS[0])
    place, table = row.file(folder, MAP, form), row.values_table(folder, form)
    own = {name: row.file(folder, name, form) for name in row.classes}
    if not table.is_file() or max(map(_written, own.values())) >= _written(place):
        return
    source = stack.enter_context(open_volume(place))
    together = source.read((0, 0, 0), source.shape)
    for item in drawn_by_table(source, table):
        if item.class_name in own:
            values = opened_labels(folder, row, item.class_name, stack)[0].read((0, 0, 0), row.grid.shape)
            if not np.array_equal((values != 0) & (values != UNKNOWN), item.inside(together)):
                log.warning(
                    "%s: %s is newer than the files of %s, and differs; these are taken. To take %s, write it in the "
                    "column classes of %s", row.key, MAP, ", ".join(own), MAP, TABLE,
                )  # fmt: skip
                return


def _written(place: Path) -> float:
    return max((file.stat().st_mtime for file in (place, *place.rglob("*")) if file.is_file()), default=0.0)


def opened_labels(folder: Path, row: Proposal, name: str, stack: ExitStack) -> tuple[VolumeSource, str]:
    """Return the labels of a class, or of `MAP`, open as long as ``stack`` is, and their format.

    Raises `MissingError`, `UnknownNameError` or `InputError` if there are none, or their shape is not that of the row.
    """
    there = [(row.file(folder, name, f), f) for f in FORMATS if row.file(folder, name, f).exists()]
    if not there:
        place = row.file(folder, name, "tiff").parent
        beside = {path.stem for path in place.glob("*.tif")} | {p.name for p in row.file(folder, "", "zarr").glob("*")}
        if name in row.classes and beside:
            raise unknown_name("class", name, beside, f"the labels of {row.key}; correct column classes of {TABLE}")
        raise MissingError(f"{row.key}: no labels of {name} below {folder / LABELS}; restore them, or write no in done")
    path, file_format = there[0]
    source = stack.enter_context(open_volume(path))
    if source.shape != row.grid.shape:
        raise InputError(f"{path} has {source.shape} voxels, its row in {TABLE} {row.grid.shape}; they must agree")
    return source, file_format
