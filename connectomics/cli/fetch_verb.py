"""The verb fetch: public data to a local root."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import InOption, OutArgument

if TYPE_CHECKING:
    from connectomics.cellmap.catalog import Crop
    from connectomics.cellmap.fetch import Missing
    from connectomics.cellmap.fetch.transfer import Moved


def fetch(
    root: Annotated[Path, OutArgument(help="Local data root; made if it does not exist.")],
    source: Annotated[
        str | None, typer.Option("--from", help="s3://bucket or s3://bucket/folder; default: the public CellMap data.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Another S3 server; default AWS_ENDPOINT_URL or Amazon.")] = None,
    config: Annotated[
        Path | None,
        InOption("--for", help="Just what this configuration reads: its crops, classes, raw levels and context."),
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    crop: Annotated[list[str] | None, typer.Option(help="Only this crop (crop234); may be repeated.")] = None,
    class_name: Annotated[
        list[str] | None, typer.Option("--class", help="Only what can say something of this class; may be repeated.")
    ] = None,
    voxel_size: Annotated[
        list[str] | None, typer.Option(help="Raw as it is read at this voxel size, nm: 8 or 16,8,8; may be repeated.")
    ] = None,
    context: Annotated[float, typer.Option(help="Raw around each crop, nm.")] = 512.0,
    crops: Annotated[
        str | None,
        typer.Option(help="Also raw under the crops of this table: 'challenge', a file or a URL (kept in the root)."),
    ] = None,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Bring labels.")] = True,
    threads: Annotated[int, typer.Option(help="Objects that move at a time.", min=1, max=256)] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files and bytes; move nothing.")] = False,
) -> None:
    """Fetch public challenge data: labels, and the raw chunks under and around their crops.

    Nothing comes twice: what is there is kept, and a fetch that was killed goes on where it stopped.

    Examples:

      pytc fetch data --for tutorials/cellmap_cos7.yaml --dry-run

      pytc fetch data --dataset jrc_cos7-1a --class mito --class er --voxel-size 8 --context 1000

      pytc fetch data --no-labels --crops challenge --voxel-size 8
    """
    from connectomics.cellmap.fetch import PUBLIC, Missing, open_source, plan_fetch, resolve_table, transfer
    from connectomics.cli.data_verbs import voxel_size_of
    from connectomics.errors import InputError
    from connectomics.geometry import triple
    from connectomics.io.store import StoreOptions
    from connectomics.pipeline.fetch import Needs, boxes_of_crops, boxes_of_table, needs_of_config

    given = (dataset, crop, class_name, voxel_size)
    if config is not None and any(given):
        raise InputError("--for says what is fetched; leave out --dataset, --crop, --class and --voxel-size")
    if context < 0:
        raise InputError(f"--context takes nm, at least 0, found {context:g}")
    if not labels and config is None and crops is None and not voxel_size:
        raise InputError("nothing to fetch: --no-labels leaves raw, so give --voxel-size, --crops or --for")
    options = StoreOptions(endpoint=endpoint).resolved()
    if endpoint is not None:  # the reader of chunks asks the environment
        os.environ["AWS_ENDPOINT_URL"] = endpoint
    place = root.expanduser()
    catalog = open_source(source or PUBLIC, options)
    table = None if crops is None else resolve_table(crops, None if dry_run else place)
    with show.stage("looking up what is needed"):
        if config is not None:
            from connectomics.config import load_config

            composed = load_config(config)
            classes: list[str] | None = composed.dataset.classes
            wanted: list[Crop] = []
            needs = needs_of_config(composed, catalog)
            sizes = [triple(composed.dataset.voxel_size)]
        else:
            classes = class_name
            wanted = catalog.crops(dataset, crop, class_name) if labels or dataset or crop or table is None else []
            sizes = [voxel_size_of(text) for text in voxel_size or ["8"]]
            needs = Needs(wanted)
        boxes = ([] if config is not None else boxes_of_crops(wanted)) + (
            [] if table is None else boxes_of_table(catalog, table)
        )
        needs.add_around(boxes, sizes, context)
    with progress.counted("listing objects") as advance:
        plan = plan_fetch(catalog.root, needs.crops if labels else [], classes, needs.raw, options, advance)
    missing = Missing.below(place, plan)
    _print_plan(missing)
    if dry_run:
        return
    begin = time.perf_counter()
    with progress.counted("fetching") as advance:
        number = transfer(missing, place, options, threads=threads, progress=_told(advance))
    seconds = max(time.perf_counter() - begin, 1e-9)
    rate = f", {missing.size / 1e6 / seconds:.1f} MB/s" if number else ""
    print(f"{place}: {number} objects came, {plan.number - missing.number} were there{rate}")


def _told(advance: progress.Advance) -> Moved:
    begin = time.perf_counter()

    def tell(done: int, number: int, size: int, total: int) -> None:
        rate = size / 1e6 / max(time.perf_counter() - begin, 1e-9)
        advance(done, number, f"{_size(size)} of {_size(total)}, {rate:.1f} MB/s")

    return tell


def _print_plan(missing: Missing) -> None:
    rows = []
    for item, files in zip(missing.plan.items, missing.items, strict=True):
        absent = str(item.absent) if item.absent else ""
        rows.append([item.name, str(len(item.files)), _size(item.size), _size(sum(f.size for f in files)), absent])
    rows.append(["all", str(missing.plan.number), _size(missing.plan.size), _size(missing.size), ""])
    show.table(["item", "objects", "size", "to come", "chunks not stored"], rows)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
