"""Verbs that make, bring or look at data: phantom, demo, fetch, ingest, propose, describe."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import InArgument, InOption, OutArgument, OutOption
from connectomics.errors import number_of

if TYPE_CHECKING:
    from connectomics.cellmap.fetch import Missing


def phantom(
    out: Annotated[Path, OutArgument(help="Folder to make: a data root, test_crops.csv and truth.zarr.")],
    preset: Annotated[str, typer.Option(help="tiny (tests), small (the demo) or large.")] = "small",
    size: Annotated[float | None, typer.Option(help="Extent of each data set, nm; default: the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed; another seed gives another cell.")] = 0,
    overwrite: opt.Overwrite = False,
) -> None:
    """Make a synthetic data root in the CellMap layout whose ground truth is a function of position.

    Examples:

      pytc phantom data/phantom

      pytc phantom /scratch/phantom --preset tiny --seed 7
    """
    from connectomics.phantom import PhantomOptions, make_phantom

    with terminal.stage(f"making the phantom {out}"):
        info = make_phantom(out, PhantomOptions(seed=seed, preset=preset, size_nm=size, overwrite=overwrite))
    for crop in info.crops:
        part = "test    " if crop.test else "training"
        print(f"  {part} {crop.dataset}/{crop.name}: {crop.grid}, {number_of(len(crop.voxels), 'class')}")
    print(f"data root {info.root}, crop table {info.crop_table}, truth {info.truth}")


def demo(
    out: Annotated[Path, OutOption(help="Folder for everything.")] = Path("outputs/demo"),
    data: Annotated[
        Path | None,
        InOption(help="A labeled data set of yours ({name}/{name}.zarr); default: the phantom.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, InOption(help="Configuration; default: tutorials/phantom.yaml, or the data set's own.")
    ] = None,
    overrides: opt.Overrides = None,
    preset: Annotated[str, typer.Option(help="Size of the phantom: tiny, small or large.")] = "small",
    overwrite: opt.Overwrite = False,
) -> None:
    """Run everything: data, a short training, prediction, decoding, score, submission, report.

    With --data, each labeled crop is cut into a training, a validation and a test part.

    Examples:

      pytc demo --out outputs/demo

      pytc demo --data data/fib25-medulla --out outputs/fib25 training.max_epochs=20
    """
    from connectomics.pipeline.demo import prepare_demo

    with terminal.stages() as advance:
        made = prepare_demo(
            out, data=data, config=config, overrides=overrides or [], preset=preset, overwrite=overwrite,
            stage=terminal.stage, progress=advance,
        )  # fmt: skip
        scores, baseline = made.run()
    rows = [
        [name, terminal.number(getattr(scores.totals, key), 3), terminal.number(getattr(baseline.totals, key), 3)]
        for name, key in (("overall", "overall"), ("instances", "instance"), ("semantic", "semantic"))
    ]
    for name, found in scores.label_scores.items():
        rows.append([name, terminal.number(found.score, 3), terminal.number(baseline.label_scores[name].score, 3)])
    terminal.table([f"score (rules {scores.rules})", "network", "intensity threshold"], rows)
    print()
    for name in ("scores.json", "submission.zip", "report.html"):
        print(f"  {out / name}")


def fetch(
    root: Annotated[Path, OutArgument(help="Local data root; created if it does not exist.")],
    source: Annotated[
        str | None, typer.Option("--from", help="s3://bucket or s3://bucket/folder; default: the public CellMap data.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Another S3 server; default: AWS_ENDPOINT_URL, else Amazon.")
    ] = None,
    config: Annotated[
        Path | None, InOption("--for", help="Only what this configuration reads: crops, classes, raw levels, context.")
    ] = None,
    dataset: opt.Datasets = None,
    crop: opt.Crops = None,
    class_name: Annotated[
        list[str] | None, typer.Option("--class", help="Only arrays that inform this class; may be repeated.")
    ] = None,
    voxel_size: Annotated[
        list[str] | None, typer.Option(help="Raw for this voxel size, nm: 8 or 16,8,8; may be repeated; default: 8.")
    ] = None,
    context: Annotated[float, typer.Option(help="Raw around each crop, nm.")] = 512.0,
    crops: Annotated[
        str | None,
        typer.Option(help="Also raw under the crops of this table: 'challenge', a file or a URL (kept in the root)."),
    ] = None,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Fetch labels.")] = True,
    threads: Annotated[int, typer.Option(help="Objects to transfer at a time.", min=1, max=256)] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files and bytes; transfer nothing.")] = False,
) -> None:
    """Fetch public challenge data: labels, and the raw chunks under and around their crops.

    Existing files are kept, and rerunning the same command resumes a fetch that was interrupted.

    Examples:

      pytc fetch data/cellmap --for tutorials/cellmap_cos7.yaml --dry-run

      pytc fetch data --dataset jrc_cos7-1a --class mito --class er --voxel-size 8 --context 1000

      pytc fetch data --no-labels --crops challenge --voxel-size 8
    """
    from connectomics.pipeline.fetch import fetch as run

    found: Missing | None = None
    begin = 0.0

    def planned(missing: Missing) -> None:
        nonlocal found, begin
        _print_missing(missing)
        found, begin = missing, time.perf_counter()

    run(
        root, source=source, endpoint=endpoint, config=config, datasets=dataset, crops=crop, classes=class_name,
        voxel_sizes=[opt.voxel_size_of(text) for text in voxel_size or ()], context_nm=context, crop_table=crops,
        labels=labels, threads=threads, dry_run=dry_run, planned=planned, shown=terminal.counted,
    )  # fmt: skip
    if found is not None and not dry_run:
        rate = f", {found.size / 1e6 / max(time.perf_counter() - begin, 1e-9):.1f} MB/s" if found.number else ""
        before = found.plan.number - found.number
        print(f"{root}: {number_of(found.number, 'object')} fetched, {before} already there{rate}")


def _print_missing(missing: Missing) -> None:
    plan = missing.plan
    rows: list[list[object]] = []
    for item, files in zip(plan.items, missing.items, strict=True):
        left = terminal.size(sum(file.size for file in files))
        rows.append([item.name, len(item.files), terminal.size(item.size), left, len(item.absent) or ""])
    rows.append(["all", plan.number, terminal.size(plan.size), terminal.size(missing.size), ""])
    terminal.table(["item", "objects", "size", "to fetch", "chunks not stored"], rows)


def ingest(
    root: Annotated[Path, OutArgument(help="Data root; created if it does not exist.")],
    dataset: Annotated[str | None, typer.Option(help="Name of the data set in the root.", show_default=False)] = None,
    raw: Annotated[str | None, typer.Option(help="Raw volume.", metavar="FILE")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=FILE",
            help="Labels of one class; CLASS:instance=FILE keeps IDs, CLASS:semantic=FILE not; may be repeated.",
        ),
    ] = None,
    label_map: Annotated[
        str | None, typer.Option(metavar="FILE", help="One volume with the labels of all classes.")
    ] = None,
    values: Annotated[
        Path | None, InOption(metavar="CSV", help="What the values of --label-map mean: value,class[,kind].")
    ] = None,
    proposals: Annotated[
        Path | None, InOption(help="Instead: a folder of `pytc propose`; its boxes that are done become crops.")
    ] = None,
    done: Annotated[
        str | None,
        typer.Option(metavar="1,4-6", help="With --proposals: ranks that are done, if the table has no yes."),
    ] = None,
    crop: Annotated[str, typer.Option(help="Crop for the labels: crop1, crop2, ...")] = "crop1",
    voxel_size: Annotated[
        str | None, typer.Option(help="nm, 8 or z,y,x; default: the file's (labels: else the raw's).")
    ] = None,
    begin: Annotated[
        str | None, typer.Option(help="Labels: offset from the raw's first face, nm z,y,x; default: the file's, or 0.")
    ] = None,
    value_range: Annotated[
        str | None, typer.Option("--range", metavar="LOW,HIGH", help="Store raw as uint8: values for 0 and 255.")
    ] = None,
    unknown: Annotated[int | None, typer.Option(help="Labels: the value of voxels that nobody annotated.")] = None,
    known: Annotated[
        str | None, typer.Option(metavar="FILE", help="Labels: a mask, nonzero where voxels are annotated.")
    ] = None,
    slices: Annotated[
        str | None, typer.Option(metavar="0,5,10-12", help="Labels: annotated sections, from 0; others are unknown.")
    ] = None,
    format_name: Annotated[str | None, typer.Option("--format", help="Format, if the file name does not tell.")] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Import your own volumes (TIFF pages or a folder of sections, HDF5, MRC, NRRD, npy, N5, precomputed, Zarr) into
    the CellMap layout, with pyramids, in bounded memory. All other verbs then work on them.

    Examples:

      pytc ingest data --dataset my-cell --raw stack.tif --voxel-size 8

      pytc ingest data --dataset my-cell --labels mito:instance=mito.h5:/labels --labels er=er.tif --begin 400,0,0

      pytc ingest data --dataset my-cell --label-map all.nrrd --values classes.csv --slices 0,10,20

      pytc ingest data --proposals rounds/1 --done 1,3
    """
    from connectomics.errors import InputError
    from connectomics.pipeline.ingest import ingest as run

    files: dict[str, str] = {}
    for text in labels or ():
        name, equals, place = text.partition("=")
        if not equals or not name or name in files:
            expected = "one CLASS=FILE, CLASS:instance=FILE or CLASS:semantic=FILE for each class"
            raise InputError(f"--labels: expected {expected}, got {text!r}")
        files[name] = place
    low_high = None if value_range is None else opt.numbers_of(value_range, "--range", (2,), "LOW,HIGH")
    start = None if begin is None else opt.numbers_of(begin, "--begin", (3,), "z,y,x in nm")
    run(
        root, dataset, raw=raw, labels=files, label_map=label_map, values=values, proposals=proposals,
        done=() if done is None else _numbers(done, "--done"), crop=crop,
        voxel_size=None if voxel_size is None else opt.voxel_size_of(voxel_size), begin=start,
        value_range=low_high, unknown=unknown, known=known,
        slices=None if slices is None else _numbers(slices, "--slices"), format_name=format_name, overwrite=overwrite,
        written=print, shown=terminal.counted,
    )  # fmt: skip


def propose(
    network: Annotated[Path, InArgument(metavar="RUN", help="Run folder, checkpoint or model package.")],
    root: Annotated[str, typer.Argument(metavar="DATA", help="Data root; a folder or s3:// URL.")],
    overrides: opt.Overrides = None,
    out: Annotated[Path, OutOption(help="Folder to make.")] = Path("outputs/proposals"),
    budget: Annotated[int, typer.Option(help="Number of boxes.")] = 10,
    size: Annotated[str, typer.Option(help="Size of a box, voxels of the network, z,y,x.")] = "1,256,256",
    method: Annotated[str, typer.Option(help="uncertainty, or to compare with: random, even.")] = "uncertainty",
    datasets: opt.Datasets = None,
    box: Annotated[
        str | None, typer.Option(help="Only within DATASET:z0,y0,x0:z1,y1,x1 (nm).", show_default=False)
    ] = None,
    candidates: Annotated[int, typer.Option(help="Boxes to look at, at most.")] = 400,
    seed: Annotated[int, typer.Option(help="Random seed of the candidates, and of random.")] = 0,
    file_format: Annotated[str, typer.Option("--format", help="Label files: zarr, or tiff stacks.")] = "zarr",
    checkpoint: Annotated[
        list[Path] | None, InOption(help="A further network, for an ensemble; may be repeated.", show_default=False)
    ] = None,
    config: Annotated[Path | None, InOption(help="Configuration; default: that of the run or package.")] = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Propose what to annotate next: boxes where the network is unsure and that are unlike what is annotated, spread
    over space and data sets, with its prediction as labels to correct. `pytc ingest --proposals` takes them back.

    Examples:

      pytc propose runs/first data --budget 10 --size 1,256,256 --out rounds/1

      pytc propose runs/first data --box my-cell:0,0,0:4000,4000,4000 --size 32,128,128 --format tiff --out rounds/1

      pytc propose runs/first data --method random --seed 1 --out rounds/random inference.tta=flips
    """
    from connectomics.errors import InputError
    from connectomics.pipeline.propose import propose as run

    shape = opt.numbers_of(size, "--size", (3,), "three whole numbers of voxels, z,y,x")
    if not all(n.is_integer() for n in shape):
        raise InputError(f"--size: expected three whole numbers of voxels, z,y,x, got {size!r}")
    with terminal.stage("proposing"), terminal.stages() as advance:
        found = run(
            [network, *(checkpoint or ())], root, out=out, budget=budget, size=[int(n) for n in shape], method=method,
            datasets=datasets, box=box, candidates=candidates, seed=seed, file_format=file_format,
            config=config, overrides=overrides or (), device=device, overwrite=overwrite, progress=advance,
        )  # fmt: skip
    rows = []
    for p in found:
        scores = [None if value != value else value for value in (p.score, p.uncertainty, p.novelty)]
        rows.append([p.rank, p.key, " ".join(f"{v:.7g}" for v in p.grid.box.begin), *scores])
    terminal.table(["rank", "crop", "begin nm", "score", "uncertainty", "novelty"], rows)
    for name in ("proposals.csv", "proposals.html", "labels"):
        print(out / name)


def _numbers(text: str, option: str) -> frozenset[int]:
    """``0,5,10-12`` as numbers."""
    from connectomics.errors import InputError

    found: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            begin, end = int(first), int(last if dash else first)
            if begin > end:
                raise ValueError(part)
            found.update(range(begin, end + 1))
    except ValueError as error:
        raise InputError(f"{option}: expected numbers and ranges, such as 0,5,10-12, got {text!r}") from error
    return frozenset(found)


def describe(
    root: Annotated[str, typer.Argument(help="Data root: holds {dataset}/{dataset}.zarr; a folder or s3:// URL.")],
    dataset: opt.Datasets = None,
    crop: opt.Crops = None,
    class_name: opt.Classes = None,
    voxel_size: Annotated[
        str | None, typer.Option(help="Voxel size of a run, nm: 8 or 16,8,8; default: the raw's finest.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Print data sets, crops, voxel sizes, extents, classes, and how much of each is present, absent and unknown.

    Counts raw chunks that are missing under a crop (a partial download), for the level that a run reads.

    Examples:

      pytc describe data/phantom

      pytc describe data/phantom --class mito --class nuc --json

      pytc describe s3://janelia-cosem-datasets --dataset jrc_cos7-1a --voxel-size 8
    """
    from connectomics.cellmap.summary import summarize

    summary = summarize(root, dataset, crop, class_name, None if voxel_size is None else opt.voxel_size_of(voxel_size))
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    for item in summary["datasets"]:
        raw = item["raw"]
        levels = ", ".join(terminal.triple(level["voxel_size"]) for level in raw["levels"])
        shape = terminal.triple(raw["levels"][0]["shape"])
        print(f"{item['name']}: raw {shape} {raw['dtype']}, levels of {levels} nm")
        for row in item["crops"]:
            place = f"{terminal.triple(row['extent_nm'])} nm from {terminal.triple(row['begin_nm'])} nm"
            print(f"  {row['name']}: {place}, {number_of(len(row['classes']), 'class')}, {_stored(row['raw_chunks'])}")
        if item["raw_chunks"]["missing"]:
            print(f"  in all: {_stored(item['raw_chunks'])}")
    rows = []
    for name, c in summary["classes"].items():
        total = max(1e-9, c["present_um3"] + c["absent_um3"] + c["unknown_um3"])
        shares = [f"{100 * c[k] / total:.1f} %" for k in ("present_um3", "absent_um3", "unknown_um3")]
        rows.append([name, c["kind"], c["crops"], *shares, c["present_um3"]])
    if rows:
        header = ["class", "annotated as", "crops", "present", "absent", "unknown", "present um^3"]
        terminal.table(header, rows, title=f"classes over {number_of(summary['n_crops'], 'crop')}")
    for name, number in summary["not_annotated"].items():
        print(f"{name}: a group without annotation in {number} crop(s), not a class")


def _stored(chunks: dict[str, Any]) -> str:
    first = chunks.get("first_missing")
    hint = f" (first missing: {first})" if first else ""
    return f"raw chunks stored {chunks['total'] - chunks['missing']} of {chunks['total']}{hint}"
