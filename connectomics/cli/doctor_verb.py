"""The verb doctor: what this machine has, and what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli.paths import OutOption


def doctor(
    at: Annotated[Path, OutOption("--at", help="Folder for runs and the crop cache; its disk is measured.")] = Path(),
    s3: Annotated[
        str | None, typer.Option("--s3", help="Also ask this bucket, s3://...; 'public' for the CellMap data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Look at versions, GPU, memory, limits, disk speed and S3, and say what to change. Fails where a run would.

    Examples:

      pytc doctor

      pytc doctor --at /scratch --s3 public
    """
    from connectomics.cellmap.fetch import PUBLIC
    from connectomics.errors import InputError
    from connectomics.io.store import is_s3
    from connectomics.pipeline.doctor import examine

    if at.is_file():
        raise InputError(f"--at takes a folder, found the file {at}")
    if s3 is not None and s3 != "public" and not is_s3(s3):
        raise InputError(f"--s3 takes s3://BUCKET, or public, found {s3}")
    findings = []
    for finding in examine(at.expanduser(), s3=PUBLIC if s3 == "public" else s3):
        findings.append(finding)
        if not as_json:
            mark = {"ok": " ", "note": "!", "problem": "X"}[finding.level]
            print(f"{mark} {finding.what}: {finding.found}" + (f"\n    -> {finding.advice}" if finding.advice else ""))
    problems = sum(f.level == "problem" for f in findings)
    if as_json:
        print(json.dumps([f.to_dict() for f in findings], indent=1))
    else:
        notes = sum(f.level == "note" for f in findings)
        print(f"{problems} problems, {notes} things that may cost time")
    return 1 if problems else 0
