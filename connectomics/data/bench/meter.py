"""Clocks: CPU and wall seconds of named parts of some work, and the memory that each takes."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Cost:
    """What a part has cost: CPU seconds of this process (all threads) and wall seconds, without the parts in it.

    ``peak_mb`` is the most memory (10^6 bytes) that the process held beyond what it held when the part began, mapped
    files included; None where it was not looked at.
    """

    cpu: float = 0.0
    wall: float = 0.0
    peak_mb: float | None = None


@dataclass
class _Open:
    """A part that is running: the clocks without what was spent in parts within it, and memory in kB."""

    cpu: float
    wall: float
    base: int = 0
    peak: int = 0


@dataclass
class Meter:
    """Adds up the cost of parts by name; parts may lie within each other.

    With ``memory`` the kernel's high-water mark is reset around each part (Linux only, see proc(5), clear_refs), which
    costs time: such a meter's clocks are not to be used.
    """

    memory: bool = False
    costs: dict[str, Cost] = field(default_factory=dict)
    _open: list[_Open] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the block as ``name``."""
        self._note_peak()
        now = _Open(-time.process_time(), -time.perf_counter())
        if self.memory:
            _give_back()
            _reset_peak()
            now.base = now.peak = _status("VmRSS")
        self._open.append(now)
        try:
            yield
        finally:
            cpu, wall = now.cpu + time.process_time(), now.wall + time.perf_counter()
            self._note_peak()
            self._open.pop()
            cost = self.costs.setdefault(name, Cost())
            cost.cpu += cpu
            cost.wall += wall
            if self.memory:
                cost.peak_mb = max(cost.peak_mb or 0.0, (now.peak - now.base) * 1.024e-3)
            if self._open:  # the part around it does not count it
                self._open[-1].cpu -= cpu
                self._open[-1].wall -= wall

    def _note_peak(self) -> None:
        """Give the mark so far to the part that runs, and reset it."""
        if self.memory:
            if self._open:
                self._open[-1].peak = max(self._open[-1].peak, _status("VmHWM"))
            _reset_peak()


def can_measure_peaks() -> bool:
    """Whether this system lets a process reset its own high-water mark."""
    try:
        _reset_peak()
    except OSError:
        return False
    return True


def _reset_peak() -> None:
    """Let the high-water mark begin at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _give_back() -> None:
    """Give freed memory back to the system: a part that takes it again would seem to need none."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc has it
        library.malloc_trim(0)


def _status(field_name: str) -> int:
    """A size of ``/proc/self/status``, kB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1])
    return 0


def private_mb(pid: int) -> float:
    """Memory (10^6 bytes) that one process alone holds: ``Private_Clean + Private_Dirty`` of smaps_rollup."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1])
    return total * 1.024e-3


def medians(rounds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median over rounds of each name."""
    found = list(rounds)
    return {name: statistics.median(r[name] for r in found) for name in found[0]}


def median_ratio(rounds: Iterable[Mapping[str, float]], above: str, below: str) -> float:
    """The median of the ratios within rounds: what slows a whole round down does not count."""
    return statistics.median(r[above] / r[below] for r in rounds)
