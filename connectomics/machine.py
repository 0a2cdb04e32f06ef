"""What this process may use of the machine."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path


def usable_cores() -> int:
    """Return the number of CPU cores this process may run on, at least 1.

    Counts the CPU affinity where the system has one: in a SLURM or LSF slot, a container, or under ``taskset`` that is
    less than the machine has, and one thread per machine core would oversubscribe the slot.
    """
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def is_first_process() -> bool:
    """Return whether this is the only process, or the first of a data-parallel run by the environment."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def cpu_has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions; without them bfloat16 is slower than float32."""
    if platform.system() != "Linux":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def ensure_numba_cache() -> None:
    """Let numba keep compiled kernels in the temporary folder if neither the code's folder nor the user's cache can be
    written, as in a read-only installation without a home on some cluster nodes; numba would refuse to work."""
    user = os.path.expanduser(os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "numba"))
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__pycache__")
    if "NUMBA_CACHE_DIR" in os.environ or _is_writable(beside) or _is_writable(user):
        return
    folder = os.path.join(tempfile.gettempdir(), f"connectomics-numba-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        mine = os.stat(folder).st_uid == os.getuid() and not os.path.islink(folder)
    except OSError:
        mine = False
    # numba runs what is stored there, so the folder must belong to this user
    os.environ["NUMBA_CACHE_DIR"] = folder if mine else tempfile.mkdtemp(prefix="connectomics-numba-")


def _is_writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
