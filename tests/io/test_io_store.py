"""Locations: local folders and a real S3 server on this machine that serves a bucket to anyone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError
from connectomics.geometry import VoxelGrid
from connectomics.io.location import StoreError, StoreOptions, join
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.io.store import exists, list_groups, normalize, read_attrs, read_json, split_s3
from connectomics.io.write import write_multiscale
from tests.s3_server import MotoServer

GRID = VoxelGrid((5.24, 4.0, 4.0), (100.0, 200.0, 300.0), (24, 20, 28))
DATA = np.random.default_rng(0).integers(1, 255, GRID.shape, dtype=np.uint8)


def test_locations():
    assert join("/a/b/", "c", "d/") == "/a/b/c/d"
    assert join(Path("a"), "b") == "a/b"
    assert join("s3://bucket/x.zarr/", "/em/") == "s3://bucket/x.zarr/em"
    assert join("s3://bucket", "em") == "s3://bucket/em"
    assert split_s3("s3://bucket/a//b/") == ("bucket", "a/b")
    assert normalize("file:///tmp/x") == "/tmp/x"
    assert normalize("~/x") == str(Path.home() / "x")
    for wrong in ("s3://", "/local"):
        with pytest.raises(InputError, match="expected s3://bucket/path"):
            split_s3(wrong)
    with pytest.raises(InputError, match="threads >= 1"):
        StoreOptions(threads=0)
    with pytest.raises(InputError, match="timeout > 0 s"):
        StoreOptions(timeout=0)


def test_local_listing_and_json(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").write_text("[1]")
    assert list_groups(tmp_path) == ["a", "b"]
    assert list_groups(tmp_path / "nowhere") == []
    assert list_groups(tmp_path / "file") == []
    assert exists(tmp_path / "a")
    assert not exists(tmp_path / "c")
    assert read_json(tmp_path / "nowhere") is None
    with pytest.raises(MetadataError, match="must hold a JSON object"):
        read_json(tmp_path / "file")
    with pytest.raises(MissingError, match="no Zarr group or array"):
        read_attrs(tmp_path)
    with pytest.raises(StoreError, match="cannot read"):
        read_json(tmp_path / "a")


class Server(MotoServer):
    """moto with an OME-Zarr volume in its public bucket."""

    @property
    def options(self) -> StoreOptions:
        return StoreOptions(endpoint=self.endpoint, cache_bytes=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("upload")
    write_multiscale(folder / "x.zarr" / "recon-1" / "em", DATA, GRID, levels=2, chunks=(16, 16, 16))
    with Server() as running:
        running.upload(folder)
        yield running


def test_s3_volume(server, monkeypatch):
    location = "s3://public/x.zarr/recon-1/em"
    volume = Multiscale.open(location, server.options)
    assert [level.grid.shape for level in volume.levels] == [(24, 20, 28), (12, 10, 14)]
    values, inside = volume.read_raw(volume.grid.grow(1))
    np.testing.assert_array_equal(values[1:-1, 1:-1, 1:-1], DATA)
    assert inside.sum() == DATA.size
    plain = PlainArray.open(join(location, "s0"), server.options)
    np.testing.assert_array_equal(plain.read(), DATA)
    assert plain.grid == GRID
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(server.options.endpoint))
    assert Multiscale.open(location).levels[0].grid == GRID


def test_s3_listing(server):
    assert list_groups("s3://public", server.options) == ["x.zarr"]
    assert list_groups("s3://public/x.zarr/recon-1/em", server.options) == ["s0", "s1"]
    assert list_groups("s3://public/nowhere", server.options) == []
    assert exists("s3://public/x.zarr/recon-1", server.options)
    assert exists("s3://public/x.zarr/recon-1/em/.zattrs", server.options)
    assert not exists("s3://public/y.zarr", server.options)
    assert read_attrs("s3://public/x.zarr", server.options) == {}
    assert read_json("s3://public/x.zarr/nothing.json", server.options) is None


def test_s3_failures(server):
    with pytest.raises(MissingError, match="does not exist"):
        Multiscale.open("s3://public/nowhere", server.options)
    with pytest.raises(MissingError, match="no Zarr array"):
        PlainArray.open("s3://public/nowhere", server.options)
    with pytest.raises(StoreError, match="cannot read s3://nowhere/x"):
        Multiscale.open("s3://nowhere/x", server.options)
    server.put("a/.zattrs", b"{}", bucket="private")
    with pytest.raises(StoreError, match="403 Forbidden"):
        read_attrs("s3://private/a", server.options)
    started = time.monotonic()
    with pytest.raises(StoreError, match="cannot read") as caught:
        read_attrs("s3://public/a", StoreOptions(endpoint="http://127.0.0.1:1"))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


def test_s3_absent_and_corrupt_chunks(server):
    stored = server.client.list_objects_v2(Bucket="public", Prefix="x.zarr/recon-1/em/")["Contents"]
    for key in (item["Key"] for item in stored):
        if "/s1/" not in key and not key.endswith("s0/1/1/1"):  # a partial download, mirrored
            content = server.client.get_object(Bucket="public", Key=key)["Body"].read()
            server.put(key.replace("x.zarr", "holes.zarr"), content)
    volume = Multiscale.open("s3://public/holes.zarr/recon-1/em", server.options)
    assert volume.absent == {"s1": (10.48, 8.0, 8.0)}
    values, inside = volume.read_raw(volume.grid)
    expected = np.ones(GRID.shape, bool)
    expected[16:, 16:, 16:] = False
    np.testing.assert_array_equal(inside, expected)
    np.testing.assert_array_equal(values, np.where(expected, DATA, 0))
    server.put("holes.zarr/recon-1/em/s0/0/1/1", b"no chunk")
    with pytest.raises(CorruptDataError, match=r"holes\.zarr/recon-1/em/s0/0/1/1"):
        volume.read_raw(volume.grid)
