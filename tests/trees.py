"""The files of an output, to be compared with those of another run."""

from __future__ import annotations

import re
from pathlib import Path

_ID = re.compile(rb'"id": "[0-9a-f]{32}"')  # of an output: every run draws its own


def contents(folder: str | Path) -> dict[str, bytes]:
    """Relative name -> bytes of every file below ``folder``, without the id of the output."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _ID.sub(b'"id": ""', path.read_bytes()) for path in files}
