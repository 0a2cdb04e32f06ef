"""How the command line speaks: stages with their time, tables, numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from connectomics.cli.progress import say


@contextmanager
def stage(what: str, timings: dict[str, float] | None = None, name: str | None = None) -> Iterator[None]:
    """Say what begins and how long it took, on stderr; ``timings[name]`` gets the seconds."""
    say(f"{what} ...")
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    if timings is not None:
        timings[name or what] = round(seconds, 3)
    say(f"{what}: {seconds:.1f} s")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout, first column to the left and the others to the right."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    if title:
        print(f"\n{title}")
    for row in (header, ["-" * w for w in widths], *rows):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


def triple(values: Sequence[float]) -> str:
    """Three numbers, z x y x, without needless digits."""
    return "x".join(f"{v:.7g}" for v in values)


def shape(values: Sequence[int]) -> str:
    """A shape in voxels."""
    return "x".join(str(v) for v in values)
