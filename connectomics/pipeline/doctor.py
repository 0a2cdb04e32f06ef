"""Check this machine: versions, GPU, memory, disk, S3, and known problems."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from connectomics.cellmap.fetch import PUBLIC
from connectomics.errors import InputError
from connectomics.io.store import is_s3
from connectomics.machine import existing, usable_cores

Level = Literal["ok", "note", "problem"]

#: Packages that are always needed.
_CORE = (
    "torch", "pytorch-lightning", "monai", "hydra-core", "omegaconf", "zarr", "numcodecs", "tensorstore", "obstore",
    "numpy", "scipy", "numba", "connected-components-3d", "edt", "fastremap", "scikit-image", "ortools",
)  # fmt: skip
#: Extra -> its packages.
_EXTRAS = {
    "tune": ("optuna",),
    "cluster": ("dask", "distributed", "dask-jobqueue"),
    "affinities": ("mwatershed",),
    "mesh": ("zmesh",),
    "view": ("neuroglancer",),
    "formats": ("tifffile", "h5py", "mrcfile", "pynrrd"),
    "mlflow": ("mlflow-skinny",),
    "bioimageio": ("bioimageio.spec",),
}
_GB = 1e9
_LEAST_MEMORY, _LEAST_SHARED, _LEAST_FREE = 8 * _GB, 1 * _GB, 20 * _GB
_LEAST_FILES = 1024
_SLOW_DISK = 100.0  # MB/s: reading a cached patch of 128^3 then takes at least 20 ms
_PROBE = 128 << 20  # bytes written and read to measure the disk
_NETWORK_DISKS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "fuse.sshfs", "ceph", "fuse.ceph"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: subject, such as ``GPU``.
        found: description.
        level: a ``note`` may cost time, a ``problem`` stops a run.
        advice: what to change, or "".
    """

    what: str
    found: str
    level: Level = "ok"
    advice: str = ""


def examine(folder: Path, *, s3: str | None = None) -> Iterator[Finding]:
    """Yield the results of all checks.

    Args:
        folder: place of runs and the crop cache; a file of 128 MiB measures its disk.
        s3: ``s3://bucket`` to list once, or "public" for the CellMap data; None: no request.

    Raises:
        InputError: ``folder`` is a file, or ``s3`` is not a bucket.
    """
    folder = folder.expanduser()
    if folder.is_file():
        raise InputError(f"--at: expected a folder, got the file {folder}")
    if s3 is not None and s3 != "public" and not is_s3(s3):
        raise InputError(f"--s3: expected s3://BUCKET or public, got {s3}")
    s3 = PUBLIC if s3 == "public" else s3
    yield from _versions()
    yield from _gpus()
    yield from _processor()
    yield _memory()
    yield from _limits()
    yield from _disk(folder)
    yield _reach(s3)


def _checked(what: str, found: str, bad: bool, level: Level, advice: str) -> Finding:
    """Return a finding of ``level`` with advice if it is ``bad``, else one that is ok."""
    return Finding(what, found, level, advice) if bad else Finding(what, found)


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    old = not (3, 11) <= tuple(int(v) for v in python.split(".")[:2]) <= (3, 14)
    yield _checked("Python", python, old, "problem", "create an environment with Python 3.11 to 3.14")
    if _version("connectomics") is not None:
        found = "another package of the same import name is installed: connectomics"
        advice = "pip uninstall connectomics, then install connectomics-cellmap again"
        yield Finding("name", found, "problem", advice)
    versions = {name: _version(name) for name in _CORE}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        yield Finding("libraries", f"missing: {', '.join(missing)}", "problem", f"pip install {' '.join(missing)}")
    yield Finding("libraries", ", ".join(f"{n} {v}" for n, v in versions.items() if v is not None))
    for extra, names in _EXTRAS.items():
        missing = [name for name in names if _version(name) is None]
        found = f"missing: {', '.join(missing)}" if missing else "installed"
        yield _checked(
            f"extra {extra}", found, bool(missing), "ok", f"pip install 'connectomics-cellmap[{extra}]' to use it"
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_properties(number).name
            free, total = torch.cuda.mem_get_info(number)
            bfloat16 = "yes" if torch.cuda.is_bf16_supported() else "no"
            found = f"{name}, {free / _GB:.1f} of {total / _GB:.1f} GB free, bfloat16 {bfloat16}"
            advice = "another process uses it; set CUDA_VISIBLE_DEVICES to another GPU"
            yield _checked(f"GPU {number}", found, free < total / 2, "note", advice)
        return
    card = _nvidia_card()
    if card is None:
        yield Finding("GPU", "none: training and prediction run on the CPU")
    elif torch.version.cuda is None:
        advice = "install torch with CUDA (pytorch.org has the command for your driver)"
        yield Finding("GPU", f"{card}, but this torch ({torch.__version__}) was built without CUDA", "problem", advice)
    else:
        advice = f"update the driver to one that supports CUDA {torch.version.cuda}, or install a torch for your driver"
        yield Finding("GPU", f"{card}, but torch cannot use it", "problem", advice)


def _nvidia_card() -> str | None:
    """Return the first GPU's name by the driver, independent of torch; None if there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    return re.sub(r" \(UUID.*", "", lines[0]) if answer.returncode == 0 and lines else None


def _cgroup(name: str) -> list[str]:
    """Return the words of a limit of this container, such as ``cpu.max``; [] without a limit."""
    try:
        words = Path("/sys/fs/cgroup", name).read_text(encoding="utf-8").split()
    except OSError:
        return []
    return words if words and words[0].isdigit() else []


def _processor() -> Iterator[Finding]:
    usable = usable_cores()
    found = f"{usable} of {os.cpu_count()} cores usable"
    limit = _cgroup("cpu.max")
    quota = int(limit[0]) / int(limit[1]) if len(limit) == 2 else float(usable)
    if quota < usable:
        found += f", but the container may use {quota:g}"
    yield _checked("CPU", found, quota < usable, "note", f"set system.num_cpus={max(1, int(quota))}")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdigit() and int(threads) > usable:
        advice = f"unset it, or set it to at most {usable}"
        yield Finding("OMP_NUM_THREADS", f"{threads}, more than the usable cores", "note", advice)


def _memory() -> Finding:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    found = f"{free / _GB:.1f} of {total / _GB:.1f} GB free"
    limit = _cgroup("memory.max")
    if limit and int(limit[0]) < total:
        found += f", the container may use {int(limit[0]) / _GB:.1f}"
        free = min(free, int(limit[0]))
    advice = "set data.num_workers=2, data.batch_size=1 and inference.block_size=[128,128,128]"
    return _checked("memory", found, free < _LEAST_MEMORY, "note", advice)


def _limits() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        advice = "start the container with --shm-size=8g (loader workers pass patches through it), or num_workers=0"
        yield _checked("shared memory", f"{size / _GB:.2f} GB of /dev/shm", size < _LEAST_SHARED, "problem", advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} allowed (at most {hard})"
    yield _checked("open files", found, soft < _LEAST_FILES, "note", f"ulimit -n {_LEAST_FILES * 4}")


def _disk(folder: Path) -> Iterator[Finding]:
    place = existing(folder)
    free = shutil.disk_usage(place).free
    advice = "crops of the challenge take up to 20 GB decoded; set data.cache_gb, or another data.cache_dir"
    yield _checked("disk space", f"{free / _GB:.1f} GB free at {place}", free < _LEAST_FREE, "note", advice)
    kind = _file_system(place)
    if kind in _NETWORK_DISKS:
        advice = "put the crop cache (data.cache_dir) on a local disk: patches are read in random order"
        yield Finding("file system", f"{kind} (network) at {place}", "note", advice)
    if not os.access(place, os.W_OK):
        yield Finding("disk speed", f"{place} is read-only", "problem", "give a writable folder (--at)")
        return
    try:
        written, read = _disk_speed(place)
    except OSError as error:
        advice = "free some space, or give another folder (--at)"
        yield Finding("disk speed", f"{place}: {error.strerror}", "problem", advice)
        return
    found = f"{written:.0f} MB/s written to the disk, {read:.0f} MB/s read back (from the page cache)"
    yield _checked("disk speed", found, written < _SLOW_DISK, "note", "put runs and the crop cache on a faster disk")


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Return MB/s for writing a file until it is on the disk, and for reading it again."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(_PROBE >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        file.seek(0)
        begin = time.perf_counter()
        while file.read(1 << 20):
            pass
        read = time.perf_counter() - begin
    return _PROBE / 1e6 / written, _PROBE / 1e6 / max(read, 1e-9)


def _file_system(folder: Path) -> str:
    """Return the type of the file system of a folder, "" if the system does not tell."""
    import psutil

    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""


def _reach(source: str | None) -> Finding:
    from connectomics.io import store
    from connectomics.io.store import StoreError, StoreOptions

    if source is None:
        return Finding("S3", "not checked")
    begin = time.perf_counter()
    try:
        groups = store.list_groups(source, StoreOptions(retries=1, timeout=8).resolved())
    except StoreError as error:
        advice = "set a proxy (https_proxy) or another endpoint (AWS_ENDPOINT_URL); local data does not need S3"
        return Finding("S3", str(error), "note", advice)
    return Finding("S3", f"{source} answers in {time.perf_counter() - begin:.2f} s, {len(groups)} folders")
