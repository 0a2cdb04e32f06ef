"""The files of an output, to be compared with those of another run."""

from __future__ import annotations

import re
from pathlib import Path

# the id of an output, which every run draws for itself, and samples of an input, of which a few may change
_ID = re.compile(rb'(?<="id": ")[0-9a-f]{32}(?=")|(?<=content-)[0-9a-f]{16}-[0-9a-f.]*')


def contents(folder: str | Path) -> dict[str, bytes]:
    """Relative name -> bytes of every file below ``folder``, without what no two runs share."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _ID.sub(b"", path.read_bytes()) for path in files}
