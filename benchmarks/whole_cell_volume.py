"""Run a whole volume through predict, decode, measure and its coarser levels; compare memory, files and bytes.

    python benchmarks/whole_cell_volume.py [--shapes 512,512,512 1536,1024,1024] [--formats 0.5 0.4] [--places disk s3]
        [--steps predict pyramid components watershed mutex_watershed measure] [--workers 2] [--kills 20] [--out FOLDER]

The raw volume is a pattern of 160 voxels that repeats along each axis: balls of 9 to 12 voxels' radius, some of them
joined by a neck in pairs, and rods along x, with noise. It fills the first 480 voxels along each axis, a row along z
and one along x through the whole volume, and its last corner; the rest is of one gray value. A network of one layer
(3x3x3, set by hand) gives the probability of a class and three affinities. Each step is a separate process, the
command ``pytc``, on a disk and on an S3 server of this machine (`tests.s3_server`; its objects are files on the same
disk). The coarser levels of the probabilities are a separate step (the same command with ``output.pyramid=true``);
``decode`` writes those of the labels.

A row of the table: wall and CPU time of all processes; the peak of the resident memory of the main process, and of the
largest worker, above what its imports took, and in brackets the ratio to the first of ``--shapes``; files (on S3:
objects) and bytes of the output. ``voxels``: whether all decoded voxels and tables are those of the first format.
``files``: whether all chunks or shards, and tables, are byte by byte those of the first place with this format.

With ``--kills``, each step is repeated in another folder, killed so many times at random moments, and started
again (over, if it was done). ``killed`` says how many of the outputs that were completed have the files of the
undisturbed run, of how many, and how many kills there were. A first tiny volume, which is not reported, compiles the
kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the server of the tests

from connectomics.models import register_model
from tests.s3_server import BUCKET, KEYS, FolderServer
from tests.starter import Starter

ROOT = Path(__file__).resolve().parents[1]
Index = tuple[int, int, int]
PERIOD, CELL = 160, 32  # voxels
READ = 192  # voxels of a block that is read to compare, a multiple of the chunk
METHODS = {"components": "cc3d", "watershed": "watershed", "mutex_watershed": "mutex_watershed"}
STEPS = ("predict", "pyramid", *METHODS, "measure")
#: what a step imports anyway, before its memory counts; of several groups, a worker imports the first one only
IMPORTS = {
    "predict": "torch,connectomics.pipeline.predict,connectomics.lightning.checkpoints",
    "pyramid": "connectomics.tasks.pyramid;torch,connectomics.pipeline.predict,connectomics.lightning.checkpoints",
    "measure": "connectomics.pipeline.measure",
    **dict.fromkeys(METHODS, "scipy.ndimage,connectomics.pipeline.decode"),
}
RUN = """
import atexit, importlib, json, os, re, runpy, sys, time
file, groups, *words = sys.argv[1:]

def memory(what, pid="self"):
    try:
        with open(f"/proc/{pid}/status") as status:
            return int(re.search(what + r":\\s+(\\d+)", status.read())[1]) * 1024
    except (OSError, TypeError):
        return 0

held, workers = [], []
for names in groups.split(";"):
    for name in ("numba", "obstore", "tensorstore", *names.split(",")):
        importlib.import_module(name)
    held.append(memory("VmRSS"))
found = {"held": held, "workers": workers, "at": time.time()}

def write():
    with open(file, "w") as out:
        json.dump({**found, "main": memory("VmHWM")}, out)

from connectomics.tasks.supervise import Child
end = Child.end

def noted(child):
    workers.append(memory("VmHWM", child._process.pid))
    end(child)

Child.end = noted
atexit.register(write)
sys.argv = ["pytc", *words]
runpy.run_module("connectomics", run_name="__main__", alter_sys=True)
"""


def one_layer(in_channels: int, out_channels: int) -> Any:
    from torch import nn

    return nn.Conv3d(in_channels, out_channels, 3, padding=1)


register_model("one_layer", one_layer, "a single convolution")


# -- the volume and the network ----------------------------------------------------------------------------------------
def pattern() -> np.ndarray:
    """One period of the raw, uint8."""
    number = PERIOD // CELL
    raw = np.full((PERIOD,) * 3, 40, np.uint8)
    z, y, x = np.ogrid[tuple(slice(-CELL // 2, CELL // 2) for _ in range(3))]
    for k, j, i in np.ndindex((number,) * 3):
        cell = raw[tuple(slice(n * CELL, (n + 1) * CELL) for n in (k, j, i))]
        if k == j == number - 1:
            cell[np.broadcast_to(z * z + y * y < 25, cell.shape)] = 200  # a rod along x
            continue
        cell[z * z + y * y + x * x < (9 + (7 * k + 3 * j + i) % 4) ** 2] = 200
        if i < number - 1:  # half a neck to the neighbor; what the affinities separate is darker
            half = (x >= 0) if i % 2 == 0 else (x < 0)
            neck = (z * z + y * y < 16) & half & (cell < 100)
            cell[neck & (np.abs(x + 0.5) < CELL // 2 - 1)] = 200
            cell[neck & (np.abs(x + 0.5) > CELL // 2 - 1)] = 130
    noise = np.random.default_rng(0).integers(-6, 7, raw.shape)
    return (raw + noise).astype(np.uint8)


def write_raw(root: Path, shape: Index) -> None:
    """The raw of the data set ``cell`` at 8 nm, block by block."""
    from connectomics.geometry import VoxelGrid
    from connectomics.io.write import create_multiscale, ensure_group

    folder, tile = root / "cell" / "cell.zarr" / "recon-1" / "em", pattern()
    ensure_group(folder)
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), shape)
    (writer,) = create_multiscale(folder / "fibsem-uint8", [grid], np.uint8, chunks=(128,) * 3)
    for begin, block in grid.blocks((128, 256, 256)):
        places = [np.arange(b, b + n) for b, n in zip(begin, block.shape, strict=True)]
        z, y, x = np.ix_(*(place // PERIOD for place in places))
        far = [place >= n - PERIOD for place, n in zip(np.ix_(*places), shape, strict=True)]
        filled = (z < 3) & (y < 3) & (x < 3) | (y == 0) & ((x == 0) | (z == 0)) | far[0] & far[1] & far[2]
        writer.write(begin, np.where(filled, tile[np.ix_(*(place % PERIOD for place in places))], 40).astype(np.uint8))


def write_network(folder: Path, window: int) -> None:
    """``run.yaml`` and ``net.ckpt``: the class is where raw is above 80, two voxels are together if they sum to 280."""
    import torch

    from connectomics.config import RunConfig, config_to_dict, save_config
    from connectomics.config.schema import DataConfig, DatasetConfig, HeadConfig, ModelConfig
    from connectomics.lightning.checkpoints import CHECKPOINT_FORMAT, CHECKPOINT_KEY

    offsets = [[-8.0 * (axis == k) for axis in range(3)] for k in range(3)]
    config = RunConfig(
        name="whole-cell-volume",
        plugins=["whole_cell_volume"],
        dataset=DatasetConfig(data_root="data", classes=["mito"]),
        model=ModelConfig(
            architecture="one_layer",
            heads=[HeadConfig(kind="affinities", class_name="mito", offsets_nm=offsets)],
        ),
        data=DataConfig(
            patch_size=[window] * 3, normalization={"*": {"low": 0.0, "high": 255.0, "mean": 0.0, "std": 1.0}}
        ),
    )
    config.inference.overlap = 0.125
    weight, bias = torch.zeros(4, 1, 3, 3, 3), torch.tensor([-80 / 6, *[-280 / 16] * 3])
    weight[0, 0, 1, 1, 1] = 255 / 6
    for axis in range(3):
        before = [1, 1, 1]
        before[axis] = 0
        weight[axis + 1, 0, 1, 1, 1] = weight[axis + 1, 0, *before] = 255 / 16
    about = {
        "format": CHECKPOINT_FORMAT, "version": "0", "classes": ["mito"], "voxel_size": [8.0] * 3,
        "config": config_to_dict(config),
    }  # fmt: skip
    state = {"network.weight": weight, "network.bias": bias}
    torch.save({"state_dict": state, CHECKPOINT_KEY: about}, folder / "net.ckpt")
    save_config(config, folder / "run.yaml")


# -- one command -------------------------------------------------------------------------------------------------------
def measured(words: list[str], groups: str, folder: Path) -> dict[str, float]:
    """Run ``pytc`` with these words; what it took. MB are above the imports (`IMPORTS`)."""
    file = folder / "measured.json"
    begin = time.time()
    with (folder / "said.txt").open("w") as said:
        command = [sys.executable, "-c", RUN, str(file), groups, *words]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    end = time.time()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"pytc {' '.join(words)}:\n{(folder / 'said.txt').read_text()[-3000:]}")
    found = json.loads(file.read_text())
    return {
        "s": end - begin,
        "work s": end - found["at"],
        "cpu": usage.ru_utime + usage.ru_stime,
        "main": (found["main"] - found["held"][-1]) / 1e6,
        "worker": (max(found["workers"], default=found["held"][0]) - found["held"][0]) / 1e6,
        "imports": found["held"][-1] / 1e6,
    }


# -- what is compared --------------------------------------------------------------------------------------------------
def files_of(folder: Path) -> dict[str, str]:
    """A digest of each chunk or shard, table and description of an array below a folder, by its name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        of_array = path.name == ".zarray" or (path.name == "zarr.json" and re.fullmatch(r"s\d+", path.parent.name))
        if path.is_file() and (path.name.isdigit() or path.suffix == ".csv" or of_array):
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return found


def voxels_of(folder: Path) -> dict[str, str]:
    """A digest of the decoded voxels of each array, chunk by chunk, and of each table; read by zarr-python."""
    import zarr

    found = {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()[:32]
        for path in folder.rglob("*.csv")
    }
    for place in sorted(path for path in folder.rglob("s[0-9]*") if path.is_dir()):
        array = zarr.open_array(place, mode="r")
        digest = hashlib.blake2b(f"{array.shape} {array.dtype}".encode())
        for begin in np.ndindex(*(-(-n // READ) for n in array.shape)):
            digest.update(np.ascontiguousarray(array[tuple(slice(b * READ, (b + 1) * READ) for b in begin)]).data)
        found[str(place.relative_to(folder))] = digest.hexdigest()[:32]
    return found


# -- a volume ----------------------------------------------------------------------------------------------------------
@dataclass
class Bench:
    """Commands over one volume in one format, and what they gave.

    Attributes:
        folder: with ``run.yaml``, ``net.ckpt`` and the data root. store: where outputs lie as files.
        at: what the commands are told instead, the same place or its URL.
    """

    folder: Path
    store: Path
    at: str
    shape: Index
    format: str
    options: argparse.Namespace
    starter: Starter | None = None

    def words(self, step: str, out: str) -> list[str]:
        """The command of a step that writes to the folder ``out``."""
        edge, base = self.options.block, self.folder
        engine = f"engine.workers={self.options.workers}"
        how = [f"output.format={self.format}", f"output.chunk=[{','.join([str(self.options.chunk)] * 3)}]", engine]
        if self.format == "0.5":
            how.append(f"output.shard=[{edge},{edge},{edge}]")
        if step in ("predict", "pyramid"):
            box = f"cell:0,0,0:{','.join(str(8 * n) for n in self.shape)}"
            place = ["--checkpoint", f"{base}/net.ckpt", "--box", box, "--device", "cpu", "--out", f"{self.at}/{out}"]
            how += [f"dataset.data_root={base}/data", f"inference.block_size=[{edge},{edge},{edge}]"]
            how.append(f"output.pyramid={'true' if step == 'pyramid' else 'false'}")
            return ["predict", f"{base}/run.yaml", *place, *how]
        if step == "measure":
            return ["measure", f"{self.at}/components", "--out", f"{self.at}/{out}", engine]
        rule = [f"decoding.default.method={METHODS[step]}", "decoding.default.min_size_nm3=20000"]
        rule += ["decoding.blockwise_above=0", "output.pyramid=true"]
        return ["decode", f"{self.at}/predict", f"{self.at}/{out}", "--config", f"{base}/run.yaml", *rule, *how]

    def out(self, step: str) -> str:
        """The name of the output of a step."""
        return "predict" if step == "pyramid" else step

    def run(self, step: str) -> dict[str, Any]:
        """Do one step; return its row and the digests."""
        row: dict[str, Any] = measured(self.words(step, self.out(step)), IMPORTS[step], self.folder)
        place = self.store / self.out(step)
        sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
        row |= {"files": len(sizes), "MB": sum(sizes) / 1e6, "digests": files_of(place)}
        if self.options.kills:
            row["killed"] = self.killed(step, row)
        return row

    def killed(self, step: str, row: dict[str, Any]) -> str:
        """Kill a step at random moments; compare each output that is completed with the undisturbed one."""
        assert self.starter is not None
        words, place = ["pytc", *self.words(step, "killed")], self.store / "killed"
        before = self.store / "before"  # what the step starts from: finished probabilities without coarser levels
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
        chance, left, good, done = random.Random(f"{self.shape} {self.at} {step}"), self.options.kills, 0, 0
        while True:
            if step == "pyramid" and not place.exists():
                shutil.copytree(before, place)
            started = self.starter.start(words, environment)
            if left:
                end = time.monotonic() + row["work s"] * chance.random()
                if started.wait_for(partial(is_over, end), pause_s=0.05):
                    started.kill()
                    left -= 1
                    continue
            if started.wait() != 0:
                sys.exit(f"after {self.options.kills - left} kills: {' '.join(words)}\n{started.said[-3000:]}")
            done, good = done + 1, good + (files_of(place) == row["digests"])
            shutil.rmtree(place)
            if not left:
                return f"{good} of {done}, {self.options.kills} kills"


def is_over(end: float) -> bool:
    """Return whether this time (of `time.monotonic`) has passed."""
    return time.monotonic() > end


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as a bucket from another process; yields the address."""
    spawn = multiprocessing.get_context("spawn")
    pipe, far = spawn.Pipe()
    server = spawn.Process(target=serve, args=(folder, far), daemon=True)
    server.start()
    try:
        yield pipe.recv()
    finally:
        pipe.send(None)
        server.join(10)


def serve(folder: Path, pipe: Connection) -> None:
    """Be the server, until told to end."""
    with FolderServer(folder, writable=True) as server:
        pipe.send(server.endpoint)
        pipe.recv()


def rows_of(folder: Path, shape: Index, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all steps over one volume, in each format and place; yields a row for each."""
    (folder / "data").mkdir(parents=True)
    write_raw(folder / "data", shape)
    write_network(folder, options.window)
    voxels, files = dict[str, dict[str, str]](), dict[tuple[str, str], dict[str, str]]()
    for place, form in ((place, form) for place in options.places for form in options.formats):
        with ExitStack() as stack:
            store = folder / place
            store.mkdir()
            at = str(store)
            if place == "s3":
                os.environ.update({**KEYS, "AWS_ENDPOINT_URL": stack.enter_context(served(store))})
                at = f"s3://{BUCKET}"
            said = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            starter = stack.enter_context(Starter(said)) if options.kills else None
            bench = Bench(folder, store, at, shape, form, options, starter)
            for step in options.steps:
                if step == "pyramid" and options.kills:
                    shutil.copytree(store / "predict", store / "before")
                row = {"volume": "x".join(map(str, shape)), "place": place, "format": form, "step": step}
                row |= bench.run(step)
                digests = row.pop("digests")
                row["files equal"] = files.setdefault((form, step), digests) == digests
                if place == options.places[0] and len(options.formats) > 1:  # elsewhere the files are compared
                    digests = voxels_of(store / bench.out(step))
                    row["voxels equal"] = voxels.setdefault(step, digests) == digests
                yield row
                shutil.rmtree(store / "before", ignore_errors=True)
                if step in ("watershed", "mutex_watershed"):
                    shutil.rmtree(store / step)
            shutil.rmtree(store)


def text_of(row: dict[str, Any], first: dict[str, Any]) -> str:
    """A row of the table; ``first``: the same of the first volume."""
    cells = [row["volume"], row["place"], row["format"], row["step"], f"{row['s']:.0f}", f"{row['cpu']:.0f}"]
    for name in ("main", "worker"):
        ratio = f" ({row[name] / first[name]:.2f})" if first is not row and first[name] else ""
        cells.append(f"{row[name]:.0f}{ratio}" if row[name] else "")
    cells += [f"{row['files']:,}", f"{row['MB']:,.0f}"]
    answers = {True: "equal", False: "**differ**"}
    cells += [answers.get(row.get(f"{what} equal"), "") for what in ("voxels", "files")]
    return f"| {' | '.join([*cells, row.get('killed', '')])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512,512,512", "1536,1024,1024"], help="voxels, z,y,x")
    parser.add_argument("--formats", nargs="+", choices=("0.4", "0.5"), default=["0.4", "0.5"])
    parser.add_argument("--places", nargs="+", choices=("disk", "s3"), default=["disk", "s3"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--block", type=int, default=192, help="edge of a block and of a shard, voxels")
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk, voxels")
    parser.add_argument("--window", type=int, default=112, help="edge of a window of the network, voxels")
    parser.add_argument("--workers", type=int, default=2, help="worker processes; 1: the main process does all")
    parser.add_argument("--kills", type=int, default=0, help="how often to kill each step")
    parser.add_argument("--cold", action="store_true", help="leave out the tiny volume that compiles the kernels")
    parser.add_argument("--out", type=Path, help="an empty folder; default: a temporary one")
    parser.add_argument("--json", type=Path, help="a file for the rows; those that it has are used for the ratios")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    shapes = [tuple(int(n) for n in text.split(",")) for text in options.shapes]
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    print("| volume | place | format | step | s | CPU s | main MB | worker MB | files | MB | voxels | files | killed |")
    print(f"|{' --- |' * 13}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        base = options.out or Path(temporary)
        if math.prod(shapes[0]) > 128**3 and not options.cold:
            once = argparse.Namespace(**{**vars(options), "kills": 0, "places": ["disk"]})
            list(rows_of(base / "warm", (64, 64, 64), once))
        for number, (z, y, x) in enumerate(shapes):
            for row in rows_of(base / str(number), (z, y, x), options):
                same = [r for r in known if all(r[key] == row[key] for key in ("place", "format", "step"))]
                known.append(row)
                print(text_of(row, (same or [row])[0]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(known, indent=1))
            shutil.rmtree(base / str(number))
    if not all(row.get("voxels equal", True) and row["files equal"] for row in known):
        sys.exit("voxels or files differ")


if __name__ == "__main__":
    main()
