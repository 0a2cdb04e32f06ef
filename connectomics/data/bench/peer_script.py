"""Runs inside the peer's environment, so it imports nothing of this project: the official loader, cellmap-data.

Reads one JSON object from stdin: ``entries`` ([{"raw": path, "gt": "path/[a,b]"}]), ``classes``, ``patch_size`` and
``resolution`` (z y x, voxels and nm), ``spatial`` (its ``spatial_transforms`` or null), ``batch_size``, ``seed``,
``threads`` (of torch; null leaves the default). Then each further line is a number of batches to load; for each line
one JSON object goes to stdout.

The loader is built as its own documentation says (`CellMapDataSplit`, `CellMapDataLoader`, its default value
transforms, its class-balanced sampler), in this process, without workers.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any


def declare_operators(torch: Any) -> Any:
    """torchvision looks for its compiled operators, which a CPU build of torch may not have; none of them is called."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError as error:
            if "multiple" not in str(error) and "already" not in str(error):
                raise
    return library


def build(spec: dict[str, Any], torch: Any) -> tuple[Any, Iterator[dict[str, Any]]]:
    """The combined data set of all crops and an endless iterator over batches."""
    from cellmap_data import CellMapDataLoader, CellMapDataSplit

    torch.manual_seed(spec["seed"])
    array = {"shape": tuple(spec["patch_size"]), "scale": tuple(spec["resolution"])}
    split = CellMapDataSplit(
        input_arrays={"input": array},
        target_arrays={"output": array},
        classes=spec["classes"],
        pad=True,  # else it leaves out every crop that is smaller than the patch
        dataset_dict={"train": spec["entries"], "validate": []},
        spatial_transforms=spec["spatial"],
    )
    if not split.train_datasets:
        raise SystemExit("it takes none of the crops (they are smaller than the patch); lower data.patch_size")
    data = split.train_datasets_combined
    loader = CellMapDataLoader(
        data, batch_size=spec["batch_size"], num_workers=0, weighted_sampler=True, is_train=True,
        iterations_per_epoch=10**9,
    )  # fmt: skip
    return data, iter(loader)


def peak_kb() -> int:
    """The most memory that this process held, kB; what `resource` says counts, on Linux, the one that started it."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Answer one line with one line until there are no more."""
    spec = json.loads(sys.stdin.readline())
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever it prints is no answer
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    held = declare_operators(torch)
    from importlib.metadata import version

    data, batches = build(spec, torch)
    print(json.dumps({"version": version("cellmap-data"), "crops": len(data.datasets)}), file=answer, flush=True)
    for line in sys.stdin:
        count = int(line)
        cpu, wall = time.process_time(), time.perf_counter()
        nbytes = 0
        for _ in range(count):
            batch = next(batches)
            nbytes = sum(v.numel() * v.element_size() for v in batch.values() if isinstance(v, torch.Tensor))
        found = {
            "cpu_s": (time.process_time() - cpu) / count / spec["batch_size"],
            "wall_s": (time.perf_counter() - wall) / count / spec["batch_size"],
            "peak_mb": peak_kb() / 1024,
            "bytes": nbytes // spec["batch_size"],
            "shapes": {k: list(v.shape) for k, v in batch.items() if isinstance(v, torch.Tensor)},
        }
        print(json.dumps(found), file=answer, flush=True)
    del held


if __name__ == "__main__":
    main()
