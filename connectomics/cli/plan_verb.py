"""The verb plan: configurations that suit data and machine, with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import OutOption


def plan(
    root: Annotated[str, typer.Argument(help="Data root: a folder or s3:// URL.")],
    class_name: Annotated[list[str], typer.Option("--class", help="Class to segment; may be repeated.")],
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    out: Annotated[Path, OutOption(help="Folder for plan_{N}nm.yaml.")] = Path(),
    trial: Annotated[
        bool, typer.Option("--trial/--no-trial", help="Try a training step: batch, memory, hours.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace files of an earlier plan.")] = False,
) -> None:
    """Measure data and machine, and write configurations that train: one for each voxel size that classes need.

    Examples:

      pytc plan data --class mito --class er --class mt

      pytc plan data --class nuc --out plans --no-trial
    """
    from connectomics.errors import WriteError
    from connectomics.io.replacing import contains, require_own
    from connectomics.io.store import is_s3
    from connectomics.io.write import write_file
    from connectomics.pipeline.data_facts import data_facts
    from connectomics.pipeline.plan import MARK, hours, machine_facts, propose, try_step

    with progress.counted("measuring classes") as advance:
        data = data_facts(root, class_name, dataset, advance)
    machine = machine_facts(out)
    plans = propose(data, machine, root if is_s3(root) else str(Path(root).expanduser().resolve()))
    files = [out / f"{item.name}.yaml" for item in plans]
    for file in files:
        if file.exists() and not overwrite:
            raise WriteError(f"{file} is there already; give --overwrite, or another --out")
        require_own(file, contains(MARK), "plan")
    rows = [
        [
            facts.name,
            str(facts.crops),
            f"{facts.present_um3:.3g}",
            f"{100 * facts.share:.2g} %",
            "-" if facts.chord_nm is None else f"{facts.chord_nm:.0f}",
            "-" if facts.test_nm is None else f"{facts.test_nm:g}",
        ]
        for facts in data.classes
    ]
    show.table(["class", "crops", "present um^3", "of known", "mean chord nm", "asked at nm"], rows)
    low, middle, high = data.grey
    print(
        f"{data.crops} crops, {data.volume_um3:.3g} um^3; raw {data.raw_dtype}, {low:.0f} / {middle:.0f} / {high:.0f}"
    )
    gpu = machine.gpu or "no GPU"
    print(f"{machine.cores} cores, {machine.memory / 1e9:.0f} GB, {gpu}, {machine.disk / 1e9:.0f} GB of disk free")
    for item, file in zip(plans, files, strict=True):
        if trial:
            with show.stage(f"trying {item.name}"):
                try_step(item, machine)
        print(f"\n{item.name}: {', '.join(item.classes)}")
        for reason in item.reasons:
            print(f"  {reason}")
        if item.step_seconds is not None and item.step_memory is not None:
            expected = hours(item)
            print(
                f"  a step takes {item.step_seconds:.2f} s and {item.step_memory / 1e9:.1f} GB; at most {expected:.1f} "
                f"h for all epochs, loading not counted"
            )
        write_file(file, item.to_yaml().encode())
        print(f"  pytc train {file}")
    absent = [facts.name for facts in data.classes if facts.chord_nm is None]
    if absent:
        print(f"\nleft out, since nowhere present: {', '.join(absent)}")
