"""Sharded arrays (Zarr v3): what any tool reads is what was written, in as many files as the formula says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from connectomics.config.schema import RunConfig
from connectomics.errors import ConfigError, CorruptDataError, EngineError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.location import StoreError
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.io.resample import linear
from connectomics.io.sharded import Storage
from connectomics.io.write import (
    ArrayWriter,
    create_array,
    create_multiscale,
    ensure_group,
    multiscales_attrs,
    update_attrs,
)
from tests.io.test_io_s3 import in_child
from tests.s3_server import FolderServer

GRID = VoxelGrid((8, 8, 4), (4, 4, 2), (70, 100, 40))
SHARD = (32, 64, 32)


def values_of(dtype: str) -> np.ndarray:
    """Noise, except for the first shard, which is empty, and a chunk of the second."""
    values = np.random.default_rng(0).integers(1, 200, GRID.shape).astype(dtype)
    values[:32, :64, :32] = 0
    values[:16, 64:80, :16] = 0
    return values


def write(folder: Path, dtype: str, codec: str) -> ArrayWriter:
    (writer,) = create_multiscale(
        folder / "a.zarr" / "crop1" / "mito", [GRID], dtype, chunks=(16, 16, 16), shards=SHARD, codec=codec
    )
    return writer


@pytest.mark.parametrize(("dtype", "codec"), [("uint8", "blosc"), ("float16", "blosc"), ("uint32", "zstd")])
def test_others_read_what_was_written(tmp_path: Path, dtype: str, codec: str) -> None:
    writer, values = write(tmp_path, dtype, codec), values_of(dtype)
    for begin, block in GRID.blocks(SHARD):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        writer.write(begin, values[z, y, x])
    group = zarr.open_group(tmp_path / "a.zarr", mode="r", zarr_format=3)
    array = group["crop1/mito/s0"]
    np.testing.assert_array_equal(array[:], values)
    assert array.shards == SHARD
    assert array.chunks == (16, 16, 16)
    assert array.metadata.dimension_names == ("z", "y", "x")
    ome = dict(group["crop1/mito"].attrs)["ome"]
    assert ome["version"] == "0.5"
    assert "version" not in ome["multiscales"][0]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": writer.location}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), values)
    ours = Multiscale.open(tmp_path / "a.zarr" / "crop1" / "mito")
    assert ours.grid == GRID
    assert ours.levels[0].chunks == SHARD
    read, inside = ours.read_level(0, (0, 0, 0), GRID.shape)
    assert inside.all(), "an empty shard is data"
    np.testing.assert_array_equal(read, values)
    np.testing.assert_array_equal(
        ArrayWriter.open(writer.location).read((5, 6, 7), (60, 80, 30)), values[5:65, 6:86, 7:37]
    )
    files = [path for path in Path(writer.location, "c").rglob("*") if path.is_file()]
    assert len(files) == math.prod(math.ceil(n / s) for n, s in zip(GRID.shape, SHARD, strict=True)) - 1
    codecs = json.loads(Path(writer.location, "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert codecs[-1]["name"] == codec


def test_parts_of_shards_keep_the_rest_and_an_emptied_shard_is_removed(tmp_path: Path) -> None:
    writer, values = write(tmp_path, "uint8", "zstd"), values_of("uint8")
    writer.write((0, 0, 0), values)
    first = {path: path.read_bytes() for path in Path(writer.location).rglob("*") if path.is_file()}
    writer.write((10, 10, 10), values[10:50, 10:90, 10:35])
    assert first == {path: path.read_bytes() for path in Path(writer.location).rglob("*") if path.is_file()}
    writer.write((32, 0, 0), np.zeros((32, 64, 32), np.uint8))
    values[32:64, :64, :32] = 0
    assert not Path(writer.location, "c/1/0/0").exists()
    np.testing.assert_array_equal(PlainArray.open(writer.location).read(), values)


def test_a_small_array_gets_a_small_shard(tmp_path: Path) -> None:
    writer = create_array(tmp_path / "a", (20, 40, 7), "uint16", chunks=(16, 16, 16), shards=(512, 512, 512))
    assert writer.chunks == (32, 48, 16)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    writer = write(tmp_path, "uint8", "zstd")
    writer.write((0, 0, 0), values_of("uint8"))
    shard = Path(writer.location, "c/1/0/0")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        CorruptDataError, match=r"cannot decode a chunk of \S+/c/1/0/0: it is truncated or damaged \(Error dec"
    ):
        PlainArray.open(writer.location).read()


def foreign(place: Path, where: str = "end") -> np.ndarray:
    """Raw of another program in shards of 2 x 2 x 2 chunks, of which one chunk and the last shard are absent."""
    values = np.random.default_rng(1).integers(1, 255, GRID.shape, np.uint8)
    values[16:32, :16, 16:32] = values[64:, 96:, 32:] = 0
    zarr.open_group(place, mode="w", zarr_format=3).attrs.update(multiscales_attrs([GRID], "em", 3))
    shards = zarr.codecs.ShardingCodec(chunk_shape=(16, 16, 16), index_location=where)
    array = zarr.create_array(
        place / "s0", shape=GRID.shape, chunks=(32, 32, 32), dtype="uint8", serializer=shards, compressors=None,
        fill_value=0,
    )  # fmt: skip
    array[...] = values
    return values


@pytest.mark.parametrize("where", ["start", "end"])
@pytest.mark.parametrize("remote", [False, True])
def test_absent_chunks_within_shards_are_missing_raw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, remote: bool
) -> None:
    values = foreign(tmp_path / "em", where)
    assert not (tmp_path / "em/s0/c/2/3/1").exists()
    with FolderServer(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        volume = Multiscale.open("s3://public/em" if remote else tmp_path / "em")
        assert volume.missing_chunks(GRID)[:2] == (2, 5 * 7 * 3)
        assert volume.missing_chunks(GRID)[2] == f"{volume.location}/s0/c/0/0/0"
        for grid in (GRID, GRID.crop((20, 3, 10), (20, 20, 20)), GRID.at_voxel_size((16, 16, 8))):
            found, inside = volume.read_raw(grid)
            exact, filled = linear(values, GRID, grid), linear((values > 0) * 255, GRID, grid) > 254.9
            assert np.array_equal(inside, filled)
            assert np.allclose(found, np.where(inside, exact, 0), atol=1e-4)
        labels, known = volume.read_level(0, (0, 0, 0), GRID.shape, absent_is_missing=False)
        assert known.all()
        assert np.array_equal(labels, values)


def test_a_folder_in_place_of_a_shard_is_no_absent_one(tmp_path: Path) -> None:
    foreign(tmp_path / "em")
    shard = tmp_path / "em/s0/c/0/0/0"
    shard.unlink()
    assert not Multiscale.open(tmp_path / "em").read_raw(GRID.crop((0, 0, 0), (8, 8, 8)))[1].any()
    shard.mkdir()
    with pytest.raises(StoreError, match=r"s0/c/0/0/0: expected a file, found a folder"):
        Multiscale.open(tmp_path / "em").read_raw(GRID.crop((0, 0, 0), (8, 8, 8)))


def test_a_forked_child_does_not_take_absent_chunks_for_data(tmp_path: Path) -> None:
    foreign(tmp_path / "em")
    volume = Multiscale.open(tmp_path / "em")
    volume.read_raw(GRID)
    with pytest.raises(EngineError, match=r"shards of other programs.*forkserver"):
        in_child("fork", volume.read_raw, GRID)


def test_v3_is_not_hidden_in_v2(tmp_path: Path) -> None:
    ensure_group(tmp_path / "a.zarr" / "crop1", {"one": 1})
    with pytest.raises(WriteError, match=r"a\.zarr is a Zarr v2 group.*output\.format=0\.4"):
        ensure_group(tmp_path / "a.zarr" / "crop2", zarr_format=3)
    ensure_group(tmp_path / "b.zarr" / "crop1", {"one": 1}, zarr_format=3)
    update_attrs(tmp_path / "b.zarr" / "crop1", {"two": 2})
    assert dict(zarr.open_group(tmp_path / "b.zarr", mode="r")["crop1"].attrs) == {"one": 1, "two": 2}


def test_storage_refuses_what_does_not_fit() -> None:
    assert Storage.of(RunConfig().output) == Storage()
    assert Storage("0.5", (64,) * 3, (128, 128, 64)).block((256, 192, 40)) == (256, 128, 64)
    with pytest.raises(ConfigError, match=r"output\.shard must be a multiple of output\.chunk"):
        Storage("0.5", (64, 64, 64), (96, 128, 128))
    with pytest.raises(ConfigError, match=r"output\.shard needs output\.format=0\.5"):
        Storage("0.4", shard=(128, 128, 128))
