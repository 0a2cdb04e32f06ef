"""Work for another process, in a module that imports next to nothing."""

from __future__ import annotations

import sys


def has_the_loader(task: str, wait: bool) -> None:
    """Raise an error if this process has yet to import what loader workers need."""
    assert "connectomics.data.loader" in sys.modules
