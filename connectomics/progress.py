"""How a long step reports how far it is: one protocol for every function that takes ``progress=``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

#: Seconds between two progress lines in a log.
EVERY = 10.0


class Progress(Protocol):
    """Called after each unit of work. The command line draws a bar; a notebook or a test passes its own function."""

    def __call__(self, done: int, total: int, what: str = "", /) -> None:
        """``done`` of ``total`` units are finished; ``what`` names the step or the item (``jrc_cos7-1a/crop234``)."""


def silent(done: int, total: int, what: str = "", /) -> None:
    """Report nothing."""


def named(progress: Progress, name: str) -> Progress:
    """Return a progress that reports each step under a name: ``jrc_cos7-1a/crop234, predict``."""

    def report(done: int, total: int, what: str = "", /) -> None:
        progress(done, total, f"{name}, {what}" if what else name)

    return report


def lines(what: str, say: Callable[[str], object]) -> Progress:
    """Return a progress that says a line now and then, at most one in `EVERY` seconds."""
    begin = last = time.monotonic()

    def report(done: int, total: int, name: str = "", /) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            left = (last - begin) / done * (total - done) if done else 0.0
            say(f"{what}: {done}/{total} {name} ({last - begin:.0f} s, {left:.0f} s to go)")

    return report


#: Shows the progress of one step, by its name, while the block runs.
Shown = Callable[[str], AbstractContextManager[Progress]]


def showing(progress: Progress | None) -> Shown:
    """Return what shows every step by one progress, or nothing."""
    return lambda what: nullcontext(progress or silent)
