"""Labels and probabilities as TIFF stacks for other programs: values, voxel size, memory, and what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from connectomics.cli import main
from connectomics.errors import CorruptDataError
from connectomics.geometry import VoxelGrid
from connectomics.io.formats import open_volume
from connectomics.io.write import write_multiscale
from connectomics.pipeline.export import export_tiff

GRID = VoxelGrid((16.0, 4.0, 5.24), (1008.0, 2002.0, 3002.62), (20, 30, 40))


def write(folder: Path, values: NDArray[Any], crop: str = "crop1", name: str = "mito", **about: Any) -> Path:
    attrs = {"connectomics": {"artefact": "labels", "complete": True, **about}}
    place = folder / "cell.zarr" / crop / name
    grid = VoxelGrid(GRID.voxel_size, GRID.translation, values.shape)
    write_multiscale(place, values, grid, attrs=attrs)
    return place


def ids(largest: int, dtype: str = "uint32") -> NDArray[Any]:
    values = np.random.default_rng(0).integers(0, 200, GRID.shape).astype(dtype)
    values[5, 6, 7] = largest
    return values


def pytc(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The exit status of ``pytc export``, and the last line."""
    status = main(["export", *map(str, words)])
    said = capsys.readouterr()
    return status, (said.err if status else said.out).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("values", "dtype", "imagej"),
    [
        (ids(200), "uint8", True),
        (ids(300), "uint16", True),
        (ids(70_000), "uint32", False),
        (ids(7, "uint8"), "uint8", True),
        ((ids(3) / 255).astype(np.float16), "float32", True),
    ],
)
def test_values_and_voxel_size_are_those_of_the_array(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: NDArray[Any], dtype: str, imagej: bool
) -> None:
    write(tmp_path / "out", values)
    file = tmp_path / "new" / "a.tif"
    status, line = pytc(capsys, tmp_path / "out", file)
    assert (status, line) == (0, f"{file}: {dtype}, {GRID}")
    found = tifffile.imread(file)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)
    with tifffile.TiffFile(file) as stored:
        assert stored.is_imagej is imagej
        assert len(stored.pages) == GRID.shape[0]
    with open_volume(file) as source:
        assert source.voxel_size == pytest.approx(GRID.voxel_size)
    assert [p.name for p in file.parent.iterdir()] == ["a.tif"]


def test_a_box_is_cut_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Faces at 1000, 2000 and 3000 nm: the box touches voxels 2 to 5, 1 to 4 and 0 to 2."""
    write(tmp_path / "out", values := ids(300))
    box = "cell:1032,2004,2000:1096,2018,3010"
    status, line = pytc(capsys, tmp_path / "out", tmp_path / "a.tiff", "--box", box)
    assert status == 0
    assert line.endswith("4x4x2 voxels of 16 4 5.24 nm from 1040 2006 3002.62 nm"), line
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tiff"), values[2:6, 1:5, 0:2])


def test_what_is_refused_leaves_all_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "a.tif"
    write(out, ids(1))
    write(out, ids(1), name="er")
    write(out, ids(1), crop="crop2", complete=False)
    file.write_bytes(b"mine")
    one = ("--class", "er")
    for words, said in (
        ((file, *one), "a.tif exists; remove it, or choose another name"),
        ((tmp_path / "b.tif",), "holds one array, and 3 in"),
        ((tmp_path / "b.tif", "--class", "mito"), "fit: cell/crop1/mito, cell/crop2/mito; choose one by --class"),
        ((tmp_path / "b.tif", "--class", "mito", "--crop", "2"), "crop2/mito is only half written"),
        ((tmp_path / "b.tif", "--class", "nuc"), "unknown class 'nuc'"),
        ((tmp_path / "b.tif", *one, "--box", "cell:0,0,0:9,9,9"), "cell:0,0,0:9,9,9 lies outside of"),
        ((tmp_path / "b.tif", *one, "--box", "cell:9"), "a box is DATASET:z0,y0,x0:z1,y1,x1"),
        ((tmp_path / "b.tif", *one, "--strict"), "give one --class and --dataset, no --probabilities or --strict"),
        (("s3://bucket/b.tif", *one), "cannot write to s3://bucket/b.tif"),
        ((tmp_path / "b.zip", "--crop", "crop1"), "--crop and --box are for a TIFF stack"),
        ((file / "b.tif", *one), "cannot write"),
    ):
        status, line = pytc(capsys, out, *words)
        assert (status, line.startswith("error: ")) == (1, True), words
        assert said in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "out"]
    assert file.read_bytes() == b"mine"


def test_a_chunk_that_cannot_be_read_leaves_no_file(tmp_path: Path) -> None:
    place = write(tmp_path / "out", ids(1, "uint8"))
    (place / "s0/0/0/0").write_bytes(b"broken")
    with pytest.raises(CorruptDataError):
        export_tiff(tmp_path / "out", tmp_path / "a.tif")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_memory_is_that_of_some_planes(tmp_path: Path) -> None:
    values = np.zeros((512, 192, 192), np.uint16)
    values[:, 5, 5] = 300
    write(tmp_path / "out", values)
    tracemalloc.start()
    try:
        export_tiff(tmp_path / "out", tmp_path / "a.tif")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes / 3
