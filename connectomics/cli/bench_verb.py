"""The verbs that measure: bench data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import OutOption

if TYPE_CHECKING:
    from connectomics.data.bench import DataBench

bench = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure on this machine, beside the limits that hold on it.",
)

_WHAT = {
    "read": "open the crop's arrays",
    "spatial": "place, draw, fused pass",
    "others": "MONAI transforms",
    "collate": "batch of patches",
    "transfer": "to the device",
    "intensity": "on the device",
}
_LIMITS = {
    "copy": "bare copy of the patch's raw and codes",
    "kernel": "bare fused pass, arrays in memory",
    "decompress": "bare decompression of the chunks behind it",
    "decode": "read without the crop cache",
    "dense": "labels unpacked to dense arrays",
}


@bench.callback()
def group() -> None:
    """Keep ``data`` a command of its own, though it is the only one."""


@bench.command("data")
def data(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value ..., as in data.patch_size=[64,64,64]", show_default=False)
    ] = None,
    config: Annotated[
        str, typer.Option(help="Configuration: a file, or a tutorial's name (phantom, cellmap_cos7).")
    ] = "phantom",
    patches: Annotated[int, typer.Option(help="Patches to measure.")] = 64,
    against: Annotated[
        str | None, typer.Option(metavar="cellmap-data", help="Also run this loader on the same data.")
    ] = None,
    peer_env: Annotated[
        Path | None, OutOption("--peer-env", help="Its virtual environment; default: in the user's cache folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the data path of a run: patches a second, CPU milliseconds a patch and memory, stage by stage, with what
    the same bytes cost at the least measured in the same run. Nothing is trained; crops are decoded into the cache as
    for training.

    --against cellmap-data runs the official loader on the same crops, classes, patch and voxel size, in a virtual
    environment of its own (made once; about 1.5 GB).

    Examples:

      pytc bench data --config phantom --patches 32

      pytc bench data --config tutorials/cellmap_cos7.yaml --against cellmap-data data.patch_size=[64,64,64]
    """
    from connectomics.errors import InputError, unknown_name

    if against not in (None, "cellmap-data"):
        raise unknown_name("loader", against, ["cellmap-data"], "--against")
    if peer_env is not None and against is None:
        raise InputError("--peer-env is the environment of --against cellmap-data: give that too")
    if patches < 1:
        raise InputError(f"--patches must be at least 1, found {patches}")
    from connectomics.config import load_config
    from connectomics.config.compose import tutorial

    file = Path(config)
    if not file.suffix and len(file.parts) == 1:
        file = tutorial(config)
    composed = load_config(file, overrides or [])
    from connectomics.data.bench import bench_data, ensure_environment

    python = None
    if against is not None:
        python = ensure_environment(peer_env, say=lambda line: print(line, file=sys.stderr, flush=True))
    with progress.counted("measuring") as advance:
        found = bench_data(composed, patches, peer_python=python, progress=advance)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)


def _print(found: DataBench) -> None:
    setup = found.setup
    print(
        f"{setup['crops']} crops, {setup['classes']} classes, patches of {show.shape(setup['patch_size'])} voxels of "
        f"{show.triple(setup['resolution'])} nm, batches of {setup['batch_size']}, cache: {setup['cache']}, "
        f"device: {setup['device']}{'' if setup['device'] != 'cpu' else ' (no transfer)'}"
    )
    rows = [
        [name, _WHAT[name], f"{1e3 * cpu:.2f}", f"{found.peaks[name]:.1f}" if name in found.peaks else "-"]
        for name, cpu in found.stages.items()
    ]
    rows.append(["whole", "", f"{1e3 * found.whole:.2f}", f"{found.peak_mb:.0f}"])
    show.table(["stage", "", "CPU ms a patch", "MB"], rows, f"one process, medians of {found.rounds} rounds")
    print("  MB: what a stage takes beyond what was held; whole: resident, with programs and mapped crops")
    limits = [[_LIMITS[name], f"{1e3 * cpu:.2f}"] for name, cpu in found.limits.items()]
    show.table(["limits, on the same patches", "CPU ms a patch"], limits)
    for name, value in found.ratios.items():
        above, below = name.split("/")
        print(f"  {above} / {below}: {value:.2f}")
    speed = found.loader
    memory = "" if speed.worker_mb is None else f", {speed.worker_mb:.0f} MB private memory a worker"
    print(
        f"\nwhole loader: {speed.patches_per_s:.3g} patches/s with {speed.workers} workers (in this process "
        f"{found.patches_per_s:.3g}), {1e3 * speed.cpu_s:.2f} CPU ms a patch with what workers and queues cost{memory}"
    )
    if found.peer:
        _print_peer(found)


def _print_peer(found: DataBench) -> None:
    rows = []
    for item in (comparison.to_dict() for comparison in found.peer):
        rows.append(
            [
                "flips, rotation" if item["augmented"] else "plain",
                *(f"{1e3 * item[name]:.2f}" for name in ("peer_cpu_s", "cpu_s", "dense_cpu_s")),
                f"{item['ratio']:.1f}",
                f"{item['dense_ratio']:.1f}",
            ]
        )
    show.table(
        ["patch", "cellmap-data ms", "ours ms", "ours, dense ms", "ratio", "ratio, dense"],
        rows,
        f"CPU a patch, cellmap-data {found.peer[0].version} beside ours, one process and torch thread each",
    )
    print("  theirs: dense float32 labels read from Zarr; ours: packed codes from the crop cache; dense: unpacked too")
