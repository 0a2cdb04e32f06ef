"""`ArrayWriter`: one Zarr array, v2 or sharded v3, local or on S3, that is written block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.geometry import slices_of
from connectomics.io import s3
from connectomics.io.array import StoredArray
from connectomics.io.location import Location, StoreOptions, absolute
from connectomics.io.metadata import grid_of_attrs
from connectomics.io.place import S3Path, output_place, place
from connectomics.io.replacing import write_file
from connectomics.io.sharded import encode

#: A chunk that a block shares: its index, and the shared part inside the chunk and inside the block.
_Part = tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]


class ArrayWriter:
    """An array open for writing (returned by `create_array`, `create_multiscale` and `ArrayWriter.open`).

    Picklable. Several processes may write at once if the faces of their blocks lie on the borders of ``chunks`` (or
    the array's end). Any other block re-reads the chunks that it covers in part and needs a single writer.

    Attributes:
        location: path of the array.
        shape: voxels, z y x. dtype: numpy dtype. chunks: voxels of a stored file, z y x.
        grid: where the array lies, or None if its attributes do not say.
    """

    def __init__(self, location: Location) -> None:
        self._path = output_of(location)
        self.location = str(self._path)
        self._stored = stored = StoredArray(self.location, StoreOptions(cache_bytes=0))
        self.shape, self.chunks, self.dtype = stored.shape, stored.chunks, stored.dtype
        self.fill_value: float = stored.fill_value.item()
        self.grid = grid_of_attrs(stored.attrs, stored.shape, self.location)
        meta = stored.metadata
        if stored.zarr_format == 3:
            names = [codec.get("name") for codec in meta.get("codecs", [])]
            if names != ["sharding_indexed"] or not stored.absent_is_fill:
                raise MetadataError(
                    f"{self.location}: expected a sharded array of this program, got the codecs {names}"
                )
            return
        self.dtype = np.dtype(meta["dtype"])  # in its byte order
        order, separator, compressor = (meta.get(key) for key in ("order", "dimension_separator", "compressor"))
        if separator != "/" or order != "C" or (compressor or {}).get("id") != "blosc" or meta.get("filters"):
            raise MetadataError(
                f"{self.location}: expected an array in C order with keys z/y/x and Blosc, "
                f"got order {order!r}, separator {separator!r}, compressor {compressor!r}"
            )

    @classmethod
    def open(cls, location: Location) -> ArrayWriter:
        """Open an array that this module created, to continue writing it. `MissingError`, `MetadataError`."""
        return cls(location)

    def write(self, begin: Sequence[int], block: NDArray[Any]) -> None:
        """Store ``block`` with its first voxel at index ``begin`` (voxels, z y x).

        The block must lie inside the array, and its dtype must be castable ("same_kind"), integers without
        overflow.

        Raises:
            InputError: the block does not fit. WriteError: disk full, no permission.
        """
        if len(begin) != len(self.shape) or block.ndim != len(self.shape):
            raise InputError(
                f"{self.location} has {len(self.shape)} axes, got begin {tuple(begin)}, block {block.shape}"
            )
        start = [int(b) for b in begin]
        stop = [b + n for b, n in zip(start, block.shape, strict=True)]
        if min(start) < 0 or any(e > n for e, n in zip(stop, self.shape, strict=True)):
            raise InputError(f"{self.location} holds {self.shape} voxels; cannot write {block.shape} at {tuple(start)}")
        if not np.can_cast(block.dtype, self.dtype, casting="same_kind"):
            raise InputError(f"{self.location} holds {self.dtype}; cannot write {block.dtype} without loss: convert it")
        if block.size == 0:
            return
        if block.dtype.kind in "iu" and self.dtype.kind in "iu" and not np.can_cast(block.dtype, self.dtype):
            held = np.iinfo(self.dtype)
            if block.min() < held.min or block.max() > held.max:
                raise InputError(f"{self.location} holds {self.dtype}; cannot write {block.min()} to {block.max()}")

        def write(part: _Part) -> None:
            index, inner, outer = part
            origin = [i * c for i, c in zip(index, self.chunks, strict=True)]
            valid = [min(c, n - o) for c, n, o in zip(self.chunks, self.shape, origin, strict=True)]
            if block[outer].shape == self.chunks:
                self._write_chunk(index, np.ascontiguousarray(block[outer], self.dtype))
                return
            whole = all(s.start == 0 and s.stop >= v for s, v in zip(inner, valid, strict=True))
            chunk = np.full(self.chunks, self.fill_value, self.dtype)
            if not whole:
                chunk[tuple(map(slice, valid))] = self.read(origin, valid)
            chunk[inner] = block[outer]
            self._write_chunk(index, chunk)

        if isinstance(self._path, S3Path) and self._stored.zarr_format == 2:  # most of it is waiting
            s3.in_parallel(write, list(self._chunks_of(start, stop)))
        else:
            for part in self._chunks_of(start, stop):
                write(part)

    def _write_chunk(self, index: tuple[int, ...], chunk: NDArray[Any]) -> None:
        path, meta = place(self._stored.chunk_location(index)), self._stored.metadata
        sharded = self._stored.zarr_format == 3
        data = encode(meta, chunk) if sharded else chunk_codec(meta["compressor"]).encode(chunk)
        if data is None:  # all of it is the fill value
            path.unlink(missing_ok=True)
        else:
            write_file(path, data)

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """Return the stored values of a block inside the array (voxels); unwritten chunks give the fill value."""
        return self._stored.read(begin, shape, absent_is_missing=False)[0]

    def _chunks_of(self, begin: Sequence[int], end: Sequence[int]) -> Iterator[_Part]:
        """Chunks of the block [begin, end): index, and the shared part inside the chunk and inside the block."""
        for index in product(*map(range, *self._stored.chunk_range(begin, end))):
            low = [max(i * c, b) for i, c, b in zip(index, self.chunks, begin, strict=True)]
            high = [min((i + 1) * c, e) for i, c, e in zip(index, self.chunks, end, strict=True)]
            origin = [i * c for i, c in zip(index, self.chunks, strict=True)]
            shape = np.subtract(high, low)
            yield index, slices_of(np.subtract(low, origin), shape), slices_of(np.subtract(low, begin), shape)


def chunk_codec(compressor: Mapping[str, Any]) -> Any:
    """Return the codec for written chunks: the same values give the same bytes in every run."""
    import numcodecs
    from numcodecs import blosc

    blosc.use_threads = False  # its threads append their parts in the order in which they finish
    return numcodecs.get_codec(dict(compressor))


def output_of(location: Location) -> Path:
    """Return the absolute `place` of an output; `WriteError` for a URL other than ``s3://``."""
    return place(absolute(output_place(location)))
