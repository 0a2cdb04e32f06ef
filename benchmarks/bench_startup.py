"""Start-up: seconds until a verb can begin its work, and the heavy libraries that are loaded by then.

    python benchmarks/bench_startup.py
    python benchmarks/bench_startup.py --against ../other-checkout --modules decode=connectomics.decoding.decode

Each line is the best of several fresh processes that import what the verb needs. With ``--against`` another checkout is
measured in the same run, in turns; ``--modules`` names its modules where they differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Verb -> modules that it imports before it begins.
VERBS = {
    "import": "connectomics",
    "--help": "connectomics.cli.app",
    "describe": "connectomics.cellmap.summary",
    "train": "connectomics.pipeline.train connectomics.lightning.trainer",
    "predict": "connectomics.pipeline.predict connectomics.lightning.checkpoints connectomics.lightning.network",
    "decode": "connectomics.pipeline.decode",
    "evaluate": "connectomics.pipeline.evaluate",
    "export": "connectomics.pipeline.export",
    "score": "connectomics.pipeline.score",
    "report": "connectomics.pipeline.report",
}
HEAVY = ("numpy", "numba", "torch", "monai", "pytorch_lightning", "scipy", "zarr", "tensorstore", "hydra", "matplotlib")
_CODE = """
import sys, time
begin = time.perf_counter()
for name in {modules!r}.split():
    __import__(name)
seconds = time.perf_counter() - begin
print(seconds, *[name for name in {heavy!r} if name in sys.modules])
"""


def start_up(modules: str, root: Path) -> tuple[float, list[str]]:
    """Return the seconds of an import in a fresh process, and the heavy libraries that it loads."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE.format(modules=modules, heavy=HEAVY)],
        capture_output=True, text=True, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    seconds, *loaded = done.stdout.split()
    return float(seconds), loaded


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, measured in the same run")
    parser.add_argument(
        "--modules", nargs="*", default=[], metavar="VERB=MODULES", help="modules of the other checkout"
    )
    options = parser.parse_args()
    other = {**VERBS, **dict(item.split("=", 1) for item in options.modules)}
    print(f"{'verb':10} {'seconds':>8} {'other':>8}  loaded here")
    for verb, modules in VERBS.items():
        here: list[tuple[float, list[str]]] = []
        there: list[tuple[float, list[str]]] = []
        for _ in range(options.rounds):
            here.append(start_up(modules, ROOT))
            if options.against is not None:
                there.append(start_up(other[verb], options.against))
        seconds, loaded = min(here)
        before = f"{min(there)[0]:8.2f}" if there else f"{'-':>8}"
        print(f"{verb:10} {seconds:8.2f} {before}  {' '.join(loaded)}", flush=True)


if __name__ == "__main__":
    main()
