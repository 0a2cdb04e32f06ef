"""How the command line talks: stages with their time, progress, tables. Everything but results goes to stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from connectomics.progress import Progress, lines, silent

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Print a line on stderr, unless `pytc -q` asked for silence."""
    if log.isEnabledFor(logging.INFO):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def stage(what: str, timings: dict[str, float] | None = None, name: str | None = None) -> Iterator[None]:
    """Announce a stage and say how long it took; ``timings[name]`` gets the seconds."""
    say(f"{what} ...")
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    if timings is not None:
        timings[name or what] = round(seconds, 3)
    say(f"{what}: {seconds:.1f} s")


@contextmanager
def counted(what: str) -> Iterator[Progress]:
    """Show progress while the block runs (a bar on a terminal, now and then a line in a log), then the time it took."""
    with stage(what):
        if not log.isEnabledFor(logging.INFO):
            yield silent
        elif sys.stderr.isatty():
            with _bar() as advance:
                yield advance
        else:
            yield lines(what, say)


@contextmanager
def stages(what: str | None = None) -> Iterator[Progress]:
    """Yield a progress that shows each step as `counted` does, if it leaves work when it starts: steps are told by
    their names, or all that is reported is one step, ``what``."""
    with ExitStack() as shown:
        running: dict[str, Progress] = {}

        def advance(done: int, total: int, name: str = "", /) -> None:
            step, item = (name, "blocks") if what is None else (what, name)
            if step not in running and done < total:
                shown.close()
                running[step] = shown.enter_context(counted(step))
            if step in running:
                running[step](done, total, item)
                if done >= total:
                    shown.close()
                    if what is not None:
                        running.clear()

        yield advance


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)

        def advance(done: int, total: int, name: str = "", /) -> None:
            bars.update(bar, completed=done, total=total, description=name)

        yield advance


def table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table, the first column to the left and the others to the right; numbers get four digits, None is "-"."""
    shown = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(r[i]) for r in (header, *shown)) for i in range(len(header))]
    if title:
        print(f"\n{title}")
    for row in (header, ["-" * w for w in widths], *shown):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def triple(values: Sequence[float]) -> str:
    """Return ``8x8x8``, z x y x."""
    return "x".join(f"{v:.7g}" for v in values)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with fixed digits, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def size(count: float | None) -> str:
    """Return a number of bytes with a unit, "-" for None."""
    if count is None:
        return "-"
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """Return a time with a unit."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.3g} h"
