"""`metrics.csv`: all logged metrics, as a table that a resumed run continues."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from connectomics.io.write import write_file
from connectomics.lightning.run_state import metric_rows

_FIRST = ["epoch", "step"]


class MetricsTable(Logger):
    """A CSV file with one row per logging call; metrics that a call does not log are empty.

    Columns: ``epoch``, ``step`` (optimizer steps before the row), then the metrics in the order of their first value.
    Rows are written at once, so a killed run leaves its history; Lightning's own CSV logger deletes the history of an
    earlier run in the same folder.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run has one table."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """Path of the file."""
        return self.path

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is saved as config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {**metrics, "step": metrics.get("step", 0) if step is None else step}
        columns = self._known_columns()
        new = [name for name in row if name not in columns]
        if new or not self.path.is_file():
            self._rewrite(self.rows(), columns + new)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._known_columns()).writerow(row)

    def rows(self) -> list[dict[str, str]]:
        """Return all rows of the file, as text."""
        return metric_rows(self.path)

    @rank_zero_only
    def remove_from(self, step: int) -> None:
        """Remove the rows of ``step`` and later: a run that resumes there writes them again."""
        rows = self.rows()
        kept = [row for row in rows if row["step"] and int(float(row["step"])) < step]
        if len(kept) < len(rows):
            self._rewrite(kept, self._known_columns())

    def _known_columns(self) -> list[str]:
        if self._columns is None:
            rows = self.rows()
            self._columns = list(rows[0]) if rows else list(_FIRST)
        return self._columns

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.path, text.getvalue().encode())
        self._columns = columns
