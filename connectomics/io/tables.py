"""Tables that grow part by part on the disk, as CSV or Parquet, and take their place when they are whole.

The unit of a column ends its name (``volume_nm3``). In Parquet it is also the field's metadata (``unit``), every part
is a row group, and a number that is not known is null; in CSV it is empty.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, WriteError

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("csv", "parquet")
#: Rows that are written at a time, and those of a row group.
ROWS = 100_000
_DOCUMENT = "connectomics"


@dataclass(frozen=True)
class Column:
    """A column: its name, what it holds, in which unit (nm, nm2, voxels, ... or none) and with how many decimals in
    CSV. ``ids`` is a list of ids a row: in CSV with a space between them."""

    name: str
    kind: Literal["text", "id", "count", "number", "flag", "ids"]
    unit: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Ragged:
    """Lists of ids, one a row: row i is ``values[offsets[i]:offsets[i + 1]]`` (uint64; offsets (n + 1,) int64)."""

    values: NDArray[np.uint64]
    offsets: NDArray[np.int64]


Values = NDArray[Any] | Sequence[str] | Ragged


class Table(ABC):
    """A table that is being written."""

    @abstractmethod
    def write(self, values: Mapping[str, Values]) -> None:
        """Add rows, given by column: at most `ROWS` should come at a time."""

    @abstractmethod
    def close(self) -> None:
        """Finish the file."""


def check_format(path: str | Path) -> None:
    """That a table can be written to such a path: its ending names a format, whose library is installed.

    Raises `InputError`.
    """
    ending = Path(path).suffix.lstrip(".")
    if ending not in FORMATS:
        raise InputError(f"a table is {' or '.join(FORMATS)}, found {ending!r} ({path})")
    if ending == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError(
                "tables as Parquet need pyarrow, which is not installed; "
                "run pip install 'connectomics[tables]', or write CSV"
            ) from error


@contextmanager
def table(path: Path, columns: Sequence[Column], about: str = "") -> Iterator[Table]:
    """A table at ``path`` (its ending says the format), in its place when the block ends without an error, and removed
    otherwise.

    Args:
        about: JSON, kept in the metadata of Parquet under ``connectomics``.

    Raises `WriteError` where it cannot be written, and what `check_format` does.
    """
    check_format(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    make = _Csv if path.suffix == ".csv" else _Parquet
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            made = make(temporary, path, columns, about)
        try:
            yield made
        finally:
            with _writing(path):
                made.close()
        with _writing(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed runs left of files that they were writing into ``folder`` (`table`, `write_file`), by the
    name of the file; only where no other run writes there."""
    for pattern in (f".{name}.*.part", f".{name}.part-*"):
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)


class _Csv(Table):
    def __init__(self, temporary: Path, path: Path, columns: Sequence[Column], about: str) -> None:
        self._columns, self._path = columns, path
        self._file = temporary.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow([column.name for column in columns])

    def write(self, values: Mapping[str, Values]) -> None:
        made = [_TEXT[column.kind](values[column.name], column) for column in self._columns]
        with _writing(self._path):
            self._writer.writerows(zip(*made, strict=True))

    def close(self) -> None:
        self._file.close()


def _numbers(values: Any, column: Column) -> list[str]:
    return ["" if math.isnan(v) else f"{v:.{column.digits}f}" for v in np.asarray(values).tolist()]


def _lists(values: Any, column: Column) -> list[str]:
    plain, offsets = values.values.tolist(), values.offsets.tolist()
    return [" ".join(map(str, plain[a:b])) for a, b in itertools.pairwise(offsets)]


_TEXT: dict[str, Callable[[Any, Column], list[Any]]] = {
    "text": lambda values, _: list(values),
    "id": lambda values, _: values.tolist(),
    "count": lambda values, _: values.tolist(),
    "number": _numbers,
    "flag": lambda values, _: values.astype(np.int8).tolist(),
    "ids": _lists,
}


class _Parquet(Table):
    def __init__(self, temporary: Path, path: Path, columns: Sequence[Column], about: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds: dict[str, pyarrow.DataType] = {
            "text": pa.string(),
            "id": pa.uint64(),
            "count": pa.int64(),
            "number": pa.float64(),
            "flag": pa.bool_(),
            "ids": pa.large_list(pa.uint64()),
        }
        fields = [pa.field(c.name, kinds[c.kind], metadata={"unit": c.unit} if c.unit else None) for c in columns]
        self._schema = pa.schema(fields, metadata={_DOCUMENT: about} if about else None)
        self._path = path
        self._writer = pq.ParquetWriter(temporary, self._schema, compression="zstd")

    def write(self, values: Mapping[str, Values]) -> None:
        import pyarrow as pa

        made = []
        for field in self._schema:
            given = values[field.name]
            if isinstance(given, Ragged):
                made.append(pa.LargeListArray.from_arrays(given.offsets, pa.array(given.values)))
            else:
                made.append(pa.array(given, type=field.type, from_pandas=True))  # NaN is null
        with _writing(self._path):
            self._writer.write_table(pa.Table.from_arrays(made, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Where the disk refuses, a `WriteError` that names the table."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; check the folder and its free space"
        ) from error


def read_columns(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns of numbers of a table that was written as CSV or Parquet; the column ``id`` as uint64, others float64.

    Memory: 8 bytes a number, twice while they are read. Raises `InputError` where a column is absent or holds no
    numbers, and what `check_format` does.
    """
    check_format(path)
    parts: dict[str, list[NDArray[Any]]] = {name: [np.zeros(0, _number_type(name))] for name in names}
    try:
        for part in (_parquet_parts if path.suffix == ".parquet" else _csv_parts)(path, names):
            for name, values in zip(names, part, strict=True):
                whole = name == "id" and isinstance(values, list | tuple)
                parts[name].append(np.asarray([int(v) for v in values] if whole else values, _number_type(name)))
    except InputError:
        raise
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is no table of numbers: {error}; write it again") from error
    return {name: np.concatenate(found) for name, found in parts.items()}


def _number_type(name: str) -> type:
    return np.uint64 if name == "id" else np.float64


def _csv_parts(path: Path, names: Sequence[str]) -> Iterator[list[Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        places = _places(path, next(lines, []), names)
        while rows := list(itertools.islice(lines, ROWS)):
            yield [[row[i] for row in rows] for i in places]


def _parquet_parts(path: Path, names: Sequence[str]) -> Iterator[list[Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _places(path, file.schema_arrow.names, names)
        for part in file.iter_batches(ROWS, columns=list(names)):
            yield [part[name].to_numpy(zero_copy_only=False) for name in names]


def _places(path: Path, there: Sequence[str], names: Sequence[str]) -> list[int]:
    if missing := [name for name in names if name not in there]:
        raise InputError(f"{path} has no column {', '.join(missing)}; it is no table of instances")
    return [list(there).index(name) for name in names]
