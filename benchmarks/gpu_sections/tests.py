"""Section ``tests``: what is marked ``gpu`` in tests/gpu; on the CPU the same tests on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from gpu_sections.record import Section

TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"


class Reporter:
    """A pytest plugin: adds a row when a test ends, and stops the session when the time is over."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self._add(report.nodeid, report.outcome, report.duration, _reason(report))
        if report.when == "teardown" and self.section.left <= 0:
            self.session.shouldstop = "the section's time is over"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report.nodeid, "failed", 0.0, _reason(report))

    def _add(self, name: str, outcome: str, seconds: float, reason: str) -> None:
        row: dict[str, Any] = {"table": "test", "name": name.removeprefix("tests/gpu/"), "values": {"result": outcome}}
        row["values"]["s"] = round(seconds, 1)
        if outcome == "passed":
            row["quiet"] = outcome
        elif outcome == "failed":
            row["error"] = reason
        elif outcome == "skipped":
            row["left_out"] = reason
        self.section.record.add(self.section.name, row)


def _reason(report: Any) -> str:
    """Return the line that says why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else str(report.longrepr or "")).strip().splitlines()
    return lines[0][:300] if lines else ""


def run(section: Section) -> None:
    """Raises `RuntimeError` if there was nothing to run or the time was over."""
    if importlib.util.find_spec("pytest") is None:
        row = {"table": "test", "name": "all", "values": {}, "left_out": "skipped: pytest is not installed"}
        section.record.add(section.name, row)
        return
    import pytest

    marked = "gpu" if section.device == "cuda" else "not gpu and not slow"
    arguments = [str(TESTS), "-m", marked, "-p", "no:cacheprovider", "--tb=short", "-q"]
    arguments += [f"--basetemp={section.scratch / 'pytest'}", f"--rootdir={TESTS.parents[1]}"]
    status = pytest.main(arguments, plugins=[Reporter(section)])
    if status == pytest.ExitCode.INTERRUPTED and section.left <= 0:
        raise RuntimeError("the time was over before the last test")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with status {int(status)}")
