"""What the portal would refuse or silently count as nothing, said before the upload.

Names and sizes are looked at first, from the zip's directory alone; where they are not safe, nothing is read. Then the
group, its crops and its arrays are compared with the crop table, and last the arrays' content, a slab at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from connectomics.cellmap.classes import CLASSES
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError, nearest
from connectomics.metrics.challenge.zarr_v2 import MAX_DEPTH, MAX_UNPACKED_BYTES
from connectomics.submission.archive import Archive, ArchivedArray
from connectomics.submission.content import check_content
from connectomics.submission.findings import Finding
from connectomics.submission.grids import check_grid

#: The official scorer refuses arrays with more voxels than this many times the crop's.
MAX_VOXEL_RATIO = 16**3

Progress = Callable[[int, int, str], None]

_NESTED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}
# Where one of these is found, nothing of the archive is read.
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
        crops: the table of arrays that should be there; a part of it (`CropTable.select`) checks that part, and calls
            the rest unknown.
        truth: a group of plain arrays ``crop{N}/{class}``; then emptiness and numbers of instances are compared with
            it, and not with what is usual.
        progress: told after each array.

    Returns:
        Findings, errors first, then in the order of the table; [] where all is well.

    Raises:
        MissingError: nothing is at ``submission`` or ``truth``. What is wrong with the submission itself is never
        raised, but found.
    """
    table = CropTable.resolve(crops)
    findings: list[Finding] = []
    try:
        archive = Archive(submission)
    except InputError as error:
        return [Finding("error", "not-a-zip", ".", str(error), "a zip file or a folder", _PACK)]
    with archive:
        findings += _names(archive)
        if any(f.rule in _UNSAFE for f in findings):
            return findings  # not safe to look further
        prefix = _root(archive, table, findings)
        if prefix is not None:
            reference = None if truth is None else _reference(truth, table)
            try:
                for number, (entry, path) in enumerate(_pairs(archive, table, prefix, findings), start=1):
                    if path is not None:
                        findings += _array(archive, entry, path, reference)
                    if progress is not None:
                        progress(number, len(table), f"{entry.crop_name}/{entry.class_name}")
            finally:
                if reference is not None:
                    reference.close()
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda f: order[f.severity])


def _reference(truth: str | Path, table: CropTable) -> Archive:
    """The truth, if it is one of the table's crops; `MissingError`."""
    reference = Archive(truth)
    if not any(f"{entry.crop_name}/{entry.class_name}/.zarray" in reference for entry in table):
        reference.close()
        first = table.entries[0]
        raise MissingError(
            f"{truth} holds no truth of the crop table: expected plain arrays such as "
            f"{first.crop_name}/{first.class_name}"
        )
    return reference


# -- names and sizes -------------------------------------------------------------------------------------------------
def _names(archive: Archive) -> list[Finding]:
    """What the list of files alone says."""
    findings = []
    seen: set[str] = set()
    junk, nested = [], []
    for entry in archive.entries:
        name = entry.name
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in parts or "\x00" in name:
            findings.append(
                Finding("error", "outside-path", name, "a path out of the archive", "relative names without ..", _PACK)
            )
        elif "\\" in name:
            findings.append(Finding("error", "backslash", name, "a backslash in a name", "names with /", _PACK))
        if len(parts) > MAX_DEPTH:
            what = f"{len(parts)} folders in each other"
            findings.append(Finding("error", "deep-path", f"{name[:40]}...", what, f"at most {MAX_DEPTH}", _PACK))
        if entry.is_link:
            findings.append(Finding("error", "link", name, "a link", "files and folders only", _PACK))
        if entry.is_encrypted:
            findings.append(Finding("error", "encrypted", name, "an encrypted file", "no password", _PACK))
        if entry.is_strange:
            what = "a file that is neither stored nor deflated"
            findings.append(Finding("error", "zip-method", name, what, "what every reader of zips unpacks", _PACK))
        if name in seen:
            findings.append(Finding("error", "duplicate", name, "the name twice", "every name once", _PACK))
        seen.add(name)
        if parts[0] == "__MACOSX" or parts[-1] in _JUNK or parts[-1].startswith("._"):
            junk.append(name)
        elif name.lower().endswith(_NESTED):
            nested.append(name)
    if nested:
        what = "an archive in the archive" if len(nested) == 1 else f"{len(nested)} archives in the archive"
        findings.append(Finding("error", "nested-archive", nested[0], what, "the arrays themselves", _PACK))
    if junk:
        findings.append(
            Finding(
                "warning", "junk", junk[0], f"{len(junk)} files of the operating system", "Zarr files only",
                "remove them: zip -d submission.zip '__MACOSX/*' '*/.DS_Store'",
            )
        )  # fmt: skip
    size = sum(e.size for e in archive.entries)
    if size > MAX_UNPACKED_BYTES:
        findings.append(
            Finding(
                "error", "unpacked-size", ".", f"{size / 1024**3:.1f} GB unpacked",
                f"at most {MAX_UNPACKED_BYTES / 1024**3:.0f} GB",
                "compress the chunks (export does) and leave out pyramids and margins",
            )
        )  # fmt: skip
    if archive.is_zip and sum(e.stored for e in archive.entries) > Path(archive.location).stat().st_size:
        findings.append(
            Finding("error", "overlap", ".", "files that share bytes, as in a zip bomb", "each file its own", _PACK)
        )
    return findings


# -- the group and its crops -----------------------------------------------------------------------------------------
def _root(archive: Archive, table: CropTable, findings: list[Finding]) -> str | None:
    """What has to stand before a name of the archive to make it a crop's (``""`` or ``crop``); None: unusable."""
    if ".zgroup" not in archive:
        findings.append(_no_root(archive))
        return None
    if "zarr.json" in archive:
        findings.append(
            Finding("warning", "zarr-v3", "zarr.json", "Zarr v3 beside v2 metadata", "Zarr v2 only", "remove zarr.json")
        )
    top = _children(archive, "")
    names = {e.crop_name for e in table}
    if names & top:
        return ""
    if names & {f"crop{name}" for name in top}:
        findings.append(
            Finding(
                "warning", "crop-names", ".", f"crops named {_some(top)}", f"names such as {min(names)}",
                "rename them; the portal guesses right only while no name matches",
            )
        )  # fmt: skip
        return "crop"
    inner = [name for name in top if f"{name}/.zgroup" in archive and _children(archive, name) & names]
    what = f"the crops below {inner[0]}/" if inner else f"{_some(top) or 'nothing'} in the group"
    findings.append(
        Finding("error", "no-crop", ".", what, f"crops of the table, such as {min(names)}", "the portal refuses it; "
                + ("export it with the crops at the top" if inner else "check the crop table and the names"))
    )  # fmt: skip
    return None


def _no_root(archive: Archive) -> Finding:
    """Why there is no group at the top."""
    expected = "one Zarr v2 group (.zgroup at the top)"
    if "zarr.json" in archive:
        return Finding(
            "error", "zarr-v3", "zarr.json", "a Zarr v3 group", expected, "write zarr_format=2, or use export"
        )
    if ".zarray" in archive:
        return Finding("error", "not-a-group", ".zarray", "a single array", expected, "put it at crop{N}/{class}")
    top = sorted(_children(archive, "") - {"__MACOSX"})
    groups = [name for name in top if f"{name}/.zgroup" in archive or f"{name}/zarr.json" in archive]
    if groups and all(re.fullmatch(r"(crop)?\d+", name) for name in groups):
        return Finding("error", "not-a-group", ".", "crops without a group around them", expected, "add .zgroup")
    if len(groups) > 1:
        return Finding("error", "many-groups", ".", f"{len(groups)} groups: {_some(set(groups))}", expected, _PACK)
    if groups:
        what = f"the group inside the folder {groups[0]}/"
        return Finding("error", "prefix-folder", f"{groups[0]}/", what, expected, _PACK)
    return Finding("error", "not-a-group", ".", _some(set(top)) or "nothing", expected, _PACK)


def _pairs(
    archive: Archive, table: CropTable, prefix: str, findings: list[Finding]
) -> Iterator[tuple[TableEntry, str | None]]:
    """Every row of the table with the path of its array, None where there is none; says what is missing or too much."""
    rows = table.crops()
    there = {f"{prefix}{name}": name for name in _children(archive, "") if name != "__MACOSX"}
    for crop in sorted(set(there) - {f"crop{number}" for number in rows}):
        close = nearest(crop, (f"crop{number}" for number in rows))
        hint = f"; is it {close}?" if close else ""
        findings.append(
            Finding("warning", "unknown-crop", there[crop], "a crop that is not asked for", "crops of the table",
                    f"the portal ignores it{hint}")
        )  # fmt: skip
    for number, entries in rows.items():
        crop = f"crop{number}"
        if crop not in there:
            findings.append(
                Finding("error", "missing-crop", crop, "nothing", f"{len(entries)} arrays",
                        "predict and export it, or all of it counts as missed")
            )  # fmt: skip
            yield from ((entry, None) for entry in entries)
            continue
        folder = there[crop]
        if f"{folder}/.zgroup" not in archive:
            findings.append(
                Finding("error", "not-a-group", folder, "a folder without .zgroup", "a Zarr v2 group", "add .zgroup")
            )
        classes = _children(archive, folder)
        asked = {e.class_name for e in entries}
        for name in sorted(classes - asked):
            close = nearest(name, asked - classes)
            known = "a class that is not asked for" if name in CLASSES else "a class that the challenge does not know"
            hint = f"; is it {close}?" if close else ""
            findings.append(
                Finding("warning", "unknown-class", f"{folder}/{name}", known, f"{len(asked)} classes of the table",
                        f"the portal ignores it{hint}")
            )  # fmt: skip
        for entry in entries:
            path = f"{folder}/{entry.class_name}"
            problem = _not_an_array(archive, path) if entry.class_name in classes else "nothing"
            if problem is None:
                yield entry, path
                continue
            rule = "missing-class" if problem == "nothing" else "not-an-array"
            findings.append(
                Finding("error", rule, path, problem, "a plain Zarr v2 array",
                        "export it, or all of it counts as missed")
            )  # fmt: skip
            yield entry, None


def _not_an_array(archive: Archive, path: str) -> str | None:
    """What stands where an array should, None where it is one."""
    if f"{path}/.zarray" in archive:
        return None
    if f"{path}/zarr.json" in archive:
        return "a Zarr v3 node"
    if any(f"{path}/s{level}/.zarray" in archive for level in range(8)) or f"{path}/.zgroup" in archive:
        return "a multiscale group, which is read as missing"
    return "a folder without .zarray"


# -- one array -------------------------------------------------------------------------------------------------------
def _array(archive: Archive, entry: TableEntry, path: str, reference: Archive | None) -> list[Finding]:
    try:
        array = ArchivedArray(archive, path)
    except (MetadataError, CorruptDataError) as error:
        return [Finding("error", "metadata", path, str(error), "a readable Zarr v2 array", "export it again")]
    if len(array.shape) != 3:
        return [
            Finding("error", "rank", path, f"shape {array.shape}", f"three axes, {entry.grid.shape}",
                    "remove the other axes")
        ]  # fmt: skip
    if math.prod(array.shape) > MAX_VOXEL_RATIO * entry.grid.size:
        what = f"{math.prod(array.shape)} voxels, {math.prod(array.shape) / entry.grid.size:.0f} times the crop's"
        expected = f"at most {MAX_VOXEL_RATIO} times {entry.grid.size}"
        return [Finding("error", "too-large", path, what, expected, "export it on the table's grid")]
    findings = check_grid(array, entry)
    try:
        truth = None
        if reference is not None:
            if f"{path}/.zarray" in reference:
                truth = ArchivedArray(reference, path)
            elif f"{entry.crop_name}/{entry.class_name}/.zarray" in reference:
                truth = ArchivedArray(reference, f"{entry.crop_name}/{entry.class_name}")
            else:
                findings.append(
                    Finding("warning", "no-truth", path, "no truth for it", f"an array in {reference.location}",
                            "give the truth that belongs to the table")
                )  # fmt: skip
        findings += check_content(array, entry.class_name, truth)
    except CorruptDataError as error:
        findings.append(Finding("error", "corrupt", path, str(error), "chunks that can be read", "export it again"))
    return findings


def _children(archive: Archive, path: str) -> set[str]:
    """Names of the folders directly in ``path`` (``""`` is the top), hidden ones left out."""
    return {name for name in archive.folders(path) if not name.startswith(".")}


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f", ... ({len(shown)})" if len(shown) > 3 else "")
