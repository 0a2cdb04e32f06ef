"""Check a submission before the upload: find what the portal would refuse or silently count as nothing.

The check looks at names and sizes first, from the zip's directory alone; if they are unsafe, nothing is read. Then it
compares the group, its crops and its arrays with the crop table, and last the arrays' values, a slab at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from connectomics.cellmap.classes import CLASSES
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError, nearest, number_of
from connectomics.metrics.challenge.rules import Rules
from connectomics.metrics.challenge.zarr_v2 import MAX_UNPACKED_BYTES, Archive
from connectomics.progress import Progress, silent
from connectomics.submission.array_checks import check_content, check_grid, open_array
from connectomics.submission.findings import Finding, error, warning

_NESTED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}
# If one of these is found, nothing of the archive is read.
_UNSAFE = ("outside-path", "deep-path", "link", "unpacked-size", "overlap", "encrypted", "zip-method")
_PACK = "export it again, or zip the content of the group's folder: cd submission.zarr && zip -r0 ../submission.zip ."


def validate_submission(
    submission: str | Path,
    crops: CropTable | str | Path,
    truth: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> list[Finding]:
    """Check a submission, a zip or the folder of a group, against a crop table.

    Args:
        submission: what would be uploaded.
        crops: the table of required arrays. A part of it (`CropTable.select`) checks that part, and reports the rest
            as unknown.
        truth: a group of plain arrays ``crop{N}/{class}``; if given, the check compares emptiness and instance numbers
            with it instead of usual values.
        progress: called after each array.

    Returns:
        Findings, errors first, then in the order of the table; [] if there are none.

    Raises:
        MissingError: nothing is at ``submission`` or ``truth``. Problems of the submission itself are findings.
    """
    table = CropTable.resolve(crops)
    findings: list[Finding] = []
    try:
        archive = Archive(submission)
    except InputError as problem:
        return [error("not-a-zip", ".", str(problem), "a zip file or a folder", _PACK)]
    with archive:
        findings += _check_names(archive)
        if any(f.rule in _UNSAFE for f in findings):
            return findings
        prefix = _crop_prefix(archive, table, findings)
        if prefix is not None:
            reference = None if truth is None else _open_truth(truth, table)
            try:
                for number, (entry, path) in enumerate(_arrays(archive, table, prefix, findings), start=1):
                    if path is not None:
                        findings += _check_array(archive, entry, path, reference)
                    (progress or silent)(number, len(table), f"{entry.crop_name}/{entry.class_name}")
            finally:
                if reference is not None:
                    reference.close()
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda f: order[f.severity])


def _open_truth(truth: str | Path, table: CropTable) -> Archive:
    """Open the ground truth; `MissingError` if it has no array of the table."""
    reference = Archive(truth)
    if not any(f"{entry.crop_name}/{entry.class_name}/.zarray" in reference for entry in table):
        reference.close()
        first = table.entries[0]
        raise MissingError(
            f"{truth} holds no ground truth of the crop table: expected plain arrays such as "
            f"{first.crop_name}/{first.class_name}"
        )
    return reference


# -- names and sizes ---------------------------------------------------------------------------------------------------
def _check_names(archive: Archive) -> Iterator[Finding]:
    """Check the list of files alone."""
    seen: set[str] = set()
    junk, nested = [], []
    for entry in archive.entries:
        name = entry.name
        parts = name.replace("\\", "/").split("/")
        shown = name if len(name) <= 120 else f"{name[:40]}..."
        yield from (error(rule, shown, found, expected, _PACK) for rule, found, expected in entry.problems)
        if name in seen:
            yield error("duplicate", name, "the name twice", "every name once", _PACK)
        seen.add(name)
        if parts[0] == "__MACOSX" or parts[-1] in _JUNK or parts[-1].startswith("._"):
            junk.append(name)
        elif name.lower().endswith(_NESTED):
            nested.append(name)
    if nested:
        what = "an archive in the archive" if len(nested) == 1 else f"{len(nested)} archives in the archive"
        yield error("nested-archive", nested[0], what, "the arrays themselves", _PACK)
    if junk:
        what = f"{number_of(len(junk), 'file')} of the operating system"
        advice = "zip -d submission.zip '__MACOSX/*' '*/.DS_Store'"
        yield warning("junk", junk[0], what, "Zarr files only", f"remove them: {advice}")
    size = sum(e.size for e in archive.entries)
    if size > MAX_UNPACKED_BYTES:
        expected = f"at most {MAX_UNPACKED_BYTES / 1024**3:.0f} GB"
        advice = "compress the chunks (export does) and leave out pyramids and margins"
        yield error("unpacked-size", ".", f"{size / 1024**3:.1f} GB unpacked", expected, advice)
    if archive.is_zip and sum(e.stored for e in archive.entries) > Path(archive.location).stat().st_size:
        yield error("overlap", ".", "files that share bytes, as in a zip bomb", "separate files", _PACK)


# -- the group and its crops -------------------------------------------------------------------------------------------
def _crop_prefix(archive: Archive, table: CropTable, findings: list[Finding]) -> str | None:
    """Return what turns a folder name into a crop name (``""`` or ``crop``); None if the archive is unusable."""
    if ".zgroup" not in archive:
        findings.append(_no_group(archive))
        return None
    if "zarr.json" in archive:
        what = "Zarr v3 metadata next to v2 metadata"
        findings.append(warning("zarr-v3", "zarr.json", what, "Zarr v2 only", "remove zarr.json"))
    top = set(archive.folders())
    names = {e.crop_name for e in table}
    if names & top:
        return ""
    if names & {f"crop{name}" for name in top}:
        advice = "rename them; the portal accepts these names only if no name matches"
        findings.append(warning("crop-names", ".", f"crops named {_some(top)}", f"names such as {min(names)}", advice))
        return "crop"
    inner = [name for name in sorted(top) if f"{name}/.zgroup" in archive and set(archive.folders(name)) & names]
    what = f"the crops below {inner[0]}/" if inner else f"{_some(top) or 'nothing'} in the group"
    advice = "export it with the crops at the top" if inner else "check the crop table and the names"
    expected = f"crops of the table, such as {min(names)}"
    findings.append(error("no-crop", ".", what, expected, f"the portal refuses it; {advice}"))
    return None


def _no_group(archive: Archive) -> Finding:
    """Explain why there is no group at the top."""
    expected = "one Zarr v2 group (.zgroup at the top)"
    if "zarr.json" in archive:
        return error("zarr-v3", "zarr.json", "a Zarr v3 group", expected, "write zarr_format=2, or use export")
    if ".zarray" in archive:
        return error("not-a-group", ".zarray", "a single array", expected, "move it to crop{N}/{class}")
    top = set(archive.folders()) - {"__MACOSX"}
    groups = sorted(name for name in top if f"{name}/.zgroup" in archive or f"{name}/zarr.json" in archive)
    if groups and all(re.fullmatch(r"(crop)?\d+", name) for name in groups):
        return error("not-a-group", ".", "crops without a group around them", expected, "add .zgroup")
    if len(groups) > 1:
        return error("many-groups", ".", f"{len(groups)} groups: {_some(set(groups))}", expected, _PACK)
    if groups:
        what = f"the group inside the folder {groups[0]}/"
        return error("prefix-folder", f"{groups[0]}/", what, expected, _PACK)
    return error("not-a-group", ".", _some(top) or "nothing", expected, _PACK)


def _arrays(
    archive: Archive, table: CropTable, prefix: str, findings: list[Finding]
) -> Iterator[tuple[TableEntry, str | None]]:
    """Yield every entry of the table with the path of its array (None if missing); report missing and unknown names."""
    entries_of = table.crops()
    there = {f"{prefix}{name}": name for name in archive.folders() if name != "__MACOSX"}
    for crop in sorted(set(there) - {f"crop{number}" for number in entries_of}):
        advice = f"the portal ignores it{_hint(crop, [f'crop{number}' for number in entries_of])}"
        findings.append(
            warning("unknown-crop", there[crop], "a crop that is not asked for", "crops of the table", advice)
        )
    for number, entries in entries_of.items():
        crop = f"crop{number}"
        if crop not in there:
            advice = "predict and export it, or all of it counts as missed"
            findings.append(error("missing-crop", crop, "nothing", number_of(len(entries), "array"), advice))
            yield from ((entry, None) for entry in entries)
            continue
        folder = there[crop]
        if f"{folder}/.zgroup" not in archive:
            what = "a folder without .zgroup"
            findings.append(error("not-a-group", folder, what, "a Zarr v2 group", "add .zgroup"))
        classes, asked = set(archive.folders(folder)), {e.class_name for e in entries}
        for name in sorted(classes - asked):
            what = "a class that is not asked for" if name in CLASSES else "a class that the challenge does not know"
            advice = f"the portal ignores it{_hint(name, sorted(asked - classes))}"
            expected = f"{number_of(len(asked), 'class')} of the table"
            findings.append(warning("unknown-class", f"{folder}/{name}", what, expected, advice))
        for entry in entries:
            path = f"{folder}/{entry.class_name}"
            problem = _not_an_array(archive, path) if entry.class_name in classes else "nothing"
            if problem is not None:
                rule = "missing-class" if problem == "nothing" else "not-an-array"
                advice = "export it, or all of it counts as missed"
                findings.append(error(rule, path, problem, "a plain Zarr v2 array", advice))
            yield entry, path if problem is None else None


def _not_an_array(archive: Archive, path: str) -> str | None:
    """Return what is there instead of an array, None if it is one."""
    if f"{path}/.zarray" in archive:
        return None
    if f"{path}/zarr.json" in archive:
        return "a Zarr v3 node"
    if any(f"{path}/s{level}/.zarray" in archive for level in range(8)) or f"{path}/.zgroup" in archive:
        return "a multiscale group, which is read as missing"
    return "a folder without .zarray"


def _check_array(archive: Archive, entry: TableEntry, path: str, reference: Archive | None) -> Iterator[Finding]:
    try:
        array = open_array(archive, path)
    except (MetadataError, CorruptDataError) as problem:
        yield error("metadata", path, str(problem), "a readable Zarr v2 array", "export it again")
        return
    voxels, limit = math.prod(array.shape), Rules.max_size_ratio
    if len(array.shape) != 3:
        expected = f"three axes, {entry.grid.shape}"
        yield error("rank", path, f"shape {array.shape}", expected, "remove the other axes")
        return
    if voxels > limit * entry.grid.size:
        what = f"{voxels} voxels, {voxels / entry.grid.size:.0f} times the crop's"
        yield error(
            "too-large", path, what, f"at most {limit} times {entry.grid.size}", "export it on the table's grid"
        )
        return
    yield from check_grid(array, entry)
    try:
        truth = None
        if reference is not None:
            names = (path, f"{entry.crop_name}/{entry.class_name}")
            found = next((name for name in names if f"{name}/.zarray" in reference), None)
            if found is not None:
                truth = reference, open_array(reference, found)
            else:
                expected, advice = f"an array in {reference.location}", "give the ground truth of this table"
                yield warning("no-truth", path, "no ground truth for it", expected, advice)
        yield from check_content(archive, array, entry.class_name, truth)
    except CorruptDataError as problem:
        yield error("corrupt", path, str(problem), "chunks that can be read", "export it again")


def _hint(name: str, known: list[str]) -> str:
    close = nearest(name, known)
    return f"; is it {close}?" if close else ""


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f", ... ({len(shown)})" if len(shown) > 3 else "")
