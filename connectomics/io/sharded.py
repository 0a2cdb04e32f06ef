"""How arrays are stored: Zarr v2 with a file per chunk (OME-Zarr 0.4), or Zarr v3 with a file per shard (0.5).

A shard holds many chunks, which are read alone, and an index of where each of them lies (the codec
``sharding_indexed`` of Zarr v3). Shards of the fill value only are not stored, and the attribute `ABSENT` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import ConfigError
from connectomics.geometry import Index, index

if TYPE_CHECKING:
    from connectomics.config.output import OutputConfig

Codec = Literal["blosc", "zstd"]

#: Attribute of an array whose absent shards hold the fill value, rather than no data.
ABSENT = {"absent_chunks": "fill_value"}


@dataclass(frozen=True)
class Storage:
    """How the arrays of an output are stored.

    Attributes:
        format: version of OME-Zarr: ``0.4`` (Zarr v2), or ``0.5`` (Zarr v3, sharded).
        chunk: voxels that are compressed together, z y x.
        shard: ``0.5``: voxels of a file, z y x, a multiple of ``chunk``; None: a block.
    """

    format: str = "0.4"
    chunk: Index = (64, 64, 64)
    shard: Index | None = None

    def __post_init__(self) -> None:
        if self.shard is None:
            return
        if not self.is_sharded:
            raise ConfigError("output.shard needs output.format=0.5: Zarr v2 has no shards")
        if any(s % c for s, c in zip(self.shard, self.chunk, strict=True)):
            raise ConfigError(
                f"output.shard must be a multiple of output.chunk {list(self.chunk)} along each axis, got "
                f"{list(self.shard)}"
            )

    @classmethod
    def of(cls, config: OutputConfig) -> Storage:
        """Return what the configuration's group ``output`` asks for; `ConfigError` if its values do not fit."""
        chunk, shard = config.chunk, config.shard
        return cls(config.format, index(chunk), None if shard is None else index(shard))

    @classmethod
    def like(cls, folder: Path) -> Storage:
        """Return how to store an array beside or instead of the group or array at ``folder``: in the same format."""
        return cls("0.5" if (folder / "zarr.json").exists() else "0.4")

    @property
    def is_sharded(self) -> bool:
        """Whether a file is a shard."""
        return self.format == "0.5"

    @property
    def zarr_format(self) -> int:
        """Version of Zarr: 2 or 3."""
        return 3 if self.is_sharded else 2

    @property
    def unit(self) -> Index:
        """Voxels of which a block must be a multiple, so that no two blocks write one file; z y x."""
        return self.shard or self.chunk

    def block(self, shape: Index) -> Index:
        """Return the largest multiple of `unit` up to ``shape``, at least one unit; voxels, z y x."""
        return index(max(1, b // u) * u for b, u in zip(shape, self.unit, strict=True))


def array_metadata(
    shape: Sequence[int],
    dtype: np.dtype[Any],
    chunks: Sequence[int],
    shards: Sequence[int],
    *,
    codec: Codec,
    clevel: int,
    fill_value: float,
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the ``zarr.json`` of a sharded array of any number of axes.

    Args:
        shards: voxels of a file, a multiple of ``chunks``.
        codec: ``zstd`` (labels) or ``blosc`` with zstd.
    """
    plain = {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"}
    compress: dict[str, Any] = {"name": "zstd", "configuration": {"level": clevel, "checksum": False}}
    if codec == "blosc":
        options = {"cname": "zstd", "clevel": clevel, "shuffle": "shuffle", "typesize": dtype.itemsize, "blocksize": 0}
        compress = {"name": "blosc", "configuration": options}
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": list(chunks), "codecs": [plain, compress], "index_codecs": index, "index_location": "end",
    }  # fmt: skip
    names = {"dimension_names": ["z", "y", "x"]} if len(shape) == 3 else {}
    return {
        "zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shards)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "fill_value": fill_value,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}], **names,
        "attributes": {**attributes, **ABSENT},
    }  # fmt: skip


def encode(metadata: Mapping[str, Any], values: NDArray[Any]) -> bytes | None:
    """Return the file of one shard of an array with this ``zarr.json``; None if all values are the fill value.

    values: the whole shard, of the array's dtype. The same values give the same bytes.
    """
    import tensorstore

    one = {key: value for key, value in metadata.items() if key != "attributes"} | {"shape": list(values.shape)}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}})
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}, "metadata": one, "create": True}
    array = tensorstore.open(spec, context=context).result()  # a new store in memory
    with tensorstore.Transaction() as whole:  # else each chunk would write the shard again
        array.with_transaction(whole).write(values).result()
    assert array.kvstore is not None
    found = array.kvstore.read("/".join(["c", *["0"] * values.ndim])).result()
    return bytes(found.value) if found.state == "value" else None
