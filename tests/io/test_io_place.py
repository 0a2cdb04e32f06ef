"""Places on S3: paths, who may read and write, and folders that are removed and moved whatever interrupts that."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics.decoding.blocks.labels_task import MaskTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import IncompleteError, MetadataError, MissingError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io import s3, store
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import S3Path, output_place, place, remove_tree, walk
from connectomics.io.write import ArrayWriter, create_array, write_multiscale
from connectomics.pipeline.decode import decode_jobs
from connectomics.pipeline.mesh import mesh_tasks
from connectomics.tasks import run_task
from tests.decoding.decode_kit import decode_predictions
from tests.s3_server import BUCKET, KEYS, FaultyProxy, FolderServer, MotoServer

ROOT = S3Path(f"s3://{BUCKET}")


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a bucket."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    with FolderServer(folder, writable=True) as server:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield folder


def test_a_place_is_a_path_on_both_kinds_of_storage() -> None:
    for given in ("s3://bucket/a.zarr/b/", Path("s3://bucket/a.zarr/b"), S3Path("s3://bucket/a.zarr/b")):
        found = place(given)
        assert isinstance(found, S3Path)
        assert str(found) == "s3://bucket/a.zarr/b"
        assert str(found / "c" / "0") == "s3://bucket/a.zarr/b/c/0"
        assert (found.name, found.parent.stem, str(found.parent)) == ("b", "a", "s3://bucket/a.zarr")
        assert str(found.with_name(".b.partial")) == "s3://bucket/a.zarr/.b.partial"
        assert found.absolute() == found == pickle.loads(pickle.dumps(found))
    assert place("~/x") == Path.home() / "x"
    assert not isinstance(place("a/s3"), S3Path)
    with pytest.raises(NotImplementedError):
        S3Path("s3://bucket/a").open("wb")
    with pytest.raises(NotImplementedError):
        S3Path("s3://bucket/a").open()


def test_files_of_a_prefix(objects: Path) -> None:
    folder = ROOT / "a b" / "é"
    assert not folder.exists()
    (folder / "one").put(b"1")
    (folder / "two" / "three").put(b"3")
    assert folder.is_dir()
    assert not folder.is_file()
    assert (folder / "one").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    assert [path.name for path in folder.glob("o*")] == ["one"]
    assert (folder / "one").read_text() == "1"
    assert (objects / "a b/é/two/three").read_bytes() == b"3"
    assert [(str(at), names) for at, _, names in walk(folder)] == [(str(folder), ["one"]), (f"{folder}/two", ["three"])]
    content = bytes(range(250)) * 1000
    (folder / "large").put(content)
    with (folder / "large").open("rb") as file:
        for begin, whence, size in ((200_000, 0, 70_000), (-10, 2, 100), (0, 0, 10), (5, 1, 3), (0, 2, 1)):
            at = file.seek(begin, whence)
            assert file.read(size) == content[at : at + size]
    (folder / "large").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "large").open("rb")
    (folder / "one").unlink()
    (folder / "one").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "one").read_bytes()
    assert (folder / "new").put(b"1", match="") is not None
    assert (folder / "new").put(b"2", match="") is None
    found = (folder / "new").read_tagged()
    assert found is not None
    assert (folder / "new").put(b"2", match=found[1]) is not None
    assert (folder / "new").put(b"3", match=found[1]) is None
    remove_tree(folder)
    assert list(objects.iterdir()) == []
    with pytest.raises(WriteError, match="cannot replace the bucket"):
        remove_tree(ROOT)


@pytest.mark.parametrize("shards", [None, (16, 16, 16)])
def test_an_array_on_s3_has_the_bytes_of_a_local_one(objects: Path, tmp_path: Path, shards) -> None:
    values = np.random.default_rng(0).integers(0, 255, (20, 17, 33), dtype=np.uint8)
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), values.shape)
    for at in (ROOT / "x", tmp_path / "x"):
        writer = create_array(at, values.shape, np.uint8, chunks=(8, 8, 8), grid=grid, shards=shards)
        writer.write((0, 0, 0), values)
        ArrayWriter.open(at).write((3, 4, 5), np.zeros((6, 7, 8), np.uint8))
        assert np.array_equal(ArrayWriter.open(at).read((2, 0, 0), (10, 17, 33))[2:, 5:, 0], values[4:12, 5:, 0])
    assert files(objects / "x") == files(tmp_path / "x")
    write_multiscale(ROOT / "m", values, grid, levels=2)
    write_multiscale(ROOT / "m", values + 1, grid, overwrite=True)
    assert np.array_equal(Multiscale.open(ROOT / "m").read_level(0, (0, 0, 0), values.shape)[0], values + 1)
    assert [p.name for p in objects.iterdir() if p.name.startswith(".m")] == []


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Kill(BaseException):
    """Ends what runs, as a kill does."""


class Interruption:
    """Lets ``moment`` requests that write through, and stops the process's next one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: float = np.inf
        for name in ("put", "copy", "delete"):
            monkeypatch.setattr(s3, name, self._counted(getattr(s3, name)))

    def _counted(self, write):  # type: ignore[no-untyped-def]
        def counted(*arguments, **more):  # type: ignore[no-untyped-def]
            self.left -= 1
            if self.left < 0:
                raise Kill
            return write(*arguments, **more)

        return counted


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stored", ["0.4", "0.5"])
def test_labels_that_are_replaced_are_whole_or_incomplete_at_every_moment(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, stored: str
) -> None:
    from connectomics.io.sharded import Storage

    values = np.random.default_rng(0).integers(0, 255, (16, 16, 48), dtype=np.uint8)
    about = {"artefact": "probability", "class_name": "er", "complete": True}
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), values.shape)
    write_multiscale(tmp_path / "in.zarr/c/er", values, grid, attrs={"connectomics": about})
    output, storage = f"{ROOT}/out.zarr/c/er", Storage(stored, (16, 16, 16))

    def task(threshold: float) -> MaskTask:
        parameters = DecodeParameters(method="threshold", threshold=threshold)
        return MaskTask(str(tmp_path / "in.zarr/c/er"), output, "er", parameters, (16, 16, 16), storage=storage)

    def labels() -> np.ndarray | None:
        """What a reader gets: whole labels or none."""
        try:
            require_complete(output)
        except (IncompleteError, MissingError, MetadataError):
            return None
        return Multiscale.open(output).read_level(0, (0, 0, 0), values.shape, absent_is_missing=False)[0]

    low, high = values > 255 * 0.25, values > 255 * 0.75
    run_task(task(0.25))
    interruption, moment, done = Interruption(monkeypatch), 0, False
    while not done:
        interruption.left = moment
        try:
            run_task(task(0.75), overwrite=True)
            done = True
        except Kill:
            interruption.left = np.inf
            for lock in objects.rglob("*.lock"):  # of a process that is gone
                lock.unlink()
            found = labels()
            assert found is None or np.array_equal(found, low) or np.array_equal(found, high), moment
            run_task(task(0.75), overwrite=True, resume=True)
        interruption.left = np.inf
        assert np.array_equal(labels(), high), moment
        leftover = [path.name for path in (objects / "out.zarr/c").iterdir() if path.name not in ("er", ".zgroup")]
        assert set(leftover) <= {"zarr.json", ".er.partial"}, "what a kill at the very end leaves has no task"
        assert not (objects / "out.zarr/c/.er.partial/task.json").exists()
        run_task(task(0.25), overwrite=True)
        moment += step
    assert moment > 20


def test_what_another_run_has_begun_on_s3_is_left_alone(objects: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 48), dtype=np.uint8)
    about = {"artefact": "probability", "class_name": "er", "complete": True}
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), values.shape)
    write_multiscale(tmp_path / "in/d.zarr/c/er", values, grid, attrs={"connectomics": about})

    def decode(threshold: float, **how) -> list:  # type: ignore[no-untyped-def]
        parameters = {"er": DecodeParameters(method="threshold", threshold=threshold)}
        return decode_predictions(tmp_path / "in", str(ROOT / "out"), parameters, blockwise_above=0, **how)

    decode(0.25)
    (job,) = decode_jobs(
        tmp_path / "in", str(ROOT / "out"),
        {"er": DecodeParameters(method="threshold", threshold=0.75)}, blockwise_above=0,
    )  # fmt: skip
    assert job.task is not None
    job.task.claim(overwrite=True)
    begun = files(objects / "out/d.zarr/c/.er.partial")
    assert "task.json" in begun
    assert decode(0.25)[0].skipped
    assert files(objects / "out/d.zarr/c/.er.partial") == begun
    (objects / "out/d.zarr/c/.er.partial/task.json").unlink()
    assert decode(0.25)[0].skipped
    assert not (objects / "out/d.zarr/c/.er.partial").exists(), "what was killed at its very end"


def test_labels_that_were_being_removed_when_a_run_was_killed_are_not_resumed(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was done but the last move; then the run that starts over is killed while it removes that."""
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 48), dtype=np.uint8)
    about = {"artefact": "probability", "class_name": "er", "complete": True}
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), values.shape)
    write_multiscale(tmp_path / "in.zarr/c/er", values, grid, attrs={"connectomics": about})
    parameters = DecodeParameters(method="threshold", threshold=0.5)
    output = f"{ROOT}/out.zarr/c/er"
    task = MaskTask(str(tmp_path / "in.zarr/c/er"), output, "er", parameters, (16, 16, 16))
    interruption, moment = Interruption(monkeypatch), 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr("connectomics.decoding.blocks.labels_task.publish", raise_kill)
            with pytest.raises(Kill):
                run_task(task, overwrite=True)
        interruption.left = moment
        try:
            task.claim(overwrite=True)
            break
        except Kill:
            interruption.left = np.inf
            run_task(task)
            require_complete(output)
            found = Multiscale.open(output).read_level(0, (0, 0, 0), values.shape, absent_is_missing=False)[0]
            assert np.array_equal(found, values > 127.5), moment
        moment += 1
    assert moment > 4


def test_meshes_that_were_being_removed_when_a_run_was_killed_are_not_finished(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zmesh", reason="meshes need pip install 'connectomics-cellmap[mesh]'")
    values = np.zeros((12, 12, 24), np.uint8)
    values[2:9, 2:9, 2:9], values[2:9, 2:9, 14:21] = 1, 2
    about = {"artefact": "labels", "class_name": "er", "kind": "instance", "complete": True}
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), values.shape)
    write_multiscale(tmp_path / "in/d.zarr/c/er", values, grid, attrs={"connectomics": about})
    (task,) = mesh_tasks(tmp_path / "in", str(ROOT / "meshes"), "er", file_format="multilod")
    run_task(task)
    whole = {name: data for name, data in files(objects / "meshes").items() if "task.json" not in name}
    assert {"d/c/er/1.index", "d/c/er/info", "d/c/er/meshes.csv"} < whole.keys()
    delete = s3.delete

    def killed_within(bucket: str, keys: list[str], options: s3.StoreOptions) -> None:
        """A request for several objects that has removed only the first of them."""
        delete(bucket, keys[:1], options)
        if len(keys) > 1:
            raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(s3, "delete", killed_within)
        with pytest.raises(Kill):
            task.claim(overwrite=True)
    assert len(files(objects / "meshes")) < len(whole)
    run_task(task)
    assert {name: data for name, data in files(objects / "meshes").items() if "task.json" not in name} == whole


def raise_kill(*_: object) -> None:
    raise Kill


def test_a_public_bucket_is_read_by_anyone_and_with_credentials_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with MotoServer() as server, FaultyProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        server.put("a", b"1")
        server.put("b", b"2", bucket="private")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
        assert store.read_bytes("s3://public/a") == b"1"
        with pytest.raises(store.StoreError, match="access is denied"):
            store.read_bytes("s3://private/b")
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        assert store.read_bytes("s3://private/b") == b"2"
        assert store.read_bytes("s3://public/a") == b"1"
        output_place("s3://private/c").joinpath("d").put(b"3")  # type: ignore[attr-defined]
        assert server.client.get_object(Bucket="private", Key="c/d")["Body"].read() == b"3"


def test_credentials_that_are_refused_do_not_keep_anyone_from_public_data(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses what is signed with other keys, and gives anyone what is not signed."""
    (tmp_path / "public").mkdir()
    (tmp_path / "public/a").write_bytes(b"1")
    with FolderServer(tmp_path / "public", refuses_signed=True) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        values = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
        write_multiscale(tmp_path / "public/m", values, VoxelGrid((8, 8, 8), (0, 0, 0), values.shape))
        assert store.read_bytes("s3://public/a") == b"1"
        assert np.array_equal(Multiscale.open("s3://public/m").read_level(0, (0, 0, 0), values.shape)[0], values)
        opened = pickle.loads(pickle.dumps(Multiscale.open("s3://public/m")))
        assert np.array_equal(opened.read_level(0, (0, 0, 0), values.shape)[0], values)


def test_without_an_endpoint_requests_go_to_amazon() -> None:
    """obstore refuses ``endpoint=None``; no request is sent here."""
    from connectomics.io import s3

    opened = s3._open("bucket", None, "us-east-1", 0, 1.0, 1.0, ())
    assert "endpoint" not in opened.config
    assert (
        s3._open("bucket", "http://localhost:1", "us-east-1", 0, 1.0, 1.0, ()).config["endpoint"]
        == "http://localhost:1"
    )
