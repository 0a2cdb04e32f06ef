"""The page of `pytc inspect`: what looks wrong, every patch in slices, the numbers, the loader, the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from connectomics import __version__
from connectomics.errors import InputError
from connectomics.io.location import local_path
from connectomics.io.replacing import contains, require_own
from connectomics.io.write import write_file
from connectomics.report import page
from connectomics.report.inspect.data import Done, Inspection, SeenPatch, as_text, pooled_known
from connectomics.report.inspect.numbers import ValueRange, by_class
from connectomics.report.inspect.raw import RawShare
from connectomics.report.inspect.views import legend, viewers

_MOST_PICTURES = 16  # patches in pictures; the numbers are of all


def check_out(out: str | Path, *, overwrite: bool = False) -> Path:
    """The page's path; `InputError` if it is no ``.html`` file or is there already, `WriteError` if what is there is no
    page of ours and may not be replaced."""
    path = local_path(out)
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"the page goes to a .html file, found {path}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another --out, or --overwrite to replace it")
    return require_own(path, contains(page.GENERATOR), "inspect")


def write_page(out: str | Path, inspection: Inspection, *, overwrite: bool = False) -> Path:
    """Write the page, in one step, and return its path.

    Raises:
        InputError: as `check_out`. WriteError: it cannot be written; no half-written page is left.
    """
    path = check_out(out, overwrite=overwrite)
    title = f"What the network gets: {inspection.name}"
    style = resources.files("connectomics.report").joinpath("assets", "inspect.css").read_text(encoding="utf-8")
    header = f"<style>{style}</style><h1>{page.text(title)}</h1>{_tiles(inspection)}"
    sections = [
        page.Section("looks", "What looks wrong", _warnings(inspection)),
        page.Section("patches", "Patches", _patches(inspection)),
        page.Section("classes", "Classes", _classes(inspection)),
        page.Section("values", "Values of the images", _values(inspection)),
        page.Section("loader", "Loader and memory", _loader(inspection)),
        page.Section("raw", "Missing raw", _missing(inspection)),
        page.Section("configuration", "Configuration of the data", _configuration(inspection)),
    ]
    footer = f"<p>Written {page.text(page.now())} by connectomics {page.text(__version__)}. This page is one file.</p>"
    write_file(path, page.document(title, header, sections, footer).encode("utf-8"))
    return path


def _tiles(inspection: Inspection) -> str:
    known = pooled_known(inspection.patches)
    labels = f"{page.percent(known['labels'])} of all labels"
    rows = by_class([p.labels for p in inspection.patches])
    present = sum(r.patches_present > 0 for r in rows)
    rate = inspection.speed.patches_per_s
    shown_rate = "–" if rate is None else f"{rate:.3g}"
    tiles = (
        ("something known", page.percent(known["anything"]), "of the voxels", labels),
        ("classes present", f"{present} of {len(rows)}", f"in {len(inspection.patches)} patches", ""),
        ("patches a second", shown_rate, _workers(inspection.speed.workers), "the loader alone, here"),
    )  # fmt: skip
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><span>{page.text(name)}</span><strong>{page.text(value)}</strong>'
        f"<small>{page.text(beside)}</small><em>{page.text(below)}</em></div>"
        for name, value, beside, below in tiles
    ) + "</div>"  # fmt: skip


def _workers(number: int) -> str:
    return f"{number or 'no'} worker{'s' * (number != 1)}"


def _warnings(inspection: Inspection) -> str:
    found = inspection.warnings()
    return "".join(map(page.note, found)) or "<p>Nothing: no warning applies to these batches.</p>"


# -- patches -----------------------------------------------------------------------------------------------------------
def _patches(inspection: Inspection) -> str:
    shown = inspection.patches[:_MOST_PICTURES]
    lines = []
    if len(shown) < len(inspection.patches):
        lines.append(
            page.note(
                f"Pictures of the first {len(shown)} of {len(inspection.patches)} patches; the numbers are of all."
            )
        )
    tools = (
        '<div class="tools"><label>overlay <input type="range" id="opacity" min="0" max="100" value="85" '
        'aria-label="overlay opacity"></label></div>'
    )
    about = page.hint(
        "After every augmentation: black is 0 and white is 1. The network gets (value - mean) / std, with the numbers "
        "of data.normalization below. Slices are those of the turned and deformed patch; z is counted from its first "
        "voxel, and places are those before augmentation. The list of classes says how much of what is known is "
        "present."
    )
    articles = "".join(_patch(patch, inspection.classes) for patch in shown)
    return "".join(lines) + about + legend() + tools + articles


def _patch(patch: SeenPatch, classes: Sequence[str]) -> str:
    anchor = f"b{patch.batch + 1}p{patch.number + 1}"
    begin, end = patch.grid.box.begin, patch.grid.box.end
    span = ", ".join(
        f"{axis} {page.number(b)} to {page.number(e)}" for axis, b, e in zip("zyx", begin, end, strict=True)
    )
    facts = {
        "crop": patch.crop,
        "drawn for": patch.drawn_by or "a plain index",
        "something known": page.percent(patch.labels.anything / patch.labels.voxels),
        "no raw": "not measured (a MONAI transform moves the patch)" if patch.raw is None else _shares(patch.raw),
        "combinations of classes": patch.labels.states,
        "seed on the device": patch.seed,
        "place, nm": span,
        "in space": _done(patch.spatial),
        "values": _done(patch.intensity),
    }
    head = f"batch {patch.batch + 1}, patch {patch.number + 1} <small>{page.text(patch.crop)}</small>"
    about = f"<div>{page.definitions(facts)}{_patch_classes(patch)}</div>"
    # one view leaves room beside it, several take the whole width
    frame = "top" if len(patch.images) == 1 else "several"
    body = f'<div class="{frame}">{viewers(patch, classes, anchor)}{about}</div>'
    return f'<article class="crop" id="{anchor}"><h3>{head}</h3>{body}</article>'


def _shares(raw: Sequence[RawShare]) -> str:
    first, *others = (page.percent(share.none) for share in raw)
    return first + "".join(f", image_{k} {share}" for k, share in enumerate(others, start=1))


def _done(done: Done) -> str:
    if not done:
        return "nothing"
    return "; ".join(" ".join([name, *(f"{k} {as_text(v)}" for k, v in given.items())]) for name, given in done)


def _patch_classes(patch: SeenPatch) -> str:
    numbers = patch.labels
    rows = [
        [
            f"<th scope=row>{page.text(name)}</th>",
            *_number_cells(page.count(numbers.known[name]), page.percent(numbers.known[name] / numbers.voxels)),
            *_number_cells(page.count(numbers.present[name])),
        ]
        for name in numbers.known
    ]
    headers = ["class", *_number_heads("voxels known", "share", "voxels present")]
    return page.details(f"{len(rows)} classes in voxels", page.table(headers, rows))


# -- numbers -----------------------------------------------------------------------------------------------------------
def _classes(inspection: Inspection) -> str:
    n = len(inspection.patches)
    rows = []
    for row in by_class([p.labels for p in inspection.patches]):
        never = ' class="num bad"' if not row.patches_present else " class=num"
        share = "–" if row.present is None else page.percent(row.present)
        rows.append(
            [
                f"<th scope=row>{page.text(row.name)}</th>",
                f'<td class=wide><span class="bar"><b style="width:{100 * row.known:.2f}%"></b></span></td>',
                *_number_cells(page.percent(row.known), share, f"{row.patches_known} of {n}"),
                f"<td{never}>{row.patches_present} of {n}</td>",
            ]
        )
    heads = ("of the voxels", "present where known", "known in patches", "present in patches")
    headers = ["class", "known", *_number_heads(*heads)]
    return page.hint("Over all patches taken.") + page.table(headers, rows, kind="bars")


def _values(inspection: Inspection) -> str:
    names = ("smallest", "1 %", "median", "mean", "99 %", "largest", "exactly 0", "exactly 1")
    headers = ["", *_number_heads(*names)]
    several = len(inspection.values) > 1
    rows = [
        _value_row(f"all, image_{k}" if k else "all" + several * ", image", v) for k, v in enumerate(inspection.values)
    ]
    for patch in inspection.patches:
        for k, values in enumerate(patch.values):
            rows.append(_value_row(patch.name + several * (f", image_{k}" if k else ", image"), values))
    return page.table(headers, rows)


def _value_row(name: str, values: ValueRange) -> list[str]:
    shown = (values.low, values.p1, values.p50, values.mean, values.p99, values.high)
    cells = _number_cells(*(f"{v:.3f}" for v in shown), page.percent(values.zero), page.percent(values.one))
    return [f"<th scope=row>{page.text(name)}</th>", *cells]


def _number_heads(*names: str) -> list[str]:
    return [f"<th scope=col class=num>{page.text(n)}</th>" for n in names]


def _number_cells(*values: str) -> list[str]:
    return [f"<td class=num>{page.text(v)}</td>" for v in values]


def _loader(inspection: Inspection) -> str:
    speed = inspection.speed
    rate, flow = speed.patches_per_s, speed.bytes_per_s
    facts = {
        "workers": speed.workers or "none: the main process reads",
        "until the first batch": page.seconds(speed.first_s),
        "patches a second": "too few batches in an epoch to tell" if rate is None else f"{rate:.3g}",
        "data a second": "–" if flow is None else page.size(flow),
        "batch": f"{speed.batch_size} patches, {page.size(speed.batch_bytes)}",
        "timed": f"{speed.timed_batches} batches after the first, {page.seconds(speed.timed_s)}",
        "crop cache": inspection.cache + (f", {page.size(inspection.cache_bytes)}" if inspection.cache_bytes else ""),
    }
    body = page.definitions(facts)
    if not speed.memory:
        return body + page.note("Memory is not measured: this system has no /proc/PID/smaps_rollup.")
    headers = ["process", *_number_heads("private", "shared", "resident")]
    rows = [
        [f"<th scope=row>{m.name}</th>", *_number_cells(*(page.size(v) for v in (m.private, m.shared, m.resident)))]
        for m in speed.memory
    ]
    together = page.size(sum(m.proportional for m in speed.memory))
    text = (
        f"All together {together}, what several share counted once. Shared: libraries, batches on their way, and the "
        "mapped files of the crop cache, which the system drops where memory is short."
    )
    return body + page.table(headers, rows, caption="Memory while batches were taken") + page.hint(text)


def _missing(inspection: Inspection) -> str:
    if not inspection.missing:
        crops = "crop" if inspection.crops == 1 else "crops"
        return f"<p>None: every chunk of raw behind the {inspection.crops} training {crops} is stored.</p>"
    headers = ["crop", *_number_heads("not stored", "of chunks"), "the first"]
    rows = [
        [
            f"<th scope=row>{page.text(m.crop)}</th>",
            *_number_cells(page.count(m.missing), page.count(m.total)),
            f'<td class="code">{page.text(m.first)}</td>',
        ]
        for m in inspection.missing
    ]
    return page.table(headers, rows)


def _configuration(inspection: Inspection) -> str:
    rows = [
        [f"<th scope=row>{page.text(key)}</th>", f'<td class="code">{page.text(as_text(value))}</td>']
        for key, value in inspection.configuration.items()
    ]
    return page.table(["key", "value"], rows)
