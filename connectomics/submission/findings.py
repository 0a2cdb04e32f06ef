"""What a check of a submission says: one finding, one line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        severity: ``error``: refused, or scored as if nothing were there; ``warning``: probably not what is meant;
            ``info``: worth knowing.
        rule: short name of the check (``missing-class``), for filtering.
        path: in the archive; ``.`` is the archive itself.
        found, expected: what is there and what should be.
        what_to_do: how to mend it.
    """

    severity: Severity
    rule: str
    path: str
    found: str
    expected: str
    what_to_do: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: found {self.found}, expected {self.expected}; {self.what_to_do}"

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return dataclasses.asdict(self)
