"""Every reason why the portal would refuse a submission, or count it as nothing, is found and said in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import cc3d
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cli import main
from connectomics.errors import CorruptDataError, InputError, MissingError, number_of
from connectomics.geometry import VoxelGrid
from connectomics.metrics.challenge import score_submission
from connectomics.metrics.challenge.blocks import SlabComponents
from connectomics.metrics.challenge.rules import instance_limit
from connectomics.metrics.challenge.zarr_v2 import Archive, ZipStore
from connectomics.submission import validate_submission
from connectomics.submission.pack import PlainArrayWriter, write_group, zip_folder

GRID = VoxelGrid((8, 8, 8), (804, 1604, 404), (20, 24, 28))
FLAT = VoxelGrid((1.74, 2, 2), (23837.13, 7599, 35999), (16, 20, 24))
TABLE = CropTable(
    (
        TableEntry(7, "one", "mito", GRID),
        TableEntry(7, "one", "er", GRID),
        TableEntry(12, "two", "er", FLAT),
    )
)
ZARRAY, ZATTRS = "crop7/er/.zarray", "crop7/er/.zattrs"


def write_array(folder, grid, values):
    writer = PlainArrayWriter(folder, grid, values.dtype, {})
    writer.write((0, 0, 0), values)


def two_boxes(grid, dtype=np.uint8):
    values = np.zeros(grid.shape, dtype)
    values[2:6, 2:6, 2:6] = 1
    values[10:14, 10:14, 10:14] = 2
    return values


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The files of a submission without fault, by name."""
    folder = tmp_path_factory.mktemp("good") / "data"
    write_group(folder)
    for entry in TABLE:
        write_group(folder / entry.crop_name)
        write_array(folder / entry.crop_name / entry.class_name, entry.grid, two_boxes(entry.grid))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def check(tmp_path, files, **options):
    return validate_submission(pack(tmp_path / "s.zip", files), TABLE, **options)


def edited(files, name, **changes):
    """The files with some keys of a JSON file changed (None removes one)."""
    value = {**json.loads(files[name]), **changes}
    return {**files, name: json.dumps({k: v for k, v in value.items() if v is not None}).encode()}


def with_values(files, values, **changes):
    """The files with ``crop7/er`` or, for ``path``, another array holding ``values`` in one chunk."""
    path = changes.pop("path", "crop7/er")
    meta = {
        "shape": values.shape, "chunks": values.shape, "dtype": values.dtype.str,
        "compressor": {"id": "zstd", "level": 1}, **changes,
    }  # fmt: skip
    kept = {k: v for k, v in files.items() if not (k.startswith(f"{path}/") and k[len(path) + 1].isdigit())}
    chunk = bytes(numcodecs.Zstd(1).encode(np.ascontiguousarray(values)))
    return edited({**kept, f"{path}/" + ".".join("0" * values.ndim): chunk}, f"{path}/.zarray", **meta)


def rules(findings, severity="error"):
    return [f.rule for f in findings if f.severity == severity]


# -- nothing to say ----------------------------------------------------------------------------------------------------
def test_a_good_submission_has_no_finding_as_zip_and_as_folder(tmp_path, good):
    seen = []
    assert check(tmp_path, good, progress=lambda done, total, name: seen.append((done, total, name))) == []
    assert seen[-1] == (3, 3, "crop12/er")
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        archive.extractall(tmp_path / "folder")
    assert validate_submission(tmp_path / "folder", TABLE) == []


def test_the_reference_submissions(shared_reference):
    """What the official scorer made of them is known: see its expected.json."""
    folder = shared_reference / "official_scorer/submissions"
    table = CropTable.load(folder / "test_crop_manifest.csv")

    def found(name):
        return {(f.severity, f.rule) for f in validate_submission(folder / f"{name}.zip", table, folder / "truth.zarr")}

    assert found("exact_grid") == set()
    assert found("finer_with_margin") == {("warning", "voxel-size")}
    assert found("coarser_multiscale") == {("error", "not-an-array")}
    assert found("missing_labels_and_crop") == {("error", "missing-class"), ("error", "missing-crop")}
    assert found("no_attributes") == {("warning", "no-voxel-size"), ("warning", "no-translation")}
    assert found("unprefixed_names") == {("warning", "crop-names")}
    assert ("error", "shape") in found("smaller_offset")


def test_nothing_there_is_an_error_of_the_caller(tmp_path):
    with pytest.raises(MissingError, match="no submission at"):
        validate_submission(tmp_path / "none.zip", TABLE)


# -- the archive -------------------------------------------------------------------------------------------------------
def test_what_is_no_zip(tmp_path):
    (tmp_path / "s.zip").write_bytes(b"not a zip at all")
    assert rules(validate_submission(tmp_path / "s.zip", TABLE)) == ["not-a-zip"]


@pytest.mark.parametrize("name", ["../evil", "crop7/../../evil", "/etc/passwd", "C:/evil", "crop7\\..\\evil"])
def test_paths_out_of_the_archive_stop_the_check(tmp_path, good, name):
    findings = check(tmp_path, {**good, name: b"x"})
    assert rules(findings) == ["outside-path"]
    assert "out of the archive" in str(findings[0])


def test_links_stop_the_check_in_zips_and_folders(tmp_path, good):
    path = pack(tmp_path / "s.zip", good)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("crop7/nuc")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
    assert rules(validate_submission(path, TABLE)) == ["link"]
    with zipfile.ZipFile(pack(tmp_path / "t.zip", good)) as archive:
        archive.extractall(tmp_path / "folder")
    (tmp_path / "folder/crop7/nuc").symlink_to("/etc")
    assert rules(validate_submission(tmp_path / "folder", TABLE)) == ["link"]


def test_more_than_50_gb_unpacked_is_seen_in_the_directory_alone(tmp_path, good):
    path = pack(tmp_path / "s.zip", good | {f"crop7/er/9.9.{n}": b"" for n in range(20)})
    data = bytearray(path.read_bytes())
    for at in find_all(data, b"PK\x01\x02"):  # records of the central directory; bytes 24 to 28: unpacked size
        data[at + 24 : at + 28] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    findings = validate_submission(path, TABLE)
    assert rules(findings) == ["unpacked-size"]
    assert "at most 50 GB" in str(findings[0])


def find_all(data, pattern):
    at = data.find(pattern)
    while at >= 0:
        yield at
        at = data.find(pattern, at + 1)


def test_files_that_share_their_bytes_are_a_bomb(tmp_path, good):
    path = pack(tmp_path / "s.zip", {**good, "a": b"\0" * 5000})
    data = bytearray(path.read_bytes())
    for at in find_all(data, b"PK\x01\x02"):
        data[at + 20 : at + 24] = (5000).to_bytes(4, "little")
    path.write_bytes(data)
    assert "overlap" in rules(validate_submission(path, TABLE))


@pytest.mark.parametrize(
    ("name", "severity", "rule"),
    [
        ("crop7/er.zip", "error", "nested-archive"),
        ("inner.tar.gz", "error", "nested-archive"),
        ("crop7\\nuc", "error", "backslash"),
        ("__MACOSX/crop7/._er", "warning", "junk"),
        ("crop7/.DS_Store", "warning", "junk"),
    ],
)
def test_what_does_not_belong_into_the_archive(tmp_path, good, name, severity, rule):
    findings = check(tmp_path, {**good, name: b"x"})
    assert [(f.severity, f.rule, f.path) for f in findings] == [(severity, rule, name)]


def test_a_name_twice(tmp_path, good):
    path = pack(tmp_path / "s.zip", good)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(".zgroup", good[".zgroup"])
    assert rules(validate_submission(path, TABLE)) == ["duplicate"]


# -- the group ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        (lambda g: {f"submission.zarr/{k}": v for k, v in g.items()}, "prefix-folder", "the folder submission.zarr/"),
        (
            lambda g: {f"{top}.zarr/{k}": v for top in ("a", "b") for k, v in g.items()},
            "many-groups",
            "2 groups: a.zarr, b.zarr",
        ),
        (lambda g: {k: v for k, v in g.items() if k != ".zgroup"}, "not-a-group", "crops without a group"),
        (lambda g: {"zarr.json": b"{}"}, "zarr-v3", "a Zarr v3 group"),
        (lambda g: {".zarray": g[ZARRAY], "0.0.0": b""}, "not-a-group", "a single array"),
        (lambda g: {"readme.txt": b"hello"}, "not-a-group", "got nothing"),
        (lambda g: {k.replace("crop", "volume"): v for k, v in g.items()}, "no-crop", "volume12, volume7"),
        (
            lambda g: {".zgroup": g[".zgroup"]} | {f"all/{k}": v for k, v in g.items()},
            "no-crop",
            "the crops below all/",
        ),
    ],
)
def test_what_is_not_one_zarr_v2_group_with_the_crops_at_the_top(tmp_path, good, change, rule, words):
    findings = check(tmp_path, change(good))
    assert rules(findings) == [rule]
    assert words in str(findings[0])


def test_crops_named_by_their_number_only(tmp_path, good):
    findings = check(tmp_path, {k.removeprefix("crop"): v for k, v in good.items()})
    assert [(f.severity, f.rule) for f in findings] == [("warning", "crop-names")]


def test_missing_and_unknown_crops_and_classes(tmp_path, good):
    files = {k.replace("crop12", "crop21").replace("crop7/er/", "crop7/er_memm/"): v for k, v in good.items()}
    findings = check(tmp_path, files)
    assert [(f.severity, f.rule, f.path) for f in findings] == [
        ("error", "missing-class", "crop7/er"),
        ("error", "missing-crop", "crop12"),
        ("warning", "unknown-crop", "crop21"),
        ("warning", "unknown-class", "crop7/er_memm"),
    ]
    assert "is it crop12?" in str(findings[2])
    assert "is it er?" in str(findings[3]) or "does not know" in str(findings[3])


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        (
            lambda g: (
                {(k.replace("crop7/er/", "crop7/er/s0/")): v for k, v in g.items()} | {"crop7/er/.zgroup": g[".zgroup"]}
            ),
            "not-an-array",
            "a multiscale group, which is read as missing",
        ),
        (
            lambda g: {k: v for k, v in g.items() if k != ZARRAY} | {"crop7/er/zarr.json": b"{}"},
            "not-an-array",
            "a Zarr v3 node",
        ),
        (lambda g: {k: v for k, v in g.items() if k != ZARRAY}, "not-an-array", "a folder without .zarray"),
        (lambda g: {k: v for k, v in g.items() if k != "crop7/.zgroup"}, "not-a-group", "without .zgroup"),
        (lambda g: {**g, ZARRAY: b"{broken"}, "metadata", "is not JSON"),
        (lambda g: edited(g, ZARRAY, zarr_format=3), "metadata", "zarr_format 3"),
        (lambda g: edited(g, ZARRAY, chunks=[8, 8]), "metadata", "another rank"),
        (lambda g: edited(g, ZARRAY, compressor={"id": "pcodec"}), "metadata", "'pcodec' is not read"),
        (lambda g: edited(g, ZARRAY, shape=[10**4] * 3, chunks=[2] * 3), "metadata", "chunks, expected at most"),
        (lambda g: edited(g, ZARRAY, dtype="<U8"), "metadata", "expected an array of numbers"),
        (lambda g: with_values(g, np.ones((1, *GRID.shape), np.uint8)), "rank", r"three axes"),
    ],
)
def test_what_is_not_a_plain_array(tmp_path, good, change, rule, words):
    findings = check(tmp_path, change(good))
    assert rules(findings) == [rule]
    assert words in str(findings[0])


# -- where it lies -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "severity", "rule", "words"),
    [
        ({"voxel_size": [4, 4, 4]}, "error", "voxel-size", "[4, 4, 4] with the table's shape"),
        ({"voxel_size": [16, 16, 16]}, "error", "voxel-size", "would stretch it"),
        ({"voxel_size": "8nm"}, "error", "attributes", "must be three numbers"),
        ({"voxel_size": [8, 0, 8]}, "error", "attributes", "must be positive"),
        ({"voxel_size": None}, "warning", "no-voxel-size", "no attribute voxel_size"),
        ({"translation": None}, "warning", "no-translation", "no attribute translation"),
        ({"translation": [800, 1600, 400]}, "error", "translation", "center of the first voxel, not its corner"),
        ({"translation": [805, 1604, 404]}, "warning", "translation", "off by"),
        ({"translation": [0, 0, 0]}, "error", "translation", "expected [804, 1604, 404]"),
        ({"translation": [404, 1604, 804]}, "error", "axis-order", "the table's in another order"),
        ({"translation": [804, float("nan"), 404]}, "error", "attributes", "finite"),
    ],
)
def test_wrong_or_missing_attributes(tmp_path, good, changes, severity, rule, words):
    findings = check(tmp_path, edited(good, ZATTRS, **changes))
    assert [(f.severity, f.rule) for f in findings] == [(severity, rule)]
    assert words in str(findings[0])


def test_reversed_voxel_size(tmp_path, good):
    findings = check(tmp_path, edited(good, "crop12/er/.zattrs", voxel_size=[2, 2, 1.74]))
    assert rules(findings) == ["axis-order"]
    assert "[1.74, 2, 2] (z, y, x)" in str(findings[0])


def test_other_names_of_the_attributes_count_as_the_scorer_reads_them(tmp_path, good):
    files = edited(good, ZATTRS, voxel_size=None, translation=None, resolution=[1, 8, 8, 8], offset=[804, 1604, 404])
    assert check(tmp_path, files) == []


@pytest.mark.parametrize(
    ("shape", "severity", "rule"),
    [
        ((28, 24, 20), "error", "axis-order"),
        ((20, 24, 27), "error", "shape"),
        ((20, 24, 30), "warning", "shape"),
        ((400, 480, 560), "error", "too-large"),
    ],
)
def test_wrong_shapes(tmp_path, good, shape, severity, rule):
    if rule == "too-large":
        files = edited(good, ZARRAY, shape=[n * 17 for n in GRID.shape])
    else:
        files = with_values(good, np.ones(shape, np.uint8))
    findings = check(tmp_path, files)
    assert [(f.severity, f.rule) for f in findings] == [(severity, rule)]


@pytest.mark.parametrize(
    ("shape", "voxel", "severity", "words"),
    [((10, 12, 14), 16, "warning", "the portal resamples"), ((10, 12, 7), 16, "error", "covers 50.0% of the crop")],
)
def test_other_voxel_sizes_are_resampled_where_they_cover_the_crop(tmp_path, good, shape, voxel, severity, words):
    files = with_values(good, np.ones(shape, np.uint8))
    findings = check(tmp_path, edited(files, ZATTRS, voxel_size=[voxel] * 3, translation=[808, 1608, 408]))
    assert [(f.severity, f.rule) for f in findings] == [(severity, "voxel-size")]
    assert words in str(findings[0])


def test_a_wrong_shape_without_a_voxel_size_is_an_error(tmp_path, good):
    files = edited(with_values(good, np.ones((10, 10, 10), np.uint8)), ZATTRS, voxel_size=None)
    assert "no-voxel-size" in rules(check(tmp_path, files))


# -- what it holds -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "severity", "rule", "words"),
    [
        (np.zeros(GRID.shape, np.uint8), "warning", "empty", "no voxel above 0"),
        (np.full(GRID.shape, 0.3, np.float32), "error", "dtype", "fractions (up to 0.3) in float32"),
        (np.ones(GRID.shape, np.float32), "warning", "dtype", "whole numbers as float32"),
        (two_boxes(GRID, np.int8) * np.int8(-1) + two_boxes(GRID, np.int8).T.reshape(GRID.shape), "error", "dtype",
         "negative values"),
    ],
)  # fmt: skip
def test_values_that_are_no_labels(tmp_path, good, values, severity, rule, words):
    findings = check(tmp_path, with_values(good, values))
    assert (severity, rule) in [(f.severity, f.rule) for f in findings]
    assert any(words in str(f) for f in findings)


def test_the_verb_counts_in_english(tmp_path, good, capsys):
    TABLE.save(tmp_path / "table.csv")
    for number, said in enumerate(("0 errors, 0 warnings", "1 error, 0 warnings", "2 errors, 0 warnings")):
        wrong = dict.fromkeys(("crop7/er/.zattrs", "crop7/mito/.zattrs")[:number], b"{")
        submission = pack(tmp_path / f"{number}.zip", {**good, **wrong})
        assert main(["validate", str(submission), "--crops", str(tmp_path / "table.csv")]) == (1 if number else 0)
        assert capsys.readouterr().out.splitlines()[-1] == f"{submission}: {said}"


@pytest.mark.parametrize(
    ("number", "what", "said"),
    [(1, "class", "1 class"), (0, "class", "0 classes"), (2, "entry", "2 entries"), (2, "box", "2 boxes"),
     (2, "array", "2 arrays"), (3, "patch", "3 patches")],
)  # fmt: skip
def test_a_number_with_its_noun(number, what, said):
    assert number_of(number, what) == said


def test_nan_is_counted(tmp_path, good):
    values = two_boxes(GRID, np.float32)
    values[0, 0, :5] = np.nan
    findings = check(tmp_path, with_values(good, values))
    assert [(f.severity, f.rule) for f in findings] == [("warning", "nan"), ("warning", "dtype")]
    assert "5 voxels of NaN" in str(findings[0])


def test_wrapped_and_very_large_ids(tmp_path, good):
    spots = np.zeros(GRID.shape, np.uint8)
    spots[::2, ::2, ::2] = (np.arange(10 * 12 * 14) % 255 + 1).reshape(10, 12, 14)
    findings = check(tmp_path, with_values(good, spots, path="crop7/mito"))
    assert rules(findings) == ["wrapped-ids"]
    assert rules(findings, "warning") == ["too-many-instances"]
    large = two_boxes(GRID, np.uint64) * np.uint64(2**33)
    assert rules(check(tmp_path, with_values(good, large, path="crop7/mito")), "warning") == ["large-ids"]


def test_too_many_instances_are_estimated_without_a_truth_and_known_with_one(tmp_path, good):
    spots = np.zeros(GRID.shape, np.uint8)
    spots[::2, ::2, ::2] = 1  # 1680 pieces of one value
    files = with_values(good, spots, path="crop7/mito")
    (finding,) = check(tmp_path, files)
    assert (finding.severity, finding.rule) == ("warning", "too-many-instances")
    assert "expected at most 141 if there are 5, got 1680 objects" in str(finding)
    assert "unless the ground truth holds at least 168" in str(finding)
    truth = tmp_path / "truth.zarr"
    write_group(truth)
    for entry in TABLE:
        write_array(truth / entry.crop_name / entry.class_name, entry.grid, two_boxes(entry.grid))
    findings = check(tmp_path, files, truth=truth)
    assert rules(findings) == ["too-many-instances"]
    assert "at most 87 for 2 true ones" in str(findings[0])
    shutil.rmtree(truth / "crop7/mito")
    assert ("warning", "no-truth") in [(f.severity, f.rule) for f in check(tmp_path, files, truth=truth)]


def test_an_empty_array_is_an_error_where_the_truth_is_not_empty(tmp_path, good):
    truth = tmp_path / "truth.zarr"
    write_group(truth)
    for entry in TABLE:
        write_array(truth / entry.crop_name / entry.class_name, entry.grid, two_boxes(entry.grid))
    empty = with_values(good, np.zeros(GRID.shape, np.uint8))
    assert rules(check(tmp_path, empty, truth=truth)) == ["empty"]
    write_array(truth / "crop7/er", GRID, np.zeros(GRID.shape, np.uint8))
    (truth / "crop7/er/0.0.0").unlink()
    assert check(tmp_path, empty, truth=truth) == []


def test_corrupt_chunks_are_named(tmp_path, good):
    for data in (b"", b"garbage", good["crop7/er/0.0.0"][:-4], bytes(numcodecs.Zstd().encode(np.zeros(10**6, "u1")))):
        findings = check(tmp_path, {**good, "crop7/er/0.0.0": data})
        assert rules(findings) == ["corrupt"]
        assert "crop7/er/0.0.0" in str(findings[0])


def test_damage_to_the_zip_itself_is_found(tmp_path, good):
    path = pack(tmp_path / "s.zip", good)
    data = path.read_bytes()
    at = data.index(good["crop7/er/0.0.0"])
    path.write_bytes(data[:at] + bytes(b ^ 255 for b in data[at : at + 20]) + data[at + 20 :])
    (finding,) = validate_submission(path, TABLE)
    assert finding.rule == "corrupt"
    assert "crop7/er/0.0.0 cannot be read (Bad CRC-32" in str(finding)
    path.write_bytes(data[:-30])
    assert rules(validate_submission(path, TABLE)) == ["not-a-zip"]


def test_an_encrypted_file_stops_the_check(tmp_path, good):
    path = pack(tmp_path / "s.zip", good)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(data)
    assert rules(validate_submission(path, TABLE)) == ["encrypted"]


def test_a_chunk_that_claims_to_be_huge_costs_no_memory(tmp_path, good):
    """A Zstandard frame whose header says 2^40 bytes."""
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + (2**40).to_bytes(8, "little") + b"\x01\x00\x00"
    (finding,) = check(tmp_path, {**good, "crop7/er/0.0.0": bomb})
    assert finding.rule == "corrupt"
    assert "crop7/er/0.0.0 cannot be decoded" in str(finding)


def frame(*blocks: tuple[int, int, bytes], descriptor: bytes = b"\x00\x58") -> bytes:
    """A Zstandard frame (by default of unstated size) of blocks: kind, size, bytes."""
    out = b"\x28\xb5\x2f\xfd" + descriptor
    for n, (kind, size, data) in enumerate(blocks, start=1):
        out += (int(n == len(blocks)) | kind << 1 | size << 3).to_bytes(3, "little") + data
    return out


def test_zstandard_data_that_would_grow_is_refused_by_the_check_and_by_the_scorer(tmp_path, good):
    repeated = (1, 1 << 17, b"\x01")  # 4 bytes for 128 KB
    small = bytes(numcodecs.Zstd().encode(bytes(13440)))
    bombs = {
        "frames without a stated size": frame(*[repeated] * 3000),
        "many frames": frame(*[repeated] * 300) * 10,
        "frames that are right by themselves": small * 100,
    }
    truth = tmp_path / "truth"
    write_group(truth)
    write_array(truth / "crop7/er", GRID, two_boxes(GRID))
    for name, data in bombs.items():
        files = {**good, "crop7/er/0.0.0": data}
        tracemalloc.start()
        assert rules(check(tmp_path, files)) == ["corrupt"], name
        with pytest.raises(CorruptDataError, match=r"crop7/er/0\.0\.0 cannot be decoded"):
            score_submission(tmp_path / "s.zip", truth)
        assert tracemalloc.get_traced_memory()[1] < 20e6, name
        tracemalloc.stop()
    # What streaming writers make, the size unstated, is read.
    values = two_boxes(GRID).tobytes()
    assert check(tmp_path, {**good, "crop7/er/0.0.0": frame((0, len(values), values))}) == []


def test_a_file_that_inflates_beyond_its_stated_size_costs_no_memory(tmp_path, good):
    """300 MB of zeros in a zip that states 100 bytes, and the checksum of those."""
    path = pack(tmp_path / "s.zip", good)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("crop12/.zattrs", bytes(300_000_000))
        offset = archive.getinfo("crop12/.zattrs").header_offset
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    for crc, size in ((offset + 14, offset + 22), (directory + 16, directory + 24)):
        data[crc : crc + 4] = zlib.crc32(bytes(100)).to_bytes(4, "little")
        data[size : size + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    with Archive(path) as archive:
        assert archive.read("crop12/.zattrs") == bytes(100)
    assert ZipStore(path).read("crop12/.zattrs") == bytes(100)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_ways_of_packing_that_do_not_come_piece_by_piece_stop_the_check(tmp_path, good):
    path = pack(tmp_path / "s.zip", good)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("crop7/er/0.0.1", bytes(1000))
    assert rules(validate_submission(path, TABLE)) == ["zip-method"]
    with pytest.raises(InputError, match="stored or deflated"):
        ZipStore(path)


def test_folders_without_end_stop_the_check(tmp_path, good):
    path = pack(tmp_path / "s.zip", {**good, "a/" * 20_000 + "b": b"x"})
    assert rules(validate_submission(path, TABLE)) == ["deep-path"]
    with pytest.raises(InputError, match="20001 nested folders"):
        ZipStore(path)


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(["shape", "chunks", "dtype", "compressor", "fill_value", "order", "filters", "zarr_format",
                         "dimension_separator", "voxel_size", "translation", "resolution"]),
    value=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=4),
                  st.sampled_from(["<u2", "|b1", "zstd", "F", "NaN"])),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["id", "a"]), inner)),
        max_leaves=6,
    ),
)  # fmt: skip
def test_whatever_stands_in_the_metadata_is_found_and_never_raised(tmp_path_factory, good, key, value):
    name = ZATTRS if key in ("voxel_size", "translation", "resolution") else ZARRAY
    files = {**good, name: json.dumps({**json.loads(good[name]), key: value}).encode()}
    path = pack(tmp_path_factory.getbasetemp() / "metadata.zip", files)
    for finding in validate_submission(path, TABLE):
        assert "\n" not in str(finding)


@pytest.mark.parametrize("name", [".", "/", "crop7//er/.zarray", "crop7/er/.zarray/x", "\x01", "crop7/er/"])
def test_strange_names_are_survived(tmp_path, good, name):
    path = pack(tmp_path / "s.zip", {**good, name: b"{}"})
    validate_submission(path, TABLE)
    with contextlib.suppress(InputError):
        ZipStore(path).close()


def test_chunks_under_other_names_are_not_read(tmp_path, good):
    files = {k.replace("crop7/er/0.0.0", "crop7/er/0/0/0"): v for k, v in good.items()}
    findings = check(tmp_path, files)
    assert rules(findings) == ["chunk-names"]
    assert "expected names like crop7/er/0.0.0, got 1 files that are not" in str(findings[0])
    assert check(tmp_path, edited(files, ZARRAY, dimension_separator="/")) == []


def test_submissions_that_zarr_python_wrote(tmp_path):
    for separator in (".", "/"):
        root = zarr.open_group(str(tmp_path / f"g{separator == '.'}"), mode="w", zarr_format=2)
        for entry in TABLE:
            array = root.create_array(
                f"{entry.crop_name}/{entry.class_name}",
                shape=entry.grid.shape,
                chunks=(8, 8, 8),
                dtype="uint16",
                compressors=numcodecs.Blosc("zstd", 5),
                chunk_key_encoding={"name": "v2", "separator": separator},
            )
            array[:] = two_boxes(entry.grid)
            array.attrs.update(voxel_size=entry.grid.voxel_size, translation=entry.grid.translation)
        assert validate_submission(tmp_path / f"g{separator == '.'}", TABLE) == []
        zip_folder(tmp_path / f"g{separator == '.'}", tmp_path / "z.zip")
        assert validate_submission(tmp_path / "z.zip", TABLE) == []


def test_findings_are_errors_first_and_one_line_each(tmp_path, good):
    files = edited(good, "crop12/er/.zattrs", voxel_size=[9, 9, 9])
    files = edited(with_values(files, np.zeros(GRID.shape, np.uint8)), "crop7/mito/.zattrs", translation=None)
    findings = check(tmp_path, files)
    assert [f.severity for f in findings] == ["error", "warning", "warning"]
    for finding in findings:
        assert "\n" not in str(finding)
        assert set(finding.to_dict()) == {"severity", "rule", "path", "found", "expected", "what_to_do"}


# -- counting components slab by slab ----------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.1, 0.3, 0.6]))
def test_components_counted_by_slabs_are_those_of_the_whole(seed, thick, density):
    rng = np.random.default_rng(seed)
    volume = (rng.integers(1, 3, (11, 7, 8)) * (rng.random((11, 7, 8)) < density)).astype(np.uint8)
    components = SlabComponents()
    for z in range(0, 11, thick):
        slab = volume[z : z + thick]
        components.add(slab) if slab.any() else components.skip()
    expected = cc3d.connected_components(volume, connectivity=26, return_N=True)[1]
    assert len(np.unique(components.parents())) - 1 == expected


def test_the_ratio_rule():
    assert instance_limit(1) == pytest.approx(10 + 50 * np.exp(-0.2))
    assert instance_limit(1000) == pytest.approx(10000)
