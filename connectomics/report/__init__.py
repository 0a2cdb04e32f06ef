"""Pages and figures: the report page, the pages of ``pytc inspect`` and ``pytc view``, and pictures of slices.

- `build_report` writes ``report.html``; its sections are in `connectomics.report.pages`.
- `connectomics.report.figures` makes pictures of slices from numpy arrays; `connectomics.report.colors` has the colors.
- `connectomics.report.inspect` shows training batches; `connectomics.report.view` serves volumes to a viewer.
"""

from __future__ import annotations

from pathlib import Path

from connectomics.progress import Progress
from connectomics.report.pages.sources import OtherRun, ReportOptions, ReportSources

__all__ = ["OtherRun", "ReportOptions", "ReportSources", "build_report"]


def build_report(
    out: str | Path, sources: ReportSources, options: ReportOptions | None = None, progress: Progress | None = None
) -> Path:
    """Write a self-contained page; see `connectomics.report.pages.build.build_report`."""
    from connectomics.report.pages.build import build_report as build

    return build(out, sources, options, progress)
