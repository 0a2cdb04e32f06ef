"""How many labels active learning saves: rounds of `pytc propose`, with an annotated volume as the oracle.

Each seed begins with the same few boxes for all methods. Then, round by round, a method proposes further boxes, the
stored truth replaces the prediction in them, ``pytc ingest --proposals`` takes them, and the network is trained further
from the weights of the round before, as a person would work (docs/active-learning.md). All methods have the same number
of boxes and the same processor time in each round. The end of the volume validates and is never proposed.

    python benchmarks/active_learning.py tutorials/lucchi.yaml data --dataset lucchi-train --class mito --out active

writes ``results.csv`` (method, seed, boxes, minutes, IoU: mean and of each class) and prints its table. After an
interruption the same command goes on; other options need another folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import connectomics as cx
from connectomics.cellmap.catalog import LabelArray
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline import proposals
from connectomics.pipeline.runs import open_run

VALIDATION = "crop1000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration, such as tutorials/lucchi.yaml")
    parser.add_argument("root", type=Path, help="data root with the annotated volume")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--crop", default="crop1")
    parser.add_argument("--class", dest="names", nargs="+", required=True, help="results are the mean of these")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["random", "uncertainty"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--boxes", type=int, nargs="+", default=[4, 10, 25], help="annotated boxes in each round")
    parser.add_argument("--size", type=int, nargs=3, default=[1, 256, 256], help="of a box, voxels z y x")
    parser.add_argument("--validate", type=int, default=40, help="sections at the end of the volume that validate")
    parser.add_argument("--minutes", type=float, default=4.0, help="processor time of each round")
    parser.add_argument("overrides", nargs="*", help="further settings, key=value")
    study = Study(parser.parse_intermixed_args())
    for seed in study.options.seeds:
        for method in study.options.methods:
            study.rounds(method, seed)
    print(study.table())


class Study:
    """Rounds of all methods; what is done already is not done again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        asked = {name: value for name, value in vars(options).items() if name not in ("out", "methods", "seeds")}
        text, file = json.dumps(asked, default=str), options.out / "options.json"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            sys.exit(f"{options.out} holds rounds of other options, {file.read_text()}; give another --out")
        file.write_text(text, encoding="utf-8")
        catalog = cx.open_root(options.root)
        self.raw = Path(catalog.raw_location(options.dataset))
        labels = catalog.crop(options.dataset, options.crop).labels
        self.truth: dict[str, LabelArray] = {name: labels[name] for name in options.names}
        grid = self.truth[options.names[0]].grid
        sections = grid.shape[0] - options.validate
        self.open, self.held = (
            grid.crop((first, 0, 0), (number, *grid.shape[1:]))
            for first, number in ((0, sections), (sections, options.validate))
        )
        self.results = options.out / "results.csv"

    def rounds(self, method: str, seed: int) -> None:
        """Annotate, train, propose, and again, in a data root that holds no more than the method has asked for."""
        place = self.options.out / f"{method}-{seed}"
        root, before = place / "data", self.options.out / f"first-{seed}"
        if not root.exists():
            self.begin(root, seed)
        for number, boxes in enumerate(self.options.boxes):
            folder = place / f"round-{number}" if number else before  # the first round is the same for all methods
            if number and not (self.known(method, seed, boxes) or has_finished(folder)):
                self.annotate(place, root, before, method, seed, boxes - self.options.boxes[number - 1])
            if not self.known(method, seed, boxes):
                if not has_finished(folder):
                    self.train(folder, root, before if number else None, seed)
                self.record(method, seed, boxes, folder)
            before = folder

    def begin(self, root: Path, seed: int) -> None:
        """Make a data root with the raw, the validation crop, and the first boxes, drawn at random."""
        partial = root.with_name("partial")
        em = partial / self.options.dataset / f"{self.options.dataset}.zarr" / "recon-1" / "em"
        em.mkdir(parents=True, exist_ok=True)
        if not (em / self.raw.name).is_symlink():
            (em / self.raw.name).symlink_to(self.raw.resolve())
        size = np.array(self.options.size)
        lattice = np.array(list(np.ndindex(*(self.open.shape // size)))) * size
        chosen = np.random.default_rng(seed).permutation(len(lattice))[: self.options.boxes[0]]
        self.ingest(partial, VALIDATION, self.held)
        for number, first in enumerate(lattice[chosen], start=1):
            self.ingest(partial, f"crop{number}", self.open.crop(first, size))
        partial.rename(root)

    def ingest(self, root: Path, crop: str, grid: VoxelGrid) -> None:
        """Import the truth of a box as a crop."""
        files = {name: root / f"{crop}-{name}.npy" for name in self.truth}
        for name, file in files.items():
            np.save(file, self.labels(name, grid))
        labels = {f"{name}:semantic": str(file) for name, file in files.items()}
        begin = np.subtract(grid.box.begin, Multiscale.open(self.raw).grid.box.begin)
        cx.ingest(root, self.options.dataset, labels=labels, crop=crop, voxel_size=grid.voxel_size, begin=list(begin),
                  unknown=proposals.UNKNOWN, overwrite=True)  # fmt: skip
        for file in files.values():
            file.unlink()

    def labels(self, name: str, grid: VoxelGrid) -> np.ndarray:
        """The truth of a class in a box, (D, H, W) uint8; 255: unknown."""
        truth = self.truth[name]
        first, part = truth.grid.part(grid.box)
        present, known = truth.annotation.decode(truth.read_stored(first, part.shape))
        return np.where(known, present, proposals.UNKNOWN).astype(np.uint8)

    def annotate(self, place: Path, root: Path, run: Path, method: str, seed: int, budget: int) -> None:
        """Propose boxes, correct their labels as the oracle, and import them."""
        folder = place / f"proposals-{run.name}"
        if not (folder / proposals.TABLE).exists():
            box = ":".join(",".join(map(repr, face)) for face in (self.open.box.begin, self.open.box.end))
            size = ",".join(map(str, self.options.size))
            pytc("propose", run, root, "--out", folder, "--budget", budget, "--size", size, "--method", method,
                 "--box", f"{self.options.dataset}:{box}", "--seed", seed, "inference.tta=none")  # fmt: skip
        rows = proposals.read_table(folder)
        if len(rows) != budget:
            sys.exit(f"{folder} has {len(rows)} boxes, {budget} were asked for: no more are free; give fewer --boxes")
        for row in rows:
            shutil.rmtree(row.file(folder, proposals.MAP, "zarr").parent, ignore_errors=True)
            proposals.write_labels(folder, row, {name: self.labels(name, row.grid) for name in self.truth}, "zarr")
        cx.ingest(root, proposals=folder, done=[row.rank for row in rows], overwrite=True)

    def train(self, folder: Path, root: Path, before: Path | None, seed: int) -> None:
        """Train from the weights of the round before, or from none."""
        split = root.with_name("split.yaml")
        crops = [f"{self.options.dataset}/{name}" for name in cx.open_root(root).crop_names(self.options.dataset)]
        held = f"{self.options.dataset}/{VALIDATION}"
        lines = ["train:", *(f"  - {crop}" for crop in crops if crop != held), "val:", f"  - {held}"]
        split.write_text("\n".join(lines) + "\n", encoding="utf-8")
        weights = [] if before is None else [f"model.weights={before}"]
        pytc("train", self.options.config, "--run-dir", folder, "--resume", f"dataset.data_root={root}",
             f"dataset.split_file={split}", f"training.max_cpu_minutes={self.options.minutes}", f"system.seed={seed}",
             *weights, *self.options.overrides)  # fmt: skip

    # -- results -------------------------------------------------------------------------------------------------------
    def rows(self) -> list[dict[str, str]]:
        """The results so far."""
        if not self.results.exists():
            return []
        with self.results.open(newline="", encoding="utf-8") as table:
            return list(csv.DictReader(table))

    def known(self, method: str, seed: int, boxes: int) -> bool:
        """Whether this round has its result."""
        return any((r["method"], r["seed"], r["boxes"]) == (method, str(seed), str(boxes)) for r in self.rows())

    def record(self, method: str, seed: int, boxes: int, run: Path) -> None:
        """Add the score that the last validation of a run gave."""
        scores = [open_run(run).metrics.get(f"val/{name}/iou") for name in self.truth]
        if None in scores:
            sys.exit(f"{run} ended before it was validated; give more --minutes, or training.val_every_n_epochs=1")
        new = not self.results.exists()
        with self.results.open("a", newline="", encoding="utf-8") as table:
            writer = csv.writer(table)
            if new:
                writer.writerow(["method", "seed", "boxes", "minutes", "iou", *self.truth])
            numbers = [f"{score:.4f}" for score in (np.mean(scores), *scores)]
            writer.writerow([method, seed, boxes, self.options.minutes, *numbers])

    def table(self) -> str:
        """Mean IoU and the values of all seeds, by method and number of boxes."""
        found = defaultdict[tuple[str, int], list[float]](list)
        for row in self.rows():
            found[row["method"], int(row["boxes"])].append(float(row["iou"]))
        lines = ["| method | boxes | IoU (mean) | of the seeds |", "| --- | --- | --- | --- |"]
        for (method, boxes), values in sorted(found.items()):
            each = ", ".join(f"{value:.3f}" for value in values)
            lines.append(f"| {method} | {boxes} | {np.mean(values):.3f} | {each} |")
        return "\n".join(lines)


def has_finished(run: Path) -> bool:
    """Whether a training has come to its end."""
    return (run / "state.json").exists() and open_run(run).state.name == "finished"


def pytc(*words: object) -> None:
    """Run a command of this package."""
    subprocess.run([sys.executable, "-m", "connectomics", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
