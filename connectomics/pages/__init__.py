"""Pages and figures: the report page, the pages of ``pytc inspect`` and ``pytc view``, and pictures of slices.

- `build_report` writes ``report.html``; its sections are in `connectomics.pages.report`.
- `connectomics.pages.figures` makes pictures of slices from numpy arrays; `connectomics.pages.colors` has the colors.
- `connectomics.pages.inspect` shows training batches; `connectomics.pages.view` serves volumes to a viewer.
"""

from __future__ import annotations

from pathlib import Path

from connectomics.pages.report.sources import OtherRun, ReportOptions, ReportSources
from connectomics.progress import Progress

__all__ = ["OtherRun", "ReportOptions", "ReportSources", "build_report"]


def build_report(
    out: str | Path, sources: ReportSources, options: ReportOptions | None = None, progress: Progress | None = None
) -> Path:
    """Write a self-contained page; see `connectomics.pages.report.build.build_report`."""
    from connectomics.pages.report.build import build_report as build

    return build(out, sources, options, progress)
