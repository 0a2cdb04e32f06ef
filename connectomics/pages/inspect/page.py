"""The page of ``pytc inspect``: warnings, every patch in slices, the numbers, the loader, the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from connectomics.errors import InputError
from connectomics.io.location import local_path
from connectomics.io.replacing import contains, require_own
from connectomics.io.write import write_file
from connectomics.pages import page
from connectomics.pages.inspect.data import Augmentations, Inspection, SeenPatch, as_text, pooled_known
from connectomics.pages.inspect.numbers import by_class
from connectomics.pages.inspect.patch_pictures import viewers

_MOST_PICTURES = 16  # patches with pictures; the numbers are over all patches
#: Template and heading of each section.
_SECTIONS = (
    ("warnings", "What looks wrong"), ("patches", "Patches"), ("classes", "Classes"),
    ("values", "Values of the images"), ("loader", "Loader and memory"), ("missing_raw", "Missing raw"),
    ("configuration", "Configuration of the data"),
)  # fmt: skip


def check_out(out: str | Path, *, overwrite: bool = False) -> Path:
    """Return the path of the page, before the work starts.

    Raises:
        InputError: it is no ``.html`` file, or it exists and ``overwrite`` is False. WriteError: it is not our page.
    """
    path = local_path(out)
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"expected a .html file for the page, got {path}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another --out, or --overwrite to replace it")
    return require_own(path, contains(page.GENERATOR), "inspect")


def write_page(out: str | Path, inspection: Inspection, *, overwrite: bool = False) -> Path:
    """Write the page atomically and return its path; errors as `check_out`."""
    path = check_out(out, overwrite=overwrite)
    title = f"What the network gets: {inspection.name}"
    values: dict[str, Any] = {
        "inspection": inspection,
        "speed": inspection.speed,
        "warnings": inspection.warnings(),
        "classes": by_class([p.labels for p in inspection.patches]),
        "patches": [_patch(patch, inspection.classes) for patch in inspection.patches[:_MOST_PICTURES]],
        "keys": {key: as_text(value) for key, value in inspection.configuration.items()},
    }
    sections = [page.Section(name, heading, page.render(f"inspect/{name}", **values)) for name, heading in _SECTIONS]
    header = page.render("inspect/header", title=title, known=pooled_known(inspection.patches), **values)
    whole = page.document(title, header, sections, "This page is one file.", styles=["inspect.css"])
    write_file(path, whole.encode("utf-8"))
    return path


def _patch(patch: SeenPatch, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return what the template shows of one patch."""
    anchor = f"b{patch.batch + 1}p{patch.number + 1}"
    begin, end = patch.grid.box.begin, patch.grid.box.end
    spans = [f"{axis} {page.number(b)} to {page.number(e)}" for axis, b, e in zip("zyx", begin, end, strict=True)]
    no_raw = "not measured (a MONAI transform moves the patch)"
    if patch.raw is not None:
        no_raw = ", ".join(f"image_{k} " * (k > 0) + page.percent(share.none) for k, share in enumerate(patch.raw))
    facts = {
        "crop": patch.crop,
        "drawn for": patch.drawn_by or "a plain index",
        "some class known": page.percent(patch.labels.anything / patch.labels.voxels),
        "no raw": no_raw,
        "combinations of classes": patch.labels.states,
        "seed on the device": patch.seed,
        "position, nm": ", ".join(spans),
        "spatial augmentation": _augmentations(patch.spatial),
        "intensity augmentation": _augmentations(patch.intensity),
    }
    return {"anchor": anchor, "patch": patch, "facts": facts, "viewers": viewers(patch, classes, anchor)}


def _augmentations(done: Augmentations) -> str:
    described = (" ".join([name, *(f"{k} {as_text(v)}" for k, v in given.items())]) for name, given in done)
    return "; ".join(described) or "none"
