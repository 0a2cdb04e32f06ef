"""The verb that looks after decoded crops: cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import show
from connectomics.cli.paths import OutOption

if TYPE_CHECKING:
    from connectomics.data.cache import CropCache, EntryInfo


def cache(
    folder: Annotated[
        Path | None, OutOption("--dir", help="Cache folder (data.cache_dir); default: the user's.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove entries that no running process uses.")] = False,
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", help="Only entries last used that long ago.")
    ] = None,
    crop: Annotated[
        list[str] | None, typer.Option(metavar="DATASET/CROP", help="Only entries of this crop; may be repeated.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """List the crops that were decoded for training, check them, or remove them.

    Examples:

      pytc cache

      pytc cache --dir /scratch/crops --clear --older-than 30
    """
    from connectomics.data.cache import CropCache, default_cache_dir
    from connectomics.errors import InputError, unknown_name

    if clear and verify:
        raise InputError("--clear removes entries and --verify checks them: give one of the two")
    if older_than is not None and older_than < 0:
        raise InputError(f"--older-than takes days, at least 0, found {older_than:g}")
    cached = CropCache(folder.expanduser() if folder is not None else default_cache_dir())
    entries = cached.entries()
    for name in crop or ():
        if entries and name not in {entry.crop for entry in entries}:
            raise unknown_name("crop", name, {entry.crop for entry in entries if entry.crop}, str(cached.folder))
    chosen = [entry for entry in entries if _is_meant(entry, older_than, crop)]
    if clear:
        return _clear(cached, chosen, as_json)
    damage = _damage(chosen) if verify else {}
    if as_json:
        data = [{**_described(entry), **({"damage": damage.get(entry.name)} if verify else {})} for entry in chosen]
        total = sum(entry.size for entry in entries)
        content = {"folder": str(cached.folder), "bytes": total, "budget": cached.budget, "entries": data}
        print(json.dumps(content, indent=1))
    else:
        _print(cached, chosen, sum(entry.size for entry in entries))
        for text in damage.values():
            print(f"error: {text}")
        if verify and not damage:
            print(f"all {len(chosen)} entries hold what was written")
    return 1 if damage else 0


def _is_meant(entry: EntryInfo, older_than: float | None, crops: list[str] | None) -> bool:
    from connectomics.data.cache.folder import days_since

    old_enough = older_than is None or days_since(entry.used) >= older_than
    return old_enough and (not crops or entry.crop in crops)


def _clear(cached: CropCache, chosen: list[EntryInfo], as_json: bool) -> int:
    removed = cached.remove([entry.name for entry in chosen])
    cached.sweep()
    kept = {entry.name for entry in chosen} - {entry.name for entry in removed}
    size = sum(entry.size for entry in removed)
    if as_json:
        print(json.dumps({"removed": [_described(entry) for entry in removed], "bytes": size, "in_use": sorted(kept)}))
        return 0
    used = f"; {len(kept)} are in use and were left" if kept else ""
    print(f"removed {len(removed)} entries ({_size(size)}) from {cached.folder}{used}")
    return 0


def _damage(entries: list[EntryInfo]) -> dict[str, str]:
    """By entry, what is wrong with it."""
    from connectomics.cli.progress import counted
    from connectomics.data.cache import open_entry
    from connectomics.errors import CorruptDataError

    found = {}
    with counted("checking entries") as advance:
        for number, entry in enumerate(entries):
            advance(number, len(entries), entry.crop or entry.name)
            if entry.crop is not None and not entry.current:
                continue  # of an earlier version, without checksums: never read again
            try:
                open_entry(entry.folder, "all")
            except CorruptDataError as error:
                found[entry.name] = str(error)
    return found


def _print(cached: CropCache, entries: list[EntryInfo], total: int) -> None:
    if entries:
        rows = [
            [
                entry.crop or f"damaged: {entry.name}",
                str(entry.classes),
                show.triple(entry.voxel_size),
                _size(entry.size),
                _ago(entry.used),
                "old format" if entry.crop is not None and not entry.current else "yes" if entry.processes else "",
            ]
            for entry in entries
        ]
        show.table(["crop", "classes", "voxel nm", "size", "last used", "in use"], rows)
    budget = "" if cached.budget is None else f" of {_size(cached.budget)} (data.cache_gb of the last run)"
    print(f"{cached.folder}: {len(entries)} entries, {_size(total)}{budget}")


def _described(entry: EntryInfo) -> dict[str, Any]:
    return {
        "name": entry.name,
        "crop": entry.crop,
        "classes": entry.classes,
        "voxel_size": list(entry.voxel_size),
        "bytes": entry.size,
        "used": entry.used,
        "processes": entry.processes,
        "current": entry.current,
    }


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _ago(moment: float) -> str:
    from connectomics.data.cache.folder import days_since

    days = days_since(moment)
    if days >= 2:
        return f"{days:.0f} days ago"
    return f"{24 * days:.0f} h ago" if days >= 1 / 12 else f"{max(0.0, 1440 * days):.0f} min ago"
