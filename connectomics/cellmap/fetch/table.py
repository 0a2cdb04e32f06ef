"""A crop table from where it is published."""

from __future__ import annotations

import tempfile
import urllib.request
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.errors import MissingError
from connectomics.io.replacing import require_own
from connectomics.io.write import write_file

_MOST = 1 << 26  # bytes of a table


def resolve_table(where: str, keep_in: Path | None = None) -> CropTable:
    """The table "challenge" (the shipped one), of a file, or of a URL.

    Args:
        keep_in: folder in which a table that came from a URL is stored, as ``crop_table.csv`` or ``.json``, once it was
            read without an error.

    Raises:
        MissingError: nothing is there, or the server cannot be reached. MetadataError: it is no crop table.
    """
    if not where.startswith(("http://", "https://")):
        return CropTable.resolve(where)
    name = "crop_table.json" if where.split("?")[0].endswith(".json") else "crop_table.csv"
    try:
        with urllib.request.urlopen(where, timeout=60) as answer:
            data = answer.read(_MOST)
    except OSError as error:
        raise MissingError(f"cannot read the crop table {where}: {error}; check the address") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(data)
        table = CropTable.load(file)
    if keep_in is not None:
        write_file(require_own(keep_in / name, lambda there: there == data, "fetch"), data)
    return table
