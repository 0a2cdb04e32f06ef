"""The official loader, cellmap-data, on the same data: its CPU seconds a patch beside ours, in interleaved rounds.

What is compared: from the data root to a batch of one patch in the main process, without workers, one torch thread on
either side, after a warm-up. Theirs: image float32 and labels of all classes float32 (NaN where unknown). Ours: image
float32 and labels of all classes as packed codes with their tables, which is what a training step takes; ``dense`` adds
unpacking them to float32 labels and bool ``known`` on the CPU, which no training step does. Ours reads from the crop
cache, as a run does after its first minutes; the time to fill it is given beside it. Theirs reads Zarr each time: it
has no cache. Positions differ: each draws its own, balanced by class.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path
from types import TracebackType
from typing import Any

from connectomics.cellmap.catalog import Crop
from connectomics.data.bench.peer_environment import PeerError
from connectomics.io.location import is_s3

_SCRIPT = Path(__file__).with_name("peer_script.py")

#: Flips and a rotation by any angle about every axis in every patch: the transforms of the challenge's 3D example for
#: cellmap-data, and the same for ours.
PEER_AUGMENTED: dict[str, Any] = {
    "mirror": {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}},
    "rotate": {"axes": {"x": [-180, 180], "y": [-180, 180], "z": [-180, 180]}},
}
OUR_AUGMENTED: dict[str, Any] = {
    **{f"RandFlipd_{a + 2}": {"keys": ["image", "label"], "prob": 0.5, "spatial_axis": a} for a in range(3)},
    "RandAffined": {
        "keys": ["image", "label"],
        "prob": 1.0,
        "rotate_range": [pi, pi, pi],
        "mode": ["bilinear", "nearest"],
    },
}


@dataclass(frozen=True)
class PeerRound:
    """CPU seconds a patch in one round: theirs, ours, and ours with labels unpacked to dense arrays."""

    peer: float
    ours: float
    ours_dense: float


@dataclass(frozen=True)
class Comparison:
    """Theirs against ours for one kind of patch.

    Attributes:
        augmented: whether with flips and rotation. version: of cellmap-data. rounds: what was measured.
        peer_mb: its peak memory (resident). peer_bytes: of one of its patches.
    """

    augmented: bool
    version: str
    rounds: tuple[PeerRound, ...]
    peer_mb: float
    peer_bytes: int

    @property
    def ratio(self) -> float:
        """How many times fewer CPU seconds ours takes: median over rounds."""
        return statistics.median(r.peer / r.ours for r in self.rounds)

    @property
    def dense_ratio(self) -> float:
        """As `ratio`, ours with dense labels."""
        return statistics.median(r.peer / r.ours_dense for r in self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: medians in CPU seconds a patch, and ratios."""
        return {
            "augmented": self.augmented,
            "version": self.version,
            "peer_cpu_s": statistics.median(r.peer for r in self.rounds),
            "cpu_s": statistics.median(r.ours for r in self.rounds),
            "dense_cpu_s": statistics.median(r.ours_dense for r in self.rounds),
            "ratio": self.ratio,
            "dense_ratio": self.dense_ratio,
            "peer_peak_mb": self.peer_mb,
            "peer_patch_bytes": self.peer_bytes,
            "rounds": len(self.rounds),
        }


class Peer:
    """cellmap-data at work in a process of its own; a context manager."""

    def __init__(
        self,
        python: Path,
        crops: Sequence[Crop],
        classes: Sequence[str],
        patch_size: Sequence[int],
        resolution: Sequence[float],
        *,
        augmented: bool,
        seed: int = 0,
        threads: int | None = 1,
    ) -> None:
        """``threads``: of torch; None for its default, one a core. Raises `PeerError` for crops on S3, where it does
        not run, and where it finds no crop to use."""
        for crop in crops:
            if is_s3(crop.raw):
                raise PeerError(f"cellmap-data is compared on local data alone; {crop.key} lies at {crop.raw}")
        spec = {
            "entries": [_entry(crop, classes) for crop in crops],
            "classes": list(classes),
            "patch_size": list(patch_size),
            "resolution": list(resolution),
            "spatial": PEER_AUGMENTED if augmented else None,
            "batch_size": 1,
            "seed": seed,
            "threads": threads,
        }
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed in __exit__)
        self._process = subprocess.Popen(
            [str(python), str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,  # a pipe that nobody reads would stop it once it is full
            text=True,
        )
        self.version = str(self._ask(json.dumps(spec))["version"])

    def load(self, patches: int) -> dict[str, Any]:
        """Load patches: ``cpu_s`` and ``wall_s`` a patch, ``peak_mb``, ``bytes`` of a patch, ``shapes``."""
        return self._ask(str(patches))

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            reason = said[-1] if said else f"status {process.returncode}"
            raise PeerError(f"cellmap-data ended without a patch: {reason}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()


def _entry(crop: Crop, classes: Sequence[str]) -> dict[str, str]:
    folder = Path(next(iter(crop.labels.values())).location).parent
    return {"raw": crop.raw, "gt": f"{folder}/[{','.join(classes)}]"}


def compare(
    peer: Peer,
    ours: Callable[[int], dict[str, float]],
    *,
    augmented: bool,
    rounds: int = 5,
    patches: int = 4,
    say: Callable[[int, int, str], None] = lambda done, number, name: None,
) -> Comparison:
    """``ours(n)`` gives CPU seconds a patch, measured on ``n`` patches: ``whole``, and ``dense``, the unpacking alone.
    Rounds are interleaved; each has ``patches`` of theirs and sixteen times as many of ours, which are that much
    quicker."""
    peer.load(2)
    ours(16)
    found: list[PeerRound] = []
    last: dict[str, Any] = {}
    for number in range(rounds):
        last = peer.load(patches)
        mine = ours(16 * patches)
        found.append(PeerRound(last["cpu_s"], mine["whole"], mine["whole"] + mine["dense"]))
        say(number + 1, rounds, "rounds")
    return Comparison(augmented, peer.version, tuple(found), last["peak_mb"], last["bytes"])
