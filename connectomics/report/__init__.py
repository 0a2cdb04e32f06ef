"""Pages and figures: `build_report` writes ``report.html``; `figures` makes pictures of slices from arrays.

Take `figures` from ``connectomics.report.figures``: it needs nothing but numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.report.sources import OtherRun, ReportOptions, ReportSources

if TYPE_CHECKING:
    from connectomics.report.steps import Progress

__all__ = ["OtherRun", "ReportOptions", "ReportSources", "build_report"]


def build_report(
    out: str | Path,
    sources: ReportSources,
    options: ReportOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a self-contained page; see `connectomics.report.build.build_report`."""
    from connectomics.report.build import build_report as build

    return build(out, sources, options, progress)
