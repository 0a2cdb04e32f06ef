"""Failed blocks: how often each is tried, when the run stops, and which failures the user accepts."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from connectomics.errors import BlocksFailedError, ConfigError, InputError
from connectomics.io.store import StoreError
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.pool import Batch, one_line

log = logging.getLogger(__name__)

_LOGGED = 5  # failures of a stage that are logged when they happen
_HOPELESS = 16  # distinct blocks that failed before any was done: the others would fail too
_NAMED = 5  # failed blocks that an error message describes

#: Blocks that may fail, by task name (`BlockTask.accepts`, or its part after the slash); "": of the only task.
Accepted = Mapping[str, Collection[int]]


class Failures:
    """The failed blocks of one stage of ``blocks`` blocks: each is tried ``attempts`` times; ``accept`` may fail."""

    def __init__(self, task: BlockTask, stage: str, blocks: int, attempts: int, accept: Collection[int]) -> None:
        self._task, self._stage, self._blocks, self.attempts = task, stage, blocks, attempts
        self._accept = frozenset(accept) if task.accepts(stage) else frozenset()
        if wrong := sorted(number for number in self._accept if not 0 <= number < blocks):
            raise InputError(
                f"--accept-failed: {task.name} has blocks 0 to {blocks - 1}, got {spell(wrong)}; use the "
                "numbers that the failed run named"
            )
        self._tries: dict[int, int] = {}
        self._why: dict[int, str] = {}  # of the latest try
        self.given_up: list[int] = []  # blocks that failed in every attempt
        self._any_done = False
        self._logged = 0

    def take(self, batch: Batch) -> tuple[list[int], list[int]]:
        """Process the failures of a batch.

        Returns:
            again: failed blocks to try again. accepted: failed blocks that are now stored as unknown, thus done.

        Raises:
            what stopped the batch; BlocksFailedError: all blocks so far have failed.
        """
        self._any_done = self._any_done or bool(batch.done)
        failed = dict(batch.failed)
        if batch.stop is not None:
            if batch.stopped is None or batch.stopped not in self._accept:
                raise self._stopped(batch.stop, batch.stopped)
            failed[batch.stopped] = one_line(batch.stop)
        accepted = {number: why for number, why in failed.items() if number in self._accept}
        if accepted:
            self._task.accept(self._stage, accepted)
            for number, why in sorted(accepted.items()):
                log.warning("%s: %s; accepted and stored as unknown", self._named(number), why)
        again = [number for number, why in failed.items() if number not in accepted and self._again(number, why)]
        if not self._any_done and len(self._tries) >= _HOPELESS:
            raise BlocksFailedError(
                f"{self._task.name}, {self._stage}: stopped because the first {len(self._tries)} of {self._blocks} "
                f"blocks all failed ({self._described(sorted(self._tries)[:1])}); fix the cause, then rerun the "
                "same command"
            )
        return again, list(accepted)

    def close(self) -> None:
        """Raise `BlocksFailedError` if blocks failed in every attempt."""
        if not self.given_up:
            return
        numbers = sorted(self.given_up)
        more = f"; and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
        raise BlocksFailedError(
            f"{self._task.name}, {self._stage}: {len(numbers)} of {self._blocks} blocks failed "
            f"({self._described(numbers[:_NAMED])}{more}); the others are done. Fix the cause, then rerun the same "
            f"command{self._remedy(numbers)}"
        )

    def _again(self, number: int, why: str) -> bool:
        """Count a failure; return whether the block is tried again."""
        tries = self._tries[number] = self._tries.get(number, 0) + 1
        if self._logged < _LOGGED:
            self._logged += 1
            last = " (further failures are named at the end)" if self._logged == _LOGGED else ""
            log.warning("%s failed, attempt %d of %d: %s%s", self._named(number), tries, self.attempts, why, last)
        self._why[number] = why
        if tries >= self.attempts:
            self.given_up.append(number)
        return tries < self.attempts

    def _stopped(self, error: Exception, number: int | None) -> Exception:
        """Return the error that ends the run, with the block that caused it, if any."""
        if number is None or not isinstance(error, StoreError) or not (remedy := self._remedy([number])):
            return error
        return StoreError(f"{error}. {self._named(number)} ended the run; what is done is kept{remedy}")

    def _named(self, number: int) -> str:
        return f"{self._task.name}, {self._stage}: {self._block(number)}"

    def _block(self, number: int) -> str:
        place = self._task.block_box(self._stage, number)
        return f"block {number}" if place is None else f"block {number} at {place}"

    def _described(self, numbers: Iterable[int]) -> str:
        return "; ".join(f"{self._block(n)}: {self._why[n]}" for n in numbers)

    def _remedy(self, numbers: Sequence[int]) -> str:
        name = self._task.accepts(self._stage)
        these = "this block" if len(numbers) == 1 else "these blocks"
        return f"; to store {these} as unknown, add --accept-failed {name}:{spell(numbers)}" if name else ""


def spell(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ``--accept-failed`` takes them: ``3,11,20-35``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_accepted(texts: Iterable[str]) -> dict[str, set[int]]:
    """Return the blocks in texts such as ``crop1:3,11,20-35``, by task; ``3,11`` belongs to the only task."""
    found: dict[str, set[int]] = {}
    for text in texts:
        name, _, numbers = text.rpartition(":")
        for part in numbers.split(","):
            run = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
            if run is None:
                raise ConfigError(f"--accept-failed takes CROP:12,40 or 12,40 (ranges as 20-35), got {text!r}")
            found.setdefault(name, set()).update(range(int(run[1]), int(run[2] or run[1]) + 1))
    return found


def accepted_of(tasks: Sequence[BlockTask], accepted: Accepted) -> list[frozenset[int]]:
    """Return the accepted blocks of each task.

    Raises `InputError` if a name fits no task or several, and for numbers without a name if there are several tasks.
    """
    names = [next((name for stage in task.stages if (name := task.accepts(stage))), "") for task in tasks]
    chosen: list[set[int]] = [set() for _ in tasks]
    for wanted, numbers in accepted.items():
        meant = [n for n, name in enumerate(names) if wanted in ("", name, name.rpartition("/")[2]) and name]
        if len(meant) != 1:
            known = ", ".join(filter(None, names[:12])) or "none"
            raise InputError(
                f"--accept-failed {f'{wanted}:' if wanted else ''}{spell(sorted(numbers))} must name one of the "
                f"regions to predict, but fits {len(meant)} of them; the regions are {known}"
            )
        chosen[meant[0]] |= set(numbers)
    return [frozenset(numbers) for numbers in chosen]
