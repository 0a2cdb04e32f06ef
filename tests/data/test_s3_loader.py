"""The loader against an S3 server that answers after 50 ms and fails once in twenty: the same patches, bit for bit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from connectomics.cellmap.catalog import Catalog
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset
from connectomics.data.volumes import CropVolume
from connectomics.geometry import VoxelGrid
from connectomics.io.location import StoreError, StoreOptions
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.s3_server import FaultyProxy, FolderServer, MotoServer

CLASSES = ("mito", "nuc")
ROOT = "s3://public/root"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data set with raw in 8 chunks, and four crops of two classes."""
    folder = tmp_path_factory.mktemp("s3")
    rng = np.random.default_rng(0)
    write_raw(folder / "root", "set-a", rng.integers(0, 255, (96, 96, 96), dtype=np.uint8), grid_of((96, 96, 96)))
    for number in range(4):
        grid = grid_of((40, 40, 40), start=16.0 + 96.0 * number)
        for name in CLASSES:
            values = (rng.random(grid.shape) < 0.3).astype(np.uint8)
            values[:4] = 255
            write_label(folder / "root", "set-a", f"crop{number + 1}", name, values, grid, unknown=255)
    return folder


@pytest.fixture(scope="module")
def proxy(folder: Path) -> Iterator[FaultyProxy]:
    with FolderServer(folder) as server, FaultyProxy(server.endpoint, latency=0.05, share=1 / 20, seed=2) as proxy:
        yield proxy


@pytest.fixture
def endpoint(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    proxy.reset()
    return proxy


def samples(root: str, workers: int = 0, start: str | None = None, **kwargs: Any) -> list[dict[str, torch.Tensor]]:
    data = CellMapMultiClassDataset(root, None, None, CLASSES, "val", (48, 48, 48), mode_kwargs=kwargs)
    loader = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=start)
    return list(loader)


def assert_same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "known"}
        for name in one:
            assert torch.equal(one[name], other[name]), name
    assert 0 < expected[0]["known"].float().mean() < 1  # there is something to get wrong


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_volumes_read_alike(folder: Path, endpoint: FaultyProxy, tmp_path: Path, cache: str) -> None:
    """Raw, where there is raw, and labels; on the crop's lattice and beyond the crop."""
    read = []
    for root in (str(folder / "root"), ROOT):
        crop = Catalog.open(root).crop("set-a", "crop2")
        kept = None if cache == "none" else tmp_path
        volume = CropVolume(crop, CLASSES, (16.0, 16.0, 16.0), cache=kept, context=(4, 4, 4))
        for grid in (volume.grid, volume.grid.grow(4), VoxelGrid.covering(crop.box.grow((80.0,) * 3), (16.0,) * 3)):
            read.append((*volume.read_raw(grid), *volume.read_labels(grid)))
    for local, remote in zip(read[:3], read[3:], strict=True):
        for one, other in zip(local, remote, strict=True):
            np.testing.assert_array_equal(one, other)
    assert endpoint.requests > 15


@pytest.mark.parametrize("start", [None, "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_same_patches(folder: Path, proxy: FaultyProxy, monkeypatch: Any, start: str | None) -> None:
    if start == "forkserver":  # a server from before the address was known
        early = multiprocessing.get_context("forkserver").Process(target=int)
        early.start()
        early.join()
    expected = samples(str(folder / "root"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    proxy.reset()
    assert_same(samples(ROOT, workers=0 if start is None else 2, start=start), expected)
    assert proxy.requests > 50
    assert sum(proxy.failed.values()) > 0


@pytest.mark.slow
def test_a_cache_is_filled_from_s3(folder: Path, endpoint: FaultyProxy, tmp_path: Path) -> None:
    expected = samples(str(folder / "root"))
    kept = {"cache": "disk", "cache_dir": str(tmp_path)}
    assert_same(samples(ROOT, **kept), expected)
    assert_same(samples(ROOT, workers=2, start="forkserver", **kept), expected)


@pytest.mark.parametrize("start", [None, "forkserver"])
def test_an_object_that_cannot_be_had_is_named(
    folder: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, start: str | None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    crops = Catalog.open(ROOT, StoreOptions(retries=1)).crops()
    data = CellMapMultiClassDataset.of_crops(crops, CLASSES, "val", (48, 48, 48), (8.0, 8.0, 8.0))
    workers = 0 if start is None else 1
    loader = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=start)
    monkeypatch.setitem(proxy.always, "fibsem-uint8/s0/0/0/0", "503")
    with pytest.raises(StoreError, match=r"s3://public/root/set-a/set-a\.zarr/recon-1/em/fibsem-uint8/s0/0/0/0"):
        list(loader)


@pytest.mark.slow
def test_motos_s3_serves_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An independent server, which knows of access rights: nothing is signed."""
    expected = samples(str(folder / "root"))
    with MotoServer() as server:
        server.upload(folder)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        assert_same(samples(ROOT), expected)
        assert_same(samples(ROOT, workers=1, start="forkserver"), expected)
