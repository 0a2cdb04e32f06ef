"""Export every array of the challenge's crop table from synthetic predictions: time, peak memory, size of the zip.

    python benchmarks/bench_export.py --scale 0.5

The predictions are what a run at 8 nm leaves: labels (ids) for instance classes and probabilities for semantic ones, at
8 nm or at the crop's own voxel size where that is coarser, with blobs in about half of the volume. ``--scale`` shrinks
every axis of every array; 1 is the real table, 88 thousand million voxels.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.geometry import VoxelGrid
from connectomics.io.write import create_multiscale, ensure_group

TILE = 128
MODEL_NM = 8.0


def scaled_table(scale: float) -> CropTable:
    """The challenge's table with every axis shortened."""
    rows = []
    for e in CropTable.challenge():
        shape = [max(8, round(n * scale)) for n in e.grid.shape]
        rows.append(TableEntry(e.crop, e.dataset, e.class_name, e.grid.crop((0, 0, 0), shape)))
    return CropTable(tuple(rows))


def tiles(seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint32], int]:
    """A tile of smooth probabilities, a tenth of them above one half, and its objects."""
    import cc3d
    from scipy import ndimage

    noise = np.random.default_rng(seed).standard_normal((TILE, TILE, TILE)).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, 5, mode="wrap")
    smooth = (smooth - np.quantile(smooth, 0.9)) / smooth.std()
    probability = np.clip(np.rint(127.5 + 90 * smooth), 0, 255).astype(np.uint8)
    ids, number = cc3d.connected_components((probability > 127).astype(np.uint8), return_N=True)
    return probability, ids.astype(np.uint32), int(number)


def write_predictions(root: Path, table: CropTable) -> int:
    """One array of each kind for every grid, linked under the names of all classes; returns the voxels written."""
    probability, ids, number = tiles()
    made: dict[tuple[int, bool], Path] = {}
    voxels = 0
    for e in table:
        key = (e.crop, is_instance_class(e.class_name))
        group = root / f"{e.dataset}.zarr" / e.crop_name
        if key not in made:
            size = [max(MODEL_NM, v) for v in e.grid.voxel_size]
            grid = VoxelGrid.covering(e.grid.box, size)
            kind = {"artefact": "labels", "kind": "instance"} if key[1] else {"artefact": "probability"}
            path = root / "made" / f"{e.crop}_{key[1]}"
            if key[1]:
                kind["objects"] = number * (1 + sum(1 for _ in grid.blocks((TILE,) * 3)))  # type: ignore[assignment]
            attrs = {"connectomics": {**kind, "complete": True}}
            (writer,) = create_multiscale(path, [grid], np.uint32 if key[1] else np.uint8, attrs=attrs)
            for n, (begin, block) in enumerate(grid.blocks((TILE,) * 3)):
                if n % 2 == 0:
                    z, y, x = (slice(0, s) for s in block.shape)
                    tile = ids[z, y, x]
                    writer.write(begin, np.where(tile > 0, tile + np.uint32(n * number), 0) if key[1] else
                                 probability[z, y, x])  # fmt: skip
                elif not key[1]:
                    writer.write(begin, np.zeros(block.shape, np.uint8))
            voxels += grid.size
            made[key] = path
        ensure_group(group)
        (group / e.class_name).symlink_to(made[key])
    return voxels


def export(root: str, target: str, scale: float, validate: bool, queue: Any) -> None:
    """Run in a process of its own, so that its peak memory is the export's."""
    from connectomics.submission import export_submission

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    result = export_submission(root, target, crops=scaled_table(scale), strict=True, validate=validate)
    queue.put(
        {
            "arrays": len(result.written),
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "of_which_imports_mb": round(before / 1024),
            "zip_mb": round(Path(target).stat().st_size / 1e6, 1),
            "errors": sum(f.severity == "error" for f in result.findings),
            "warnings": sum(f.severity == "warning" for f in result.findings),
        }
    )


def main() -> None:
    """Make the predictions, export them, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.25, help="length of every axis, 1 is the real table")
    parser.add_argument("--validate", action="store_true", help="also check what was written, as export does")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root, target = Path(folder, "predictions"), Path(folder, "submission.zip")
        table = scaled_table(options.scale)
        source_voxels = write_predictions(root, table)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=export, args=(str(root), str(target), options.scale, options.validate, queue))
        process.start()
        found = queue.get()
        process.join()
        found["scale"] = options.scale
        found["voxels_written_e9"] = round(sum(e.grid.size for e in table) / 1e9, 2)
        found["distinct_source_voxels_e9"] = round(source_voxels / 1e9, 3)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
