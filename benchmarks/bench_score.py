"""What the challenge's score costs here, and what it costs the official way.

    python benchmarks/bench_score.py            # the ratio (a few instances of the official way), 400^3, the curve
    python benchmarks/bench_score.py --full     # all 100 instances of the official way (minutes)
    python benchmarks/bench_score.py --large    # also 1000^3 from disk, in bounded memory (minutes, 10 GB of disk)
    python benchmarks/bench_score.py --json OUT # the numbers too

CPU seconds are ``time.process_time`` of all threads, after compilation. Peak memory is the process's high-water mark
above what it held before the volumes were made, so it includes the volumes. Every case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

VOXEL = (8.0, 8.0, 8.0)


# -- volumes -----------------------------------------------------------------------------------------------------------
@njit(cache=True)
def _balls(out, first, centres, radii, squeeze, values):  # type: ignore[no-untyped-def]
    """Ellipsoids of given values drawn into a slab whose first plane is ``first``; later ones do not overwrite."""
    n_z, n_y, n_x = out.shape
    for i in range(values.size):
        r = radii[i]
        z0, z1 = max(0, int(centres[i, 0] - r) - first), min(n_z, int(centres[i, 0] + r) + 2 - first)
        y0, y1 = max(0, int(centres[i, 1] - r)), min(n_y, int(centres[i, 1] + r) + 2)
        x0, x1 = max(0, int(centres[i, 2] - r)), min(n_x, int(centres[i, 2] + r) + 2)
        for z in range(z0, z1):
            for y in range(y0, y1):
                for x in range(x0, x1):
                    d = (
                        ((z + first - centres[i, 0]) * squeeze[i, 0]) ** 2
                        + ((y - centres[i, 1]) * squeeze[i, 1]) ** 2
                        + ((x - centres[i, 2]) * squeeze[i, 2]) ** 2
                    )
                    if d <= r * r and out[z, y, x] == 0:
                        out[z, y, x] = values[i]


class Scene:
    """Truth and prediction of ``n`` instances of about ``radius`` voxels in a cube of ``side``, seeded.

    The prediction moves and resizes every instance a little, misses a tenth and invents a tenth.
    """

    def __init__(self, side: int, n: int, radius: float, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.side = side
        self.centres = rng.uniform(radius * 0.7, side - radius * 0.7, (n, 3))
        self.radii = radius * rng.uniform(0.7, 1.2, n)
        self.squeeze = rng.uniform(1.0, 1.8, (n, 3))
        self.moved = self.centres + rng.normal(0, 0.08 * radius, (n, 3))
        self.resized = self.radii * rng.normal(1, 0.06, n)
        wrong = rng.random(n) < 0.1
        self.moved[wrong] = rng.uniform(0, side, (int(wrong.sum()), 3))
        self.order = rng.permutation(n)

    def slab(self, which: str, first: int, planes: int) -> NDArray[np.uint32]:
        """Some planes of the ``truth`` or the ``pred``."""
        out = np.zeros((planes, self.side, self.side), np.uint32)
        values = np.arange(1, len(self.radii) + 1, dtype=np.uint32)
        if which == "truth":
            _balls(out, first, self.centres, self.radii, self.squeeze, values)
        else:
            o = self.order
            _balls(out, first, self.moved[o], self.resized[o], self.squeeze[o], values)
        return out

    def volumes(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Prediction and truth, whole."""
        return self.slab("pred", 0, self.side), self.slab("truth", 0, self.side)


# -- measuring ---------------------------------------------------------------------------------------------------------
class Peak:
    """The high-water mark of this process's memory since it was made, and what it held then (Linux), bytes."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")

    def bytes(self) -> int:
        """Most memory held at once since then, above what was held then."""
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"no {name} in /proc/self/status")


def _warm_up() -> None:
    """Compiles everything and imports the solver, so that neither is counted."""
    from connectomics.metrics.challenge import score_instance

    score_instance(*Scene(48, 12, 6.0, seed=9).volumes(), VOXEL, workers=1)


def case_ours(side: int, n: int, radius: float) -> dict[str, Any]:
    """Our score of one scene: CPU and wall seconds, peak memory, counts."""
    from connectomics.metrics.challenge import score_instance

    _warm_up()
    scene = Scene(side, n, radius)
    peak = Peak()
    pred, truth = scene.volumes()
    cpu, wall = time.process_time(), time.perf_counter()
    score = score_instance(pred, truth, VOXEL)
    return {
        "side": side,
        "instances": n,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "volumes_mb": (pred.nbytes + truth.nbytes) / 2**20,
        "peak_mb": peak.bytes() / 2**20,
        "instance_voxels": int(np.count_nonzero(truth)),
        **{key: value for key, value in score.to_dict().items() if key != "panoptic"},
    }


def case_official(side: int, n: int, radius: float, few: int) -> dict[str, Any]:
    """The official way on the same scene: ``few`` instances spread over all, the rest extrapolated (0: all)."""
    from score_reference import OfficialWay

    _warm_up()
    scene = Scene(side, n, radius)
    peak = Peak()
    pred, truth = scene.volumes()
    cpu = time.process_time()
    way = OfficialWay(pred, truth, VOXEL)
    start = time.process_time() - cpu
    if few == 0:
        score = way.score()
        total = time.process_time() - cpu
        return {"cpu_s": total, "measured": n, "peak_mb": peak.bytes() / 2**20, **score}
    predicted = set(way.matches.values())
    computed = [int(t) for t in way.truth_ids if int(t) in predicted]
    sample = computed[:: max(1, len(computed) // few)][:few]
    cpu = time.process_time()
    for truth_id in sample:
        way.distance(truth_id)
    each = (time.process_time() - cpu) / len(sample)
    return {"cpu_s": start + each * len(computed), "measured": len(sample), "peak_mb": peak.bytes() / 2**20}


def case_large(side: int, n: int, radius: float, memory_gb: float) -> dict[str, Any]:
    """A crop too large for the memory allowed, from Zarr arrays on disk."""
    import zarr
    from numcodecs import Zstd

    from connectomics.metrics.challenge import score_submission

    _warm_up()
    scene = Scene(side, n, radius)
    with tempfile.TemporaryDirectory(prefix="bench-score-") as folder:
        for which in ("truth", "pred"):
            group = zarr.open_group(f"{folder}/{which}.zarr", mode="w", zarr_format=2)
            array = group.create_group("crop1").create_array(
                "mito", shape=(side,) * 3, chunks=(64,) * 3, dtype="uint32", compressors=Zstd(level=1)
            )
            array.attrs.update({"voxel_size": VOXEL, "translation": (0.0, 0.0, 0.0)})
            for first in range(0, side, 64):
                array[first : first + 64] = scene.slab(which, first, min(64, side - first))
        peak = Peak()
        cpu, wall = time.process_time(), time.perf_counter()
        score = score_submission(f"{folder}/pred.zarr", f"{folder}/truth.zarr", memory_bytes=int(memory_gb * 2**30))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    counts = score.results[0].to_dict()
    counts.pop("panoptic", None)
    return {"side": side, "instances": n, "cpu_s": cpu, "wall_s": wall, "peak_mb": peak.bytes() / 2**20, **counts}


def _child(case: str, **arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"case {case} {arguments} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# -- the report --------------------------------------------------------------------------------------------------------
def main() -> None:
    """Runs the cases one after the other and prints what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="time every instance of the official way")
    parser.add_argument("--large", action="store_true", help="also score a 1000^3 crop from disk")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(globals()[f"case_{options.case}"](**json.loads(options.arguments))))
        return

    small = {"side": 200, "n": 100, "radius": 20.0}
    ours = _child("ours", **small)
    official = _child("official", **small, few=0 if options.full else 4)
    note = "all instances" if options.full else f"extrapolated from {official['measured']} instances"
    ratio = official["cpu_s"] / ours["cpu_s"]
    print("200^3 voxels of 8 nm, 100 instances")
    print(f"  ours      {ours['cpu_s']:8.2f} CPU s   peak {ours['peak_mb']:6.0f} MB, {_times(ours)} the two volumes")
    print(f"  official  {official['cpu_s']:8.2f} CPU s   peak {official['peak_mb']:6.0f} MB   ({note})")
    print(f"  ratio     {ratio:8.0f}")
    if options.full:
        same = all(ours[k] == official[k] for k in ("tp", "fp", "fn", "n_hausdorff", "status"))
        difference = abs(ours["hausdorff_norm_sum"] - official["hausdorff_norm_sum"])
        print(f"  counts equal: {same}, difference of the distance sums: {difference:.1e}")
    large = _child("ours", side=400, n=500, radius=24.0)
    print("400^3 voxels of 8 nm, 500 instances")
    print(f"  ours      {large['cpu_s']:8.2f} CPU s   peak {large['peak_mb']:6.0f} MB, {_times(large)} the two volumes")
    print("cost against the total size of the instances (256^3 and 400^3 voxels)")
    curve = [
        _child("ours", side=side, n=n, radius=12.0) for side, n in ((256, 0), (256, 100), (256, 400), (256, 1600))
    ] + [_child("ours", side=400, n=n, radius=12.0) for n in (0, 400, 1600)]
    print("  side  instances  instance voxels     CPU s")
    for row in curve:
        print(f"  {row['side']:4d}  {row['instances']:9d}  {row['instance_voxels']:15,d}  {row['cpu_s']:8.3f}")
    numbers = {"ours_200": ours, "official_200": official, "ratio": ratio, "ours_400": large, "curve": curve}
    if options.large:
        big = _child("large", side=1000, n=4000, radius=30.0, memory_gb=3.0)
        numbers["large"] = big
        print("1000^3 voxels of 8 nm, 4,000 instances, from disk, 3 GB allowed")
        print(f"  ours      {big['cpu_s']:8.2f} CPU s   {big['wall_s']:.0f} s   peak {big['peak_mb']:6.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1))


def _times(row: dict[str, Any]) -> str:
    return f"{row['peak_mb'] / row['volumes_mb']:.1f} times"


if __name__ == "__main__":
    main()
