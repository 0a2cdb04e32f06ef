"""Verbs that write to S3, on a real server of this machine: the bytes of a local run, also after kills and faults.

`FolderServer` keeps its objects as files, so that what is in the bucket is compared like a folder.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.chaos.kit import VERBS, Started, Starter, files_in, make_inputs, results, wait_for_files
from tests.s3_server import BUCKET, KEYS, FaultyProxy, FolderServer

#: with what a verb is called besides its paths; decode block by block in three ways
MORE = {
    "predict": "",
    "components": "",
    "watershed": "decoding.default.method=watershed",
    "whole": "decoding.blockwise_above=1000000",
    "sharded": "output.format=0.5 output.chunk=[16,16,16] output.shard=[32,32,32]",
    "measure": "",
    "mesh": "",
}


@dataclass
class Bucket:
    """A bucket on a server that now and then fails, the inputs of all verbs, and what runs commands."""

    folder: Path
    inputs: Path
    objects: Path
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

    def check(self, name: str, out: str) -> None:
        """The bucket holds at ``out`` what a local run gives, and nothing that is unfinished."""
        place = self.objects / out
        assert results(place) == self.whole(name)[0]
        left = [p.name for p in place.rglob(".*") if p.name not in (".zgroup", ".zattrs", ".zarray")]
        assert not [found for found in left if not found.startswith(".done-") or "." in found[6:]]

    def fails(self, words: list[str], **environment: str) -> str:
        """The line that a command ends with."""
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            with Starter(Path(mkdtemp(dir=self.folder))) as starter:
                status, started = starter.run(words)
        finally:
            os.environ.update({name: value for name, value in before.items() if value is not None})
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
                yield Bucket(folder, inputs, objects, proxy, starter)
    finally:
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", MORE)
def test_the_bytes_on_s3_are_those_of_a_local_run(bucket: Bucket, name: str) -> None:
    words = bucket.command(name, f"s3://{BUCKET}/same-{name}")
    status, started = bucket.starter.run(words)
    assert status == 0, started.said
    bucket.check(name, f"same-{name}")
    assert sum(bucket.proxy.failed.values()) > 0, "requests failed on the way"
    status, started = bucket.starter.run(words)
    assert status == 0, started.said  # nothing to do
    bucket.check(name, f"same-{name}")
