"""Commands that write, what they need, and what may happen to them on the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.config import save_config
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.cli.small_way import config_of
from tests.starter import Started, Starter

EDGE = 48  # voxels of raw along each axis
_ID = re.compile(rb'"id": "[0-9a-f]{32}"')


@dataclass(frozen=True)
class Verb:
    """A command that writes.

    Attributes:
        words: with {base} for the folder of inputs and {out} for that of outputs.
        reads: what it reads, below the base. damaged: a file of that, whose damage must be noticed.
        writes: a place below the output where a file or folder of somebody else would be in the way.
    """

    words: str
    reads: str
    damaged: str
    writes: str

    @property
    def is_task(self) -> bool:
        """Whether it works block by block and knows what its output was made from."""
        return self.words.split()[0] in ("predict", "decode", "measure", "mesh")

    def command(self, base: Path, out: Path) -> list[str]:
        return ["pytc", *(word.format(base=base, out=out) for word in self.words.split())]


VERBS = {
    "predict": Verb(
        "predict {base}/run.yaml --checkpoint {base}/run/checkpoints/last.ckpt --out {out} --device cpu "
        "--box set-a:0,0,0:384,384,384 dataset.data_root={base}/root",
        "root", "root/set-a/set-a.zarr/recon-1/em/fibsem-uint8/s0/0/0/0",
        "set-a.zarr/box_0_0_0_384_384_384/notes.txt",
    ),
    "decode": Verb(
        "decode {base}/predictions {out} decoding.default.threshold=0.3 decoding.blockwise_above=1000",
        "predictions", "predictions/set-a.zarr/crop1/mito/s0/0/0/0", "set-a.zarr/crop1/mito/notes.txt",
    ),
    "measure": Verb(
        "measure {base}/labels --out {out} --contact mito:er:30",
        "labels", "labels/set-a.zarr/crop1/mito/s0/0/0/0", "mito.csv",
    ),
    "mesh": Verb(
        "mesh {base}/labels {out} --class mito", "labels", "labels/set-a.zarr/crop1/mito/s0/0/0/0",
        "set-a/crop1/mito/notes.txt",
    ),
    "export": Verb(
        "export {base}/labels {out}/submission.zip --crops {base}/table.csv",
        "labels", "labels/set-a.zarr/crop1/mito/s0/0/0/0", "submission.zip",
    ),
    "ingest": Verb(
        "ingest {out} --dataset mine --raw {base}/raw.npy --voxel-size 8", "raw.npy", "raw.npy",
        "mine/mine.zarr/recon-1/em/fibsem-uint8/notes.txt",
    ),
    "fetch": Verb(
        "fetch {out} --from s3://public --dataset set-a", "root",
        "root/set-a/set-a.zarr/recon-1/labels/groundtruth/crop2/mito/s0/0/0/0",
        "set-a/set-a.zarr/recon-1/em/fibsem-uint8/s0/.zarray",
    ),
    "train": Verb(
        "train {base}/run.yaml --run-dir {out} --resume training.max_epochs=3 dataset.data_root={base}/root "
        "data.cache_dir={base}/cache-{out.name}",
        "root", "root/set-a/set-a.zarr/recon-1/em/fibsem-uint8/s0/0/0/0", "config.yaml",
    ),
}  # fmt: skip


def make_inputs(base: Path, starter: Starter) -> None:
    """Raw, two crops, a network of one epoch, its probabilities, labels, a crop table."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 255, (EDGE,) * 3, dtype=np.uint8)
    write_raw(base / "root", "set-a", raw, grid_of((EDGE,) * 3))
    np.save(base / "raw.npy", raw.repeat(2, 0))
    rows = []
    for number, start in ((1, 0.0), (2, 192.0)):
        grid = grid_of((24, 24, 24), 8, start)
        ids = np.zeros((24, 24, 24), np.uint8)
        for n, corner in enumerate(np.ndindex(2, 2, 2), start=1):
            z, y, x = (12 * c + 2 for c in corner)
            ids[z : z + 7, y : y + 7, x : x + 7] = n
        for name, values, kind in (("mito", ids, "instance"), ("er", (ids % 2).astype(np.uint8), "")):
            write_label(base / "root", "set-a", f"crop{number}", name, values, grid, kind=kind)
            rows.append(TableEntry(number, "set-a", name, grid))
    CropTable(tuple(rows)).save(base / "table.csv")
    config = config_of(base / "root", base / "cache")
    config.inference.block_size = [16, 16, 16]
    save_config(config, base / "run.yaml")
    for words in (
        f"train {base}/run.yaml --run-dir {base}/run",
        f"predict {base}/run.yaml --checkpoint {base}/run/checkpoints/last.ckpt --out {base}/predictions --device cpu",
        f"decode {base}/predictions {base}/labels decoding.default.threshold=0.3 decoding.blockwise_above=1000",
    ):
        started = starter.run(["pytc", *words.split()])
        assert started.status == 0, started.said


class Whole:
    """The inputs of all verbs, to be read only, and what each verb gives that nothing happens to."""

    def __init__(self, folder: Path, starter: Starter) -> None:
        self._folder, self._starter, self.inputs = folder, starter, folder / "inputs"
        self._found: dict[str, tuple[dict[str, bytes], int]] = {}
        (self.inputs / "root").mkdir(parents=True)
        make_inputs(self.inputs, starter)

    def result(self, verb: str, *more: str) -> tuple[dict[str, bytes], int]:
        """Its results, and how many files it writes; ``more`` words change the command."""
        name = " ".join((verb, *more))
        if name not in self._found:
            out = self._folder / str(len(self._found))
            started = self._starter.run([*VERBS[verb].command(self.inputs, out), *more])
            assert started.status == 0, started.said
            self._found[name] = results(out), files_in(out)
            assert len(self._found[name][0]) > 0
        return self._found[name]


# -- what is there -----------------------------------------------------------------------------------------------------
def results(out: Path) -> dict[str, bytes]:
    """The content of every finished file: voxels, tables, surfaces, weights; not what names places, times or ids."""
    found: dict[str, bytes] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found |= {f"{name}/{n}": _ID.sub(b"", archive.read(n)) for n in archive.namelist()}
        elif path.suffix == ".ckpt":
            if path.name == "last.ckpt":
                found[name] = _weights(path)
        elif _is_result(path) and not any(part.startswith(".") for part in Path(name).parts[:-1]):
            found[name] = path.read_bytes()
    return found


def _is_result(path: Path) -> bool:
    """Whether it is a chunk, what describes an array, a table or a surface; a run's log of metrics holds times."""
    return (path.suffix in (".csv", ".ply") and path.name != "metrics.csv") or path.name in (".zarray", *"0123456789")


def _weights(path: Path) -> bytes:
    import torch

    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    return b"".join(value.contiguous().numpy().tobytes() for _, value in sorted(state.items()))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_in(folder: Path) -> int:
    """Files below a folder that others change meanwhile."""
    return sum(len(names) for _, _, names in os.walk(folder))


def wait_for_files(started: Started, folder: Path, number: int) -> bool:
    """Until the command has left so many files, or has ended; whether it still runs."""
    return started.wait_for(lambda: files_in(folder) >= number)


# -- what happens ------------------------------------------------------------------------------------------------------
@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None] | None]:
    """A file system of ``size`` bytes at ``folder``; yields what changes its size, None if nothing can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder)]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(kind, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def no_permission(folder: Path) -> Iterator[bool]:
    """Nothing can be added to folders below ``folder``, nor removed; yields False if root cannot be kept from it."""
    folders = [Path(place) for place, _, _ in os.walk(folder)]
    if os.getuid() != 0:
        modes = [(place, place.stat().st_mode) for place in folders if place.exists()]
        for place, _ in modes:
            place.chmod(0o555)
        try:
            yield True
        finally:
            for place, mode in modes:
                place.chmod(mode)
        return
    # permissions do not hold root back, attributes of the file system do
    chattr = ["chattr", "-f"]
    able = shutil.which("chattr") is not None and subprocess.run([*chattr, "+i", str(folder)]).returncode == 0
    try:
        if able:
            subprocess.run([*chattr, "+i", *map(str, folders)])
        yield able
    finally:
        if able:
            subprocess.run([*chattr, "-R", "-i", str(folder)], check=True)
