"""What this machine has, and what of it will hurt: versions, GPU, memory, disk, S3, known pitfalls."""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from connectomics.cellmap.fetch import PUBLIC
from connectomics.errors import InputError
from connectomics.io.store import is_s3
from connectomics.machine import usable_cores

Level = Literal["ok", "note", "problem"]

#: what the program stands on; without one of them it does not run
_CORE = (
    "torch", "pytorch-lightning", "monai", "hydra-core", "omegaconf", "zarr", "numcodecs", "tensorstore", "obstore",
    "numpy", "scipy", "numba", "connected-components-3d", "edt", "fastremap", "scikit-image", "ortools",
)  # fmt: skip
#: extra -> the packages that make it
_EXTRAS = {
    "tune": ("optuna",),
    "cluster": ("dask", "distributed", "dask-jobqueue"),
    "affinities": ("mwatershed",),
    "mesh": ("zmesh",),
    "view": ("neuroglancer",),
    "formats": ("tifffile", "h5py", "mrcfile", "pynrrd"),
    "mlflow": ("mlflow-skinny",),
}
_GB = 1e9
_LEAST_MEMORY, _LEAST_SHARED, _LEAST_FREE = 8 * _GB, 1 * _GB, 20 * _GB
_LEAST_FILES = 1024
_SLOW_DISK = 100.0  # MB/s: a cached patch of 128^3 then takes 20 ms and more to read
_PROBE = 128 << 20  # bytes written and read to measure the disk
_NETWORK_DISKS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "fuse.sshfs", "ceph", "fuse.ceph"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: ``GPU``. found: what is there, for people. level: ``note`` may cost time, ``problem`` will stop a run.
        advice: what to change, or "".
    """

    what: str
    found: str
    level: Level = "ok"
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(folder: Path, *, s3: str | None = None) -> Iterator[Finding]:
    """Look at everything, one finding after the other.

    Args:
        folder: where runs and the crop cache will lie; its disk is measured with a file of 128 MiB.
        s3: ``s3://bucket`` to ask for one listing, or "public" for the CellMap data; None asks nobody.

    Raises:
        InputError: ``folder`` is a file, or ``s3`` is no bucket.
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


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    good = (3, 11) <= tuple(int(v) for v in python.split(".")[:2]) <= (3, 14)
    advice = "" if good else "create an environment with Python 3.11 to 3.14"
    yield Finding("Python", python, "ok" if good else "problem", advice)
    if _version("connectomics") is not None:
        advice = "pip uninstall connectomics, then install connectomics-cellmap again"
        found = "another package of the same import name is installed: connectomics"
        yield Finding("name", found, "problem", advice)
    there = {name: _version(name) for name in _CORE}
    lacking = [name for name, version in there.items() if version is None]
    if lacking:
        yield Finding("libraries", f"missing: {', '.join(lacking)}", "problem", f"pip install {' '.join(lacking)}")
    yield Finding("libraries", ", ".join(f"{n} {v}" for n, v in there.items() if v is not None))
    for extra, names in _EXTRAS.items():
        absent = [name for name in names if _version(name) is None]
        found = f"missing: {', '.join(absent)}" if absent else "installed"
        yield Finding(
            f"extra {extra}", found, "ok", f"pip install 'connectomics-cellmap[{extra}]' to use it" if absent else ""
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
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            busy = free < total / 2
            yield Finding(
                f"GPU {number}",
                f"{about.name}, {free / _GB:.1f} of {total / _GB:.1f} GB free, bfloat16 "
                f"{'yes' if torch.cuda.is_bf16_supported() else 'no'}",
                "note" if busy else "ok",
                "someone else uses it; set CUDA_VISIBLE_DEVICES to another" if busy else "",
            )
        return
    card = _nvidia_card()
    if card is None:
        yield Finding("GPU", "none: training and prediction run on the CPU")
    elif torch.version.cuda is None:
        advice = "install torch with CUDA (pytorch.org names the command for your driver)"
        yield Finding("GPU", f"{card}, but this torch ({torch.__version__}) was built without CUDA", "problem", advice)
    else:
        advice = (
            f"update the driver to one that knows CUDA {torch.version.cuda}, or install a torch for the one you have"
        )
        yield Finding("GPU", f"{card}, but torch cannot use it", "problem", advice)


def _nvidia_card() -> str | None:
    """What the driver calls the first card, whatever torch says; None where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        said = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = said.stdout.strip().splitlines()
    return re.sub(r" \(UUID.*", "", lines[0]) if said.returncode == 0 and lines else None


def _processor() -> Iterator[Finding]:
    usable = usable_cores()
    quota = _cgroup_cores()
    text = f"{usable} cores usable of {os.cpu_count()}"
    if quota is not None and quota < usable:
        yield Finding(
            "CPU", f"{text}, but the container may use {quota:g}", "note", f"set system.num_cpus={max(1, int(quota))}"
        )
    else:
        yield Finding("CPU", text)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdigit() and int(threads) > usable:
        advice = f"unset it, or set it to {usable} at most"
        yield Finding("OMP_NUM_THREADS", f"{threads}, more than there are cores", "note", advice)


def _cgroup_cores() -> float | None:
    """Cores that a container is limited to; None where it is not."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _memory() -> Finding:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    text = f"{free / _GB:.1f} of {total / _GB:.1f} GB free"
    limit = _cgroup_memory()
    if limit is not None and limit < total:
        text += f", the container may use {limit / _GB:.1f}"
        free = min(free, limit)
    if free < _LEAST_MEMORY:
        advice = "set data.num_workers=2 and inference.block_size=[128,128,128], data.batch_size=1"
        return Finding("memory", text, "note", advice)
    return Finding("memory", text)


def _cgroup_memory() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _limits() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < _LEAST_SHARED
        advice = "start the container with --shm-size=8g (loader workers hand patches over there), or num_workers=0"
        found = f"{size / _GB:.2f} GB of /dev/shm"
        yield Finding("shared memory", found, "problem" if small else "ok", advice if small else "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < _LEAST_FILES
    found = f"{soft} allowed (at most {hard})"
    yield Finding("open files", found, "note" if few else "ok", f"ulimit -n {_LEAST_FILES * 4}" if few else "")


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    scarce = free < _LEAST_FREE
    advice = "crops of the challenge take up to 20 GB decoded; set data.cache_gb, or another data.cache_dir"
    yield Finding(
        "disk space", f"{free / _GB:.1f} GB free at {there}", "note" if scarce else "ok", advice if scarce else ""
    )
    kind = _file_system(there)
    if kind in _NETWORK_DISKS:
        advice = "put the crop cache (data.cache_dir) on a disk of this machine: patches are read at random"
        yield Finding("file system", f"{kind} (network) at {there}", "note", advice)
    if not os.access(there, os.W_OK):
        yield Finding("disk speed", f"{there} is read-only", "problem", "give a folder that you may write to (--at)")
        return
    try:
        written, read = _disk_speed(there)
    except OSError as error:
        yield Finding("disk speed", f"{there}: {error.strerror}", "problem", "free some space, or give another (--at)")
        return
    slow = written < _SLOW_DISK
    advice = "put runs and the crop cache on a faster disk" if slow else ""
    found = f"{written:.0f} MB/s written to the disk, {read:.0f} MB/s read back (from the page cache)"
    yield Finding("disk speed", found, "note" if slow else "ok", advice)


def _disk_speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing a file until it is on the disk, and of reading it again."""
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
    """The type of the file system that holds a folder ("" where the system does not say)."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    mounts = [line.split()[1:3] for line in lines]
    inside = [(place, kind) for place, kind in mounts if folder.is_relative_to(place.replace("\\040", " "))]
    return max(inside, key=lambda pair: len(pair[0]))[1] if inside else ""


def _reach(source: str | None) -> Finding:
    from connectomics.io import store
    from connectomics.io.store import StoreError, StoreOptions

    if source is None:
        return Finding("S3", "not asked")
    begin = time.perf_counter()
    try:
        groups = store.list_groups(source, StoreOptions(retries=1, timeout=8).resolved())
    except StoreError as error:
        advice = "ask for a proxy (https_proxy) or another endpoint (AWS_ENDPOINT_URL); local data needs none of it"
        return Finding("S3", str(error), "note", advice)
    return Finding("S3", f"{source} answers in {time.perf_counter() - begin:.2f} s, {len(groups)} folders")
