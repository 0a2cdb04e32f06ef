"""The verb inspect: training batches as the network gets them, on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import OutOption
from connectomics.cli.run_verbs import Overrides

if TYPE_CHECKING:
    from connectomics.report.inspect.data import Inspection


def inspect(
    config: Annotated[str, typer.Argument(help="Configuration: a file, or a tutorial's name (phantom, cellmap_cos7).")],
    overrides: Overrides = None,
    out: Annotated[Path, OutOption(help="The page to write.")] = Path("inspect.html"),
    batches: Annotated[int, typer.Option(help="How many batches to show.")] = 2,
    overwrite: Annotated[bool, typer.Option(help="Replace the page where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show training batches as the network gets them, after every augmentation: slices with labels and what is
    unknown, where each patch comes from and what was done to it, and in numbers how much is known and present, what
    raw is missing, how fast the loader is and how much memory it holds. Says in words what looks wrong.

    Nothing is trained; crops are decoded into the cache as for training.

    Examples:

      pytc inspect phantom --out inspect.html

      pytc inspect tutorials/cellmap_cos7.yaml --batches 4 data.num_workers=8 data.patch_size=[96,96,96]
    """
    from connectomics.config import load_config
    from connectomics.config.compose import tutorial
    from connectomics.report.inspect.data import inspect_data
    from connectomics.report.inspect.page import check_out, write_page

    file = Path(config)
    if not file.suffix and len(file.parts) == 1:
        file = tutorial(config)
    check_out(out, overwrite=overwrite)  # before the work
    composed = load_config(file, overrides or [])
    with progress.counted("taking batches") as advance:
        found = inspect_data(composed, batches, advance)
    page = write_page(out, found, overwrite=overwrite)
    if as_json:
        print(json.dumps({**found.to_dict(), "page": str(page)}, indent=1))
        return
    _print_summary(found)
    print(page)


def _print_summary(found: Inspection) -> None:
    from connectomics.report.inspect.data import pooled_known
    from connectomics.report.inspect.numbers import by_class
    from connectomics.report.page import percent, size

    rows = [
        [
            row.name,
            percent(row.known),
            "-" if row.present is None else percent(row.present),
            f"{row.patches_present} of {len(found.patches)}",
        ]
        for row in by_class([p.labels for p in found.patches])
    ]
    show.table(["class", "known", "present where known", "patches with it"], rows)
    known, values, speed = pooled_known(found.patches), found.values[0], found.speed
    print(f"\nknown: {percent(known['labels'])} of all labels; something at {percent(known['anything'])} of the voxels")
    print(
        f"image: {values.low:.3f} to {values.high:.3f}, mean {values.mean:.3f}; exactly 0 {percent(values.zero)}, "
        f"exactly 1 {percent(values.one)}"
    )
    rate, flow = speed.patches_per_s, speed.bytes_per_s
    if rate is not None and flow is not None:
        print(
            f"loader: {rate:.3g} patches/s, {size(flow)}/s with {speed.workers} worker{'s' * (speed.workers != 1)} "
            f"(first batch {speed.first_s:.1f} s)"
        )
    if speed.memory:
        print(f"memory: {size(sum(m.proportional for m in speed.memory))} in {len(speed.memory)} processes")
    for warning in found.warnings():
        print(f"warning: {warning}")
