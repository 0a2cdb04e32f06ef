"""Results of a submission check: one finding, one line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from connectomics.config.values import plain

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One problem that a check found.

    Attributes:
        severity: ``error``: refused, or scored as if nothing were there; ``warning``: probably a mistake;
            ``info``: worth knowing.
        rule: short name of the check (``missing-class``), for filtering.
        path: in the archive; ``.`` is the archive itself.
        found, expected: what is there and what should be.
        what_to_do: how to fix it.
    """

    severity: Severity
    rule: str
    path: str
    found: str
    expected: str
    what_to_do: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: expected {self.expected}, got {self.found}; {self.what_to_do}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return plain(self)


error = partial(Finding, "error")
warning = partial(Finding, "warning")
