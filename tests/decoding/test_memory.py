"""Memory of the decoders that read blocks with a halo: what a block needs, whatever the volume."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from connectomics.geometry import VoxelGrid
from connectomics.io.write import create_multiscale
from tests.decoding.affinity_kit import OFFSETS, affinities_of, write_prediction

# One process decodes a volume three times, until the heaps of its threads have settled, and then one that is stored in
# 20 MB more; kernels and imports are there by then.
# Resident memory at its peak is read from /proc, as ru_maxrss would count the parent.
MEASURE = """
import re, sys
from connectomics.decoding.affinities.affinity_task import AffinitiesTask
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.blocks.labels_task import objects_of
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.tasks import run_task

method, *places = sys.argv[1:]
kind = {"watershed": WatershedTask, "cc3d": ComponentsTask}.get(method, AffinitiesTask)
more = {"watershed": {"max_depth_nm": 64.0}, "cc3d": {"boundary": "pm"}}.get(method, {})
for number, source in enumerate(places):
    chosen = DecodeParameters(method=method, **more)
    task = kind(source, f"{source}.out{number}/d.zarr/c/mito", "mito", chosen, (64, 128, 128))
    run_task(task)
    print(objects_of(task), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def balls(shape):
    """Balls of 12 voxels' radius in cells of 32, which none leaves."""
    z, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    inside = (z % 32 - 16) ** 2 + (y % 32 - 16) ** 2 + (x % 32 - 16) ** 2 < 144
    cells = [-(-n // 32) for n in shape]
    number = (z // 32 * cells[1] + y // 32) * cells[2] + x // 32 + 1
    return np.where(inside, number, 0).astype(np.uint32)


def write_probabilities(folder, ids, name="mito"):
    place = folder / "d.zarr" / "c" / name
    about = {"artefact": "probability", "class_name": name, "complete": True}
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), ids.shape)
    (writer,) = create_multiscale(place, [grid], np.dtype(np.uint8), attrs={"connectomics": about})
    writer.write((0, 0, 0), np.where(ids > 0, 255, 0).astype(np.uint8))
    return str(place)


def write_between(folder, ids):
    """One body of everything, cut by walls of three voxels into as many cells as there are balls."""
    walls = np.zeros(ids.shape, bool)
    for axis, n in enumerate(ids.shape):
        at = np.flatnonzero(np.isin(np.arange(n) % 32, (9, 10, 11)) & (np.arange(n) > 32))
        walls[(slice(None),) * axis + (at,)] = True
    write_probabilities(folder, walls, "pm")
    return write_probabilities(folder, np.ones_like(ids))


def write_affinities(folder, ids):
    return write_prediction(folder, np.where(ids > 0, 255, 0).astype(np.uint8), affinities_of(ids, OFFSETS), OFFSETS)


@pytest.mark.parametrize(
    ("method", "write", "shapes"),
    [
        pytest.param("watershed", write_probabilities, [(192, 128, 128), (1536, 128, 128)], marks=pytest.mark.slow),
        pytest.param("cc3d", write_between, [(192, 128, 128), (1536, 128, 128)], marks=pytest.mark.slow),
        ("mutex_watershed", write_affinities, [(192, 64, 64), (704, 64, 64)]),
    ],
)
def test_a_volume_of_many_more_chunks_takes_no_more_memory(tmp_path, method, write, shapes):
    """Both have a block with neighbours on both sides along z, and none along y and x, so blocks read as much."""
    stored, places = [], []
    for number, shape in enumerate(shapes):
        places.append(write(tmp_path / str(number), balls(shape)))
        stored.append(np.prod(shape) * (1 + len(OFFSETS) * (method == "mutex_watershed")))
    assert stored[1] - stored[0] > 20e6
    command = [sys.executable, "-c", MEASURE, method, *places[:1] * 3, places[1]]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [int(n) for n in out[::2]] == [np.prod(shape) // 32**3 for shape in (shapes[0],) * 3 + (shapes[1],)]
    assert (int(out[7]) - int(out[5])) * 1024 < 12e6  # half of what there is to keep; seen: 4 to 8
