"""`build_report`: one self-contained page from whatever there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from connectomics import __version__
from connectomics.errors import ConnectomicsError, InputError
from connectomics.io.location import local_path
from connectomics.io.replacing import contains, require_own
from connectomics.io.write import write_file
from connectomics.report import analysis, compare, crops, data, page, scores
from connectomics.report import training as run
from connectomics.report.library import Library
from connectomics.report.scores import Scores
from connectomics.report.sources import ReportOptions, ReportSources
from connectomics.report.steps import Progress, Steps


def build_report(
    out: str | Path,
    sources: ReportSources,
    options: ReportOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        out: the file (``.html``), or a folder that gets ``report.html``.
        sources: what there is. A part that is missing, half written or broken becomes a line on the page.
        options: how large the page may become.
        progress: told after each class of a crop that was drawn, each crop whose voxels were counted, and the data
            root: done, of how many, which.

    Raises:
        WriteError: the page cannot be written, or a file is there that is no page of ours; no half-written page is
        left. InputError: ``out`` is a file of another kind.
    """
    path = local_path(out)
    if path.suffix not in (".html", ".htm"):
        if path.is_file():
            raise InputError(f"{path} is a file; a report goes to a .html file or into a folder")
        path = path / "report.html"
    require_own(path, contains(page.GENERATOR), "report")
    settings = options or ReportOptions()
    table, score_lines = _load_scores(sources.scores, "scores")
    baseline, baseline_lines = _load_scores(sources.baseline_scores, sources.baseline_name)
    library = Library.open(sources)
    steps = Steps(progress, 1 + analysis.crops_of(library))
    try:
        datasets = _datasets(library)
        sections = [
            _part("what", "What was run", lambda: run.provenance(sources, table)),
            *_compared(sources),
            _scores_section(table, baseline, datasets, sources.baseline_name, score_lines + baseline_lines),
            *_evaluation(sources),
            _part("crops", "Crops", lambda: crops.section(library, table, settings, steps)),
            *analysis.sections(library, settings, steps),
            _part("training", "Training", lambda: run.training(sources.run)),
            _part("time", "Where the time went", lambda: run.time(sources)),
            _part("data", "Data", lambda: data.section(sources.data_root, sources.run, settings.max_arrays)),
            _part("configuration", "Configuration", lambda: run.configuration(sources.run)),
        ]
        steps.step("the data root")
    finally:
        library.close()
    header = f"<h1>{page.text(sources.title)}</h1>{scores.headline(table, baseline, sources.baseline_name)}"
    written = f"Written {page.text(page.now())} by connectomics {page.text(__version__)}."
    whole = page.document(sources.title, header, sections, f"<p>{written} This page is one file of {_SIZE}.</p>")
    content = whole.encode("utf-8")
    size = page.size(len(content) + len("000.0 MB") - len(_SIZE))
    # the last one is ours: what others wrote, and may hold the same letters, comes before it
    before, after = content.rsplit(_SIZE.encode(), 1)
    write_file(path, before + size.encode() + after)
    return path


_SIZE = "@size@"


def _compared(sources: ReportSources) -> list[page.Section]:
    """Runs side by side, where there are two or more."""
    runs = [] if sources.run is None else [(sources.run, sources.scores)]
    runs += [(other.run, other.scores) for other in sources.others]
    return [_part("runs", "Runs compared", lambda: compare.section(runs))] if len(runs) > 1 else []


def _part(anchor: str, title: str, make: Callable[[], page.Section]) -> page.Section:
    """A section; what cannot be read is said in its place, and the rest of the page stands."""
    try:
        return make()
    except ConnectomicsError as error:
        return page.Section(anchor, title, page.note(str(error)))


def _load_scores(path: Path | None, what: str) -> tuple[Scores | None, list[str]]:
    if path is None:
        return None, []
    try:
        return Scores.load(path), []
    except ConnectomicsError as error:
        return None, [f"The {what} cannot be shown: {error}"]


def _scores_section(
    table: Scores | None, baseline: Scores | None, datasets: dict[str, str], baseline_name: str, lines: list[str]
) -> page.Section:
    notes = "".join(page.note(line) for line in lines)
    if table is None:
        return page.Section("scores", "Scores", notes or page.note("No scores: no scores.json was given."))
    made = _part("scores", "Scores", lambda: scores.section(table, baseline, datasets, baseline_name))
    return page.Section(made.anchor, made.title, notes + made.body)


def _evaluation(sources: ReportSources) -> list[page.Section]:
    if sources.evaluation is None:
        return []
    path = sources.evaluation
    title = "Evaluation on annotated crops"
    return [_part("evaluation", title, lambda: scores.evaluation_section(path))]


def _datasets(library: Library) -> dict[str, str]:
    """The data set of each crop, as far as it is known; the crops' section says why it is not."""
    try:
        return crops.datasets_of(library.wanted())
    except ConnectomicsError:
        return {}
