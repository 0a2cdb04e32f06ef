"""Verbs that write to S3, on a real server of this machine: the bytes of a local run, also after kills and faults.

`FolderServer` keeps its objects as files, so that what is in the bucket is compared like a folder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.chaos.kit import VERBS, Starter, files_in, make_inputs, results, wait_for_files
from tests.s3_server import BUCKET, KEYS, FaultyProxy, FolderServer

#: with what a verb is called besides its paths; decode block by block in three ways
MORE = {
    "predict": "",
    "components": "",
    "watershed": "decoding.default.method=watershed engine.workers=2",
    "whole": "decoding.blockwise_above=1000000",
    "sharded": "output.format=0.5 output.chunk=[16,16,16] output.shard=[32,32,32]",
    "measure": "",
    "mesh": "",
    "export": "",
}


@dataclass
class Bucket:
    """A bucket on a server that now and then fails, the inputs of all verbs, and what runs commands."""

    folder: Path
    inputs: Path
    objects: Path
    server: str
    proxy: FaultyProxy
    starter: Starter

    def __post_init__(self) -> None:
        self._whole: dict[str, tuple[dict[str, bytes], int]] = {}

    def command(self, name: str, out: str, base: str = "") -> list[str]:
        """The words of a verb that writes to ``out``, and reads from the inputs or from ``base``."""
        verb = name if name in VERBS else "decode"
        words = VERBS[verb].words.format(base=base or self.inputs, out=out).split()
        return [*words, *MORE[name].split()]

    def whole(self, name: str) -> tuple[dict[str, bytes], int]:
        """What a local run gives, and how many files it writes."""
        if name not in self._whole:
            out = self.folder / "whole" / name
            status, started = self.starter.run(self.command(name, str(out)))
            assert status == 0, started.said
            self._whole[name] = results(out), files_in(out)
            assert len(self._whole[name][0]) > 0
        return self._whole[name]

    def check(self, name: str, out: str, killed: bool = False) -> None:
        """The bucket holds at ``out`` what a local run gives, and nothing that is unfinished; but a lease may be left
        of a run that was ``killed`` after all was done."""
        place = self.objects / out
        assert results(place) == self.whole(name)[0]
        ours = (".zgroup", ".zattrs", ".zarray")
        left = [p.name for p in place.rglob(".*") if p.name not in ours and not (killed and p.suffix == ".lock")]
        assert not [found for found in left if not found.startswith(".done-") or "." in found[6:]]

    def fails(self, words: list[str], environment: Mapping[str, str | None] | None = None) -> str:
        """The line that a command ends with."""
        status, started = self.starter.run(words, environment)
        assert status == 1, started.said
        assert len(started.errors) == 1, started.said
        assert "Traceback" not in started.said
        return started.errors[0]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    folder = Path(mkdtemp(prefix="s3-"))
    inputs, objects = folder / "inputs", folder / "bucket"
    inputs.mkdir()
    objects.mkdir()
    patch = pytest.MonkeyPatch()
    try:
        with FolderServer(objects, writable=True) as server, FaultyProxy(server.endpoint, share=1 / 50) as proxy:
            for name, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
                patch.setenv(name, value)
            with Starter(folder) as starter:
                make_inputs(inputs, starter)
                yield Bucket(folder, inputs, objects, server.endpoint, proxy, starter)
    finally:
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", [name for name in MORE if name != "export"])
def test_the_bytes_on_s3_are_those_of_a_local_run(bucket: Bucket, name: str) -> None:
    words = bucket.command(name, f"s3://{BUCKET}/same-{name}")
    status, started = bucket.starter.run(words)
    assert status == 0, started.said
    bucket.check(name, f"same-{name}")
    assert sum(bucket.proxy.failed.values()) > 0, "requests failed on the way"
    status, started = bucket.starter.run(words)
    assert status == 0, started.said  # nothing to do
    bucket.check(name, f"same-{name}")


def test_from_raw_to_meshes_in_the_bucket(bucket: Bucket) -> None:
    """Each verb reads from the bucket what the one before wrote there, with credentials from ~/.aws."""
    at = f"s3://{BUCKET}/way"
    base = bucket.inputs
    more = "decoding.default.threshold=0.3 decoding.blockwise_above=1000"
    way = {
        "predictions": f"predict {base}/run.yaml --checkpoint {base}/run/checkpoints/last.ckpt --device cpu --out",
        "labels": f"decode {at}/predictions {{out}} {more}",
        "measures": f"measure {at}/labels --contact mito:er:30 --out",
        "meshes": f"mesh {at}/labels {{out}} --class mito",
    }
    home = Path(mkdtemp(dir=bucket.folder))
    (home / "credentials").write_text("[lab]\naws_access_key_id = me\naws_secret_access_key = me\n")
    environment = {
        **dict.fromkeys(KEYS), "AWS_PROFILE": "lab", "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials")
    }  # fmt: skip
    for out, words in way.items():
        for folder in (at, str(home)):
            place = f"{folder}/{out}"
            command = words.format(out=place) if "{out}" in words else f"{words} {place}"
            status, started = bucket.starter.run(command.replace(at, folder).split(), environment)
            assert status == 0, started.said
        assert results(bucket.objects / "way" / out) == results(home / out)
    status, started = bucket.starter.run(["status", f"{at}/predictions", "--json"], environment)
    assert status == 0, started.said
    stages = json.loads(started.said)
    assert {(stage["output"], stage["state"]) for stage in stages} == {
        ("set-a.zarr/crop1", "complete"), ("set-a.zarr/crop2", "complete")
    }  # fmt: skip
    assert all(stage["done"] == stage["blocks"] > 0 for stage in stages)


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("predict", 3),
        ("components", 3),
        *(pytest.param(name, 20, marks=pytest.mark.slow) for name in ("predict", "components", "watershed", "whole")),
        *(pytest.param(name, 20, marks=pytest.mark.slow) for name in ("sharded", "measure", "mesh")),
    ],
)
def test_killed_at_any_moment_and_run_again_the_bytes_are_the_same(bucket: Bucket, name: str, kills: int) -> None:
    out, chance, left = f"killed-{name}-{kills}", random.Random(name), kills
    words = bucket.command(name, f"s3://{BUCKET}/{out}")
    begin = time.monotonic()
    bucket.starter.run(words)
    seconds = time.monotonic() - begin
    shutil.rmtree(bucket.objects / out)
    while left:
        started = bucket.starter.start(words)
        time.sleep(seconds * chance.random())
        if started.is_running():
            started.kill()
            left -= 1
        elif (status := started.wait()) == 0:  # start over
            bucket.check(name, out, killed=True)
            shutil.rmtree(bucket.objects / out)
        else:
            raise AssertionError((status, started.said))
    status, started = bucket.starter.run(words)
    assert status == 0, started.said
    bucket.check(name, out, killed=True)


@pytest.mark.parametrize("name", ["predict", "components"])
def test_processes_that_share_an_output_of_which_one_is_killed(bucket: Bucket, name: str) -> None:
    out = f"shared-{name}"
    words = [*bucket.command(name, f"s3://{BUCKET}/{out}"), "engine.share=true"]
    jobs = [bucket.starter.start(words) for _ in range(3)]
    assert wait_for_files(jobs[0], bucket.objects / out, 8)
    jobs[0].kill()
    for job in jobs[1:]:
        assert job.wait() == 0, job.said
    bucket.check(name, out)


def test_a_second_run_is_refused_while_one_works(bucket: Bucket) -> None:
    words = bucket.command("predict", f"s3://{BUCKET}/busy")
    first = bucket.starter.start(words)
    assert wait_for_files(first, bucket.objects / "busy", 8)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        assert f"process {first.pid} on " in bucket.fails(words)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0, first.said
    bucket.check("predict", "busy")


#: what is wrong -> the command's output, its environment, what the line says
WRONG: dict[str, tuple[str, dict[str, str | None], str]] = {
    "bucket": ("s3://nobucket/x", {}, "NoSuchBucket"),
    "no credentials": (f"s3://{BUCKET}/x", dict.fromkeys(KEYS), "there are no credentials; set AWS_ACCESS_KEY_ID"),
    "other credentials": (f"s3://{BUCKET}/x", {"AWS_ACCESS_KEY_ID": "you"}, "access is denied"),
    "no server": (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "error sending request"),
    "another store": ("gs://bucket/x", {}, "this output must be on a local disk or on S3"),
}


@pytest.mark.parametrize("name", ["predict", "components", "measure", "mesh"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_in_one_line_soon(bucket: Bucket, name: str, wrong: str) -> None:
    out, environment, says = WRONG[wrong]
    begin = time.monotonic()
    assert says in bucket.fails(bucket.command(name, out), environment)
    assert time.monotonic() - begin < 60
    assert not (bucket.objects / "x").exists()


def test_a_dry_run_writes_nothing_and_a_stored_task_runs_again(bucket: Bucket) -> None:
    words = bucket.command("predict", f"s3://{BUCKET}/dry")
    status, started = bucket.starter.run([*words, "--dry-run"])
    assert status == 0, started.said
    assert "blocks" in started.said
    assert not (bucket.objects / "dry").exists()
    status, started = bucket.starter.run(words)
    assert status == 0, started.said
    (task,) = (bucket.objects / "dry").rglob("task.json")
    done = task.with_name(".done-predict")
    done.write_bytes(done.read_bytes()[:-1] + b"\0")  # a block that is not done, of an output that is not complete
    attrs = task.with_name(".zattrs")
    attrs.write_text(attrs.read_text().replace('"complete": true', '"complete": false'))
    status, started = bucket.starter.run(["run-task", f"s3://{BUCKET}/{task.relative_to(bucket.objects)}"])
    assert status == 0, started.said
    bucket.check("predict", "dry")
    status, started = bucket.starter.run(["run-task", f"s3://{BUCKET}/{task.relative_to(bucket.objects)}"])
    assert "nothing to do" in started.said


def test_a_submission_is_packed_on_a_disk(bucket: Bucket) -> None:
    words = bucket.command("export", f"s3://{BUCKET}/x")
    assert "output must be on a local disk" in bucket.fails(words)


def test_a_store_without_conditional_writes_takes_one_process(bucket: Bucket) -> None:
    words = bucket.command("components", f"s3://{BUCKET}/unconditional")
    with FaultyProxy(bucket.server) as proxy:
        proxy.dropped_headers = ("if-none-match", "if-match")
        environment = {"AWS_ENDPOINT_URL": proxy.endpoint}
        assert "needs a store with conditional writes" in bucket.fails([*words, "engine.share=true"], environment)
        status, started = bucket.starter.run(words, environment)
        assert status == 0, started.said
        assert "this store ignores conditions" in started.said
    bucket.check("components", "unconditional")


@pytest.mark.parametrize(
    ("name", "other"), [("predict", "inference.overlap=0.5"), ("components", "decoding.default.threshold=0.6")]
)
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_replaces_another_output(bucket: Bucket, name: str, other: str, kills: int) -> None:
    out, chance = f"replaced-{name}-{kills}", random.Random(name)
    words = [*bucket.command(name, f"s3://{BUCKET}/{out}"), "--overwrite"]
    begin = time.monotonic()
    assert bucket.starter.run([*words, other])[0] == 0
    seconds = time.monotonic() - begin
    while kills:
        started = bucket.starter.start([*words, "--resume"])
        time.sleep(seconds * chance.random())
        if started.is_running():
            started.kill()
            kills -= 1
            continue
        assert started.wait() == 0, started.said
        bucket.check(name, out, killed=True)
        assert bucket.starter.run([*words, other])[0] == 0
    status, started = bucket.starter.run([*words, "--resume"])
    assert status == 0, started.said
    bucket.check(name, out, killed=True)
