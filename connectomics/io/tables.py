"""Tables that are written part by part, as CSV or Parquet, and appear under their name once they are complete.

A column name ends with its unit (``volume_nm3``); in Parquet the unit is also metadata of the field (``unit``) and each
part is a row group. A number that is not known is null in Parquet and empty in CSV.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, as_write_error
from connectomics.io.place import S3Path

FORMATS = ("csv", "parquet")
#: Rows to write at a time, and rows of a Parquet row group.
ROWS = 100_000


@dataclass(frozen=True)
class Column:
    """A column: name, kind of values, unit (nm, nm2, voxels or none), and decimals that CSV keeps of a ``number``.

    ``ids`` is a list of IDs per row; CSV puts spaces between them.
    """

    name: str
    kind: Literal["text", "id", "count", "number", "flag", "ids"]
    unit: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Ragged:
    """Lists of IDs, one per row: row i is ``values[offsets[i]:offsets[i + 1]]`` (uint64; offsets (n + 1,) int64)."""

    values: NDArray[np.uint64]
    offsets: NDArray[np.int64]


Values = NDArray[Any] | Sequence[str] | Ragged


class Table:
    """A table that is being written; see `table`."""

    def __init__(self, temporary: Path, path: Path, columns: Sequence[Column], about: str) -> None:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        self._columns, self._path, self._is_csv = columns, path, path.suffix == ".csv"
        kinds = {"text": pa.string(), "id": pa.uint64(), "count": pa.int64(), "number": pa.float64()}
        kinds["flag"] = pa.int8() if self._is_csv else pa.bool_()
        kinds["ids"] = pa.large_string() if self._is_csv else pa.large_list(pa.uint64())
        fields = [pa.field(c.name, kinds[c.kind], metadata={"unit": c.unit} if c.unit else None) for c in columns]
        self._schema = pa.schema(fields, metadata={"connectomics": about} if about else None)
        self._file = temporary.open("wb")
        if self._is_csv:
            self._file.write((",".join(column.name for column in columns) + "\n").encode())  # pyarrow would quote it
            options = pa.csv.WriteOptions(include_header=False)
            self._writer: Any = pa.csv.CSVWriter(self._file, self._schema, write_options=options)
        else:
            self._writer = pa.parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def write(self, values: Mapping[str, Values]) -> None:
        """Add rows, given by column; at most `ROWS` at a time."""
        import pyarrow as pa

        made = [self._array(column, values[column.name]) for column in self._columns]
        with _writing(self._path):
            self._writer.write_table(pa.Table.from_arrays(made, schema=self._schema))

    def _array(self, column: Column, values: Any) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = self._schema.field(column.name).type
        if isinstance(values, Ragged):
            lists = pa.LargeListArray.from_arrays(
                _numbers(values.offsets, pa.int64()), _numbers(values.values, pa.uint64())
            )
            if not self._is_csv:
                return lists
            return pc.binary_join(lists.cast(pa.large_list(kind)), pa.scalar(" ", kind))
        if column.kind == "text":
            parts = [value.encode() for value in values]
            ends = np.cumsum([0, *map(len, parts)], dtype=np.int32)
            return pa.StringArray.from_buffers(len(parts), pa.py_buffer(ends), pa.py_buffer(b"".join(parts)))
        if self._is_csv and column.kind == "number":
            values = np.round(np.asarray(values, np.float64), column.digits) + 0.0  # no -0
        return _numbers(values, kind)

    def close(self) -> None:
        """Finish the file."""
        try:
            self._writer.close()
        finally:
            self._file.close()


def check_format(path: str | Path) -> None:
    """Raise `InputError` unless the suffix of ``path`` names a table format."""
    if (suffix := Path(path).suffix.lstrip(".")) not in FORMATS:
        raise InputError(f"unknown table format {suffix!r} ({path}); expected {' or '.join(FORMATS)}")


@contextmanager
def table(path: Path, columns: Sequence[Column], about: str = "") -> Iterator[Table]:
    """Write a table to ``path``, in the format of its suffix; yields the `Table` to fill.

    The file appears when the block ends without an error; otherwise nothing is kept.

    Args:
        about: JSON for the metadata of Parquet, under the key ``connectomics``.

    Raises:
        WriteError: the file cannot be written. InputError: the suffix names no format.
    """
    check_format(path)
    if isinstance(path, S3Path):
        with tempfile.TemporaryDirectory() as folder:
            with table(Path(folder, path.name), columns, about) as made:
                yield made
            with Path(folder, path.name).open("rb") as file:
                path.put(file)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Table(temporary, path, columns, about)
        try:
            yield made
        finally:
            with _writing(path):
                made.close()
        with _writing(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _numbers(values: Any, kind: Any) -> Any:
    """Return numbers or flags as Arrow's, NaN as null. Not by ``pyarrow.array``, which imports pandas: 0.3 s, 30 MB."""
    import pyarrow as pa

    flags = kind == pa.bool_()
    made = np.ascontiguousarray(values, bool if flags else kind.to_pandas_dtype())
    stored = np.packbits(made, bitorder="little") if flags else made
    known = ~np.isnan(made) if made.dtype.kind == "f" else np.ones(0, bool)
    there = None if known.all() else pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.Array.from_buffers(kind, len(made), [there, pa.py_buffer(stored)])


def _writing(path: Path) -> AbstractContextManager[None]:
    return as_write_error(f"cannot write {path}", "check the folder and its free space")


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove unfinished files that killed runs left in ``folder`` (by `table` and `write_file`), by file name.

    Only safe while no other run writes there.
    """
    for pattern in (f".{name}.*.part", f".{name}.part-*"):
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)


def read_columns(path: Path, names: Sequence[str], rows: Mapping[str, str] | None = None) -> dict[str, NDArray[Any]]:
    """Read columns of numbers of a CSV or Parquet table: ``id`` as uint64, others as float64 (NaN where not known).

    ``rows``: only those with these texts in these columns (data set, crop); None: all.

    Raises:
        InputError: a column is missing or holds no numbers, or the suffix names no format.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet

    check_format(path)
    chosen = dict(rows or {})
    types = {name: pa.uint64() if name == "id" else pa.float64() for name in names}
    types |= dict.fromkeys(chosen, pa.string())
    source = pa.BufferReader(path.read_bytes()) if isinstance(path, S3Path) else path
    try:
        if path.suffix == ".csv":
            wanted = pa.csv.ConvertOptions(include_columns=list(types), column_types=types)
            found = pa.csv.read_csv(source, pa.csv.ReadOptions(use_threads=False), convert_options=wanted)
        else:
            with pa.parquet.ParquetFile(source) as file:
                found = file.read(columns=list(types), use_threads=False)
        for name, text in chosen.items():
            found = found.filter(pc.equal(found[name], text))
        columns = {name: found[name].to_numpy() for name in names}
        if "id" in columns and columns["id"].dtype.kind not in "ui":
            raise ValueError("its ids must be whole numbers")
        return {name: values.astype(np.uint64 if name == "id" else np.float64) for name, values in columns.items()}
    except KeyError as error:
        raise InputError(f"{path} is no instance table; expected the columns {', '.join(names)}") from error
    except ValueError as error:
        raise InputError(f"{path} is no table of numbers: {error}; write it again") from error
