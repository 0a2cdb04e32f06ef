"""The crops and raw grids that a run configuration reads from a public source."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.fetch import PUBLIC, Missing, open_source, plan_fetch, resolve_table, transfer
from connectomics.config import RunConfig, as_config
from connectomics.data.dataset.build import patch_options, run_dataset
from connectomics.data.dataset.dataset_cellmap import Mode
from connectomics.errors import InputError
from connectomics.geometry import Triple, VoxelGrid
from connectomics.io.store import StoreOptions
from connectomics.progress import Progress, Shown, showing


@dataclass
class Needs:
    """Crops whose labels are needed, and the grids (nm) that must be readable, by raw group."""

    crops: list[Crop]
    raw: dict[str, list[VoxelGrid]] = field(default_factory=dict)

    def add(self, location: str, grid: VoxelGrid) -> None:
        """Add a grid on a raw group."""
        if grid.size:
            self.raw.setdefault(location, []).append(grid)


def needs_of_config(config: RunConfig, catalog: Catalog) -> Needs:
    """Return everything that training and validating ``config`` on ``catalog`` can read.

    That is patches including the margin that augmentation needs, further inputs, and validation windows, each at its
    voxel size.
    """
    chosen = config.dataset
    crops = catalog.crops(chosen.datasets, chosen.crops, chosen.classes)
    options = replace(patch_options(config), allow_missing_raw=True, cache="none")
    found = Needs(crops)
    modes: tuple[Mode, ...] = ("train", "val")
    for mode in modes:
        for volume in run_dataset(config, crops, mode, options).all_volumes:
            found.add(volume.crop.raw, volume.cached_raw_grid)
    return found


def fetch(
    root: str | Path,
    *,
    source: str | None = None,
    endpoint: str | None = None,
    config: RunConfig | str | Path | None = None,
    datasets: Sequence[str] | None = None,
    crops: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    voxel_sizes: Sequence[Triple] | None = None,
    context_nm: float = 512.0,
    crop_table: str | None = None,
    labels: bool = True,
    threads: int = 16,
    dry_run: bool = False,
    planned: Callable[[Missing], None] | None = None,
    shown: Shown | None = None,
    progress: Progress | None = None,
) -> Catalog:
    """Fetch public challenge data: labels, and the raw chunks under and around their crops.

    Existing files are kept; calling it again resumes a fetch that was interrupted.

    Args:
        root: local data root.
        source: ``s3://bucket`` or ``s3://bucket/folder``; None: the public CellMap data.
        endpoint: another S3 server.
        config: only what this configuration reads; excludes the next four.
        datasets, crops, classes: only these.
        voxel_sizes: raw for these voxel sizes (nm, z y x); None: 8 nm.
        context_nm: raw around each crop, nm.
        crop_table: also raw under the crops of this table: "challenge", a file or a URL (kept in the root).
        labels: whether to fetch labels.
        threads: objects to transfer at a time.
        dry_run: only list the objects; write nothing.
        planned: called with what is missing, before it is transferred.
        progress: called while objects are listed and transferred.
        shown: or a progress for each of the two.

    Returns:
        The catalog of the root; with ``dry_run``, of the source.

    Raises:
        InputError, UnknownNameError, MissingError: the request.
        StoreError, WriteError: the transfer.
    """
    if config is not None and any((datasets, crops, classes, voxel_sizes)):
        raise InputError("--for determines what is fetched; leave out --dataset, --crop, --class and --voxel-size")
    if context_nm < 0:
        raise InputError(f"--context: expected nm, at least 0, got {context_nm:g}")
    if not labels and config is None and crop_table is None and not voxel_sizes:
        raise InputError("nothing to fetch: --no-labels leaves raw only, so give --voxel-size, --crops or --for")
    options = StoreOptions(endpoint=endpoint).resolved()
    if endpoint is not None:  # the reader of chunks takes it from the environment
        os.environ["AWS_ENDPOINT_URL"] = endpoint
    place, show = Path(root).expanduser(), shown or showing(progress)
    with show("listing objects") as advance:
        catalog = open_source(source or PUBLIC, options)
        table = None if crop_table is None else resolve_table(crop_table, None if dry_run else place)
        boxes = [] if table is None else [(dataset, box) for (dataset, _), box in table.boxes().items()]
        if config is not None:
            composed = as_config(config)
            needs, sizes = needs_of_config(composed, catalog), [composed.voxel_size]
            classes = composed.dataset.classes
        else:
            wanted = catalog.crops(datasets, crops, classes) if labels or datasets or crops or table is None else []
            needs, sizes = Needs(wanted), list(voxel_sizes or [(8.0, 8.0, 8.0)])
            boxes = [(crop.dataset, crop.box) for crop in wanted] + boxes
        for dataset, box in boxes:
            for size in sizes:
                needs.add(catalog.raw_location(dataset), VoxelGrid.covering(box.grow(context_nm), size))
        plan = plan_fetch(catalog.root, needs.crops if labels else [], classes, needs.raw, options, advance)
        missing = Missing.below(place, plan)
    if planned is not None:
        planned(missing)
    if dry_run:
        return catalog
    with show("fetching") as advance:
        transfer(missing, place, options, threads=threads, progress=_with_rate(advance))
    return Catalog.open(str(root))


def _with_rate(advance: Progress) -> Callable[[int, int, int, int], None]:
    """Return the progress that `transfer` takes, which adds the bytes and the rate since now."""
    begin = time.perf_counter()

    def tell(done: int, number: int, size: int, total: int) -> None:
        rate = size / 1e6 / max(time.perf_counter() - begin, 1e-9)
        advance(done, number, f"{size / 1e6:.1f} of {total / 1e6:.1f} MB, {rate:.1f} MB/s")

    return tell
