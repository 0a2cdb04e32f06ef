"""Estimate the resources for a volume of any size: the tables of docs/cluster.md.

python benchmarks/volume_arithmetic.py [--edge 10000] [--block 256] [--chunk 64] [--instances 5000000]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

FRAGMENT_BYTES = 64  # of a row in the fragment table: size, first voxel, box, sums of coordinates
GROUP = 4  # blocks along each axis that a worker unites
#: The main process holds two numbers for each fragment, a parent and a label for each tree of a group, and a row, its
#: copy in order, and three numbers for each instance.
UNITING_BYTES = (2 * 4, 2 * 8, 2 * 64 + 3 * 8)
RATES = (0.83, 5.0, 10.0)  # Mvoxel/s that a GPU writes
GPUS = (1, 8, 64)


def blocks_along(edge: int, block: int) -> int:
    """Return the number of blocks (or chunks) along one axis."""
    return -(-edge // block)


def fragments_each(edge: int, block: int) -> float:
    """Return the mean number of fragments per instance: (1 + d / block)^3 for a box with edge d, here 150 voxels."""
    return (1 + min(150, edge) / block) ** 3


def files_of_class(edge: int, shard: int) -> int:
    """Return the number of files of a class with ``output.format=0.5`` and a pyramid: the shards and the zarr.json of
    each level, down to a level of at most 64 voxels, and the zarr.json of the group."""
    files = 1
    while True:
        files += blocks_along(edge, shard) ** 3 + 1
        if edge <= 64:
            return files
        edge = blocks_along(edge, 2)


def table(edge: int, block: int, chunk: int, instances: int) -> Iterator[tuple[str, str, str]]:
    """Yield (quantity, calculation, value) for a cube of ``edge`` voxels and one class."""
    voxels, blocks, chunks = edge**3, blocks_along(edge, block) ** 3, blocks_along(edge, chunk) ** 3
    fragments = instances * fragments_each(edge, block)
    faces = blocks * 6 * block**2 * 4
    pyramid = sum(blocks_along(blocks_along(edge, 2**level), chunk) ** 3 for level in (1, 2, 3))
    yield "voxels", f"{edge}^3", f"{voxels:.2g}"
    yield "blocks", f"ceil({edge}/{block})^3", f"{blocks:,}"
    yield "done-map of a stage", "1 byte per block", f"{blocks / 1e3:.0f} kB"
    yield "raw, uint8", "1 byte per voxel; zstd: 1.5 times smaller", f"{voxels / 1e12:.2g} TB; {voxels / 1.5e12:.2g} TB"
    yield "probabilities of a class, uint8", "1 byte per voxel before compression", f"{voxels / 1e12:.2g} TB"
    yield "the same, float16", "2 bytes per voxel", f"{2 * voxels / 1e12:.2g} TB"
    yield "intermediate labels, uint32", "4 bytes per voxel before compression", f"{4 * voxels / 1e12:.2g} TB"
    yield "block faces, scratch", f"6 x {block}^2 x 4 bytes per block before compression", f"{faces / 1e9:.0f} GB"
    yield "files of an array", f"ceil({edge}/{chunk})^3 chunks", f"{chunks:,}"
    yield "files of three further levels", "each an eighth", f"{pyramid:,}"
    for shard in (256, 512):
        name = f"files with OME-Zarr 0.5, shards of {shard}^3"
        yield name, f"sum over levels of ceil(n/{shard})^3 + 1", f"{files_of_class(edge, shard):,}"
    yield "fragments of instances", f"{instances:,} x (1 + 150/{block})^3", f"{fragments / 1e6:.0f} million"
    yield "fragment tables", f"{FRAGMENT_BYTES} bytes each", f"{fragments * FRAGMENT_BYTES / 1e9:.1f} GB"
    groups, trees = blocks_along(blocks_along(edge, block), GROUP) ** 3, instances * fragments_each(edge, GROUP * block)
    yield f"groups of {GROUP}^3 blocks", f"ceil(ceil({edge}/{block})/{GROUP})^3", f"{groups:,}"
    yield "trees of the groups", f"{instances:,} x (1 + 150/{GROUP * block})^3", f"{trees / 1e6:.1f} million"
    memory = sum(n * size for n, size in zip((fragments, trees, instances), UNITING_BYTES, strict=True))
    each = "{} bytes per fragment, {} per tree, {} per instance".format(*UNITING_BYTES)
    yield "memory for uniting them", each, f"{memory / 1e9:.1f} GB"
    yield "scheduling", "0.1 to 0.3 ms per block (measured)", f"{blocks * 3e-4:.0f} s at most"


def hours(edge: int) -> Iterator[tuple[float, list[str]]]:
    """Yield the hours for each rate on each number of GPUs: voxels / (rate x GPUs)."""
    for rate in RATES:
        yield rate, [f"{edge**3 / (rate * 1e6 * gpus) / 3600:.3g}" for gpus in GPUS]


def lines(edge: int, block: int, chunk: int, instances: int) -> list[str]:
    """Return both tables as Markdown."""
    found = ["| | calculation | |", "| --- | --- | --- |"]
    found += [f"| {what} | {how} | {value} |" for what, how, value in table(edge, block, chunk, instances)]
    found += ["", f"| Mvoxel/s per GPU | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in GPUS)} |"]
    found += ["| --- " * (1 + len(GPUS)) + "|"]
    found += [f"| {rate:g} | {' | '.join(f'{value} h' for value in row)} |" for rate, row in hours(edge)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=10_000, help="edge of the cube, voxels")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--instances", type=int, default=5_000_000)
    options = parser.parse_args()
    print("\n".join(lines(options.edge, options.block, options.chunk, options.instances)))


if __name__ == "__main__":
    main()
