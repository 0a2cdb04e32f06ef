"""Fetching: exactly what a run reads comes, whole, once, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.fetch import FetchPlan, Missing, RemoteFile, plan_fetch, resolve_table, transfer
from connectomics.cellmap.fetch.plan import FetchItem
from connectomics.cellmap.fetch.transfer import Destination
from connectomics.cellmap.labels import read_labels
from connectomics.cli import main
from connectomics.errors import InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io import s3
from connectomics.io.store import StoreError, StoreOptions
from tests.s3_server import FaultyProxy, FolderServer, MotoServer
from tests.starter import Starter

SIZE = (8.0, 8.0, 8.0)
_MD5_OF_ABC = "900150983cd24fb0d6963f7d28e17f72"


@pytest.fixture(scope="module")
def server(phantom: Path) -> Iterator[FolderServer]:
    with FolderServer(phantom) as running:
        yield running


def options_of(server: FolderServer | FaultyProxy | MotoServer) -> StoreOptions:
    return StoreOptions(endpoint=server.endpoint, retries=4, timeout=20).resolved()


def plan_of(server: FolderServer | FaultyProxy, classes: list[str] | None = None, context: float = 40.0) -> FetchPlan:
    options = options_of(server)
    catalog = Catalog.open("s3://public", options)
    crops = catalog.crops(catalog.datasets[:1], classes=classes)[:1]
    grid = VoxelGrid.covering(crops[0].box.grow(context), SIZE)
    return plan_fetch(catalog.root, crops, classes, {crops[0].raw: [grid]}, options)


def files_below(root: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != ".fetched.tsv"}


def test_what_comes_is_what_is_there_and_enough_to_read_raw_and_labels(
    server: FolderServer, phantom: Path, tmp_path: Path
) -> None:
    plan = plan_of(server, ["mito"])
    missing = Missing.below(tmp_path, plan)
    assert (missing.number, missing.size) == (plan.number, plan.size)
    assert transfer(missing, tmp_path, options_of(server)) == plan.number
    for name, data in files_below(tmp_path).items():
        assert data == (phantom / name).read_bytes()
    here, there = Catalog.open(str(tmp_path)), Catalog.open(str(phantom))
    dataset = here.datasets[0]
    mine = here.crops()[0]
    theirs = there.crop(dataset, mine.name)
    grid = VoxelGrid.covering(theirs.box.grow(40.0), SIZE)
    values, inside = mine.raw_source.read_raw(grid)
    expected, all_inside = theirs.raw_source.read_raw(grid)
    assert np.array_equal(inside, all_inside)
    assert np.array_equal(values, expected)
    assert mine.raw_source.missing_chunks(grid)[0] == 0
    ours, full = read_labels(mine, ["mito"], grid), read_labels(theirs, ["mito"], grid)
    assert np.array_equal(ours.present, full.present)
    assert np.array_equal(ours.known, full.known)


def test_only_the_raw_level_that_is_read_and_only_the_finest_labels_come(server: FolderServer, phantom: Path) -> None:
    plan = plan_of(server, ["mito"])
    levels = {
        m.group() for i in plan.items for f in i.files if (m := re.search(r"/s\d(?=/\d)", f.key)) and "/em/" in f.key
    }
    crop = Catalog.open(str(phantom)).crops()[0]
    read = crop.raw_source.levels[crop.raw_source.level_for(SIZE)].path
    assert levels == {f"/{read}"}
    label_chunks = [f.key for i in plan.items if i.whole for f in i.files]
    assert label_chunks
    assert all("/s0/" in key for key in label_chunks)


def test_nothing_comes_twice_and_what_is_damaged_comes_again(server: FolderServer, tmp_path: Path) -> None:
    plan, options = plan_of(server), options_of(server)
    transfer(Missing.below(tmp_path, plan), tmp_path, options)
    assert Missing.below(tmp_path, plan).number == 0
    victim = next(f for i in plan.items if i.whole for f in i.files if not f.is_metadata)
    (tmp_path / victim.path).write_bytes(b"cut")
    again = {f.path for files in Missing.below(tmp_path, plan).items for f in files}
    assert victim.path in again
    array = victim.path.split("/s0/")[0] + "/s0"  # is not there until it is whole
    assert again - {victim.path} == {f"{array}/.zarray", f"{array}/.zattrs"}
    transfer(Missing.below(tmp_path, plan), tmp_path, options)
    assert Missing.below(tmp_path, plan).number == 0


def test_an_array_opens_when_all_else_of_it_is_there_whenever_a_fetch_is_killed(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its attributes an array opens, but the counts are missing that say whether 255 is an instance."""
    there, here, order = tmp_path / "store", tmp_path / "root", list[Path]()
    shutil.copytree(phantom, there)
    put, unlink = Destination.put, Path.unlink
    with FolderServer(there) as server:
        options, plan = options_of(server), plan_of(server)
        with monkeypatch.context() as patch:
            patch.setattr(Destination, "put", lambda self, to, data: (order.append(to), put(self, to, data)))
            transfer(Missing.below(here, plan), here, options, threads=1)
        arrays = [path for path in order if path.name == ".zarray" and "groundtruth" in path.parts]
        assert arrays
        for path in arrays:
            assert {file for file in path.parent.rglob("*") if file.is_file()} <= set(order[: order.index(path) + 1])
        for path in arrays:
            chunks = (there / path.relative_to(here)).parent.rglob("*")
            next((file for file in chunks if file.is_file() and file.name[0].isdigit()), there / "none").unlink(True)
        order.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda self, **how: (order.append(self), unlink(self, **how)))
            transfer(Missing.below(here, plan_of(server)), here, options, threads=1)
        for path in arrays:
            assert order.index(path) < order.index(path.with_name(".zattrs"))


def test_chunks_that_the_store_has_no_more_are_removed_as_they_would_be_read(phantom: Path, tmp_path: Path) -> None:
    """The crop was annotated again, and an empty chunk is not stored; likewise of raw. Other files stay."""
    there, here = tmp_path / "store", tmp_path / "root"
    shutil.copytree(phantom, there)
    with FolderServer(there) as server:
        options, plan = options_of(server), plan_of(server, ["mito"])
        transfer(Missing.below(here, plan), here, options)
        chunks = [(item, file.path) for item in plan.items for file in item.files if not file.is_metadata]
        labels = next(path for item, path in chunks if item.whole)
        raw = next(path for item, path in chunks if "/raw" in item.name)
        for path in (labels, raw):
            (there / path).unlink()
        own = here / labels.replace("/s0/", "/s0/notes-")
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text("mine")
        left = Missing.below(here, plan_of(server, ["mito"]))
        array = labels.split("/s0/")[0] + "/s0"  # is not there while it holds a stale chunk
        metadata = {f"{array}/.zarray", f"{array}/.zattrs"}
        assert {place.relative_to(here).as_posix() for place in left.stale} == {labels, raw, *metadata}
        assert {file.path for files in left.items for file in files} == metadata
        transfer(left, here, options)
        assert not (here / labels).exists()
        assert not (here / raw).exists()
        assert own.exists()
        left = Missing.below(here, plan_of(server, ["mito"]))
        assert (left.number, left.stale) == (0, ())


def test_md5_sums_are_compared_where_the_store_gives_them(phantom: Path, tmp_path: Path) -> None:
    with MotoServer() as moto:
        moto.put("a/one", b"abc")
        good = RemoteFile("a/one", 3, _MD5_OF_ABC, "a/one")
        plan = FetchPlan("s3://public", (FetchItem("a", (good,)),))
        transfer(Missing.below(tmp_path, plan), tmp_path, options_of(moto))
        (tmp_path / ".fetched.tsv").unlink()
        assert Missing.below(tmp_path, plan).number == 0  # known by its sum
        (tmp_path / "a/one").write_bytes(b"abd")
        assert Missing.below(tmp_path, plan).number == 1
        with pytest.raises(WriteError, match="not written by fetch"):  # and not in the log: somebody else's
            transfer(Missing.below(tmp_path, plan), tmp_path, options_of(moto))
        (tmp_path / "a/one").unlink()
        bad = RemoteFile("a/one", 3, "0" * 32, "a/one")
        wrong = FetchPlan("s3://public", (FetchItem("a", (bad,)),))
        with pytest.raises(StoreError, match="expected the MD5 sum 0000"):
            transfer(Missing.below(tmp_path, wrong), tmp_path, options_of(moto))


def test_failures_are_tried_again_and_what_never_comes_is_named_and_its_array_stays_closed(
    server: FolderServer, tmp_path: Path
) -> None:
    plan = plan_of(server, ["mito"])
    with FaultyProxy(server.endpoint, share=1 / 5, seed=3) as proxy:
        transfer(Missing.below(tmp_path / "a", plan), tmp_path / "a", options_of(proxy))
    assert Missing.below(tmp_path / "a", plan).number == 0
    item = next(i for i in plan.items if i.whole)
    gone = next(f for f in item.files if not f.is_metadata)
    lost = RemoteFile(gone.key + ".gone", gone.size, gone.etag, gone.path)
    items = tuple(
        FetchItem(i.name, tuple(lost if f == gone else f for f in i.files), i.absent, i.whole) for i in plan.items
    )
    broken = FetchPlan(plan.source, items)
    with pytest.raises(StoreError, match=r"1 of \d+ objects failed .*is gone.*run the same command again"):
        transfer(Missing.below(tmp_path / "b", broken), tmp_path / "b", options_of(server))
    assert not (tmp_path / "b" / gone.path.split("/s0/")[0] / "s0/.zarray").exists()
    here = Catalog.open(str(tmp_path / "b")).crops()[0]
    with pytest.raises(MissingError, match="none of its levels is stored"):
        here.labels[item.name.split("/")[-1]].source  # noqa: B018
    transfer(Missing.below(tmp_path / "b", plan), tmp_path / "b", options_of(server))
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def number_below(root: Path) -> int:
    """Files below a folder to which some come, and from which some go."""
    return sum(len(files) for _, _, files in os.walk(root))


def test_a_fetch_that_is_killed_goes_on(server: FolderServer, phantom: Path, tmp_path: Path, starter: Starter) -> None:
    name = Catalog.open(str(phantom)).crops()[0].name
    command = ["pytc", "fetch", "--from", "s3://public", "--crop", name, "--voxel-size", "8", "--threads", "2"]
    with FaultyProxy(server.endpoint, latency=0.02) as slow:
        for _ in range(2):
            seen = number_below(tmp_path / "b")
            running = starter.start([*command, tmp_path / "b"], {"AWS_ENDPOINT_URL": slow.endpoint})
            running.wait_for(lambda seen=seen: number_below(tmp_path / "b") > seen + 10)  # type: ignore[misc]
            running.kill()
    for place in ("a", "b"):
        ended = starter.run([*command, tmp_path / place], {"AWS_ENDPOINT_URL": server.endpoint})
        assert ended.status == 0, ended.said[-2000:]
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")
    assert not list((tmp_path / "b").rglob(".fetching-*"))


def test_a_second_fetch_at_the_same_time_takes_nothing_away(server: FolderServer, tmp_path: Path) -> None:
    """It has looked at the root while the first one was at work, and begins when that has ended: a training that reads
    the crops meanwhile must find all labels."""
    plan, options = plan_of(server), options_of(server)
    chunks = tuple(tuple(f for f in item.files if not f.is_metadata)[:1] for item in plan.items)
    transfer(Missing(plan, chunks), tmp_path, options)  # what the first one has so far
    second = Missing.below(tmp_path, plan)
    transfer(Missing.below(tmp_path, plan), tmp_path, options)
    metadata = [tmp_path / file.path for item in plan.items for file in item.files if file.is_metadata]
    lacking = set[Path]()
    transfer(second, tmp_path, options, progress=lambda *_: lacking.update(p for p in metadata if not p.exists()))
    assert not lacking
    assert Missing.below(tmp_path, plan).number == 0


def test_what_another_fetch_has_just_written_is_no_other_file(tmp_path: Path) -> None:
    """Written since this one has looked, and not in the log yet."""
    with MotoServer() as moto:
        moto.put("a/one", b"abc")
        plan = FetchPlan("s3://public", (FetchItem("a", (RemoteFile("a/one", 3, _MD5_OF_ABC, "a/one"),)),))
        missing = Missing.below(tmp_path, plan)
        (tmp_path / "a").mkdir()
        (tmp_path / "a/one").write_bytes(b"abc")
        assert transfer(missing, tmp_path, options_of(moto)) == 1


def test_what_killed_fetches_left_is_removed_by_any_later_one(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    host = platform.node()
    left = {
        f".fetching-{host}-{ended.pid}-0f": True,
        f".fetching-{host}-{os.getpid()}-0f": False,  # another thread's
        ".fetching-node17-5-0f": False,
        ".fetching-node18-5-0f": True,
    }
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"ab")
    os.utime(tmp_path / ".fetching-node18-5-0f", (1e9, 1e9))  # nothing came for years
    (tmp_path / ".fetching-mine").touch()  # nothing of ours
    with Destination(tmp_path) as destination:
        destination.put(tmp_path / "a/b", b"abc")
        assert (tmp_path / "a/b").read_bytes() == b"abc"
        assert {name: not (tmp_path / name / "half").exists() for name in left} == left
    assert {p.name for p in tmp_path.iterdir()} == {name for name, gone in left.items() if not gone} | {
        "a",
        ".fetching-mine",
    }


def test_an_object_is_written_to_another_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a data set of the root is a link to another disk, files cannot be renamed onto it."""
    rename = Path.replace

    def onto_one_disk(self: Path, target: Path) -> Path:
        if self.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    with Destination(tmp_path) as destination, monkeypatch.context() as patch:
        patch.setattr(Path, "replace", onto_one_disk)
        destination.put(tmp_path / "a/b", b"abc")
    assert files_below(tmp_path) == {"a/b": b"abc"}


def test_a_run_configuration_says_what_comes(
    server: FolderServer,
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    config = tmp_path / "run.yaml"
    config.write_text(
        "dataset: {classes: [mito, nuc], resolution: [16, 16, 16]}\ndata: {patch_size: [16, 16, 16], num_workers: 0, "
        "augmentations: {RandRotate90d: {keys: [image, label], prob: 0.5}}}\n"
    )
    root = tmp_path / "données 1"
    arguments = ["fetch", str(root), "--from", "s3://public", "--for", str(config)]
    assert main([*arguments, "--dry-run"]) == 0
    assert not root.exists()
    said = capfd.readouterr().out
    assert re.search(r"/raw +\d+ +[\d.]+ [kM]B", said)
    assert main(arguments) == 0
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    from connectomics.config import load_config
    from connectomics.data.datamodule import CellMapDataModule

    composed = load_config(config, [f"dataset.data_root='{root}'"])
    module = CellMapDataModule(composed)
    module.setup("fit")  # checks that all raw chunks that patches can look at are there
    assert next(iter(module.train_dataloader()))["image"].shape[-1] == 16


def test_bad_input_is_one_line(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    dataset = Catalog.open("s3://public", options_of(server)).datasets[0]
    cases: list[tuple[list[str], str]] = [
        (["--from", str(tmp_path)], "expected an S3 URL"),
        (["--from", "s3://public", "--dataset", dataset + "x"], "did you mean"),
        (["--from", "s3://public", "--class", "mitoo"], "did you mean 'mito'"),
        (["--from", "s3://public", "--crop", "crop99999"], "unknown crop"),
        (["--from", "s3://nowhere"], "s3://nowhere"),
        (["--from", "s3://public", "--voxel-size", "wide"], "one number or three"),
        (["--from", "s3://public", "--context", "-1"], "--context"),
        (["--from", "s3://public", "--no-labels"], "nothing to fetch"),
        (["--from", "s3://public", "--crops", "nowhere.csv"], "no crop table at"),
        (["--from", "s3://public", "--for", str(tmp_path / "no.yaml")], "no.yaml"),
    ]
    for arguments, expected in cases:
        assert main(["fetch", str(tmp_path / "root"), *arguments]) == 1, arguments
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1, arguments
        assert expected in said[0]


def test_a_key_that_leads_out_of_the_root_is_refused(server: FolderServer, tmp_path: Path) -> None:
    evil = RemoteFile("x/../../evil", 1, "", "x/../../evil")
    with pytest.raises(InputError, match="leads out of"):
        Missing.below(tmp_path, FetchPlan("s3://public", (FetchItem("x", (evil,)),)))


def test_too_little_space_is_said_before_anything_comes(server: FolderServer, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    plan = FetchPlan("s3://public", (FetchItem("x", (RemoteFile("x", 2 * free, "", "x"),)),))
    with pytest.raises(WriteError, match="GB free"):
        transfer(Missing.below(tmp_path / "root", plan), tmp_path / "root", options_of(server))
    assert files_below(tmp_path / "root") == {}


def test_a_crop_table_comes_from_a_url_and_a_broken_one_is_not_kept(
    server: FolderServer, phantom: Path, tmp_path: Path
) -> None:
    table = resolve_table(f"{server.endpoint}/public/test_crops.csv", tmp_path)
    assert len(table) == len(resolve_table(str(phantom / "test_crops.csv")))
    no_table = f"{server.endpoint}/public/{next(phantom.rglob('.zarray')).relative_to(phantom)}"
    kept = (tmp_path / "crop_table.csv").read_bytes()
    with pytest.raises(MetadataError):
        resolve_table(no_table, tmp_path)
    assert (tmp_path / "crop_table.csv").read_bytes() == kept
    with pytest.raises(MissingError, match="cannot read the crop table"):
        resolve_table(f"{server.endpoint}/public/nowhere.csv", tmp_path)


@pytest.mark.slow
def test_thousands_of_objects_come_through_failures(tmp_path: Path) -> None:
    """Three thousand objects, one request in fifty failing: each comes once, whole."""
    for n in range(3000):
        place = tmp_path / "store" / "a" / str(n // 100) / str(n % 100)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes([n % 251]) * (n % 97 + 1))
    with FolderServer(tmp_path / "store") as server, FaultyProxy(server.endpoint, share=1 / 50, seed=5) as proxy:
        listed = s3.objects("public", "a", options_of(server))
        files = tuple(RemoteFile(key, size, etag.strip('"'), key) for key, size, etag in listed)
        plan = FetchPlan("s3://public", (FetchItem("a", files),))
        told: list[tuple[int, int]] = []
        missing = Missing.below(tmp_path / "root", plan)
        came = transfer(
            missing,
            tmp_path / "root",
            options_of(proxy),
            progress=lambda done, number, _, __: told.append((done, number)),
        )
    assert (came, missing.number, told[-1]) == (3000, 3000, (3000, 3000))
    assert files_below(tmp_path / "root") == files_below(tmp_path / "store")
    assert Missing.below(tmp_path / "root", plan).number == 0


def test_what_a_run_needs_is_what_its_data_module_reads(phantom: Path) -> None:
    """With a wider view, an augmentation that moves it, and a head that tells objects apart."""
    from connectomics.config import load_config
    from connectomics.config.compose import tutorial
    from connectomics.data.datamodule import CellMapDataModule
    from connectomics.pipeline.fetch import needs_of_config

    composed = load_config(
        tutorial("cellmap_mito_affinities"),
        [
            f"dataset.data_root='{phantom}'", "dataset.classes=[mito]", "dataset.datasets=null", "dataset.crops=null",
            "data.patch_size=[16,16,16]", "data.inputs=[{voxel_size: [32, 32, 32], patch_size: [16, 16, 16]}]",
            "data.cache=none", "data.allow_missing_raw=true",
        ],
    )  # fmt: skip
    needs = needs_of_config(composed, Catalog.open(str(phantom)))
    module = CellMapDataModule(composed)
    module.setup("fit")
    read = [(v.crop.raw, v.cached_raw_grid) for v in (*module.train_dataset.all_volumes, *module.val_volumes)]
    assert read
    assert all(grid in needs.raw[location] for location, grid in read)
