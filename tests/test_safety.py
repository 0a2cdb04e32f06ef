"""What must never be done with files of others, and to whom nothing may be sent."""

from __future__ import annotations

import ast
import html
import io
import os
import re
import socket
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cli import main
from tests.cellmap.roots import grid_of, plain_root, write_label, write_raw

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("connectomics", "scripts") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)

#: Calls that make code of data, however they are used.
NEVER = {
    "eval", "exec", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load",
    "yaml.full_load_all", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load",
    "cloudpickle.load", "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open", "os.system", "os.popen",
    "shutil.unpack_archive", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
#: file -> calls of NEVER that it may make: a task and an error that our own leading process pickled, over its own pipe.
ALLOWED = {"connectomics/tasks/child.py": {"pickle.loads"}}
#: call -> argument -> the only value that it may have; it must be given.
ONLY = {"torch.load": ("weights_only", True)}
#: argument -> the value that it may not have, in any call.
NOT = {"allow_pickle": True, "shell": True, "weights_only": False}


def calls_of(text: str) -> Iterator[tuple[int, str, dict[str, object]]]:
    """Line, dotted name and constant keyword arguments of every call."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            given = {
                k.arg: k.value.value if isinstance(k.value, ast.Constant) else k.value for k in node.keywords if k.arg
            }
            yield node.lineno, ast.unparse(node.func), given


def unsafe(text: str, allowed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """What is wrong with a source, by line."""
    found = []
    for line, name, given in calls_of(text):
        if name in NEVER - set(allowed) or name.split(".")[-1] in ("extractall", "extract"):
            found.append(f"{line}: {name}")
        if name in ONLY:
            key, value = ONLY[name]
            if given.get(key) is not value:
                found.append(f"{line}: {name} without {key}={value}")
        for key, value in NOT.items():
            if key in given and given[key] is not (not value):
                found.append(f"{line}: {name}({key}) is not plainly {not value}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_makes_code_of_data(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert unsafe(path.read_text(encoding="utf-8"), ALLOWED.get(name, set())) == []


@pytest.mark.parametrize(
    "text",
    [
        "yaml.load(x)", "pickle.loads(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "eval(x)",
        "np.load(x, allow_pickle=True)", "np.load(x, allow_pickle=y)", "subprocess.run(x, shell=True)",
        "archive.extractall(x)", "trainer.fit(x, weights_only=False)",
    ],
)  # fmt: skip
def test_the_test_above_sees_what_it_looks_for(text: str) -> None:
    assert unsafe(text)


def test_the_exceptions_are_still_needed() -> None:
    for name, allowed in ALLOWED.items():
        assert {call for _, call, _ in calls_of((ROOT / name).read_text(encoding="utf-8"))} >= allowed


# -- archives ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A crop table of one array, mito of crop1, 8 voxels a side; its truth lies beside it, in a folder of a folder."""
    folder = tmp_path / "outer/inner"
    (folder / "truth.zarr/crop1/mito").mkdir(parents=True)
    CropTable((TableEntry(1, "set-a", "mito", grid_of((8, 8, 8))),)).save(folder / "table.csv")
    for group in ("truth.zarr", "truth.zarr/crop1"):
        (folder / group / ".zgroup").write_text('{"zarr_format": 2}')
    for name, data in ARRAY.items():
        (folder / "truth.zarr/crop1/mito" / name).write_bytes(data)
    return folder / "table.csv"


def _meta(side: int) -> bytes:
    return (
        f'{{"zarr_format": 2, "shape": [{side}, {side}, {side}], "chunks": [{side}, {side}, {side}], "dtype": "|u1", '
        '"compressor": null, "fill_value": 0, "filters": null, "order": "C"}'
    ).encode()


ARRAY = {
    ".zarray": _meta(8),
    ".zattrs": b'{"voxel_size": [8, 8, 8], "translation": [4, 4, 4]}',
    "0.0.0": np.ones((8, 8, 8), np.uint8).tobytes(),
}
GROUPS = {".zgroup": b'{"zarr_format": 2}', "crop1/.zgroup": b'{"zarr_format": 2}'}
WHOLE = {**GROUPS, **{f"crop1/mito/{name}": data for name, data in ARRAY.items()}}
LINK = zipfile.ZipInfo("crop1/mito/1.0.0")
LINK.external_attr = 0o120777 << 16
BOMB = 2 * 10**8


def packed(path: Path, files: dict[str, bytes], *more: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [*files.items(), *more]:
            archive.writestr(name, data)
    return path


def understated(path: Path) -> Path:
    """A zip whose directory says that the chunk takes 512 bytes, which inflates to 200 MB."""
    files = {name: data for name, data in WHOLE.items() if not name.endswith("0.0.0")}
    packed(path, files, ("crop1/mito/0.0.0", bytes(BOMB)))
    size = BOMB.to_bytes(4, "little")
    data = path.read_bytes()
    assert data.count(size) == 2, "in the file's own header and in the directory"
    path.write_bytes(data.replace(size, (512).to_bytes(4, "little")))
    return path


def test_a_good_archive_is_read(table: Path, capfd: pytest.CaptureFixture[str]) -> None:
    submission = packed(table.with_name("good.zip"), WHOLE)
    assert main(["validate", str(submission), "--crops", str(table)]) == 0
    out = ["--out", str(table.parent / "scores")]
    assert main(["score", str(submission), str(table.with_name("truth.zarr")), "--crops", str(table), *out]) == 0


EVIL: dict[str, tuple[dict[str, bytes], list[tuple[str | zipfile.ZipInfo, bytes]]]] = {
    "dots": (WHOLE, [("../evil.txt", b"x")]),
    "dots inside": (WHOLE, [("crop1/../../evil.txt", b"x")]),
    "absolute": (WHOLE, [("/tmp/evil.txt", b"x")]),
    "drive": (WHOLE, [("C:/evil.txt", b"x")]),
    "backslashes": (WHOLE, [("..\\evil.txt", b"x")]),
    "link": (WHOLE, [(LINK, b"/etc/passwd")]),
}


@pytest.mark.parametrize("evil", EVIL)
def test_names_that_lead_out_of_an_archive(evil: str, table: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files, more = EVIL[evil]
    submission = packed(table.with_name("evil.zip"), files, *more)
    _refused(submission, table, capfd)


def test_a_bomb_is_refused_without_unpacking_it(table: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bomb = understated(table.with_name("evil.zip"))
    _refused(bomb, table, capfd)  # what is imported meanwhile takes memory, too
    tracemalloc.start()
    try:
        _refused(bomb, table, capfd)
        assert tracemalloc.get_traced_memory()[1] < BOMB / 4  # threads of other tests may allocate beside it
    finally:
        tracemalloc.stop()


def test_an_array_that_says_it_is_huge_is_refused(table: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {**WHOLE, "crop1/mito/.zarray": _meta(10**6)}
    _refused(packed(table.with_name("evil.zip"), files), table, capfd)


def _refused(submission: Path, table: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both verbs end with 1 and one line (validate: a finding), and leave nothing outside."""
    around = table.parents[2]  # the folder of this test
    before = sorted(path.name for path in around.rglob("*"))
    assert main(["validate", str(submission), "--crops", str(table)]) == 1
    assert "error: " in capfd.readouterr().out
    where = ["score", str(submission), str(table.with_name("truth.zarr")), "--crops", str(table)]
    status = main([*where, "--out", str(table.with_name("scores"))])
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert status == 1
    assert len([line for line in said.splitlines() if line.startswith("error:")]) == 1
    assert sorted(path.name for path in around.rglob("*")) == before
    assert not Path("/tmp/evil.txt").exists()


def test_a_model_package_does_not_unpickle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A pickle that would make a file, as a checkpoint and in a package: it stays a pickle."""
    import pickle

    made = tmp_path / "made by a pickle"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return os.mkdir, (str(made),)

    evil = pickle.dumps(Evil())
    (tmp_path / "raw.ckpt").write_bytes(evil)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for name, data in (("archive/data.pkl", evil), ("archive/version", b"3\n"), ("archive/byteorder", b"little")):
            archive.writestr(name, data)
    (tmp_path / "torch.ckpt").write_bytes(inner.getvalue())
    packed(tmp_path / "evil.pytc", {"about.json": b"{}", "weights.safetensors": evil, "data.pkl": evil})
    plain_root(tmp_path / "root")
    for words in (["--checkpoint", "raw.ckpt"], ["--checkpoint", "torch.ckpt"], ["--checkpoint", "evil.pytc"]):
        config = [str(ROOT / "tutorials/phantom.yaml")] if words[0] == "--checkpoint" else []
        place = [f"dataset.data_root={tmp_path / 'root'}", "dataset.classes=[mito]"]
        out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
        assert main(["predict", *config, words[0], str(tmp_path / words[1]), *out, *place]) == 1, words
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1, words
        assert words[1] in said[0]
        assert not made.exists(), words


# -- pages -------------------------------------------------------------------------------------------------------------
EVIL_NAME = "<script>alert(1)</script>"


def test_a_page_shows_a_hostile_name_as_text(tmp_path: Path) -> None:
    """A title, a run's name and messages of a configuration are text in a report."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"name: '{EVIL_NAME}'\ndataset: {{classes: ['{EVIL_NAME}']}}\n")
    (run / "metrics.csv").write_text(f"epoch,step,{EVIL_NAME}\n0,1,0.5\n1,2,0.6\n")
    assert main(["report", str(tmp_path / "page.html"), "--run", str(run), "--title", EVIL_NAME]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert EVIL_NAME not in page
    assert html.escape(EVIL_NAME) in page


def test_the_page_of_inspect_shows_a_hostile_name_as_text(tmp_path: Path) -> None:
    """A data set's folder can be called almost anything."""
    evil = "<b onclick=alert(1)>set"
    rng = np.random.default_rng(0)
    write_raw(tmp_path / "root", evil, rng.integers(0, 255, (16, 16, 16), dtype=np.uint8), grid_of((16, 16, 16)))
    label = np.eye(16, dtype=np.uint8)[None].repeat(16, 0)
    write_label(tmp_path / "root", evil, "crop1", "mito", label, grid_of((16, 16, 16)))
    out = tmp_path / "page.html"
    assert main(["inspect", "phantom", f"dataset.data_root={tmp_path / 'root'}", "dataset.classes=[mito]",
                 "data.cache=none", "dataset.train_val_split=1.0", "data.patch_size=[16,16,16]",
                 "data.patches_per_epoch=2", "--batches", "1", "--out", str(out)]) == 0  # fmt: skip
    page = out.read_text(encoding="utf-8")
    assert evil not in page
    assert html.escape(evil) in page


# -- network -----------------------------------------------------------------------------------------------------------
_OFFLINE = """
import socket, sys

def refused(self, address, *more):
    if self.family == getattr(socket, "AF_UNIX", None):
        return connect(self, address, *more)  # processes of this machine
    raise AssertionError(f"connects to {address}")

def looked_up(host, *more, **options):
    raise AssertionError(f"looks up {host}")

connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refused
socket.getaddrinfo = socket.gethostbyname = looked_up
"""


def offline(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which nothing can be connected to, nor looked up."""
    return subprocess.run(
        [sys.executable, "-c", _OFFLINE + code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def test_importing_connects_to_nobody() -> None:
    done = offline(
        "import connectomics, connectomics.cli.app, connectomics.pipeline.train, connectomics.pages\n"
        "import connectomics.pipeline.predict, connectomics.cellmap.fetch, connectomics.pages.view\n"
        "import connectomics.decoding.decode, connectomics.submission, connectomics.metrics.challenge\n"
    )
    assert done.returncode == 0, done.stderr


def test_local_work_connects_to_nobody(tmp_path: Path) -> None:
    root = plain_root(tmp_path / "root")
    code = (
        "from connectomics.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert main(['describe', sys.argv[1]]) == 0\n"
        "assert main(['train', 'tutorials/phantom.yaml', '--fast-dev-run', 'dataset.data_root=' + sys.argv[1],\n"
        "    'dataset.classes=[mito]', 'data.patch_size=[16,16,16]', 'inference.window=[16,16,16]',\n"
        "    'data.cache=none', 'dataset.train_val_split=1.0', 'model.options.channels=[4,8]',\n"
        "    'model.options.strides=[2]', 'training.precision=32']) == 0\n"
    )
    done = offline(code, str(root))
    assert done.returncode == 0, done.stderr
    assert "connects to" not in done.stderr


def test_the_test_above_sees_a_connection() -> None:
    assert "looks up" in offline("import urllib.request\nurllib.request.urlopen('http://example.invalid')").stderr
    assert "connects to" in offline("socket.socket().connect(('127.0.0.1', 9))").stderr


def test_a_dask_cluster_of_this_machine_is_heard_by_this_machine_only() -> None:
    from connectomics.config.schema import EngineConfig
    from connectomics.tasks.cluster import make_cluster

    with make_cluster(EngineConfig(name="dask", workers=1)) as cluster:
        addresses = [cluster.scheduler_address, cluster.dashboard_link, *_workers(cluster)]
    assert len(addresses) >= 3
    for address in addresses:
        assert re.search(r"//127\.0\.0\.1[:/]", address), address


def _workers(cluster: object) -> list[str]:
    from distributed import Client

    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=120)
        return list(client.scheduler_info()["workers"])


def test_nothing_listens_on_all_addresses_by_default() -> None:
    """No source names the address of everybody; who wants it gives it (``pytc view --bind``)."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in ("0.0.0.0", "::"), f"{path}:{node.lineno}"
    assert socket.gethostbyname("localhost").startswith("127.")
