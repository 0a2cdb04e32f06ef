"""How far the page is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Told (done, of how many, what was done last).
Progress = Callable[[int, int, str], None]


@dataclass
class Steps:
    """Counts what takes time: each class of a crop that is drawn, each crop whose voxels are counted, the data root.

    Parts say what they will do (`expect`) before the first step is done, so that the number of all does not grow.
    """

    progress: Progress | None = None
    expected: int = 0
    done: int = 0

    def expect(self, number: int) -> None:
        """So many steps more."""
        self.expected += number

    def step(self, name: str) -> None:
        """One is done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.expected, name)
