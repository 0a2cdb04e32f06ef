"""Throughput of the loader from S3. ``python benchmarks/bench_s3.py [--patches N] [--workers N] [--json FILE]``.

A root of one data set (8 nm raw with texture in 64^3 chunks, four crops of three classes) is read from the disk and
from a server on this machine: undisturbed, with 50 ms before each answer, and with one request in twenty failing as
well (500, 503, connection reset, body cut short). No crop cache, a chunk cache of 64 MiB a worker. Workers start by
forkserver.

Patches of 64^3 in batches of 2, random places, in one order for all: every case must give the same bytes.

The server and the proxy are one Python process on the same cores as the workers, so "S3" without delay measures them
as much as the loader; with the delay the waiting dominates, and that is what this is about.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the test kit's server

from connectomics.cellmap.annotation import Annotation
from connectomics.geometry import VoxelGrid
from connectomics.io.write import ensure_group, write_multiscale

SIDE, CROP, PATCH, BATCH = 320, 160, (64, 64, 64), 2
CLASSES = ("mito", "nuc", "er")
CASES: dict[str, dict[str, float] | None] = {
    "disk": None,
    "S3": {},
    "S3, 50 ms": {"latency": 0.05},
    "S3, 50 ms, 1 in 20 fails": {"latency": 0.05, "share": 1 / 20},
}


def make_root(folder: Path) -> None:
    """One data set with textured raw and four crops."""
    rng = np.random.default_rng(0)
    raw = np.clip(128 + 30 * rng.standard_normal((SIDE,) * 3, np.float32), 0, 255).astype(np.uint8)
    base = folder / "root" / "set-a" / "set-a.zarr" / "recon-1"
    ensure_group(base / "em")
    write_multiscale(base / "em" / "fibsem-uint8", raw, VoxelGrid((8.0,) * 3, (4.0,) * 3, raw.shape))
    for number in range(4):
        at = 4.0 + 8.0 * np.array([0, 160 * (number // 2), 160 * (number % 2)])
        for name in CLASSES:
            values = (rng.random((CROP,) * 3, np.float32) < 0.2).astype(np.uint8)
            group = base / "labels" / "groundtruth" / f"crop{number + 1}" / name
            ensure_group(group.parent)
            attrs = Annotation(name, "semantic", 0, None, {"absent": int((values == 0).sum())}).to_attrs()
            grid = VoxelGrid((8.0,) * 3, tuple(at), values.shape)
            write_multiscale(group, values, grid, kind="label", attrs=attrs)


def serve(folder: Path, faults: dict[str, float], pipe: Connection) -> None:
    """The server process: says its address, then what it has counted so far, until told None."""
    from tests.s3_server import FaultyProxy, FolderServer

    with FolderServer(folder) as server, FaultyProxy(server.endpoint, seed=7, **faults) as proxy:
        pipe.send(proxy.endpoint)
        while pipe.recv() is not None:
            pipe.send((proxy.requests, proxy.sent_bytes, proxy.failed.total()))
            proxy.reset()


def measure(root: str, patches: int, workers: int) -> tuple[float, float, float, str]:
    """Seconds to open the data set, until the first batch, and for the rest of an epoch; a hash of all its bytes."""
    from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset
    from connectomics.data.loader import PatchLoader
    from connectomics.data.patches import collate
    from connectomics.data.sampling import PatchSampler, SampledCrop

    begin = time.perf_counter()
    data = CellMapMultiClassDataset(root, None, None, CLASSES, "train", PATCH)
    crops = [SampledCrop(v.dataset, float(v.grid.size), {}) for v in data.volumes]
    sampler = PatchSampler(crops, patches, classes=CLASSES, sampling={"volume": 1.0})
    opened = time.perf_counter()
    digest, first = hashlib.sha256(), 0.0
    for batch in PatchLoader(data, sampler, batch_size=BATCH, collate=collate, workers=workers):
        first = first or time.perf_counter()
        for name in sorted(batch):
            digest.update(batch[name].numpy().tobytes())
    return opened - begin, first - opened, time.perf_counter() - first, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=120)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        make_root(Path(name))
        measure(f"{name}/root", 4, args.workers)  # compiled kernels and the page cache, for all cases alike
        for case, faults in CASES.items():
            requests = sent = failed = 0
            if faults is None:
                found = measure(f"{name}/root", args.patches, args.workers)
            else:
                pipe, far = spawn.Pipe()
                server = spawn.Process(target=serve, args=(Path(name), faults, far), daemon=True)
                server.start()
                os.environ["AWS_ENDPOINT_URL"] = pipe.recv()
                found = measure("s3://public/root", args.patches, args.workers)
                pipe.send("count")
                requests, sent, failed = pipe.recv()
                pipe.send(None)
                server.join(10)
            opened, first, rest, digest = found
            rate = (args.patches - BATCH) / rest
            rows.append(
                {
                    "case": case,
                    "patches/s": rate,
                    "MB/s of raw and codes": rate * 2 * np.prod(PATCH) / 1e6,
                    "open s": opened,
                    "first batch s": first,
                    "requests": requests,
                    "MB sent": sent / 1e6,
                    "failed": failed,
                    "same bytes": digest == (rows[0]["digest"] if rows else digest),
                    "digest": digest,
                }
            )
            print(
                "  ".join(
                    f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in list(rows[-1].items())[:-1]
                )
            )
    if not all(row["same bytes"] for row in rows):
        sys.exit("the patches differ between the cases")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
