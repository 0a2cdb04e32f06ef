"""Time sections and strokes of `pytc annotate` over HTTP.

    python benchmarks/bench_annotate.py --side 1024

A new crop of 64 sections in raw of noise (64^3 chunks), one semantic and one instance class. Sections are asked for as
the page does: raw and labels, the first time (from disk) and the next one (decoded chunks are kept). Numbers are
ms of wall time, and of CPU time of server and client, which counts on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

import connectomics as cx
from connectomics.geometry import VoxelGrid
from connectomics.io.write import ensure_group, write_multiscale

DEPTH = 64


def milliseconds(address: str, body: bytes | None = None) -> tuple[float, float]:
    """Wall and CPU time of one request, with its whole answer."""
    parts = urlsplit(address)
    request = urllib.request.Request(address, body, {"Origin": f"{parts.scheme}://{parts.netloc}"})
    begin, used = time.perf_counter(), time.process_time()
    with urllib.request.urlopen(request) as reply:
        reply.read()
    return round(1000 * (time.perf_counter() - begin), 1), round(1000 * (time.process_time() - used), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    side = parser.parse_args().side
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "noise/noise.zarr/recon-1/em/fibsem-uint8"
        ensure_group(place.parent)
        shape = (DEPTH, side, side)
        raw = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        write_multiscale(place, raw, VoxelGrid((8.0,) * 3, (4.0,) * 3, shape))
        ensure_group(place.parents[1] / "labels/groundtruth")
        box = f"noise:0,0,0:{8 * DEPTH},{8 * side},{8 * side}"
        with cx.annotate(folder, crop=1, box=box, classes=["er", "mito"]) as drawing:
            found: dict[str, object] = {"side": side}
            for z, name in ((30, "first"), (31, "next")):
                for part in ("raw", "labels/er", "labels/mito"):
                    found[f"{name} section, {part}"] = milliseconds(f"{drawing.url}{part}/{z}")
            for width in (64, side):
                for part, dtype in (("er", np.uint8), ("mito", np.uint32)):
                    address = f"{drawing.url}labels/{part}/30?y=0&x=0&height={width}&width={width}"
                    body = np.ones((width, width), dtype).tobytes()
                    found[f"stroke of {width} squared, {part}"] = milliseconds(address, body)
            for part in ("er", "mito"):
                found[f"drawn section, labels/{part}"] = milliseconds(f"{drawing.url}labels/{part}/30")
            begin = time.perf_counter()
        found["closing"] = round(1000 * (time.perf_counter() - begin), 1)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
