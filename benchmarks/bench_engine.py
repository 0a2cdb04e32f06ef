"""What engines cost: seconds a block beyond the block, memory of the leading process, and what a second worker brings.

    python benchmarks/bench_engine.py [--blocks 5000] [--many 100000] [--work 200] [--rounds 3]

Each case runs in a process of its own. Printed against the limits: scheduling a block that does nothing takes less than
5 ms, in this process, on two processes, and on two Dask workers; 100,000 such blocks leave the leading process (for
Dask with the scheduler in it) below 1 GB; two Dask workers of one thread do blocks of arithmetic at least 1.8 times as
fast as one. A limit that is missed makes the exit code 1. Needs two idle cores, the last case above all.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from engine_task import IdleTask

ENGINES: dict[str, dict[str, Any]] = {
    "local-1": {},
    "local-2": {"workers": 2},
    "dask-1": {"name": "dask", "workers": 1},
    "dask-2": {"name": "dask", "workers": 2},
}
OVERHEAD_MS, MEMORY_MB, GAIN = 5.0, 1000.0, 1.8
SINES = 10  # millions in a block of arithmetic: about a tenth of a second


def case(engine: str, blocks: int, sines: int) -> dict[str, float]:
    """Run it here: seconds of the stage once workers are there, and the peak of this process in MB."""
    from connectomics.config.schema import EngineConfig
    from connectomics.tasks import open_engine, run_task

    with tempfile.TemporaryDirectory() as name, open_engine(EngineConfig(**ENGINES[engine])) as opened:
        run_task(IdleTask(str(Path(name) / "warm"), 40, 1), opened)  # workers start with the first blocks
        begin = time.perf_counter()
        run_task(IdleTask(str(Path(name) / "out"), blocks, sines), opened)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def apart(engine: str, blocks: int, sines: int = 0) -> dict[str, float]:
    """`case` in a process of its own."""
    command = [sys.executable, __file__, "--case", engine, str(blocks), str(sines)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def shown(what: str, value: float, limit: float, unit: str, at_least: bool = False) -> bool:
    """Print a number against its limit; whether it holds."""
    holds = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"{what:55} {value:8.2f} {unit:3} (limit {sign} {limit:g}) {'ok' if holds else 'MISSED'}", flush=True)
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5000, help="that do nothing, for the time of one")
    parser.add_argument("--many", type=int, default=100_000, help="that do nothing, for memory")
    parser.add_argument("--work", type=int, default=200, help="blocks of arithmetic")
    parser.add_argument("--rounds", type=int, default=3, help="of one Dask worker against two")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        engine, blocks, sines = options.case
        print(json.dumps(case(engine, int(blocks), int(sines))))
        return
    held = []
    for engine in ("local-1", "local-2", "dask-2"):
        each = apart(engine, options.blocks)["seconds"] / options.blocks * 1000
        held.append(shown(f"{engine}: scheduling a block, of {options.blocks}", each, OVERHEAD_MS, "ms"))
    for engine in ("local-2", "dask-2"):
        found = apart(engine, options.many)
        each = found["seconds"] / options.many * 1000
        held.append(shown(f"{engine}: peak of the leader, {options.many} blocks", found["mb"], MEMORY_MB, "MB"))
        held.append(shown(f"{engine}: scheduling a block, of {options.many}", each, OVERHEAD_MS, "ms"))
    pairs = []
    for _ in range(options.rounds):
        one, two = (apart(engine, options.work, SINES)["seconds"] for engine in ("dask-1", "dask-2"))
        pairs.append((one, two))
        print(f"{options.work} blocks: one Dask worker {one:.1f} s, two {two:.1f} s: {one / two:.2f}", flush=True)
    held.append(shown("two Dask workers against one", median(one / two for one, two in pairs), GAIN, "x", True))
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
