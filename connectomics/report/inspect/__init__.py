"""``pytc inspect``: batches as the network gets them, as numbers and as one page.

`inspect_data` gathers (`connectomics.report.inspect.data`), `write_page` draws (`connectomics.report.inspect.page`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from connectomics.config import RunConfig
    from connectomics.report.inspect.data import Inspection
    from connectomics.report.steps import Progress

__all__ = ["inspect_data", "write_page"]


def inspect_data(config: RunConfig, batches: int = 2, progress: Progress | None = None) -> Inspection:
    """Take batches of a run's training data; see `connectomics.report.inspect.data.inspect_data`."""
    from connectomics.report.inspect.data import inspect_data as gather

    return gather(config, batches, progress)


def write_page(out: str | Path, inspection: Inspection, *, overwrite: bool = False) -> Path:
    """Write the self-contained page; see `connectomics.report.inspect.page.write_page`."""
    from connectomics.report.inspect.page import write_page as write

    return write(out, inspection, overwrite=overwrite)
