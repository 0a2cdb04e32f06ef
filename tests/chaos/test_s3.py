"""Verbs that write to S3, on a real server of this machine: the bytes of a local run, also after kills and faults.

`FolderServer` keeps its objects as files, so that what is in the bucket is compared like a folder. The quick suite has
each disturbance and each verb, the whole one all pairs.
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
from typing import Any

import pytest

from tests.chaos.kit import VERBS, Whole, results, wait_for_files
from tests.s3_server import BUCKET, KEYS, FaultyProxy, FolderServer
from tests.starter import Starter

#: with what a verb is called besides its paths; decode block by block in several ways
MORE = {
    "predict": "",
    "components": "",
    "watershed": "decoding.default.method=watershed",
    "processes": "engine.workers=2",
    "whole": "decoding.blockwise_above=1000000",
    "sharded": "output.format=0.5 output.chunk=[16,16,16] output.shard=[32,32,32]",
    "measure": "",
    "mesh": "",
    "export": "",
}


@dataclass
class Bucket:
    """A bucket on a server that now and then fails, and what runs commands."""

    folder: Path
    objects: Path
    server: str
    proxy: FaultyProxy
    whole: Whole
    starter: Starter

    def command(self, name: str, out: str) -> list[str]:
        """The words of a verb that writes to ``out``."""
        words = VERBS[_verb(name)].words.format(base=self.whole.inputs, out=out).split()
        return ["pytc", *words, *MORE[name].split()]

    def check(self, name: str, out: str, killed: bool = False) -> None:
        """The bucket holds at ``out`` what a local run gives, and nothing that is unfinished; but a lease may be left
        of a run that was ``killed`` after all was done."""
        more = [word for word in MORE[name].split() if not word.startswith("engine")]
        assert results(self.objects / out) == self.whole.result(_verb(name), *more)[0]
        assert not self.unfinished(out, killed)

    def unfinished(self, out: str, killed: bool = False) -> list[str]:
        """Names of what is left of a run at ``out``, but for done-maps."""
        ours = (".zgroup", ".zattrs", ".zarray")
        found = [p.name for p in (self.objects / out).rglob(".*") if not (killed and p.suffix == ".lock")]
        return [name for name in found if name not in ours and (not name.startswith(".done-") or "." in name[6:])]

    def fails(self, words: list[str], environment: Mapping[str, str | None] | None = None) -> str:
        """The line that a command ends with."""
        started = self.starter.run(words, environment)
        assert started.status == 1, started.said
        assert len(started.errors) == 1, started.said
        assert "Traceback" not in started.said
        return started.errors[0]


def _verb(name: str) -> str:
    return name if name in VERBS else "decode"


@pytest.fixture(scope="module")
def bucket(whole: Whole, starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("s3")
    objects = folder / "bucket"
    objects.mkdir()
    with (
        FolderServer(objects, writable=True) as server,
        FaultyProxy(server.endpoint, share=1 / 50) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            patch.setenv(name, value)
        yield Bucket(folder, objects, server.endpoint, proxy, whole, starter)


def slow_but(*quick: str) -> list[Any]:
    """All names with a run on S3; those that are not ``quick`` are slow."""
    names = [name for name in MORE if name != "export"]
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but("predict", "sharded"))
def test_the_bytes_on_s3_are_those_of_a_local_run(bucket: Bucket, name: str) -> None:
    words = bucket.command(name, f"s3://{BUCKET}/same-{name}")
    started = bucket.starter.run(words)
    assert started.status == 0, started.said
    bucket.check(name, f"same-{name}")
    assert sum(bucket.proxy.failed.values()) > 0, "requests failed on the way"
    started = bucket.starter.run(words)
    assert started.status == 0, started.said  # nothing to do
    bucket.check(name, f"same-{name}")


@pytest.mark.slow
def test_from_raw_to_meshes_in_the_bucket(bucket: Bucket) -> None:
    """Each verb reads from the bucket what the one before wrote there, with credentials from ~/.aws."""
    at = f"s3://{BUCKET}/way"
    whole, base = bucket.whole, bucket.whole.inputs
    more = "decoding.default.threshold=0.3 decoding.blockwise_above=1000"
    run = f"{base}/run.yaml --checkpoint {base}/run/checkpoints/last.ckpt --device cpu"
    way = {
        "predictions": (f"predict {run} --out {at}/predictions", results(base / "predictions")),
        "labels": (f"decode {at}/predictions {at}/labels {more}", results(base / "labels")),
        "measures": (f"measure {at}/labels --contact mito:er:30 --out {at}/measures", whole.result("measure")[0]),
        "meshes": (f"mesh {at}/labels {at}/meshes --class mito", whole.result("mesh")[0]),
    }
    file = bucket.folder / "credentials"
    file.write_text("[lab]\naws_access_key_id = me\naws_secret_access_key = me\n")
    environment = {**dict.fromkeys(KEYS), "AWS_PROFILE": "lab", "AWS_SHARED_CREDENTIALS_FILE": str(file)}
    for out, (words, expected) in way.items():
        started = bucket.starter.run(["pytc", *words.split()], environment)
        assert started.status == 0, started.said
        assert results(bucket.objects / "way" / out) == expected
        assert not bucket.unfinished(f"way/{out}")
    started = bucket.starter.run(["pytc", "status", f"{at}/predictions", "--json"], environment)
    assert started.status == 0, started.said
    stages = json.loads(started.stdout)
    assert {(stage["output"], stage["state"]) for stage in stages} == {
        ("set-a.zarr/crop1", "complete"), ("set-a.zarr/crop2", "complete")
    }  # fmt: skip
    assert all(stage["done"] == stage["blocks"] > 0 for stage in stages)


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("components", 2),
        *(pytest.param(name, 20, marks=pytest.mark.slow) for name in MORE if name != "export"),
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
    started = bucket.starter.run(words)
    assert started.status == 0, started.said
    bucket.check(name, out, killed=True)


@pytest.mark.parametrize("name", ["predict", pytest.param("components", marks=pytest.mark.slow)])
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


VERBS_THERE = ("predict", "components", "measure", "mesh")
QUICK = {*zip(WRONG, (*VERBS_THERE, "predict"), strict=True)}


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        pytest.param(wrong, name, marks=[] if (wrong, name) in QUICK else pytest.mark.slow)
        for wrong in WRONG
        for name in VERBS_THERE
    ],
)
def test_what_is_wrong_is_said_in_one_line_soon(bucket: Bucket, name: str, wrong: str) -> None:
    out, environment, says = WRONG[wrong]
    begin = time.monotonic()
    assert says in bucket.fails(bucket.command(name, out), environment)
    assert time.monotonic() - begin < 60
    assert not (bucket.objects / "x").exists()


def test_a_dry_run_writes_nothing_and_a_stored_task_runs_again(bucket: Bucket) -> None:
    started = bucket.starter.run([*bucket.command("components", f"s3://{BUCKET}/dry"), "--dry-run"])
    assert started.status == 0, started.said
    assert "blocks" in started.said
    assert not (bucket.objects / "dry").exists()
    words = bucket.command("predict", f"s3://{BUCKET}/dry")
    started = bucket.starter.run(words)
    assert started.status == 0, started.said
    (task,) = (bucket.objects / "dry").rglob("task.json")
    done = task.with_name(".done-predict")
    done.write_bytes(done.read_bytes()[:-1] + b"\0")  # a block that is not done, of an output that is not complete
    attrs = task.with_name(".zattrs")
    attrs.write_text(attrs.read_text().replace('"complete": true', '"complete": false'))
    started = bucket.starter.run(["pytc", "run-task", f"s3://{BUCKET}/{task.relative_to(bucket.objects)}"])
    assert started.status == 0, started.said
    bucket.check("predict", "dry")
    started = bucket.starter.run(["pytc", "run-task", f"s3://{BUCKET}/{task.relative_to(bucket.objects)}"])
    assert "nothing to do" in started.said


def test_a_store_without_conditional_writes_takes_one_process(bucket: Bucket) -> None:
    words = bucket.command("components", f"s3://{BUCKET}/unconditional")
    with FaultyProxy(bucket.server) as proxy:
        proxy.dropped_headers = ("if-none-match", "if-match")
        environment = {"AWS_ENDPOINT_URL": proxy.endpoint}
        assert "needs a store with conditional writes" in bucket.fails([*words, "engine.share=true"], environment)
        started = bucket.starter.run(words, environment)
        assert started.status == 0, started.said
        assert "this store ignores conditions" in started.said
    bucket.check("components", "unconditional")


@pytest.mark.parametrize(
    ("name", "other", "kills"),
    [
        ("predict", "inference.overlap=0.5", 1),
        pytest.param("predict", "inference.overlap=0.5", 20, marks=pytest.mark.slow),
        pytest.param("components", "decoding.default.threshold=0.6", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_replaces_another_output(bucket: Bucket, name: str, other: str, kills: int) -> None:
    out, chance = f"replaced-{name}-{kills}", random.Random(name)
    words = [*bucket.command(name, f"s3://{BUCKET}/{out}"), "--overwrite"]
    begin = time.monotonic()
    assert bucket.starter.run([*words, other]).status == 0
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
        assert bucket.starter.run([*words, other]).status == 0
    started = bucket.starter.run([*words, "--resume"])
    assert started.status == 0, started.said
    bucket.check(name, out, killed=True)
