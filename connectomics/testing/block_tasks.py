"""Checks that every `BlockTask` must pass; they need no test framework and raise `AssertionError`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from connectomics.tasks import BlockTask

#: Makes the same task with its output below a folder.
MakeTask = Callable[[Path], BlockTask]
#: Returns the content of all finished files below a folder that must not depend on the order of the blocks.
Outputs = Callable[[Path], dict[str, bytes]]


def check_round_trip(task: BlockTask) -> None:
    """Check that a task survives `to_dict`, JSON and `from_dict`, with the same key."""
    again = type(task).from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task, f"{task.name}: from_dict(to_dict()) gives another task: {again}"
    assert again.key == task.key, f"{task.name}: the key changes when the task is stored"


def check_order_does_not_matter(make: MakeTask, outputs: Outputs, folder: Path) -> None:
    """Check that blocks done in reverse order, twice, or by workers that stop in between give the same bytes.

    Args:
        folder: an empty folder for four outputs.
    """
    runs: dict[str, Callable[[Sequence[int]], list[list[int]]]] = {
        "forward": lambda blocks: [list(blocks)],
        "reversed": lambda blocks: [list(reversed(blocks))],
        "twice": lambda blocks: [list(blocks), list(blocks)],
        "resumed": lambda blocks: [[number] for number in blocks],  # every block has a worker of its own
    }
    found = {}
    for name, portions in runs.items():
        _run(make(folder / name), portions)
        found[name] = outputs(folder / name)
    assert found["forward"], "the task wrote no output"
    for name, output in found.items():
        different = sorted(n for n in {*output, *found["forward"]} if output.get(n) != found["forward"].get(n))
        assert not different, f"blocks {name} give other files than blocks forward: {', '.join(different)}"


def _run(task: BlockTask, portions: Callable[[Sequence[int]], list[list[Any]]]) -> None:
    task.check()
    task.claim()
    for stage in task.stages:
        task.prepare(stage)
        for portion in portions(range(task.blocks(stage))):
            with task.open_worker(stage, "cpu") as worker:
                done = list(worker.run(portion))
            assert done == portion, f"{task.name}, {stage}: yielded {done}, expected {portion}"
            task.prepare(stage)  # as a resumed run does: must keep what finished blocks wrote
    task.finish()
