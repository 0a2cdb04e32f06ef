"""How far long work has come: a bar on a terminal, now and then a line in a log. Both on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from connectomics.progress import Progress as Advance
from connectomics.progress import silent

log = logging.getLogger(__name__)

#: Seconds between two lines in a log.
_EVERY = 10.0


def say(text: str) -> None:
    """A line on stderr, unless `pytc -q` asked for silence."""
    if log.isEnabledFor(logging.INFO):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def counted(what: str) -> Iterator[Advance]:
    """Show how many of the items are done while the block runs, and at its end how long it took."""
    begin = time.perf_counter()
    say(f"{what} ...")
    if not log.isEnabledFor(logging.INFO):
        yield silent
    elif sys.stderr.isatty():
        with _bar() as advance:
            yield advance
    else:
        yield _lines(what, begin)
    say(f"{what}: {time.perf_counter() - begin:.1f} s")


def when_needed(what: str) -> Advance:
    """As `counted` for work that may turn out to be none: begins with the first call that leaves something to do, and
    ends with the one that leaves nothing."""
    running: list[tuple[AbstractContextManager[Advance], Advance]] = []

    def advance(done: int, number: int, name: str = "", /) -> None:
        if not running and done < number:
            shown = counted(what)
            running.append((shown, shown.__enter__()))
        if running:
            running[0][1](done, number, name)
            if done >= number:
                running.pop()[0].__exit__(None, None, None)

    return advance


@contextmanager
def stages(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """The progress of a task (`connectomics.tasks.runner.Progress`): each stage that leaves something to do is shown as
    `counted` does."""
    with ExitStack() as shown:
        running: dict[str, Advance] = {}

        def advance(stage: str, done: int, blocks: int) -> None:
            if stage not in running and done < blocks:
                running[stage] = shown.enter_context(counted(f"{what}, {stage}"))
            if stage in running:
                running[stage](done, blocks, "blocks")
                if done >= blocks:
                    shown.close()

        yield advance


@contextmanager
def _bar() -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, number: int, name: str = "", /) -> None:
            bar.update(task, completed=done, total=number, description=name)

        yield advance


def _lines(what: str, begin: float) -> Advance:
    last = begin

    def advance(done: int, number: int, name: str = "", /) -> None:
        nonlocal last
        if time.perf_counter() - last >= _EVERY:
            last = time.perf_counter()
            left = (last - begin) / done * (number - done) if done else 0.0
            say(f"{what}: {done}/{number} {name} ({last - begin:.0f} s, {left:.0f} s to go)")

    return advance
