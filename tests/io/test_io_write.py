"""Writing: what comes back, what other tools make of it, and what is left where writing fails."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.errors import CorruptDataError, InputError, MissingError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.levels import halve_labels, halve_raw, level_grids
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.io.store import list_groups, read_attrs
from connectomics.io.write import (
    ArrayWriter,
    build_levels,
    create_array,
    create_multiscale,
    ensure_group,
    update_attrs,
    write_multiscale,
)

GRID = VoxelGrid((2.62, 2.0, 2.0), (3132.21, 899.0, 25863.0), (37, 30, 41))


def noise(shape: tuple[int, ...], dtype: str = "u1", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4"])
def test_a_written_volume_is_read_by_every_tool(tmp_path, dtype):
    data = noise(GRID.shape, dtype)
    location = tmp_path / "set.zarr" / "recon-1" / "em" / "fibsem-uint8"
    write_multiscale(location, data, GRID, levels=3, chunks=(16, 16, 16), attrs={"note": "kept"})
    volume = Multiscale.open(location)
    assert volume.attrs["note"] == "kept"
    assert [level.grid for level in volume.levels] == level_grids(GRID, 3)
    np.testing.assert_array_equal(volume.read_level(0, (0, 0, 0), GRID.shape)[0], data)
    np.testing.assert_array_equal(zarr.open_group(location, mode="r")["s0"][:], data)
    kvstore = {"driver": "file", "path": str(location / "s0")}
    np.testing.assert_array_equal(
        tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result().read().result(), data
    )
    plain = PlainArray.open(location / "s1")
    assert plain.grid == volume.levels[1].grid


def test_ome_zarr_models_accepts_the_metadata(tmp_path):
    from ome_zarr_models.v04 import Image

    write_multiscale(tmp_path / "a.zarr", noise(GRID.shape), GRID, levels=3)
    image = Image.from_zarr(zarr.open_group(tmp_path / "a.zarr", mode="r"))
    multiscale = image.attributes.multiscales[0]
    assert [axis.name for axis in multiscale.axes] == ["z", "y", "x"]
    assert [axis.unit for axis in multiscale.axes] == ["nanometer"] * 3
    assert [dataset.path for dataset in multiscale.datasets] == ["s0", "s1", "s2"]
    for dataset, grid in zip(multiscale.datasets, level_grids(GRID, 3), strict=True):
        scale, translation = dataset.coordinateTransformations
        assert tuple(scale.scale) == grid.voxel_size
        assert tuple(translation.translation) == grid.translation


def test_every_group_above_is_made_up_to_the_root(tmp_path):
    create_array(tmp_path / "plain" / "p.zarr" / "a" / "b" / "c", (4, 4, 4), np.uint8)
    root = tmp_path / "plain" / "p.zarr"
    assert all((folder / ".zgroup").exists() for folder in (root, root / "a", root / "a" / "b"))
    assert not (tmp_path / "plain" / ".zgroup").exists()
    assert list_groups(root / "a") == ["b"]
    assert zarr.open_group(root, mode="r")["a/b/c"].shape == (4, 4, 4)


@settings(max_examples=40, deadline=None)
@given(
    chunk=st.tuples(*[st.integers(1, 9)] * 3),
    blocks=st.lists(st.tuples(*[st.tuples(st.integers(0, 11), st.integers(1, 12))] * 3), min_size=1, max_size=5),
)
def test_any_block_lands_where_it_belongs(tmp_path_factory, chunk, blocks):
    shape = (12, 11, 13)
    writer = create_array(tmp_path_factory.mktemp("w") / "a", shape, np.uint16, chunks=chunk, fill_value=7)
    expected = np.full(shape, 7, np.uint16)
    for number, spans in enumerate(blocks):
        begin = [min(b, n - 1) for (b, _), n in zip(spans, shape, strict=True)]
        size = tuple(min(s, n - b) for (_, s), n, b in zip(spans, shape, begin, strict=True))
        block = noise(size, "u2", number)
        writer.write(begin, block)
        expected[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))] = block
    np.testing.assert_array_equal(writer.read((0, 0, 0), shape), expected)
    np.testing.assert_array_equal(zarr.open_array(writer.location, mode="r")[:], expected)


def test_writing_goes_on_where_it_was_left(tmp_path):
    create_array(
        tmp_path / "a", (20, 20, 20), np.uint8, chunks=(8, 8, 8), grid=VoxelGrid((4,) * 3, (1,) * 3, (20,) * 3)
    )
    writer = ArrayWriter.open(tmp_path / "a")
    assert writer.grid == VoxelGrid((4,) * 3, (1,) * 3, (20,) * 3)
    writer.write((0, 0, 0), np.zeros((8, 20, 20), np.uint8))
    # zeros are stored: an absent chunk would mean "nothing there"
    assert len([f for f in (tmp_path / "a").rglob("*") if f.is_file() and f.name.isdigit()]) == 9
    with pytest.raises(MissingError, match="no Zarr array"):
        ArrayWriter.open(tmp_path / "b")


def test_blocks_that_do_not_fit_are_refused(tmp_path):
    writer = create_array(tmp_path / "a", (8, 8, 8), np.uint8)
    with pytest.raises(InputError, match="cannot write"):
        writer.write((1, 0, 0), np.zeros((8, 8, 8), np.uint8))
    with pytest.raises(InputError, match="axes"):
        writer.write((0, 0), np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match="without loss"):
        writer.write((0, 0, 0), np.zeros((8, 8, 8), np.float32))
    writer.write((0, 0, 0), np.full((8, 8, 8), 255, np.uint64))
    with pytest.raises(InputError, match="holds uint8; cannot write 256 to 256"):
        writer.write((0, 0, 0), np.full((8, 8, 8), 256, np.uint64))
    assert (writer.read((0, 0, 0), (8, 8, 8)) == 255).all()
    with pytest.raises(InputError, match="must agree"):
        write_multiscale(tmp_path / "b", np.zeros((3, 3, 3)), GRID)
    with pytest.raises(InputError, match="at least one"):
        create_multiscale(tmp_path / "b", [], np.uint8)
    with pytest.raises(InputError, match="cannot store these attributes"):
        create_array(tmp_path / "b", (3, 3, 3), np.uint8, attrs={"x": float("nan")})


def test_nothing_is_replaced_unasked(tmp_path):
    create_array(tmp_path / "a", (8, 8, 8), np.uint8)
    with pytest.raises(WriteError, match="already there"):
        create_array(tmp_path / "a", (8, 8, 8), np.uint8)
    with pytest.raises(WriteError, match="already there"):
        write_multiscale(tmp_path / "a", noise(GRID.shape), GRID)
    with pytest.raises(WriteError, match="an array is already there"):
        ensure_group(tmp_path / "a")
    write_multiscale(tmp_path / "a", noise(GRID.shape), GRID, overwrite=True)
    assert list_groups(tmp_path / "a") == ["s0"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_attributes_are_merged(tmp_path):
    ensure_group(tmp_path / "g.zarr" / "x", {"a": 1, "b": {"c": np.int64(2)}})
    update_attrs(tmp_path / "g.zarr" / "x", {"b": np.arange(2), "d": Path("e")})
    assert read_attrs(tmp_path / "g.zarr" / "x") == {"a": 1, "b": [0, 1], "d": "e"}
    assert read_attrs(tmp_path / "g.zarr") == {}
    with pytest.raises(MissingError, match="make it first"):
        update_attrs(tmp_path / "nowhere", {})


# -- pyramids ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["u1", "i4", "f4"])
@pytest.mark.parametrize("shape", [(8, 6, 4), (7, 5, 33), (1, 2, 3)])
def test_raw_is_halved_by_the_mean_of_what_there_is(shape, dtype):
    data = noise(shape, dtype)
    found = halve_raw(data)
    assert found.dtype == data.dtype
    for index in np.ndindex(*found.shape):
        mean = data[tuple(slice(2 * i, 2 * i + 2) for i in index)].astype(np.float64).mean()
        assert found[index] == pytest.approx(mean if dtype == "f4" else np.rint(mean), rel=1e-6)


@pytest.mark.parametrize("shape", [(8, 6, 4), (7, 5, 33), (1, 2, 3)])
def test_labels_are_halved_to_what_most_voxels_are(shape):
    data = np.random.default_rng(1).choice(np.array([0, 1, 7, 255], "u2"), shape, p=[0.4, 0.3, 0.2, 0.1])
    found = halve_labels(data)
    assert found.dtype == data.dtype
    for index in np.ndindex(*found.shape):
        values, counts = np.unique(data[tuple(slice(2 * i, 2 * i + 2) for i in index)], return_counts=True)
        assert found[index] == values[counts == counts.max()].max()


@pytest.mark.parametrize("kind", ["raw", "label"])
def test_levels_built_block_by_block_are_those_of_the_whole(tmp_path, kind):
    data = noise(GRID.shape, "u2")
    write_multiscale(tmp_path / "whole", data, GRID, levels=4, kind=kind, chunks=(8, 8, 8), name="x")
    write_multiscale(tmp_path / "blocks", data, GRID, kind=kind, chunks=(8, 8, 8), name="x", attrs={"kept": 1})
    build_levels(tmp_path / "blocks", 4, kind)
    assert read_attrs(tmp_path / "blocks") == {**read_attrs(tmp_path / "whole"), "kept": 1}
    for level in range(4):
        one, other = (ArrayWriter.open(tmp_path / name / f"s{level}") for name in ("whole", "blocks"))
        assert one.grid == other.grid
        np.testing.assert_array_equal(one.read((0, 0, 0), one.shape), other.read((0, 0, 0), other.shape))


# -- failures ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB: the kernel refuses the write, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path, small_files):
    with pytest.raises(WriteError, match=r"cannot write .*/s0/0/0/0") as caught:
        write_multiscale(tmp_path / "x.zarr" / "a", noise((32, 32, 32)), VoxelGrid((4,) * 3, (0,) * 3, (32,) * 3))
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "x.zarr").iterdir()] == [".zgroup"]
    writer = create_array(tmp_path / "b", (32, 32, 32), np.uint8)
    with pytest.raises(WriteError):
        writer.write((0, 0, 0), noise((32, 32, 32)))
    assert [f.name for f in (tmp_path / "b").rglob("*") if f.is_file()] == [".zarray"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(WriteError, match="cannot write"):
        create_array(tmp_path / "file" / "a", (8, 8, 8), np.uint8)
    with pytest.raises(WriteError, match="expected a path, got a URL"):
        create_array("gs://bucket/a", (8, 8, 8), np.uint8)


@pytest.mark.parametrize("content", [b"", b"x" * 9, b"x" * 99, None], ids=["empty", "short", "garbage", "truncated"])
def test_a_broken_chunk_is_not_completed(tmp_path, content):
    writer = create_array(tmp_path / "a", (8, 8, 8), np.uint8)
    writer.write((0, 0, 0), noise((8, 8, 8)))
    chunk = tmp_path / "a" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:100] if content is None else content)
    with pytest.raises(CorruptDataError, match="a/0/0/0"):
        writer.write((1, 1, 1), noise((2, 2, 2)))


def test_the_same_values_give_the_same_bytes(tmp_path):
    """Blosc's threads would append their parts in the order in which they end: about 1 % of such chunks differ then."""
    values = np.random.default_rng(0).integers(0, 9, (16, 16, 16), np.uint32).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    seen = set()
    for n in range(20):
        create_array(tmp_path / str(n), values.shape, values.dtype).write((0, 0, 0), values)
        seen.add((tmp_path / str(n) / "0/0/0").read_bytes())
    assert len(seen) == 1
    assert numcodecs.blosc.use_threads is False


def test_the_files_are_plain_zarr_v2(tmp_path):
    create_multiscale(tmp_path / "m", [GRID], np.uint8, name="given")
    array = json.loads((tmp_path / "m" / "s0" / ".zarray").read_text())
    assert array["zarr_format"] == 2
    assert array["dimension_separator"] == "/"
    assert array["compressor"] == {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1, "blocksize": 0}
    assert json.loads((tmp_path / "m" / ".zattrs").read_text())["multiscales"][0]["name"] == "given"
