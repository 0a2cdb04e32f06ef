"""`build_report`: one self-contained page from all the parts that are given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from markupsafe import Markup

from connectomics.errors import ConnectomicsError, InputError
from connectomics.io.location import local_path
from connectomics.io.replacing import contains, require_own
from connectomics.io.write import write_file
from connectomics.pages import page
from connectomics.pages.report import compare, crops, data_summary, scores, training, voxel_counts
from connectomics.pages.report.library import Library, Wanted
from connectomics.pages.report.scores import Scores
from connectomics.pages.report.sources import ReportOptions, ReportSources
from connectomics.progress import Progress, silent

_SIZE = "@size@"  # replaced by the size of the page, which is known last


def build_report(
    out: str | Path, sources: ReportSources, options: ReportOptions | None = None, progress: Progress | None = None
) -> Path:
    """Write the page and return its path.

    Args:
        out: the file (``.html``), or a folder that gets ``report.html``.
        sources: the parts of the report. A part that is missing, incomplete or broken becomes a line on the page.
        options: limits on the size of the page.
        progress: called after each class of a crop with pictures, each crop whose voxels were counted, and the data
            root.

    Raises:
        WriteError: the page cannot be written, or the existing file is not a report; no incomplete page is left.
        InputError: ``out`` is a file of another kind.
    """
    path = local_path(out)
    if path.suffix not in (".html", ".htm"):
        if path.is_file():
            raise InputError(f"{path} is a file; expected a .html file or a folder for the report")
        path = path / "report.html"
    require_own(path, contains(page.GENERATOR), "report")
    options = options or ReportOptions()
    problems: list[str] = []
    table = _load_scores(sources.scores, "scores", problems)
    baseline = _load_scores(sources.baseline_scores, sources.baseline_name, problems)
    runs = [] if sources.run is None else [(sources.run, sources.scores)]
    runs += [(other.run, other.scores) for other in sources.others]
    library, wanted = Library.open(sources), list[Wanted]()
    try:
        with suppress(ConnectomicsError):  # the section on crops reports it
            problems += scores.other_labels(table, sources.labels or sources.submission, library.marks())
            wanted = library.wanted()
        expected = 1 + len({(one.dataset, one.crop) for one in wanted}) + min(len(wanted), options.max_pictures)
        done = itertools.count(1)

        def step(what: str) -> None:
            (progress or silent)(next(done), expected, what)

        sections = [_part("what", "What was run", lambda: training.provenance(sources, table))]
        if len(runs) > 1:
            sections.append(_part("runs", "Runs compared", lambda: compare.section(runs)))
        datasets = {one.crop: one.dataset for one in wanted if one.dataset}
        sections.append(_part("scores", "Scores", lambda: scores.section(
            table, baseline, datasets, sources.baseline_name, problems)))  # fmt: skip
        if (evaluation := sources.evaluation) is not None:
            title = "Evaluation on annotated crops"
            sections.append(_part("evaluation", title, lambda: scores.evaluation_section(evaluation, sources.labels)))
        order = ", worst first" if table else ""
        sections += [
            _part("crops", f"Crops{order}", lambda: crops.section(library, table, options, step)),
            *voxel_counts.sections(library, options, step),
            _part("training", "Training", lambda: training.curves(sources.run)),
            _part("time", "Where the time went", lambda: training.time(sources)),
            _part("data", "Data", lambda: data_summary.section(sources.data_root, sources.run, options.max_arrays)),
            _part("configuration", "Configuration", lambda: training.configuration(sources.run)),
        ]
        step("the data root")
    finally:
        library.close()
    header = page.render("report/header", title=sources.title)
    header += scores.headline(table, baseline, sources.baseline_name)
    whole = page.document(sources.title, header, sections, f"This page is one file of {_SIZE}.").encode()
    size = page.size(len(whole) + len("000.0 MB") - len(_SIZE))
    before, after = whole.rsplit(_SIZE.encode(), 1)  # the last one is ours: shown files may contain the same letters
    write_file(path, before + size.encode() + after)
    return path


def _part(anchor: str, title: str, body: Callable[[], Markup]) -> page.Section:
    """Return a section, with the error in it if its sources cannot be read: the other sections remain."""
    try:
        return page.Section(anchor, title, body())
    except ConnectomicsError as error:
        return page.Section(anchor, title, page.note(str(error)))


def _load_scores(path: Path | None, what: str, problems: list[str]) -> Scores | None:
    with page.noting(problems, f"The {what} cannot be shown"):
        return None if path is None else Scores.load(path)
    return None
