"""Verbs that look at data and results, or draw: inspect, cache, view, annotate."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import InOption, OutOption
from connectomics.errors import number_of

if TYPE_CHECKING:
    from connectomics.data.cache import CropCache, EntryInfo
    from connectomics.pages.inspect.data import Inspection


def inspect(
    config: Annotated[str, typer.Argument(help="Configuration: a file, or a tutorial's name (phantom, cellmap_cos7).")],
    overrides: opt.Overrides = None,
    out: Annotated[Path, OutOption(help="The page to write.")] = Path("inspect.html"),
    batches: Annotated[int, typer.Option(help="Number of batches.")] = 2,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Show training batches as the network gets them, after every augmentation: slices with labels and unknown voxels,
    where each patch comes from, what is known and present, missing raw, loader speed and memory. Warns of what looks
    wrong. Nothing is trained; crops are decoded into the cache as for training.

    Examples:

      pytc inspect phantom --out inspect.html

      pytc inspect tutorials/cellmap_cos7.yaml --batches 4 data.num_workers=8 data.patch_size=[96,96,96]
    """
    from connectomics.config import load_config, tutorial
    from connectomics.pages.inspect.data import inspect_data
    from connectomics.pages.inspect.page import check_out, write_page

    file = Path(config)
    if not file.suffix and len(file.parts) == 1:
        file = tutorial(config)
    check_out(out, overwrite=overwrite)  # before the work
    composed = load_config(file, overrides)
    with terminal.counted("taking batches") as advance:
        found = inspect_data(composed, batches, advance)
    page = write_page(out, found, overwrite=overwrite)
    if as_json:
        print(json.dumps({**found.to_dict(), "page": str(page)}, indent=1))
        return
    _print_inspection(found)
    print(page)


def _print_inspection(found: Inspection) -> None:
    from connectomics.pages.inspect.data import pooled_known
    from connectomics.pages.inspect.numbers import by_class

    rows = []
    for row in by_class([p.labels for p in found.patches]):
        present = None if row.present is None else f"{row.present:.1%}"
        rows.append([row.name, f"{row.known:.1%}", present, f"{row.patches_present} of {len(found.patches)}"])
    terminal.table(["class", "known", "present where known", "patches with it"], rows)
    known, values, speed = pooled_known(found.patches), found.values[0], found.speed
    print(f"\nknown: {known['labels']:.1%} of all labels; any class at {known['anything']:.1%} of the voxels")
    print(
        f"image: {values.low:.3f} to {values.high:.3f}, mean {values.mean:.3f}; exactly 0 {values.zero:.1%}, "
        f"exactly 1 {values.one:.1%}"
    )
    rate, flow = speed.patches_per_s, speed.bytes_per_s
    if rate is not None and flow is not None:
        print(
            f"loader: {rate:.3g} patches/s, {terminal.size(flow)}/s with "
            f"{number_of(speed.workers, 'worker')} (first batch {speed.first_s:.1f} s)"
        )
    if speed.memory:
        held = terminal.size(sum(m.proportional for m in speed.memory))
        print(f"memory: {held} in {number_of(len(speed.memory), 'process')}")
    for warning in found.warnings():
        print(f"warning: {warning}")


def cache(
    folder: Annotated[
        Path | None, OutOption("--dir", help="Cache folder (data.cache_dir); default: the user's.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove entries that no running process uses.")] = False,
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", help="Only entries not used for so many days.")
    ] = None,
    crop: Annotated[
        list[str] | None, typer.Option(metavar="DATASET/CROP", help="Only entries of this crop; may be repeated.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    as_json: opt.AsJson = False,
) -> int:
    """List the crops that were decoded for training, verify them, or remove them.

    Examples:

      pytc cache

      pytc cache --dir /scratch/crops --clear --older-than 30
    """
    from connectomics.data.cache import CropCache, default_cache_dir
    from connectomics.errors import InputError, require_known

    if clear and verify:
        raise InputError("--clear and --verify exclude each other; give one of them")
    if older_than is not None and older_than < 0:
        raise InputError(f"--older-than: expected days, at least 0, got {older_than:g}")
    cached = CropCache(folder.expanduser() if folder is not None else default_cache_dir())
    entries = cached.entries()
    if entries:
        require_known("crop", crop, {entry.crop for entry in entries if entry.crop}, str(cached.folder))
    limit = 0.0 if older_than is None else older_than
    chosen = [e for e in entries if (time.time() - e.used) / 86400 >= limit and (not crop or e.crop in crop)]
    if clear:
        return _clear(cached, chosen, as_json)
    damage = _damage(chosen) if verify else {}
    total = sum(entry.size for entry in entries)
    if as_json:
        data = [{**_described(entry), **({"damage": damage.get(entry.name)} if verify else {})} for entry in chosen]
        content = {"folder": str(cached.folder), "bytes": total, "budget": cached.budget, "entries": data}
        print(json.dumps(content, indent=1))
        return 1 if damage else 0
    if chosen:
        header = ["crop", "classes", "voxel nm", "size", "last used", "in use"]
        terminal.table(header, [_cells(entry) for entry in chosen])
    budget = "" if cached.budget is None else f" of {terminal.size(cached.budget)} (data.cache_gb of the last run)"
    print(f"{cached.folder}: {number_of(len(chosen), 'entry')}, {terminal.size(total)}{budget}")
    for text in damage.values():
        print(f"error: {text}")
    if verify and not damage:
        print(f"no damage in {number_of(len(chosen), 'entry')}")
    return 1 if damage else 0


def _clear(cached: CropCache, chosen: Sequence[EntryInfo], as_json: bool) -> int:
    removed = cached.remove([entry.name for entry in chosen])
    cached.sweep()
    kept = {entry.name for entry in chosen} - {entry.name for entry in removed}
    size = sum(entry.size for entry in removed)
    if as_json:
        print(json.dumps({"removed": [_described(entry) for entry in removed], "bytes": size, "in_use": sorted(kept)}))
        return 0
    used = f"; kept {len(kept)} that are in use" if kept else ""
    print(f"removed {number_of(len(removed), 'entry')} ({terminal.size(size)}) from {cached.folder}{used}")
    return 0


def _damage(entries: Sequence[EntryInfo]) -> dict[str, str]:
    """What is wrong, by entry."""
    from connectomics.data.cache import open_entry
    from connectomics.errors import CorruptDataError

    found = {}
    with terminal.counted("checking entries") as advance:
        for number, entry in enumerate(entries):
            advance(number, len(entries), entry.crop or entry.name)
            try:
                open_entry(entry.folder, "all")
            except CorruptDataError as error:
                found[entry.name] = str(error)
    return found


def _cells(entry: EntryInfo) -> list[object]:
    days = max(0.0, time.time() - entry.used) / 86400
    ago = f"{days:.0f} days" if days >= 2 else f"{24 * days:.0f} h" if days >= 1 / 12 else f"{1440 * days:.0f} min"
    name, used = entry.crop or f"damaged: {entry.name}", "yes" if entry.processes else ""
    return [name, entry.classes, terminal.triple(entry.voxel_size), terminal.size(entry.size), f"{ago} ago", used]


def _described(entry: EntryInfo) -> dict[str, Any]:
    names = ("name", "crop", "classes", "used", "processes")
    return {**{n: getattr(entry, n) for n in names}, "voxel_size": list(entry.voxel_size), "bytes": entry.size}


def view(
    root: Annotated[str | None, typer.Argument(help="Data root: raw, and the ground truth of its crops.")] = None,
    predictions: Annotated[Path | None, InOption(help="Folder that predict wrote.")] = None,
    labels: Annotated[Path | None, InOption(help="Folder that decode wrote.")] = None,
    tables: Annotated[Path | None, InOption(help="Folder that measure wrote: properties of instances.")] = None,
    meshes: Annotated[
        Path | None, InOption(help="Folder that mesh wrote, with --format multilod or precomputed.")
    ] = None,
    proposals: Annotated[Path | None, InOption(help="Folder that propose wrote: serves the links of its page.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set; default: the only one.")] = None,
    crop: opt.Crops = None,
    class_name: opt.Classes = None,
    port: opt.Port = 0,
    bind: Annotated[
        str, typer.Option(help="Address to listen on; the default serves this machine only.")
    ] = "127.0.0.1",
    state: Annotated[Path | None, OutOption(help="Write the page's state here, as JSON, to share it.")] = None,
    browser: opt.Browser = False,
    napari: Annotated[bool, typer.Option("--napari", help="Use napari instead, if it is installed.")] = False,
) -> None:
    """View raw, ground truth, known voxels, probabilities, labels and uncertainty in world coordinates.

    If there are many classes and crops, each crop is one layer with its classes as segments. --crop also takes test
    crops, --class shows a class alone. Instances have their size, contacts and meshes, if there are such files.

    Prints a link; the page is served to this machine only, until Ctrl-C. On a cluster, forward its port with ssh.

    Examples:

      pytc view data/phantom --dataset phantom-iso --class mito

      pytc view data --dataset my-cell --predictions outputs/predictions --labels outputs/labels --open

      pytc view data/phantom --proposals rounds/1
    """
    if proposals is not None:
        others = (predictions, labels, tables, meshes, dataset, crop, class_name, state, napari or None)
        _view_proposals(root, proposals, bind, port, browser, alone=others == (None,) * len(others))
        return
    from connectomics.io.replacing import has_keys, require_own
    from connectomics.io.write import write_file
    from connectomics.pages.view import ViewSources, collect_layers, open_viewer, summary

    if state is not None:
        require_own(state, has_keys("dimensions", "layers"), "view")
    found = collect_layers(ViewSources(root, predictions, labels, dataset, crop, class_name, tables, meshes))
    if napari:
        from connectomics.pages.view.in_napari import show_in_napari

        show_in_napari(found)
        return
    viewing = open_viewer(found, bind, port)
    if state is not None:
        write_file(state, json.dumps(viewing.state, indent=1).encode())
        print(f"state: {state}")
    print("\n".join(summary(found)))
    _serve(viewing.url, viewing.close, browser)


def _view_proposals(root: str | None, folder: Path, bind: str, port: int, browser: bool, *, alone: bool) -> None:
    from connectomics.errors import InputError
    from connectomics.pipeline.proposals import read_table
    from connectomics.pipeline.view_proposals import open_proposals

    if root is None or not alone:
        raise InputError("--proposals needs the data root, and no other option that says what to show")
    served = open_proposals(root, folder, bind, port)
    for row, page in zip(read_table(folder), served, strict=True):
        print(f"{row.rank}. {row.key}: {page.url}")
    _serve((folder / "proposals.html").resolve().as_uri(), served[0].close, browser)


def annotate(
    root: Annotated[str, typer.Argument(help="Local data root: raw, and the ground truth of its crops.")],
    dataset: Annotated[str | None, typer.Option(help="Data set; default: that of --box, or the only one.")] = None,
    crop: Annotated[str | None, typer.Option(help="Crop to draw, existing or (with --box) new: 7 or crop7.")] = None,
    class_name: Annotated[
        list[str] | None,
        typer.Option("--class", help="Class to draw, or CLASS:instance; may be repeated; default: all."),
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="DATASET:z0,y0,x0:z1,y1,x1 in nm: where the new crop is.", show_default=False)
    ] = None,
    voxel_size: Annotated[
        str | None, typer.Option(help="Of a new crop, nm: 8 or z,y,x; default: that of the raw.")
    ] = None,
    labels: Annotated[Path | None, InOption(help="Folder that decode wrote: offered where voxels are unknown.")] = None,
    raw: Annotated[str | None, typer.Option(help="Data root with the raw, if the first one has labels only.")] = None,
    edits: Annotated[
        Path | None, OutOption(help="Log of apply-edits: also merge, split and delete instances of --labels.")
    ] = None,
    port: opt.Port = 0,
    browser: opt.Browser = False,
) -> None:
    """Draw labels of a crop in a browser: brush, fill, unknown voxels, instance IDs, and acceptance of a prediction.

    Every stroke is on disk at once; rerun the same command to resume. Prints a link; the page is served to this machine
    only, until Ctrl-C. On a cluster, forward its port with ssh.

    Examples:

      pytc annotate data --dataset my-cell --crop 1

      pytc annotate data --crop 2 --box my-cell:0,0,0:800,1600,1600 --class mito --class er --labels outputs/labels

      pytc annotate checks --raw data --crop 2 --box my-cell:0,0,0:800,1600,1600 --class mito --labels outputs/labels
      --edits edits.jsonl
    """
    from connectomics.pipeline.annotate import annotate as run

    size = None if voxel_size is None else opt.voxel_size_of(voxel_size)
    drawing = run(
        root, dataset, crop, classes=class_name, box=box, voxel_size=size, labels=labels, raw=raw, edits=edits,
        port=port,
    )  # fmt: skip
    for name, item in drawing.labels.items():
        print(f"  {name} ({item.kind}): {item.grid}")
    if drawing.left_out:
        print(f"not shown: {', '.join(drawing.left_out)}; name them by --class")
    _serve(drawing.url, drawing.close, browser)


def _serve(url: str, close: Callable[[], None], browser: bool) -> None:
    """Print the link and wait for Ctrl-C."""
    print(url, flush=True)
    if browser:
        import webbrowser

        webbrowser.open(url)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("closed")
    finally:
        close()
