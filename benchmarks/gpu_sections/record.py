"""What a run of ``benchmarks/gpu.py`` found: rows by section, in ``gpu.json`` and ``gpu.md`` as soon as they are there.

Both files are replaced in one step after every row, so a run that is cut off keeps all rows that it had.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class LeftOutError(Exception):
    """A row is not measured; the message says why."""


def one_line(error: BaseException) -> str:
    """The kind and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


class Record:
    """The content of ``gpu.json``; only one process at a time may change it."""

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self.out, self.content = out, content

    @classmethod
    def start(cls, out: Path, about: Mapping[str, Any], goals: bool) -> Record:
        """A new record; ``goals``: whether values are judged by their goals."""
        out.mkdir(parents=True, exist_ok=True)
        record = cls(out, {"about": dict(about), "goals_count": goals, "sections": {}})
        record.save()
        return record

    @classmethod
    def load(cls, out: Path) -> Record:
        """Read the record of a run that has started."""
        return cls(out, json.loads((out / "gpu.json").read_text(encoding="utf-8")))

    def begin(self, section: str) -> None:
        """Add a section, without rows."""
        self.content["sections"][section] = {"state": "running", "seconds": None, "error": None, "rows": []}
        self.save()

    def add(self, section: str, row: Mapping[str, Any]) -> None:
        """Add a row: ``table``, ``name``, ``values``, and, if there are any, ``goals``, ``error``, ``left_out``,
        ``quiet`` (a word to count it by: the table does not show it)."""
        self.content["sections"][section]["rows"].append(dict(row))
        self.save()

    def end(self, section: str, state: str, seconds: float, error: str | None = None) -> None:
        """Close a section: ``done``, ``failed`` or ``cut off``."""
        self.content["sections"][section] |= {"state": state, "seconds": round(seconds, 1), "error": error}
        self.save()

    @property
    def failures(self) -> list[str]:
        """What went wrong, one line each; goals that are missed are no failures."""
        found = []
        for name, section in self.content["sections"].items():
            if section["state"] != "done":
                found.append(f"{name}: {section['state']}" + (f" ({section['error']})" if section["error"] else ""))
            found += [f"{name}, {row['name']}: {row['error']}" for row in section["rows"] if row.get("error")]
        return found

    def save(self) -> None:
        """Write both files."""
        for name, text in (("gpu.json", json.dumps(self.content, indent=1)), ("gpu.md", self.markdown())):
            part = self.out / f".{name}.part-{os.getpid()}"
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(self.out / name)

    def markdown(self) -> str:
        """All tables."""
        lines = [f"- {key}: {value}" for key, value in self.content["about"].items()]
        for name, section in self.content["sections"].items():
            seconds = "" if section["seconds"] is None else f", {section['seconds']:.0f} s"
            lines += ["", f"## {name} ({section['state']}{seconds})"]
            if section["error"]:
                lines += ["", f"error: {section['error']}"]
            tables: dict[str, list[dict[str, Any]]] = {}
            for row in section["rows"]:
                tables.setdefault(row["table"], []).append(row)
            for table, rows in tables.items():
                lines += ["", *self._table(table, rows)]
        return "\n".join(lines)

    def _table(self, title: str, rows: list[dict[str, Any]]) -> list[str]:
        quiet = Counter(row["quiet"] for row in rows if row.get("quiet"))
        lines = [f"{title}: {', '.join(f'{count} {what}' for what, count in quiet.items())}"] if quiet else []
        rows = [row for row in rows if not row.get("quiet")]
        return [*lines, *([""] if lines and rows else []), *(self._rows(title, rows) if rows else [])]

    def _rows(self, title: str, rows: list[dict[str, Any]]) -> list[str]:
        columns = list(dict.fromkeys(key for row in rows for key, value in row["values"].items() if value is not None))
        said = any(row.get("error") or row.get("left_out") for row in rows)
        head = [title, *columns, *(["remark"] if said else [])]
        lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for row in rows:
            cells = [row["name"], *(self._cell(row, key) for key in columns)]
            if said:
                remark = f"error: {row['error']}" if row.get("error") else row.get("left_out") or ""
                cells.append(remark.replace("|", "/"))
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def _cell(self, row: Mapping[str, Any], key: str) -> str:
        value = row["values"].get(key)
        if value is None:
            return ""
        text = f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value}"
        goal = (row.get("goals") or {}).get(key)
        if goal is None:
            return text
        verdict = "not judged" if not self.content["goals_count"] else "met" if value >= goal else "missed"
        return f"{text} (goal >= {goal:g}: {verdict})"


@dataclass
class Section:
    """A running section: its device and folders, the time it may take, and the record for its rows.

    Attributes:
        name: of the section. record: gets the rows. device: ``cuda`` or ``cpu``. tiny: the smallest sizes that run.
        data: folder with ``lucchi-train``. scratch: an empty folder on a local disk. seconds: that it may take.
    """

    name: str
    record: Record
    device: str
    tiny: bool
    data: Path
    scratch: Path
    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def need(self, seconds: float) -> None:
        """Leave the row out (`LeftOutError`) if it is expected to take longer than the time that is left."""
        if seconds > self.left:
            raise LeftOutError(f"left out: it takes about {seconds:.0f} s, and {max(0.0, self.left):.0f} s are left")

    @contextmanager
    def row(self, table: str, name: str, **goals: float) -> Iterator[dict[str, Any]]:
        """Yield the values of a row to fill in. The row is kept if an error is raised, and the error ends only the row.

        ``goals``: least values, by the column's name.
        """
        values: dict[str, Any] = {}
        row: dict[str, Any] = {"table": table, "name": name, "values": values, "goals": goals}
        try:
            yield values
        except LeftOutError as reason:
            row["left_out"] = str(reason)
        except Exception as error:  # whatever it is, the next row goes on
            traceback.print_exc()
            row["error"] = one_line(error)
        row["values"] = {key: _plain(value) for key, value in values.items()}
        self.record.add(self.name, row)
        print(f"[{self.name}] {name}: {row.get('error') or row.get('left_out') or row['values']}", flush=True)

    def folder(self, name: str) -> Path:
        """Make an empty folder in the scratch space."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def _plain(value: Any) -> Any:
    """A number that JSON has, rounded to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
