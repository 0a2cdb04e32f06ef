"""The crop cache: the same voxels as plain reading, entries that cannot be mistaken, processes that share them."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.data.arrays import CropArrays
from connectomics.data.cache import CropCache, cache_key, forecast, open_entry, prepare
from connectomics.data.cache import prepare as prepare_function
from connectomics.data.cache.prepare import BUSY, WorkerDiedError, run_in_processes
from connectomics.data.volumes import CropVolume
from connectomics.errors import CorruptDataError, InputError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.normalization import Normalization
from tests.cellmap.plain_labels import counts
from tests.cellmap.plain_labels import volume_of as decoded
from tests.cellmap.roots import grid_of, plain_root, write_label, write_raw, zarr_of
from tests.data.crop_roots import volume_of, write_fractional_root
from tests.data.light_task import has_the_loader
from tests.s3_server import FolderServer

ROOT = Path(__file__).resolve().parents[2]
preparing = sys.modules[prepare_function.__module__]


@pytest.fixture
def fractional_root(tmp_path: Path) -> Path:
    return write_fractional_root(tmp_path)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process, which runs ``code``."""
    head = "import sys\nfrom pathlib import Path\nfrom tests.data.crop_roots import volume_of\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]


def said(process: subprocess.Popen[str]) -> str:
    """The next line of another process."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.stderr.read() if process.stderr else ""
    return line


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def laid_out(arrays: CropArrays, lo: NDArray, hi: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Raw, inside, present and known (first class) on lattice indices ``lo`` to ``hi``, as `CropArrays` defines it."""
    shape = tuple(hi - lo)
    raw, inside = np.zeros(shape, np.uint8), np.zeros(shape, bool)
    codes = np.zeros(shape, np.int64)
    for block, begin, out in (
        (arrays.raw, arrays.raw_begin, raw),
        (np.ones(arrays.raw.shape, bool) if arrays.inside is None else arrays.inside, arrays.raw_begin, inside),
        (arrays.codes, arrays.codes_begin, codes),
    ):
        offset = np.array(begin) - lo
        low, high = np.maximum(offset, 0), np.minimum(offset + block.shape, shape)
        if np.all(high > low):
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            out[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = block[source]
    present, known = arrays.states.tables()
    return raw, inside, present[0][codes], known[0][codes]


# -- the same as plain reading ---------------------------------------------------------------------------------------
def test_cache_gives_what_plain_reading_gives(fractional_root: Path, tmp_path: Path) -> None:
    plain = volume_of(fractional_root)
    cached = volume_of(fractional_root, cache=tmp_path / "cache", context=(20, 20, 20))
    rng = np.random.default_rng(0)
    for _ in range(12):
        grid = plain.grid.crop(rng.integers(-40, 40, 3), (12, 16, 20))  # some past the context, past raw, past the crop
        labels = decoded(plain.label_codes(grid)), decoded(cached.label_codes(grid))
        np.testing.assert_array_equal(labels[0].present, labels[1].present)
        np.testing.assert_array_equal(labels[0].known, labels[1].known)
        for a, b in zip((*plain.read_raw(grid), *plain.read_labels(grid)),
                        (*cached.read_raw(grid), *cached.read_labels(grid)), strict=True):  # fmt: skip
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert len(CropCache(tmp_path / "cache").entries()) == 1


def test_arrays_hold_the_same_with_and_without_cache(fractional_root: Path, tmp_path: Path) -> None:
    plain = volume_of(fractional_root)
    cached = volume_of(fractional_root, cache=tmp_path / "cache", context=(6, 9, 12))
    rng = np.random.default_rng(1)
    for _ in range(12):
        lo = rng.integers(-40, 30, 3)
        hi = lo + rng.integers(1, 40, 3)
        raw, inside = plain.decode_raw(plain.grid.crop(lo, hi - lo))
        label = plain.decode_labels(plain.grid.crop(lo, hi - lo))
        for volume in (plain, cached):
            found = laid_out(volume.plain_arrays(lo, hi), lo, hi)
            for a, b in zip(found, (raw, inside, label.present_of("mito"), label.known_of("mito")), strict=True):
                np.testing.assert_array_equal(a, b)


def test_whole_raw_takes_no_mask_and_no_copy(tmp_path: Path) -> None:
    volume = volume_of(plain_root(tmp_path), cache=tmp_path / "cache", context=(5, 5, 5))
    arrays = volume.plain_arrays((0, 0, 0), (16, 16, 16))
    assert arrays.inside is None
    assert arrays.raw.shape == (16, 16, 16)  # the raw volume ends where the crop does: no context to keep
    assert not arrays.raw.flags.owndata
    assert not arrays.raw.flags.writeable
    assert volume_of(tmp_path).arrays((-3, 0, 0), (8, 16, 16)).inside is None


def test_the_cache_suffices_where_raw_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw of 16 voxels before 40: what reaches past its begin needs no Zarr, what reaches past the context does."""
    rng = np.random.default_rng(0)
    write_raw(tmp_path, "set-a", rng.integers(0, 255, (56, 40, 40), dtype=np.uint8), grid_of((56, 40, 40)))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((8, 40, 40), np.uint8), grid_of((8, 40, 40)))
    volume = volume_of(tmp_path, cache=tmp_path / "cache", context=(10, 4, 4))
    volume.prepare()

    def unexpected(self: CropVolume, grid: VoxelGrid) -> object:
        raise AssertionError(f"read {grid} from Zarr")

    monkeypatch.setattr(CropVolume, "decode_raw", unexpected)
    assert volume.plain_arrays((-50, -20, -20), (18, 60, 60)).raw.shape == (18, 40, 40)
    volume.read_raw(volume.grid.crop((-50, -20, -20), (68, 80, 80)))
    volume.plain_arrays((100, 0, 0), (110, 10, 10))  # all of it beyond raw
    with pytest.raises(AssertionError):
        volume.plain_arrays((0, 0, 0), (19, 40, 40))


def test_a_view_without_classes_holds_raw_alone(tmp_path: Path) -> None:
    volume = volume_of(plain_root(tmp_path), classes=(), cache=tmp_path / "cache")
    volume.prepare()
    assert CropCache(tmp_path / "cache").open(CropCache(tmp_path / "cache").ensure(volume)).files[
        "codes.npy"
    ].shape == (0, 0, 0)
    assert volume.counts == {}
    for seen in (volume, volume_of(tmp_path, classes=())):
        assert len(seen.arrays((0, 0, 0), (4, 4, 4)).states) == 1
        np.testing.assert_array_equal(seen.label_codes(seen.grid).codes, 0)


@pytest.fixture
def many_states(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """70 classes of one's own on 140x8x8 voxels: up to z = 128 nothing is present, from there each at random."""
    grid = grid_of((140, 8, 8))
    rng = np.random.default_rng(3)
    write_raw(tmp_path, "set-a", np.full(grid.shape, 9, np.uint8), grid)
    names = tuple(f"own{n:02d}" for n in range(70))
    for name in names:
        label = np.zeros(grid.shape, np.uint8)
        label[128:] = rng.random((12, 8, 8)) < 0.5
        write_label(tmp_path, "set-a", "crop1", name, label, grid)
    return tmp_path, names


def test_more_than_256_states_and_64_classes(many_states: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    root, names = many_states
    plain, cached = volume_of(root, classes=names), volume_of(root, classes=names, cache=tmp_path / "cache")
    arrays = cached.arrays((0, 0, 0), (140, 8, 8))
    assert arrays.codes.dtype == np.uint16  # the second layer of blocks has 768 voxels, all different
    assert len(arrays.states) == 2 + 768
    for a, b in zip(plain.read_labels(plain.grid), cached.read_labels(plain.grid), strict=True):
        np.testing.assert_array_equal(a, b)
    assert cached.counts is not None
    for name in (names[0], names[69]):
        assert cached.counts[name] == counts(plain.decode_labels(plain.grid), name)


# -- where classes are -----------------------------------------------------------------------------------------------
def test_points_are_uniform_over_all_voxels_of_a_class(tmp_path: Path) -> None:
    """A dense slab, and one of a voxel in eight, in blocks of their own: each voxel is as likely as any other."""
    grid = grid_of((140, 32, 64))
    label = np.zeros(grid.shape, np.uint8)
    label[:20] = 1
    label[-12:, ::2, ::2] = 1
    label[-11::2] = 0
    write_raw(tmp_path, "set-a", np.ones(grid.shape, np.uint8), grid)
    write_label(tmp_path, "set-a", "crop1", "mito", label, grid)
    write_label(
        tmp_path, "set-a", "crop1", "ld", np.pad(np.ones((1, 1, 1), np.uint8), ((5, 134), (6, 25), (7, 56))), grid
    )
    volume = volume_of(tmp_path, cache=tmp_path / "cache")
    points = volume.points("mito")
    assert points is not None
    index = np.round(grid.to_index(points)).astype(int)
    np.testing.assert_allclose(grid.to_world(index), points)
    assert label[tuple(index.T)].all()
    assert len(np.unique(index, axis=0)) == len(index) == 4096
    dense, total = 20 * 32 * 64, int(label.sum())
    expected = 4096 * dense / total
    assert abs((index[:, 0] < 20).sum() - expected) < 4 * np.sqrt(expected * (1 - dense / total))
    parts = np.bincount((index[:, 1] // 8) * 8 + index[:, 2] // 8, minlength=32)  # 32 columns of equal volume
    chi_square = ((parts - 128) ** 2 / 128).sum()
    assert 11 < chi_square < 62  # 31 degrees of freedom, 0.1 % on both sides
    first = index[:512, 0] < 20  # in random order: the first ones are a sample, too
    assert abs(first.mean() - dense / total) < 0.02
    np.testing.assert_array_equal(volume.points("ld"), grid.to_world([[5, 6, 7]]))
    assert volume.counts is not None
    assert volume.counts["mito"] == {"present": total, "absent": grid.size - total, "unknown": 0}


def test_points_do_not_depend_on_what_else_is_asked_for(tmp_path: Path) -> None:
    root = plain_root(tmp_path)
    cache = tmp_path / "cache"
    points = [
        volume_of(root, classes=classes, context=context, cache=cache).points("mito")
        for classes, context in ((("mito", "ld"), (0, 0, 0)), (("nuc", "ld", "mito"), (4, 4, 4)))
    ]
    assert points[0] is not None
    assert len(points[0]) == 216
    np.testing.assert_array_equal(points[0], points[1])
    assert volume_of(root).points("mito") is None  # without a cache
    assert volume_of(root).counts is None


# -- what an entry stands for ----------------------------------------------------------------------------------------
def test_the_key_changes_with_options_metadata_and_chunks(fractional_root: Path) -> None:
    def key(**options: object) -> str:
        return cache_key(volume_of(fractional_root, **options))  # type: ignore[arg-type]

    crop = Catalog.open(str(fractional_root)).crops()[0]
    keys = [key(), key(context=(1, 1, 1)), key(classes=("mito",)), key(normalization=Normalization(0, 200))]
    keys.append(cache_key(CropVolume(crop, ("mito", "ld"), (8.0, 8.0, 16.0))))
    recon = zarr_of(fractional_root, "set-a") / "recon-1"
    chunk = recon / "labels/groundtruth/crop1/mito/s0/0/0/0"
    assert key() == keys[0]
    chunk.write_bytes(chunk.read_bytes())  # the same bytes, written again: nobody can know without reading them
    keys.append(key())
    attrs = recon / "labels/groundtruth/crop1/mito/.zattrs"
    content = json.loads(attrs.read_text())
    content["cellmap"]["annotation"]["annotation_type"]["encoding"]["unknown"] = 254
    attrs.write_text(json.dumps(content))
    keys.append(key())
    hole = recon / "em/fibsem-uint8/s0/0/1"
    shutil.copytree(recon / "em/fibsem-uint8/s0/1/1", hole)  # raw fetched later
    keys.append(key())
    (recon / "em/fibsem-uint8/s1/9/9/9").mkdir(parents=True)  # nothing that is read
    assert key() == keys[-1]
    assert len(set(keys)) == len(keys)


def test_over_s3_the_key_follows_etags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw of 192 voxels along x, the crop in the first chunk: only what is looked at counts."""
    grid = grid_of((64, 64, 192))
    root = tmp_path / "served"
    location = write_raw(root, "set-a", np.ones(grid.shape, np.uint8), grid)
    write_label(root, "set-a", "crop1", "mito", np.ones((32, 32, 32), np.uint8), grid_of((32, 32, 32)))
    with FolderServer(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)

        def volume() -> CropVolume:
            crop = Catalog.open("s3://public/served").crops()[0]
            return CropVolume(crop, ("mito",), (8.0, 8.0, 8.0), cache=tmp_path / "cache")

        keys = [cache_key(volume())]
        chunk = location / "s0/0/0/2"
        chunk.write_bytes(chunk.read_bytes())
        assert cache_key(volume()) == keys[0]
        for path in (location / "s0/0/0/0", zarr_of(root, "set-a") / "recon-1/labels/groundtruth/crop1/mito/s0/0/0/0"):
            path.write_bytes(path.read_bytes())
            keys.append(cache_key(volume()))
        (location / "s0/0/0/0").unlink()
        keys.append(cache_key(volume()))
        assert len(set(keys)) == 4
        remote = volume()
        with pytest.raises(InputError, match=r"1 of the 1 raw chunks .*s3://public/served.*s0/0/0/0"):
            remote.check()
        assert not remote.read_raw(remote.grid)[1].any()
    remote.read_labels(remote.grid)  # the server is gone: the entry is enough


def test_raw_that_was_fetched_later_is_seen(fractional_root: Path, tmp_path: Path) -> None:
    """A partial download is decoded with holes; more of it makes another entry."""
    whole = zarr_of(fractional_root, "set-a") / "recon-1/em/fibsem-uint8"
    before = volume_of(fractional_root, cache=tmp_path / "cache", context=(30, 30, 30))
    grid = before.grid.grow(20)
    holes = before.read_raw(grid)[1]
    shutil.copytree(whole / "s0/1/1", whole / "s0/0/1", dirs_exist_ok=True)
    after = volume_of(fractional_root, cache=tmp_path / "cache", context=(30, 30, 30))
    assert after.read_raw(grid)[1].sum() > holes.sum()
    np.testing.assert_array_equal(after.read_raw(grid)[1], volume_of(fractional_root).read_raw(grid)[1])


def test_missing_raw_under_a_crop_is_an_error_unless_allowed(tmp_path: Path) -> None:
    grid = grid_of((64, 64, 192))
    location = write_raw(tmp_path, "set-a", np.ones(grid.shape, np.uint8), grid)
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((64, 64, 64), np.uint8), grid_of((64, 64, 64)))
    (location / "s0/0/0/1").unlink()  # beside the crop: context is masked, as ever
    volume_of(tmp_path, context=(64, 64, 64)).check()
    (location / "s0/0/0/0").unlink()
    with pytest.raises(
        InputError, match=r"set-a/crop1: 1 of the 1 raw chunks .*s0/0/0/0; .*data\.allow_missing_raw=true"
    ):
        volume_of(tmp_path).check()
    volume_of(tmp_path, allow_missing_raw=True).check()


# -- damage ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "of another crop"])
def test_a_damaged_entry_is_one_clear_line(fractional_root: Path, tmp_path: Path, damage: str) -> None:
    volume = volume_of(fractional_root, cache=tmp_path / "cache")
    volume.prepare()
    file = CropCache(tmp_path / "cache").ensure(volume) / "raw.npy"
    if damage == "missing":
        file.unlink()
    elif damage == "of another crop":
        np.save(file, np.zeros((3, 3, 3), np.uint8))
    else:
        file.write_bytes(file.read_bytes()[: 200 if damage == "cut" else 0])
    for read in (volume, volume_of(fractional_root, cache=tmp_path / "cache")):
        with pytest.raises(CorruptDataError, match=r"raw\.npy .*delete that folder and run again") as error:
            read.read_raw(volume.grid)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["entry.json", "states.npy", "points.npy", "codes.npy", "raw.npy"])
def test_changed_bytes_are_noticed_when_an_entry_is_opened(tmp_path: Path, name: str) -> None:
    cache = tmp_path / "cache"
    volume_of(plain_root(tmp_path), cache=cache).prepare()
    file = CropCache(cache).entries()[0].folder / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(b"{" if name == "entry.json" else content)
    with pytest.raises(CorruptDataError, match=rf"{name} .*delete that folder"):
        volume_of(tmp_path, cache=cache).prepare()


def test_a_changed_byte_in_a_large_file_is_found_by_the_full_check(tmp_path: Path) -> None:
    grid = grid_of((128, 128, 128))
    write_raw(tmp_path, "set-a", np.ones(grid.shape, np.uint8), grid)
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    volume = volume_of(tmp_path, cache=tmp_path / "cache", context=(120, 120, 120))
    entry = CropCache(tmp_path / "cache").ensure(volume)
    with (entry / "raw.npy").open("r+b") as file:
        file.seek(50_000)
        file.write(b"x")
    open_entry(entry, "pages")  # 16 pages of 512 are looked at
    with pytest.raises(CorruptDataError, match=r"raw\.npy .*checksum"):
        open_entry(entry, "all")
    with (entry / "raw.npy").open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(CorruptDataError, match=r"raw\.npy"):
        open_entry(entry, "pages")


def test_an_entry_without_its_description_is_made_again(fractional_root: Path, tmp_path: Path) -> None:
    cache = CropCache(tmp_path / "cache")
    volume = volume_of(fractional_root)
    entry = cache.ensure(volume)
    assert json.loads((entry / "entry.json").read_text())["crop"] == volume.crop.key
    (entry / "entry.json").unlink()
    assert cache.ensure(volume_of(fractional_root)) == entry
    assert (entry / "entry.json").is_file()
    assert [e.folder for e in cache.entries()] == [entry]


def test_a_full_disk_is_noticed_before_it_kills_the_process(
    fractional_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WriteError, match="No space left"):
        volume_of(fractional_root, cache=tmp_path / "cache").prepare()
    assert leftovers(tmp_path / "cache") == []
    assert CropCache(tmp_path / "cache").entries() == []


def test_what_cannot_be_read_is_not_blamed_on_the_cache(fractional_root: Path, tmp_path: Path) -> None:
    chunk = next(p for p in (zarr_of(fractional_root, "set-a") / "recon-1/labels").rglob("s0/0/0/0"))
    chunk.write_bytes(b"no chunk")
    with pytest.raises(CorruptDataError, match="mito"):
        volume_of(fractional_root, cache=tmp_path / "cache").prepare()
    assert leftovers(tmp_path / "cache") == []


def leftovers(folder: Path) -> list[str]:
    """What is in a cache folder beside entries, service files apart."""
    names = {path.name for path in folder.iterdir()} - {e.name for e in CropCache(folder).entries()}
    locks = [path.name for path in (folder / ".locks").glob("*")]
    return sorted(names - {".lock", ".locks", ".leases", ".budget"}) + locks


# -- processes -------------------------------------------------------------------------------------------------------
def test_reading_keeps_no_file_open(fractional_root: Path, tmp_path: Path) -> None:
    """The challenge has more crops than a process may have open files."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    volume = volume_of(fractional_root, cache=tmp_path / "cache")
    volume.read_labels(volume.grid)
    before = len(list(descriptors.iterdir()))
    others = [volume_of(fractional_root, cache=tmp_path / "cache") for _ in range(5)]
    for other in others:
        other.read_labels(other.grid)
        other.arrays((0, 0, 0), other.grid.shape)
    assert len(list(descriptors.iterdir())) <= before


def test_a_worker_is_told_where_the_entry_is(fractional_root: Path, tmp_path: Path) -> None:
    volume = volume_of(fractional_root, cache=tmp_path / "cache", allow_missing_raw=True)
    volume.prepare()
    volume.read_raw(volume.grid)
    data = pickle.dumps(volume)
    assert len(data) < 20_000
    sent = pickle.loads(data)
    assert sent.allow_missing_raw
    shutil.rmtree(zarr_of(fractional_root, "set-a") / "recon-1/labels")  # not looked at again
    np.testing.assert_array_equal(sent.label_codes(volume.grid).codes, volume.label_codes(volume.grid).codes)


BUILD_AND_COUNT = """
from connectomics.data.cache import build, folder, prepare
plain = build.build
def counted(volume, folder):
    with open(sys.argv[2], "a") as file:
        file.write("built\\n")
    plain(volume, folder)
build.build = counted
volume = volume_of(Path(sys.argv[1]), cache=Path(sys.argv[1]) / "cache", context=(30, 30, 30))
print("ready", flush=True)
sys.stdin.readline()
prepare([volume])
print(int(volume.read_raw(volume.grid)[0].sum()), flush=True)
"""


def test_processes_that_build_at_once_build_once(fractional_root: Path, tmp_path: Path) -> None:
    processes = [python(BUILD_AND_COUNT, fractional_root, tmp_path / "log") for _ in range(3)]
    for process in processes:
        assert said(process) == "ready"
    results = set()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        results.add(int(out))
    plain = volume_of(fractional_root)
    assert results == {int(plain.read_raw(plain.grid)[0].sum())}
    assert (tmp_path / "log").read_text() == "built\n"
    assert len(CropCache(tmp_path / "cache").entries()) == 1
    assert leftovers(tmp_path / "cache") == []


STUCK = """
import time
from connectomics.data.volumes import CropVolume
def stuck(self, grid):
    print("half way", flush=True)
    time.sleep(600)
CropVolume.decode_labels = stuck
volume_of(Path(sys.argv[1]), cache=Path(sys.argv[1]) / "cache").prepare()
"""


def test_a_killed_build_leaves_nothing(fractional_root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = python(STUCK, fractional_root)
    assert said(process) == "half way"
    killed(process)
    assert CropCache(cache).entries() == []
    assert leftovers(cache) != []
    prepare([volume_of(fractional_root, cache=cache)])
    assert len(CropCache(cache).entries()) == 1
    assert leftovers(cache) == []
    killed_again = python(STUCK.replace("cache=", "context=(3, 3, 3), cache="), fractional_root)
    assert said(killed_again) == "half way"
    killed(killed_again)
    assert leftovers(cache) != []
    prepare([volume_of(fractional_root, cache=cache)])  # another entry: also what nobody builds again is swept
    assert leftovers(cache) == []


@pytest.fixture
def three_crops(tmp_path: Path) -> Path:
    """Three crops of 32^3 voxels in one data set."""
    rng = np.random.default_rng(0)
    write_raw(tmp_path, "set-a", rng.integers(0, 255, (96, 32, 32), dtype=np.uint8), grid_of((96, 32, 32)))
    for number in range(3):
        grid = grid_of((32, 32, 32)).crop((32 * number, 0, 0), (32, 32, 32))
        write_label(tmp_path, "set-a", f"crop{number}", "mito", np.ones((32, 32, 32), np.uint8), grid)
    return tmp_path


def crops_of(root: Path, **options: object) -> list[CropVolume]:
    return [volume_of(root, crop=n, classes=("mito",), **options) for n in range(3)]  # type: ignore[arg-type]


def test_crops_are_built_in_processes(three_crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_LITTLE", 0)
    told: list[tuple[int, int]] = []
    volumes = crops_of(three_crops, cache=tmp_path / "cache")
    prepare(volumes, processes=2, progress=lambda done, number, name: told.append((done, number)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for volume, plain in zip(volumes, crops_of(three_crops), strict=True):
        np.testing.assert_array_equal(volume.read_raw(plain.grid)[0], plain.read_raw(plain.grid)[0])
    assert leftovers(tmp_path / "cache") == []


def task_of_kinds(task: str, wait: bool) -> object:
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "wrong":
        raise CorruptDataError("a chunk is damaged")
    if task == "stuck":
        time.sleep(600)
    return BUSY if task == "later" and not wait else None


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [("killed", WorkerDiedError, r"a process that tests was killed \(exit status -9\)"),
     ("wrong", CorruptDataError, "a chunk is damaged")],
)  # fmt: skip
def test_a_process_that_ends_badly_ends_the_work(task: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_in_processes(task_of_kinds, [task, "stuck"], 2, lambda done, task: None, what="tests")


def test_the_server_of_processes_has_what_loader_workers_need() -> None:
    """It is started once: without torch in it, every worker of the loader would import torch again."""
    forkserver._forkserver._stop()
    multiprocessing.get_context("forkserver").set_forkserver_preload([])
    run_in_processes(has_the_loader, ["a"], 1, lambda done, task: None, what="tests")


def test_tasks_that_another_process_is_at_come_last() -> None:
    order: list[str] = []
    run_in_processes(task_of_kinds, ["later", "a", "b"], 1, lambda done, task: order.append(task), what="tests")
    assert order == ["a", "b", "later"]


def test_an_interrupt_stops_the_processes() -> None:
    def advance(done: int, task: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_processes(task_of_kinds, ["stuck", "soon"], 2, advance, what="tests")
    assert multiprocessing.active_children() == []


# -- space -----------------------------------------------------------------------------------------------------------
def test_the_forecast_is_what_it_takes(three_crops: Path, tmp_path: Path) -> None:
    with_holes = volume_of(write_fractional_root(tmp_path / "other"), cache=tmp_path / "cache", context=(40, 40, 40))
    for volume in (crops_of(three_crops, cache=tmp_path / "cache")[0], with_holes):
        cache = CropCache(tmp_path / "cache")
        size = cache.open(cache.ensure(volume)).size
        assert size <= forecast(volume) <= size + 150_000


def test_too_small_a_disk_is_refused_before_anything_is_written(
    three_crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(
        WriteError, match=r"needs 0\.\d MB more for 3 crops.*data\.cache_dir.*data\.cache=none"
    ) as error:
        prepare(crops_of(three_crops, cache=tmp_path / "cache"))
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path / "cache") == []
    assert CropCache(tmp_path / "cache").entries() == []


def test_the_budget_removes_what_was_used_longest_ago(three_crops: Path, tmp_path: Path) -> None:
    cache = CropCache(tmp_path / "cache")
    entries = []
    for volume in crops_of(three_crops, cache=cache.folder):
        volume.prepare()
        entries.append(cache.ensure(volume))
    del volume
    gc.collect()  # nobody uses them any more
    for entry, used in zip(entries, (2000.0, 1000.0, 3000.0), strict=True):
        os.utime(entry / "used", (used, used))
    size = sum(entry.size for entry in cache.entries()) // 3
    (kept,) = [v for v in crops_of(three_crops, cache=cache.folder) if v.name == "crop1"]
    cache.hold(kept, entries[1].name)  # in use: not to be removed, though it is the oldest
    assert [e.folder for e in cache.make_room(2 * size + 1000)] == [entries[0]]
    assert [e.folder for e in cache.make_room(0)] == [entries[2]]
    assert [e.folder for e in cache.entries()] == [entries[1]]
    assert cache.entries()[0].processes == 1
    assert leftovers(cache.folder) == []


HOLD = """
volume_of(Path(sys.argv[1]), cache=Path(sys.argv[1]) / "cache", classes=("mito",), crop=int(sys.argv[2])).prepare()
volume = volume_of(Path(sys.argv[1]), cache=Path(sys.argv[1]) / "cache", classes=("mito",), crop=int(sys.argv[2]))
volume.prepare()
print("in use", flush=True)
sys.stdin.readline()
"""


def test_entries_of_a_living_process_stay_and_those_of_a_dead_one_go(three_crops: Path, tmp_path: Path) -> None:
    cache = CropCache(tmp_path / "cache")
    process = python(HOLD, three_crops, 1)
    assert said(process) == "in use"
    (entry,) = cache.entries()
    assert entry.processes == 1
    assert cache.make_room(0) == []
    assert cache.remove([entry.name]) == []
    killed(process)
    assert cache.entries()[0].processes == 0
    assert [e.name for e in cache.make_room(0)] == [entry.name]
    assert cache.entries() == []


def test_crops_that_do_not_fit_are_streamed(
    three_crops: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    volumes = crops_of(three_crops, cache=tmp_path / "cache")
    prepare(volumes, budget=2 * forecast(volumes[0]) + 1000)
    lines = [r.getMessage() for r in caplog.records if "do not fit" in r.getMessage()]
    assert len(lines) == 1
    assert "1 of 3 crops" in lines[0]
    assert "data.cache_gb=" in lines[0]
    assert len(CropCache(tmp_path / "cache").entries()) == 2
    assert [v.points("mito") is None for v in volumes] == [False, False, True]
    sent = pickle.loads(pickle.dumps(volumes[2]))
    np.testing.assert_array_equal(sent.read_raw(sent.grid)[0], crops_of(three_crops)[2].read_raw(sent.grid)[0])
    assert len(CropCache(tmp_path / "cache").entries()) == 2  # nor does a worker build it
    assert CropCache(tmp_path / "cache").budget == 2 * forecast(volumes[0]) + 1000


def test_a_run_with_a_budget_takes_the_place_of_an_earlier_one(three_crops: Path, tmp_path: Path) -> None:
    first, *others = crops_of(three_crops, cache=tmp_path / "cache")
    prepare([first], budget=2 * forecast(others[0]) + 1000)
    gone = CropCache(tmp_path / "cache").entries()[0].name
    del first
    gc.collect()
    prepare(others, budget=2 * forecast(others[0]) + 1000)
    names = {entry.name for entry in CropCache(tmp_path / "cache").entries()}
    assert len(names) == 2
    assert gone not in names


# -- memory ----------------------------------------------------------------------------------------------------------
IN_MEMORY = """
import multiprocessing, os
from connectomics.data.cache import cache_folder, memory_folder, prepare
def look(volume, pipe):
    pipe.send((str(volume._entry), int(volume.arrays((0, 0, 0), (4, 4, 4)).raw.sum())))
if __name__ == "__main__":
    folder = cache_folder("memory", None)
    assert folder == memory_folder() == cache_folder("memory", "ignored")
    volume = volume_of(Path(sys.argv[1]), cache=folder)
    prepare([volume])
    for method in sys.argv[2:]:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context(method).Process(target=look, args=(volume, theirs))
        process.start()
        seen = ours.recv()
        process.join()
        assert seen == (str(volume._entry), int(volume.arrays((0, 0, 0), (4, 4, 4)).raw.sum())), seen
    print(folder, flush=True)
    sys.stdin.readline()
"""


def test_memory_mode_lives_as_long_as_its_run(tmp_path: Path) -> None:
    root = plain_root(tmp_path)
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom pathlib import Path\nfrom tests.data.crop_roots import volume_of\n" + IN_MEMORY)
    runs = []
    for methods in (("fork", "spawn", "forkserver"), ()):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, str(script), str(root), *methods]
        runs.append(subprocess.Popen(command, text=True, env=environment, **pipes))  # type: ignore[call-overload]
    folders = [Path(said(run)) for run in runs]
    assert folders[0] != folders[1]
    if os.access("/dev/shm", os.W_OK):
        assert all(folder.parent == Path("/dev/shm") for folder in folders)
    assert all(len(CropCache(folder).entries()) == 1 for folder in folders)
    _, error = runs[0].communicate("\n", timeout=60)
    assert runs[0].returncode == 0, error
    assert not folders[0].exists()  # gone with its run
    killed(runs[1])
    assert folders[1].exists()
    other = python("from connectomics.data.cache import memory_folder\nprint(memory_folder())")
    out, error = other.communicate(timeout=60)
    assert other.returncode == 0, error
    assert not folders[1].exists()  # the next run removed what the killed one left
    assert not Path(out.strip()).exists()


ONE_OF_TWO = """
import os
from connectomics.data.cache import memory_folder
os.environ.update(WORLD_SIZE='2', MASTER_ADDR='here', MASTER_PORT=sys.argv[1])
print(memory_folder(), flush=True)
sys.stdin.readline()
"""


def test_processes_of_one_run_share_memory(tmp_path: Path) -> None:
    runs = [python(ONE_OF_TWO, os.getpid()) for _ in range(2)]
    folders = {said(run) for run in runs}
    assert len(folders) == 1
    (folder,) = map(Path, folders)
    runs[0].communicate("\n", timeout=60)
    assert folder.exists()
    runs[1].communicate("\n", timeout=60)
    assert not folder.exists()


PEAK = """
import re
volume = volume_of(Path(sys.argv[1]), classes=("mito",), cache=Path(sys.argv[1]) / "cache", crop=int(sys.argv[2]))
volume.prepare()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss would count the parent
print(peak // 1024, flush=True)
"""


@pytest.mark.slow
def test_building_takes_memory_for_some_blocks_only(tmp_path: Path) -> None:
    """Raw of 8 MB and of 25 MB, with labels as many (which make 400 MB decoded at once): the peak grows by no more than
    the 64 MB of decoded chunks that a process keeps."""
    long = grid_of((384, 256, 256))
    write_raw(tmp_path, "set-a", np.ones(long.shape, np.uint8), long)
    for number, depth in enumerate((128, 384)):
        grid = long.crop((0, 0, 0), (depth, 256, 256))
        write_label(tmp_path, "set-a", f"crop{number}", "mito", np.ones(grid.shape, np.uint8), grid)
    peaks = []
    for number in range(2):
        out, error = python(PEAK, tmp_path, number).communicate(timeout=120)
        assert out, error
        peaks.append(int(out))
    assert peaks[1] < peaks[0] + 70, peaks
