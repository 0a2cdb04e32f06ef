"""Zarr v2 arrays from folders and zips, and what is refused."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from connectomics.errors import ConnectomicsError, CorruptDataError, InputError, MetadataError, MissingError
from connectomics.metrics.challenge import zarr_v2
from connectomics.metrics.challenge.zarr_v2 import FolderStore, ZarrArray, ZipStore

VALUES = np.arange(7 * 9 * 11, dtype=np.uint16).reshape(7, 9, 11)
CODECS = {
    "blosc": numcodecs.Blosc(),
    "zstd": numcodecs.Zstd(),
    "lz4": numcodecs.LZ4(),
    "gzip": numcodecs.GZip(),
    "zlib": numcodecs.Zlib(),
    "bz2": numcodecs.BZ2(),
    "lzma": numcodecs.LZMA(),
    "none": None,
}


def write(folder: Path, values: np.ndarray, **options: Any) -> None:
    group = zarr.open_group(folder, mode="a", zarr_format=2)
    separator = options.pop("separator", ".")
    array = group.create_array(
        "crop1/mito",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(4, 4, 4),
        chunk_key_encoding={"name": "v2", "separator": separator},
        **options,
    )
    array[:] = values
    array.attrs["voxel_size"] = [8, 8, 8]


def packed(folder: Path, name: str = "s.zip", prefix: str = "") -> Path:
    path = folder.parent / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", ["folder", "zip"])
def test_reads_what_zarr_wrote(tmp_path: Path, codec: str, how: str) -> None:
    separator = "/" if codec in ("zstd", "none") else "."
    write(tmp_path / "s", VALUES, compressors=CODECS[codec], separator=separator)
    store = FolderStore(tmp_path / "s") if how == "folder" else ZipStore(packed(tmp_path / "s"))
    assert store.folders() == ["crop1"]
    assert store.folders("crop1") == ["mito"]
    array = ZarrArray(store, "crop1/mito")
    assert (array.shape, array.dtype, array.attrs) == (VALUES.shape, np.uint16, {"voxel_size": [8, 8, 8]})
    np.testing.assert_array_equal(array.read(), VALUES)
    np.testing.assert_array_equal(array.read((3, 0, 5), (2, 9, 6)), VALUES[3:5, :, 5:])
    store.close()


def test_order_byte_order_and_absent_chunks(tmp_path: Path) -> None:
    write(tmp_path / "s", VALUES.astype(">i4"), order="F", fill_value=7)
    (tmp_path / "s/crop1/mito/1.2.2").unlink()
    found = ZarrArray(FolderStore(tmp_path / "s"), "crop1/mito").read()
    expected = VALUES.astype(np.int32)
    expected[4:, 8:, 8:] = 7
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_one_zarr_folder_inside_a_zip_is_its_root(tmp_path: Path) -> None:
    write(tmp_path / "s", VALUES)
    store = ZipStore(packed(tmp_path / "s", prefix="outer/mine.zarr/"))
    np.testing.assert_array_equal(ZarrArray(store, "crop1/mito").read(), VALUES)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.zarr/.zgroup", "{}")
        archive.writestr("b.zarr/.zgroup", "{}")
    with pytest.raises(InputError, match=r"2 \.zarr folders"):
        ZipStore(tmp_path / "two.zip")


@pytest.mark.parametrize(
    ("name", "says"),
    [("../evil", "a path out"), ("/etc/evil", "a path out"), ("crop1/../../evil", "a path out"),
     ("c:/evil", "a path out"), ("crop1\\evil", "a backslash")],
)  # fmt: skip
def test_paths_out_of_the_archive_are_refused(tmp_path: Path, name: str, says: str) -> None:
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(InputError, match=says) as caught:
        ZipStore(path)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zip"]


def test_links_bombs_and_other_files_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("crop1/mito")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="is a link"):
        ZipStore(tmp_path / "link.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("crop1/mito/0.0.0", bytes(1 << 20))
    with pytest.raises(InputError, match=r"0\.0 GB unpacked, more than"):
        ZipStore(tmp_path / "bomb.zip", max_bytes=1000)
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(InputError, match="not a zip file"):
        ZipStore(tmp_path / "text.zip")
    with pytest.raises(MissingError, match="no submission"):
        ZipStore(tmp_path / "none.zip")
    with pytest.raises(MissingError, match="no folder"):
        FolderStore(tmp_path / "none")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("crop1/.zgroup", "{}")
    data = bytearray((tmp_path / "s.zip").read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag bits of both headers
        data[data.index(mark) + at] |= 1
    (tmp_path / "s.zip").write_bytes(data)
    with pytest.raises(InputError, match="encrypted"):
        ZipStore(tmp_path / "s.zip")


@pytest.mark.parametrize("codec", ["blosc", "zstd", "lz4", "gzip", "bz2", "none"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "too much"])
def test_a_corrupt_chunk_is_named(tmp_path: Path, codec: str, damage: str) -> None:
    write(tmp_path / "s", VALUES, compressors=CODECS[codec])
    chunk = tmp_path / "s/crop1/mito/1.0.0"
    whole = chunk.read_bytes()
    bomb = np.zeros(1 << 16, np.uint8)
    more = bomb.tobytes() if CODECS[codec] is None else bytes(CODECS[codec].encode(bomb))
    chunk.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\xff" * 40, "too much": more}[damage])
    with pytest.raises(CorruptDataError, match=r"crop1/mito/1\.0\.0") as caught:
        ZarrArray(FolderStore(tmp_path / "s"), "crop1/mito").read()
    assert "\n" not in str(caught.value)


def test_a_corrupt_entry_of_a_zip_is_named(tmp_path: Path) -> None:
    write(tmp_path / "s", VALUES, compressors=None)
    path = packed(tmp_path / "s")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("crop1/mito/0.0.0").header_offset
    data[offset + 60] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match=r"crop1/mito/0\.0\.0 cannot be read"):
        ZarrArray(ZipStore(path), "crop1/mito").read()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "|O"}, "array of numbers"),
        ({"dtype": "nonsense"}, "is invalid"),
        ({"shape": [7, -9, 11]}, "array of numbers"),
        ({"chunks": [4, 4]}, "another rank"),
        ({"filters": [{"id": "delta", "dtype": "<u2"}]}, "filters"),
        ({"compressor": {"id": "pickle"}}, "pickle"),
        ({"order": "X"}, "is invalid"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    write(tmp_path / "s", VALUES)
    meta = tmp_path / "s/crop1/mito/.zarray"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(MetadataError, match=says):
        ZarrArray(FolderStore(tmp_path / "s"), "crop1/mito")


def test_broken_json_huge_arrays_and_absent_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "s", VALUES)
    store = FolderStore(tmp_path / "s")
    array = ZarrArray(store, "crop1/mito")
    monkeypatch.setattr(zarr_v2, "MAX_ARRAY_BYTES", 1000)
    with pytest.raises(InputError, match="more than"):
        array.read()
    with pytest.raises(MissingError, match="no Zarr v2 array"):
        ZarrArray(store, "crop1/er")
    for text in ("{", "[]"):
        (tmp_path / "s/crop1/mito/.zattrs").write_text(text)
        with pytest.raises(ConnectomicsError, match=r"\.zattrs"):
            ZarrArray(store, "crop1/mito")
