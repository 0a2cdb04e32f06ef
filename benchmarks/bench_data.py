"""The data path against its limits: ``python benchmarks/bench_data.py [--without-peer] [--rounds N] [--json FILE]``.

One data set of the phantom (4 nm raw, one crop of 1.32 um at 4 nm with all 48 classes), read at 8 nm from the crop
cache, one process, one torch thread. CPU seconds of the process, medians over rounds of ratios within a round:

(a) 128^3, 14 classes, plain: at least 40 times fewer CPU seconds a patch than cellmap-data;
(b) 64^3, 14 classes, flips and rotation by any angle in every patch: at least 100 times fewer;
(c) 48 classes cost at most 1.5 times what 3 classes cost, 128^3 plain and 64^3 with flips and rotation;
(d) a plain patch of 128^3 at most 3 times a bare copy of its raw and codes out of the memory map;
(e) a patch of 128^3 with flips and rotation at most 2 times the bare fused pass over arrays in memory.

A patch in (a) to (c) is a batch of one, ready for the device; in (d) and (e) an item of the data set. What the other
loader is and how it is run: ``connectomics/data/bench/peer.py``. Its torch gets one thread, as in a loader worker; with
torch's default, a thread a core, it takes more CPU seconds, given beside it. Exit status 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_roots import FOURTEEN, THREE, one_large_crop

from connectomics.cellmap.catalog import Catalog
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.bench import ensure_environment
from connectomics.data.bench.meter import median_ratio
from connectomics.data.bench.peer import OUR_AUGMENTED, Peer, compare
from connectomics.data.bench.run import one_torch_thread, ours_for_peer, work_on
from connectomics.data.bench.stages import PatchWork
from connectomics.data.cache import prepare
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.phantom import PHANTOM_CLASSES


@dataclass(frozen=True)
class Result:
    """One limit: the number measured (median), its quartiles, what is allowed, what else there is to say."""

    name: str
    rounds: tuple[float, ...]
    limit: float
    at_least: bool
    said: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        spread = f"{min(self.rounds):.2f} .. {max(self.rounds):.2f}"
        return (
            f"{'pass' if self.holds else 'FAIL'}  {self.name:52} {self.value:8.2f}  {sign} {self.limit:<5g} "
            f"({spread})  {self.said}"
        )


def work(root: Path, cache: Path, classes: Sequence[str], side: int, augmented: bool) -> PatchWork:
    """Patches of a root, decoded into the cache."""
    crops = Catalog.open(str(root)).crops(None, None, classes)
    patch, options = (side,) * 3, PatchOptions(cache="disk", cache_dir=str(cache))
    augmentor = PatchAugmentor.of(OUR_AUGMENTED, patch) if augmented else None
    dataset = CellMapMultiClassDataset.of_crops(crops, classes, "train", patch, (8.0,) * 3, augmentor, options)
    prepare(dataset.all_volumes, None, processes=1)
    return work_on(dataset)


def against_peer(python: Path, ours: PatchWork, augmented: bool, rounds: int, limit: float, name: str) -> Result:
    """Limits (a) and (b)."""
    data = ours.dataset
    crops = [volume.crop for volume in data.volumes]
    where = (crops, data.classes, data.patch_size, data.voxel_size)
    with Peer(python, *where, augmented=augmented) as peer:
        found = compare(peer, ours_for_peer(ours), augmented=augmented, rounds=rounds, patches=3)
    with Peer(python, *where, augmented=augmented, threads=None) as peer:
        peer.load(2)
        free = statistics.median(peer.load(2)["cpu_s"] for _ in range(3))
    n = found.to_dict()
    said = (
        f"theirs {1e3 * n['peer_cpu_s']:.0f} ms (default threads {1e3 * free:.0f}), ours {1e3 * n['cpu_s']:.2f} ms; "
        f"labels made dense {1e3 * n['dense_cpu_s']:.0f} ms, ratio {n['dense_ratio']:.1f}"
    )
    return Result(name, tuple(r.peer / r.ours for r in found.rounds), limit, True, said)


def many_classes(few: PatchWork, many: PatchWork, rounds: int, name: str) -> Result:
    """Limit (c)."""
    few.round(8), many.round(8)
    found = [{"few": few.round(24)["whole"], "many": many.round(24)["whole"]} for _ in range(rounds)]
    ms = [1e3 * statistics.median(r[k] for r in found) for k in ("many", "few")]
    return Result(name, _ratios(found, "many", "few"), 1.5, False, f"{ms[0]:.2f} and {ms[1]:.2f} ms")


def against_limit(ours: PatchWork, limit: str, rounds: int, allowed: float, name: str) -> Result:
    """Limits (d) and (e)."""
    ours.round(8, (limit,))
    found = [ours.round(24, (limit,)) for _ in range(rounds)]
    ms = [1e3 * statistics.median(r[k] for r in found) for k in ("patch", limit)]
    return Result(name, _ratios(found, "patch", limit), allowed, False, f"{ms[0]:.2f} and {ms[1]:.2f} ms")


def _ratios(found: Sequence[dict[str, float]], above: str, below: str) -> tuple[float, ...]:
    return tuple(median_ratio([r], above, below) for r in found)


def measure(root: Path, cache: Path, python: Path | None, rounds: int) -> list[Result]:
    """All limits, printed as they come."""
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        print(result.line(), flush=True)

    plain = work(root, cache, FOURTEEN, 128, False)
    if python is not None:
        add(against_peer(python, plain, False, rounds, 40, "(a) cellmap-data / ours, 128^3, 14 classes, plain"))
        turned = work(root, cache, FOURTEEN, 64, True)
        add(against_peer(python, turned, True, rounds, 100, "(b) cellmap-data / ours, 64^3, 14 classes, augmented"))
    for side, augmented, what in ((128, False, "128^3, plain"), (64, True, "64^3, augmented")):
        few, many = (work(root, cache, classes, side, augmented) for classes in (THREE, PHANTOM_CLASSES))
        add(many_classes(few, many, rounds, f"(c) 48 classes / 3 classes, {what}"))
    add(against_limit(plain, "copy", rounds, 3, "(d) plain patch / bare copy, 128^3"))
    full = work(root, cache, FOURTEEN, 128, True)
    add(against_limit(full, "kernel", rounds, 2, "(e) augmented patch / bare fused pass, 128^3"))
    return results


def main() -> int:
    """Measure, print, and tell by the exit status whether all limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-peer", action="store_true", help="leave out (a) and (b)")
    parser.add_argument("--peer-env", type=Path, help="cellmap-data's environment; made where it is not there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep root and cache here (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    python = None if options.without_peer else ensure_environment(options.peer_env)
    with tempfile.TemporaryDirectory() as temporary, one_torch_thread():
        folder = options.folder or Path(temporary)
        results = measure(one_large_crop(folder / "root"), folder / "cache", python, options.rounds)
    if options.json:
        rows = [{**vars(r), "value": r.value, "holds": r.holds} for r in results]
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(r.holds for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
