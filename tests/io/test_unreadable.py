"""Absent is only what is known to be absent: anything that cannot be read is an error that names the path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from connectomics.errors import CorruptDataError
from connectomics.geometry import VoxelGrid
from connectomics.io.array import StoredArray
from connectomics.io.location import StoreError
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale

GRID = VoxelGrid((8, 8, 8), (4, 4, 4), (16, 16, 64))
DATA = np.random.default_rng(0).integers(1, 255, GRID.shape, dtype=np.uint8)
ONE = GRID.crop((0, 0, 0), (8, 8, 16))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A volume of chunks of 8 voxels."""
    write_multiscale(tmp_path / "raw", DATA, GRID, chunks=(8, 8, 8))
    return tmp_path / "raw"


@pytest.fixture(params=["tensorstore", "zarr-python"])
def reader(request, monkeypatch) -> str:
    """zarr-python decodes what tensorstore cannot (LZ4, filters); errors are the same."""
    if request.param == "zarr-python":

        def handles(self: StoredArray) -> tuple[object, None]:
            return self._zarr_array(ValueError("no codec")), None

        monkeypatch.setattr(StoredArray, "_handles", handles)
    return request.param


def as_raw(volume: Multiscale) -> np.ndarray:
    return volume.read_raw(ONE)[1]


def as_labels(volume: Multiscale) -> np.ndarray:
    return volume.read_level(0, (0, 0, 0), (8, 8, 16), absent_is_missing=False)[0]


def loop(chunk: Path) -> None:
    chunk.symlink_to(chunk.name)


def folder(chunk: Path) -> None:
    chunk.mkdir()


def too_long(chunk: Path) -> None:
    chunk.symlink_to("x" * 300)


@pytest.mark.parametrize("read", [as_raw, as_labels])
@pytest.mark.parametrize("trouble", [loop, folder, too_long])
def test_a_chunk_that_cannot_be_read_is_not_absent(raw: Path, trouble: Callable, read: Callable, reader: str) -> None:
    volume, chunk = Multiscale.open(raw), raw / "s0" / "0" / "0" / "1"
    chunk.unlink()
    assert (read(volume)[..., 8:] == 0).all(), "absent: the fill value, or not inside"
    trouble(chunk)
    with pytest.raises(StoreError, match=str(chunk)):
        read(volume)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
@pytest.mark.parametrize("read", [as_raw, as_labels])
@pytest.mark.parametrize("what", ["s0/0/0/1", "s0/0/0", "s0"])
def test_permission_denied_is_not_absent(raw: Path, what: str, read: Callable, reader: str) -> None:
    volume = Multiscale.open(raw)
    (raw / what).chmod(0)
    try:
        with pytest.raises(StoreError, match=f"cannot read {raw}.*[Pp]ermission"):
            read(volume)
    finally:
        (raw / what).chmod(0o755)


@pytest.mark.parametrize("read", [as_raw, as_labels])
def test_a_volume_that_is_gone_is_not_absent(raw: Path, read: Callable, reader: str) -> None:
    volume = Multiscale.open(raw)
    read(volume)
    raw.rename(raw.with_name("elsewhere"))  # as below a folder whose disk is no longer mounted
    with pytest.raises(StoreError, match=r"raw/s0 was there and is no longer \(\.zarray is gone\)"):
        read(volume)
    raw.with_name("elsewhere").rename(raw)
    read(volume)


def test_the_presence_of_long_rows_is_listed_and_the_same(tmp_path: Path) -> None:
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (8, 16, 20 * 8))
    write_multiscale(tmp_path / "raw", np.ones(grid.shape, np.uint8), grid, chunks=(8, 8, 8))
    row = tmp_path / "raw" / "s0" / "0" / "1"
    (row / "3").unlink()
    (row / "5").rename(tmp_path / "chunk")
    (row / "5").symlink_to(tmp_path / "chunk")
    (row / "notes").mkdir()
    volume = Multiscale.open(tmp_path / "raw")
    expected = np.ones((1, 2, 20), bool)
    expected[0, 1, 3] = False
    assert np.array_equal(volume.stored_chunks(grid), expected)
    assert volume.missing_chunks(grid) == (1, 40, str(row / "3"))
    (row / "7").unlink()
    (row / "7").symlink_to("7")
    with pytest.raises(StoreError, match=str(row / "7")):
        volume.stored_chunks(grid)
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="was there and is no longer"):
        volume.stored_chunks(grid)


def test_a_broken_chunk_is_still_called_corrupt_and_named(raw: Path, reader: str) -> None:
    chunk = raw / "s0" / "0" / "0" / "1"
    chunk.write_bytes(b"no chunk at all")
    with pytest.raises(CorruptDataError, match=str(chunk)):
        as_raw(Multiscale.open(raw))
