"""What a volume of any size takes, by arithmetic: the tables of docs/cluster.md.

python benchmarks/volume_arithmetic.py [--edge 10000] [--block 256] [--chunk 64] [--instances 5000000]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

PIECE_BYTES = 64  # of a row in a table of pieces: size, first voxel, box, sums of coordinates
OBJECT_BYTES = 64 + 2 * 8  # uniting holds a row, a parent and a new number for each piece
RATES = (0.83, 5.0, 10.0)  # Mvoxel/s that a GPU writes
GPUS = (1, 8, 64)


def blocks_along(edge: int, block: int) -> int:
    """Blocks (or chunks) along one axis."""
    return -(-edge // block)


def pieces_each(edge: int, block: int) -> float:
    """Into how many pieces the grid of blocks cuts an instance, on average: (1 + d / block)^3 for one whose box has
    the edge d; taken for instances that are 150 voxels long."""
    return (1 + min(150, edge) / block) ** 3


def table(edge: int, block: int, chunk: int, instances: int) -> Iterator[tuple[str, str, str]]:
    """(what, how it is reckoned, how much) for a cube of ``edge`` voxels and one class."""
    voxels, blocks, chunks = edge**3, blocks_along(edge, block) ** 3, blocks_along(edge, chunk) ** 3
    pieces = instances * pieces_each(edge, block)
    faces = blocks * 6 * block**2 * 4
    pyramid = sum(blocks_along(blocks_along(edge, 2**level), chunk) ** 3 for level in (1, 2, 3))
    yield "voxels", f"{edge}^3", f"{voxels:.2g}"
    yield "blocks", f"ceil({edge}/{block})^3", f"{blocks:,}"
    yield "done-map of a stage", "1 byte a block", f"{blocks / 1e3:.0f} kB"
    yield "raw, uint8", "1 byte a voxel; zstd 1.5 times smaller", f"{voxels / 1e12:.2g} TB; {voxels / 1.5e12:.2g} TB"
    yield "probabilities of a class, uint8", "1 byte a voxel before compression", f"{voxels / 1e12:.2g} TB"
    yield "the same, float16", "2 bytes", f"{2 * voxels / 1e12:.2g} TB"
    yield "labels while they are found, uint32", "4 bytes a voxel before compression", f"{4 * voxels / 1e12:.2g} TB"
    yield "faces of the blocks, scratch", f"6 x {block}^2 x 4 bytes a block before compression", f"{faces / 1e9:.0f} GB"
    yield "files of an array", f"ceil({edge}/{chunk})^3 chunks", f"{chunks:,}"
    yield "files of three further levels", "each an eighth", f"{pyramid:,}"
    yield "pieces of instances", f"{instances:,} x (1 + 150/{block})^3", f"{pieces / 1e6:.0f} million"
    yield "tables of pieces", f"{PIECE_BYTES} bytes each", f"{pieces * PIECE_BYTES / 1e9:.1f} GB"
    yield "memory of uniting them", f"{OBJECT_BYTES} bytes each", f"{pieces * OBJECT_BYTES / 1e9:.1f} GB"
    yield "what scheduling costs", "0.1 to 0.3 ms a block (measured)", f"{blocks * 3e-4:.0f} s at most"


def hours(edge: int) -> Iterator[tuple[float, list[str]]]:
    """Hours for each rate on each number of GPUs: voxels / (rate x GPUs)."""
    for rate in RATES:
        yield rate, [f"{edge**3 / (rate * 1e6 * gpus) / 3600:.3g}" for gpus in GPUS]


def lines(edge: int, block: int, chunk: int, instances: int) -> list[str]:
    """Both tables, as Markdown."""
    found = ["| | reckoned as | |", "| --- | --- | --- |"]
    found += [f"| {what} | {how} | {value} |" for what, how, value in table(edge, block, chunk, instances)]
    found += ["", f"| Mvoxel/s a GPU | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in GPUS)} |"]
    found += ["| --- " * (1 + len(GPUS)) + "|"]
    found += [f"| {rate:g} | {' | '.join(f'{value} h' for value in row)} |" for rate, row in hours(edge)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=10_000, help="of the cube, voxels")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--instances", type=int, default=5_000_000)
    options = parser.parse_args()
    print("\n".join(lines(options.edge, options.block, options.chunk, options.instances)))


if __name__ == "__main__":
    main()
