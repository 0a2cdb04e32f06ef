"""Ingest: any format comes in voxel for voxel, where it belongs, and works like any other data root."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import nrrd
import numpy as np
import pytest
import tensorstore
import tifffile
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.ingest import Drawn, Known, ingest_labels, ingest_raw
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.cli import main
from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError
from connectomics.geometry import VoxelGrid
from connectomics.io.formats import open_volume
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import create_array, write_multiscale

SIZE = (8.0, 4.0, 5.5)  # nm, z y x
SIZES = ("PhysicalSizeZ", "PhysicalSizeY", "PhysicalSizeX")  # µm, in OME-TIFF
SHAPE = (20, 33, 47)


def values(dtype: str = "uint8") -> NDArray[Any]:
    return np.random.default_rng(1).integers(0, 200, SHAPE).astype(dtype)


# -- each format writes what a tool of its world writes ---------------------------------------------------------------
def as_imagej(place: Path, data: NDArray[Any]) -> str:
    about = {"axes": "ZYX", "unit": "um", "spacing": SIZE[0] / 1000}
    resolution = (1000 / SIZE[2], 1000 / SIZE[1])
    tifffile.imwrite(place / "a.tif", data, imagej=True, resolution=resolution, metadata=about)
    return str(place / "a.tif")


def as_ome_tiff(place: Path, data: NDArray[Any]) -> str:
    about: dict[str, Any] = {"axes": "ZYX"}
    for axis, size in zip("ZYX", SIZE, strict=True):
        about |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "nm"}
    tifffile.imwrite(place / "a.ome.tif", data, metadata=about, compression="zlib", tile=(16, 16))
    return str(place / "a.ome.tif")


def as_sections(place: Path, data: NDArray[Any]) -> str:
    (place / "stack").mkdir()
    for z, section in enumerate(data):
        tifffile.imwrite(place / "stack" / f"section_{z}.tif", section)  # 2 stands before 10 by number only
    return str(place / "stack")


def as_hdf5(place: Path, data: NDArray[Any]) -> str:
    with h5py.File(place / "a.h5", "w") as file:
        written = file.create_dataset("volumes/raw", data=data, chunks=(8, 8, 8))
        written.attrs["element_size_um"] = [s / 1000 for s in SIZE]
    return str(place / "a.h5")


def as_mrc(place: Path, data: NDArray[Any]) -> str:
    with mrcfile.new(place / "a.mrc", data.astype(np.uint16)) as file:
        file.voxel_size = tuple(10 * s for s in reversed(SIZE))
    return str(place / "a.mrc")


def as_nrrd(place: Path, data: NDArray[Any], encoding: str = "raw") -> str:
    header = {
        "space dimension": 3,
        "space directions": np.diag(SIZE[::-1]),
        "space units": ["nm"] * 3,
        "encoding": encoding,
    }
    nrrd.write(str(place / f"{encoding}.nrrd"), data, header, index_order="C")
    return str(place / f"{encoding}.nrrd")


def as_npy(place: Path, data: NDArray[Any]) -> str:
    np.save(place / "a.npy", data)
    return str(place / "a.npy")


def as_n5(place: Path, data: NDArray[Any]) -> str:
    about = {"path": str(place / "a.n5/raw/s0")}
    array = tensorstore.open(
        {"driver": "n5", "kvstore": {"driver": "file", **about}}, create=True, dtype=data.dtype.name, shape=data.T.shape
    ).result()
    array.write(data.T).result()
    (place / "a.n5/raw/attributes.json").write_text(
        json.dumps({"pixelResolution": {"dimensions": list(SIZE[::-1]), "unit": "nm"}})
    )
    (place / "a.n5/attributes.json").write_text('{"n5": "2.0.0"}')
    return str(place / "a.n5:/raw")


def as_precomputed(place: Path, data: NDArray[Any]) -> str:
    scale = {"size": list(data.T.shape), "resolution": list(SIZE[::-1]), "encoding": "raw", "voxel_offset": [2, 3, 4]}
    array = tensorstore.open(
        {
            "driver": "neuroglancer_precomputed",
            "kvstore": {"driver": "file", "path": str(place / "pre")},
            "multiscale_metadata": {"type": "image", "data_type": data.dtype.name, "num_channels": 1},
            "scale_metadata": {**scale, "chunk_size": [16, 16, 16]},
        },
        create=True,
    ).result()
    array[..., 0].write(data.T).result()
    return str(place / "pre")


def as_ome_zarr(place: Path, data: NDArray[Any]) -> str:
    write_multiscale(place / "a.zarr", data, VoxelGrid(SIZE, (0, 0, 0), SHAPE), levels=2)
    return str(place / "a.zarr")


def as_zarr_array(place: Path, data: NDArray[Any]) -> str:
    writer = create_array(place / "plain.zarr", SHAPE, data.dtype, grid=VoxelGrid(SIZE, (0, 0, 0), SHAPE))
    writer.write((0, 0, 0), data)
    return str(place / "plain.zarr")


WITH_SIZE = (as_imagej, as_ome_tiff, as_hdf5, as_mrc, as_nrrd, as_n5, as_precomputed, as_ome_zarr, as_zarr_array)
WITHOUT = (as_sections, as_npy)


@pytest.mark.parametrize("unit", ["um", [b"um"] * 3])
def test_the_unit_of_hdf5_holds_for_size_and_place(tmp_path: Path, unit: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        written = file.create_dataset("raw", data=np.zeros((2, 3, 4), np.uint8))
        written.attrs["resolution"] = [0.04, 0.004, 0.005]
        written.attrs["offset"] = [1.0, 2.0, 3.5]
        written.attrs["units"] = unit
    with open_volume(tmp_path / "a.h5") as source:
        assert source.voxel_size == pytest.approx((40, 4, 5))
        assert source.begin == pytest.approx((1000, 2000, 3500))


@pytest.mark.parametrize("write", [*WITH_SIZE, *WITHOUT])
def test_any_block_of_any_format(write: Callable[[Path, NDArray[Any]], str], tmp_path: Path) -> None:
    data = values()
    with open_volume(write(tmp_path, data)) as source:
        assert source.shape == SHAPE
        assert np.array_equal(source.read((3, 5, 7), (6, 20, 11)), data[3:9, 5:25, 7:18])
        assert np.array_equal(source.read((0, 0, 0), SHAPE), data)
        if write in WITH_SIZE:
            assert source.voxel_size == pytest.approx(SIZE, rel=1e-6)
        else:
            assert source.voxel_size is None


@pytest.mark.parametrize("planes", [1, 5])
@pytest.mark.parametrize("how", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_a_tiff_written_bit_by_bit_is_read_to_its_end(tmp_path: Path, planes: int, how: dict[str, Any]) -> None:
    """tifffile makes a series of each ``write``: 20 of one plane, or 4 of five."""
    data = values("uint16")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for z in range(0, SHAPE[0], planes):
            file.write(data[z] if planes == 1 else data[z : z + planes], metadata={}, contiguous=False, **how)
    with open_volume(tmp_path / "a.tif") as source:
        assert source.shape == SHAPE
        assert np.array_equal(source.read((3, 5, 7), (14, 20, 11)), data[3:17, 5:25, 7:18])
    written = ingest_raw(tmp_path / "root", "mine", open_volume(tmp_path / "a.tif"), SIZE)
    assert np.array_equal(Multiscale.open(str(written)).read_level(0, (0, 0, 0), SHAPE)[0], data)


def test_tiffs_that_are_no_one_volume_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = values()
    for name, other in (("shape", data[:, :30]), ("type", data.astype("uint16"))):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as file:
            file.write(data)
            file.write(other)
    with tifffile.TiffWriter(tmp_path / "positions.ome.tif", ome=True) as file:
        file.write(data, metadata={"axes": "ZYX"})
        file.write(data, metadata={"axes": "ZYX"})
    (tmp_path / "stack").mkdir()
    for k in range(2):
        tifffile.imwrite(tmp_path / "stack" / f"{k}.tif", data)
    cases = {"shape.tif": "holds 2 images", "type.tif": "holds 2 images", "positions.ome.tif": "holds 2 images"}
    for name, says in {**cases, "stack": "holds 20 sections"}.items():
        command = ["ingest", str(tmp_path / "root"), "--dataset", "mine", "--raw", str(tmp_path / name)]
        assert main([*command, "--voxel-size", "8"]) == 1
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert says in errors[0]


def test_packed_nrrd_and_npz(tmp_path: Path) -> None:
    data = values("uint16")
    with open_volume(as_nrrd(tmp_path, data, "gzip")) as source:
        assert np.array_equal(source.read((0, 0, 0), SHAPE), data)
    np.savez(tmp_path / "two.npz", raw=data, other=data)
    with pytest.raises(InputError, match=r"holds raw, other; name one"):
        open_volume(tmp_path / "two.npz")
    with open_volume(f"{tmp_path}/two.npz:raw") as source:
        assert source.shape == SHAPE


def test_where_a_precomputed_volume_lies(tmp_path: Path) -> None:
    with open_volume(as_precomputed(tmp_path, values())) as source:
        assert source.begin == pytest.approx((4 * 8.0, 3 * 4.0, 2 * 5.5))


def test_an_array_of_an_ome_zarr_group_lies_where_the_group_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = VoxelGrid(SIZE, (100.0, 200.0, 300.0), SHAPE)
    write_multiscale(tmp_path / "a.zarr", values(), at, levels=2)
    for level, grid in enumerate(level.grid for level in Multiscale.open(str(tmp_path / "a.zarr")).levels):
        (tmp_path / f"a.zarr/s{level}/.zattrs").unlink()  # other writers give places to the group only
        source = open_volume(tmp_path / f"a.zarr/s{level}")
        assert (source.voxel_size, source.begin) == (grid.voxel_size, grid.box.begin)
    attributes = tmp_path / "a.zarr/.zattrs"
    attributes.write_text(attributes.read_text().replace('"nanometer"', '"pixel"'))
    with pytest.raises(MetadataError, match="unknown unit 'pixel'"):
        open_volume(tmp_path / "a.zarr")
    assert open_volume(tmp_path / "a.zarr/s0").voxel_size is None
    assert "takes no voxel size and position from its group" in caplog.text


def test_an_array_of_a_group_with_axes_of_time_and_channel(tmp_path: Path) -> None:
    data, levels = values(), []
    for k, stored in enumerate((data, data[:, ::2, ::2])):
        array = create_array(tmp_path / f"a.zarr/{k}", (1, 1, *stored.shape), stored.dtype, chunks=(1, 1, 8, 8, 8))
        array.write((0,) * 5, stored[None, None])
        scale = {"type": "scale", "scale": [1, 1, 0.008, 0.004 * 2**k, 0.0055 * 2**k]}
        shift = {"type": "translation", "translation": [0, 0, 0.1, 0.002 * k, 0.00275 * k]}
        levels.append({"path": str(k), "coordinateTransformations": [scale, shift]})
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    (tmp_path / "a.zarr/.zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / "a.zarr/.zattrs").write_text(json.dumps({"multiscales": [{"axes": axes, "datasets": levels}]}))
    whole, coarse = open_volume(tmp_path / "a.zarr"), open_volume(f"{tmp_path}/a.zarr:/1")
    assert np.array_equal(coarse.read((2, 3, 4), (5, 6, 7)), data[2:7, 6:18:2, 8:22:2])
    assert coarse.voxel_size == pytest.approx((8, 8, 11))
    assert coarse.begin == whole.begin == pytest.approx((96, -2, -2.75))


def test_sections_of_unknown_thickness_have_no_voxel_size(tmp_path: Path) -> None:
    """Fiji writes no spacing for a single section, or if only the pixel size was set."""
    resolution, about = (1000 / SIZE[2], 1000 / SIZE[1]), {"unit": "um"}
    (tmp_path / "stack").mkdir()
    for name, data, axes in (("a.tif", values(), "ZYX"), *((f"stack/{z}.tif", values()[z], "YX") for z in range(2))):
        tifffile.imwrite(tmp_path / name, data, imagej=True, resolution=resolution, metadata={**about, "axes": axes})
    for name in ("a.tif", "stack"):
        assert open_volume(tmp_path / name).voxel_size is None
        with pytest.raises(InputError, match=f"{name} does not contain its voxel size; give --voxel-size"):
            ingest_raw(tmp_path / "root", "mine", open_volume(tmp_path / name))


@pytest.mark.parametrize("axes", ["xyz", "zxy", "cyx"])
def test_hdf5_of_other_axes_is_refused(axes: str, tmp_path: Path) -> None:
    place = Path(as_hdf5(tmp_path, values()))
    for names in (axes, "zyx"):
        with h5py.File(place, "a") as file:
            tags = {"axes": [{"key": key, "typeFlags": 2, "resolution": 0, "description": ""} for key in names]}
            file["volumes/raw"].attrs["axistags"] = json.dumps(tags, indent=2)
        if names == axes:
            with pytest.raises(InputError, match=rf"a\.h5:/volumes/raw has the axes {axes} .*, expected zyx"):
                open_volume(place)
    assert open_volume(place).shape == SHAPE


@pytest.mark.parametrize(("stamp", "flags", "dtype"), [(1146047817, 0, "u1"), (1146047817, 1, "i1"), (0, 0, "i1")])
def test_bytes_of_mrc_have_the_sign_that_imod_says(stamp: int, flags: int, dtype: str, tmp_path: Path) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    with mrcfile.new(tmp_path / "a.mrc", stored.view(np.int8)) as file:
        extra = np.zeros(21, "<i4")
        extra[10:12] = stamp, flags
        file.header.extra2 = extra.tobytes()
    found = open_volume(tmp_path / "a.mrc")
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found.read((0, 0, 0), (4, 8, 8)), stored.view(dtype))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_axes_of_mrc_in_any_order(order: tuple[int, int, int], tmp_path: Path) -> None:
    data = values("uint16")  # z y x
    stored = data.transpose([3 - axis for axis in reversed(order)])  # 1 is x, the last axis of data
    with mrcfile.new(tmp_path / "a.mrc", stored) as file:
        file.header.mapc, file.header.mapr, file.header.maps = order
        file.header.cella = tuple(10 * s * n for s, n in zip(SIZE[::-1], SHAPE[::-1], strict=True))
        file.header.mx, file.header.my, file.header.mz = SHAPE[::-1]
    found = open_volume(tmp_path / "a.mrc")
    assert found.shape == SHAPE
    assert found.voxel_size == pytest.approx(SIZE)
    assert np.array_equal(found.read((2, 3, 4), (5, 6, 7)), data[2:7, 3:9, 4:11])
    with mrcfile.mmap(tmp_path / "a.mrc", "r+") as file:
        file.header.mapc = 7
    with pytest.raises(CorruptDataError, match=r"names its axes .*7\] \(maps, mapr, mapc\)"):
        open_volume(tmp_path / "a.mrc")


def test_an_n5_lies_where_its_transform_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = as_n5(tmp_path, values())
    file = tmp_path / "a.n5/raw/s0/attributes.json"
    stored = json.loads(file.read_text())
    transform: dict[str, list[Any]] = {
        "axes": ["z", "y", "x"], "scale": [8.0, 4.0, 0.0055], "translate": [104.0, 202.0, 0.3],
        "units": ["nm", "nm", "um"],
    }  # fmt: skip
    file.write_text(json.dumps({**stored, "transform": transform}))
    found = open_volume(place)
    assert found.voxel_size == pytest.approx(SIZE)
    assert found.begin == pytest.approx((100, 200, 300 - 2.75))
    turned = {name: list(reversed(given)) for name, given in transform.items()}
    file.write_text(json.dumps({**stored, "transform": turned}))
    assert open_volume(place).begin == pytest.approx((100, 200, 300 - 2.75))
    assert caplog.text == ""
    file.write_text(json.dumps({**stored, "offset": [0, 0, 40]}))
    assert open_volume(place).begin is None
    assert "its offset is not used" in caplog.text


def test_a_nrrd_lies_where_its_origin_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    about = {"space dimension": 3, "space directions": np.diag(SIZE[::-1]) / 1000, "space units": ["um"] * 3}
    nrrd.write(str(tmp_path / "a.nrrd"), values().T, {**about, "space origin": [0.3, 0.2, 0.1]})
    assert open_volume(tmp_path / "a.nrrd").begin == pytest.approx((100 - 4, 200 - 2, 300 - 2.75))
    turned = {**about, "space directions": np.diag([-0.0055, 0.004, 0.008]), "space origin": [0.3, 0.2, 0.1]}
    nrrd.write(str(tmp_path / "b.nrrd"), values().T, turned)
    assert "origin" not in caplog.text
    assert open_volume(tmp_path / "b.nrrd").begin is None
    assert "b.nrrd: its origin is not used, since its axes are turned" in caplog.text
    nrrd.write(str(tmp_path / "c.nhdr"), values().T, about, detached_header=True, relative_data_path=True)
    header = tmp_path / "c.nhdr"
    header.write_text(header.read_text().replace("encoding:", "byte skip: 8\nencoding:"))
    with pytest.raises(InputError, match="byte skip"):
        open_volume(header)


def test_what_a_file_says_and_is_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = values()
    (tmp_path / "stack").mkdir()
    for name, written in (("a.tif", data), ("stack/1.tif", data[0]), ("stack/2.tif", data[1])):
        tifffile.imwrite(tmp_path / name, written, photometric="miniswhite")
    for name in ("a.tif", "stack"):
        caplog.clear()
        assert np.array_equal(open_volume(tmp_path / name).read((0, 0, 0), (2, 33, 47)), data[:2])
        assert caplog.text.count(f"{name} has 0 as white (MINISWHITE), and is stored without inversion") == 1
    caplog.clear()
    with mrcfile.mmap(as_mrc(tmp_path, data), "r+") as file:
        file.nstart = (0, 0, 3)
    assert open_volume(tmp_path / "a.mrc").begin is None
    assert "its origin is not used" in caplog.text


def test_a_gap_in_the_numbers_of_sections_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stack = Path(as_sections(tmp_path, values()))
    assert open_volume(stack).shape == SHAPE
    assert caplog.text == ""
    (stack / "section_5.tif").unlink()
    assert open_volume(stack).shape[0] == SHAPE[0] - 1
    assert "section_4.tif is followed by section_6.tif" in caplog.text


def test_files_of_a_stack_that_may_be_no_sections(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stack = Path(as_sections(tmp_path, values()))
    for name in ("._section_3.tif", ".DS_Store", "Thumbs.db"):  # as macOS and Windows leave them
        (stack / name).write_bytes(b"no image")
    assert open_volume(stack).shape == SHAPE
    assert caplog.text == ""
    (stack / "section_3 copy.tif").write_bytes((stack / "section_3.tif").read_bytes())
    assert open_volume(stack).shape[0] == SHAPE[0] + 1
    assert "section_0.tif and section_3 copy.tif" in caplog.text
    assert "followed by" not in caplog.text


def test_raw_comes_in_with_its_pyramid(tmp_path: Path) -> None:
    data = values()
    written = ingest_raw(tmp_path / "root", "mine", open_volume(as_sections(tmp_path, data)), SIZE)
    source = Multiscale.open(str(written))
    assert written.name == "fibsem-uint8"
    assert source.levels[0].grid == VoxelGrid(SIZE, (0, 0, 0), SHAPE)
    assert np.array_equal(source.read_level(0, (0, 0, 0), SHAPE)[0], data)
    again = values("float32") * 10
    np.save(tmp_path / "f.npy", again)
    scaled = ingest_raw(tmp_path / "root", "scaled", open_volume(tmp_path / "f.npy"), SIZE, (0.0, 1990.0))
    got = Multiscale.open(str(scaled)).read_level(0, (0, 0, 0), SHAPE)[0]
    assert np.array_equal(got, np.clip(np.rint(again * np.float32(255 / 1990)), 0, 255).astype(np.uint8))


def test_labels_of_a_raw_that_is_replaced_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The voxel size is corrected: the labels keep the one with which they were placed."""
    root, source = tmp_path / "root", open_volume(as_npy(tmp_path, values()))
    ingest_raw(root, "mine", source, SIZE)
    ingest_raw(root, "mine", source, (8, 8, 8), overwrite=True)
    ingest_labels(root, "mine", "crop4", Drawn("er", source, "semantic"))
    ingest_raw(root, "mine", source, (8, 8, 8), overwrite=True)
    assert caplog.text == ""
    ingest_raw(root, "mine", source, (4, 4, 4), overwrite=True)
    assert "mine: the raw has another voxel size or position now, and labels stay" in caplog.text
    assert "(crop4); ingest them again" in caplog.text


def test_labels_of_each_kind_mean_what_they_meant(tmp_path: Path) -> None:
    root = tmp_path / "root"
    ingest_raw(root, "mine", open_volume(as_npy(tmp_path, values())), SIZE)
    ids = np.zeros(SHAPE, np.int64)
    ids[2:6, 3:9, 4:12], ids[10:14, 20:28, 30:40] = 7, 300
    ids[0, 0, 0] = -1  # nobody looked
    np.save(tmp_path / "mito.npy", ids)
    looked = np.ones(SHAPE, np.uint8)
    looked[:, :, 45:] = 0
    np.save(tmp_path / "looked.npy", looked)
    known = Known(-1, open_volume(tmp_path / "looked.npy"), frozenset(range(0, 20, 2)))
    for name in ("mito", "er"):
        ingest_labels(root, "mine", "crop1", Drawn(name, open_volume(tmp_path / "mito.npy")), known=known)
    crop = Catalog.open(str(root)).crop("mine", "crop1")
    assert (crop.labels["mito"].annotation.kind, crop.labels["er"].annotation.kind) == ("instance", "semantic")
    expected = np.zeros(SHAPE, bool)
    expected[::2] = True
    expected &= (looked > 0) & (ids >= 0)
    for name in ("mito", "er"):
        volume = read_labels(crop, [name], crop.grid)
        assert np.array_equal(volume.known_of(name), expected)
        assert np.array_equal(volume.present_of(name), expected & (ids > 0))
    there, where = read_instances(crop, "mito", crop.grid)
    assert np.array_equal(there[expected], ids[expected])
    assert np.array_equal(where, expected)


def test_labels_lie_where_they_were_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    ingest_raw(root, "mine", open_volume(as_npy(tmp_path, values())), SIZE)
    np.save(tmp_path / "er.npy", np.ones((5, 6, 7), np.uint8))
    source = open_volume(tmp_path / "er.npy")
    ingest_labels(root, "mine", "crop2", Drawn("er", source), (4, 4, 5.5), (16.0, 8.0, 11.0))
    crop, raw = Catalog.open(str(root)).crop("mine", "crop2"), VoxelGrid(SIZE, (0, 0, 0), SHAPE)
    assert np.subtract(crop.box.begin, raw.box.begin) == pytest.approx((16, 8, 11))
    assert np.subtract(crop.box.end, crop.box.begin) == pytest.approx((20, 24, 38.5))
    with pytest.raises(InputError, match="lie outside the raw of mine"):
        ingest_labels(root, "mine", "crop3", Drawn("er", source), begin=(1e4, 0, 0))
    assert caplog.text == ""
    whole = Path(as_ome_tiff(tmp_path, np.zeros(SHAPE, np.uint8)))
    ingest_labels(root, "mine", "crop5", Drawn("er", open_volume(whole)), SIZE)
    ingest_labels(root, "mine", "crop6", Drawn("er", open_volume(whole)))
    assert caplog.text == ""
    tifffile.imwrite(whole, np.zeros(SHAPE, np.uint8), metadata={"axes": "ZYX"} | dict.fromkeys(SIZES, 0.001))
    ingest_labels(root, "mine", "crop7", Drawn("er", open_volume(whole)))
    assert "a.ome.tif has the shape of the raw of mine, but voxels of (1, 1, 1) nm, as the file says" in caplog.text
    caplog.clear()
    ingest_labels(root, "mine", "crop3", Drawn("er", source), begin=(136, 0, 0))
    assert "reach beyond the raw of mine" in caplog.text
    caplog.clear()
    ingest_labels(root, "mine", "crop4", Drawn("er", source), known=Known(1))
    assert "no voxel of er in crop4 is annotated" in caplog.text
    assert "er.npy: labels from (-4, -2, -2.75) to (36, 22, 35.75) nm cover a part of the raw of mine" in caplog.text


def test_ids_of_64_bits_beside_unknown_voxels(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, np.uint64)
    data[3:9], data[12:] = 5_000_000_001, 2**63 + 5
    np.save(tmp_path / "ids.npy", data)
    ingest_raw(tmp_path / "root", "mine", open_volume(as_npy(tmp_path, values())), SIZE)
    with open_volume(tmp_path / "ids.npy") as source:
        known = Known(slices=frozenset(range(10)))
        ingest_labels(tmp_path / "root", "mine", "crop1", Drawn("mito", source, "instance"), known=known)
    np.save(tmp_path / "largest.npy", np.full(SHAPE, 2**64 - 1, np.uint64))
    with open_volume(tmp_path / "largest.npy") as source, pytest.raises(InputError, match="renumber"):
        ingest_labels(tmp_path / "root", "mine", "crop2", Drawn("mito", source, "instance"), known=Known(0))
    crop = Catalog.open(str(tmp_path / "root")).crop("mine", "crop1")
    ids, where = read_instances(crop, "mito", crop.grid)
    expected = np.indices(SHAPE)[0] < 10
    assert np.array_equal(where, expected)
    assert np.array_equal(ids[expected], data[expected])
    assert np.array_equal(read_labels(crop, ["mito"], crop.grid).present_of("mito"), expected & (data > 0))


def test_volumes_that_say_where_they_lie_stay_there(tmp_path: Path) -> None:
    """Raw and labels in one world keep their places in it."""
    root, data = tmp_path / "root", values()
    at = VoxelGrid(SIZE, (100.0, 200.0, 300.0), SHAPE)
    write_multiscale(tmp_path / "raw.zarr", data, at)
    inside = at.crop((4, 5, 6), (8, 9, 10))
    write_multiscale(tmp_path / "er.zarr", np.ones(inside.shape, np.uint8), inside)
    ingest_raw(root, "mine", open_volume(tmp_path / "raw.zarr"))
    ingest_labels(root, "mine", "crop1", Drawn("er", open_volume(tmp_path / "er.zarr")))
    crop = Catalog.open(str(root)).crop("mine", "crop1")
    assert crop.raw_source.levels[0].grid == at
    assert crop.labels["er"].grid == inside


def test_a_map_of_all_classes_from_the_command_line_to_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = np.zeros(SHAPE, np.uint16)
    data[:10], data[10:15], data[15:] = 1, 20, 21
    path = as_imagej(tmp_path, data)
    table = tmp_path / "values.csv"
    table.write_text("value,class,kind\n1,cyto,\n20,mito,instance\n21,mito,instance\n", encoding="utf-8")
    root = tmp_path / "my données"
    assert main(["ingest", str(root), "--dataset", "mine", "--raw", path, "--range", "0,40"]) == 0
    assert main(["ingest", str(root), "--dataset", "mine", "--label-map", path, "--values", str(table)]) == 0
    assert "does not say what" not in caplog.text
    crop = Catalog.open(str(root)).crop("mine", "crop1")
    there, _ = read_instances(crop, "mito", crop.grid)
    assert np.array_equal(there, np.where(data >= 20, data, 0))
    assert np.array_equal(read_labels(crop, ["cyto"], crop.grid).present_of("cyto"), data == 1)
    capfd.readouterr()
    assert main(["describe", str(root)]) == 0
    assert "mito" in capfd.readouterr().out
    table.write_text("value,class\n20,mito\n")
    again = ["ingest", str(root), "--dataset", "mine", "--crop", "crop2", "--label-map", path, "--values", str(table)]
    assert main([*again, "--unknown", "1"]) == 0
    assert "a.tif holds 21, but " in caplog.text


def test_bad_input_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, good = tmp_path / "root", as_imagej(tmp_path, values())
    np.save(tmp_path / "four.npy", np.zeros((2, 3, 4, 5), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros(SHAPE, np.float32))
    np.save(tmp_path / "small.npy", np.zeros((3, 4, 5), np.uint8))
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 5), np.uint8))
    np.save(tmp_path / "nan.npy", np.full(SHAPE, np.nan))
    np.save(tmp_path / "negative.npy", np.arange(-2, 2).repeat(25).reshape(4, 5, 5))
    (tmp_path / "huge.csv").write_text("value,class\n99999999999999999999,mito\n")
    (tmp_path / "cut.tif").write_bytes(b"no tiff at all")
    (tmp_path / "a.xyz").write_bytes(b"")
    (tmp_path / "bad.csv").write_text("value,class\nmany,mito\n")
    assert main(["ingest", str(root), "--dataset", "mine", "--raw", good]) == 0
    raw = ["ingest", str(root), "--dataset", "other", "--raw"]
    label = ["ingest", str(root), "--dataset", "mine"]
    cases: list[tuple[list[str], str]] = [
        ([*raw, str(tmp_path / "nowhere.tif")], "nothing at"),
        ([*raw, str(tmp_path / "a.xyz")], "unknown format"),
        ([*raw, str(tmp_path / "cut.tif")], "cannot be read as TIFF"),
        ([*raw, str(tmp_path / "four.npy"), "--voxel-size", "8"], "expected three axes"),
        ([*raw, str(tmp_path / "none.npy"), "--voxel-size", "8"], "has no voxels"),
        ([*raw, str(tmp_path / "nan.npy"), "--voxel-size", "8", "--range", "0,1"], "not finite"),
        ([*raw, str(tmp_path / "small.npy")], "--voxel-size"),
        ([*raw, good, "--format", "tif"], "did you mean 'tiff'"),
        ([*raw, good, "--range", "9,1"], "two ascending values"),
        (["ingest", str(root), "--dataset", "../x", "--raw", good], "a data set's name"),
        (["ingest", str(root), "--dataset", "mine", "--raw", good], "--overwrite"),
        ([*label], "nothing to ingest"),
        ([*label, "--labels", "mito"], "CLASS=FILE"),
        ([*label, "--labels", f"mito={good}", "--labels", "mito=b.tif"], "for each class, got 'mito=b.tif'"),
        ([*label, "--labels", f"mito={tmp_path / 'float.npy'}"], "must be whole numbers"),
        ([*label, "--labels", f"mito={tmp_path / 'negative.npy'}", "--unknown", "-1"], "negative values"),
        ([*label, "--label-map", good, "--values", str(tmp_path / "huge.csv")], "line 2: value must be"),
        ([*label, "--labels", f"mito={good}", "--slices", "3-x"], "--slices: expected"),
        ([*label, "--labels", f"mito={good}", "--slices", "99"], "sections 0 to 19"),
        ([*label, "--labels", f"mito={good}", "--known", str(tmp_path / "small.npy")], "must have the labels' shape"),
        ([*label, "--labels", f"mito={good}", "--crop", "left"], "a crop's name is"),
        ([*label, "--label-map", good, "--values", str(tmp_path / "bad.csv")], "line 2"),
        ([*label, "--label-map", good], "--label-map needs --values"),
        ([*label, "--labels", f"mito={good}", "--slices", "5-2"], "got '5-2'"),
        ([*label, "--labels", f"mito={good}", "--slices", "0-99"], "slices 20, 21, 22, ... do not exist"),
        ([*raw, str(tmp_path / "nan.npy"), "--voxel-size", "8"], "not finite"),
        (["ingest", str(root), "--dataset", "mine2", "--labels", f"mito={good}"], "did you mean 'mine'"),
    ]
    capfd.readouterr()
    for arguments, expected in cases:
        assert main(arguments) == 1, arguments
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1, arguments
        assert expected in said[0], said


def test_a_volume_that_cannot_be_read_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    data = values()
    stack = Path(as_sections(tmp_path, data))
    (stack / "section_15.tif").write_bytes((stack / "section_15.tif").read_bytes()[:200])
    with pytest.raises((CorruptDataError, InputError)):
        ingest_raw(tmp_path / "root", "mine", open_volume(stack), SIZE)
    assert not (tmp_path / "root").exists()
    ingest_raw(tmp_path / "root", "good", open_volume(as_npy(tmp_path, data)), SIZE)
    with pytest.raises((CorruptDataError, InputError)):
        ingest_raw(tmp_path / "root", "mine", open_volume(stack), SIZE)
    np.save(tmp_path / "ids.npy", np.zeros((4, 4, 4), np.int32) - 1)
    with pytest.raises(InputError, match="negative"):
        ingest_labels(tmp_path / "root", "good", "crop1", Drawn("mito", open_volume(tmp_path / "ids.npy")))
    catalog = Catalog.open(str(tmp_path / "root"))
    assert (catalog.datasets, catalog.crop_names("good")) == (["good"], [])
    packed = Path(as_nrrd(tmp_path, data, "gzip"))
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptDataError, match="truncated"):
        open_volume(packed)
    with pytest.raises(MissingError):
        open_volume(tmp_path / "nowhere.npy")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    code = (
        "import sys, resource, numpy as np\nfrom pathlib import Path\n"
        "from connectomics.cellmap.ingest import ingest_raw\nfrom connectomics.io.formats import open_volume\n"
        "place, n = Path(sys.argv[1]), int(sys.argv[2])\n"
        "data = np.lib.format.open_memmap(place / f'{n}.npy', 'w+', np.uint8, (n, 512, 512)); data[::7] = 3; del data\n"
        "ingest_raw(place / 'root', f'd{n}', open_volume(place / f'{n}.npy'), (8, 8, 8))\n"
        "import psutil; m = psutil.Process().memory_full_info(); print(m.uss)\n"
    )
    used = [
        int(subprocess.run([sys.executable, "-c", code, str(tmp_path), str(n)], capture_output=True, check=True).stdout)
        for n in (128, 512)
    ]
    assert used[1] < used[0] + 64e6
