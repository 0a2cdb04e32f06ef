"""An environment of its own for cellmap-data, which cannot live beside this project (it holds zarr below 3)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from connectomics.data.cache import default_cache_dir
from connectomics.errors import ConnectomicsError

#: torch goes in alone and first: a later step would choose another build of it.
FIRST = ("torch==2.13.0",)
#: What was measured; the numbers in docs/benchmarks.md are of these versions.
PACKAGES = (
    "cellmap-data==2026.3.20.1935", "torchvision==0.28.0", "zarr==2.18.7", "numcodecs==0.15.2", "numpy==2.4.6",
    "scipy==1.17.1",
)  # fmt: skip
_COMPLETE = "connectomics-peer.json"
_BEGUN = "connectomics-peer.begun"  # marks a folder as ours before the environment in it is whole


class PeerError(ConnectomicsError, RuntimeError):
    """The other loader could not be installed, or does not run."""


def default_folder() -> Path:
    """Where the environment is made unless another place is given: beside the user's crop cache."""
    return default_cache_dir().parent / PACKAGES[0].replace("==", "-")


def ensure_environment(folder: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """The environment's Python; made where ``folder`` does not hold it (1.5 GB, about two minutes).

    Raises `PeerError` where it cannot be made, or ``folder`` holds something else.
    """
    where = (folder or default_folder()).expanduser().absolute()
    python = where / "bin" / "python"
    if (where / _COMPLETE).is_file() and python.exists():
        return python
    if not _works(python):
        begun = where / _BEGUN
        if where.exists() and not begun.is_file() and (not where.is_dir() or any(where.iterdir())):
            raise PeerError(
                f"{where} is there and is no virtual environment of this measurement; give another folder with "
                "--peer-env"
            )
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        begun.touch()
        say(f"making an environment for {PACKAGES[0]} in {where} (once; about 1.5 GB)")
        _run([sys.executable, "-m", "venv", str(where)], "make a virtual environment")
        for packages in (FIRST, (*FIRST, *PACKAGES)):
            say(f"installing {', '.join(packages)}")
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, *packages], f"install {', '.join(packages)}")
    (where / _COMPLETE).write_text(json.dumps({"packages": [*FIRST, *PACKAGES]}) + "\n", encoding="utf-8")
    return python


def _works(python: Path) -> bool:
    """Whether it is the Python of an environment with the very versions."""
    if not python.exists():
        return False
    wanted = dict(p.split("==") for p in (*FIRST, *PACKAGES))
    code = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({n: m.version(n).split('+')[0] for n in json.loads(sys.argv[1])}))"
    )
    done = subprocess.run([str(python), "-c", code, json.dumps(list(wanted))], capture_output=True, text=True)
    return done.returncode == 0 and json.loads(done.stdout) == wanted


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip() and "WARNING" not in line]
        raise PeerError(f"could not {what}: {lines[-1] if lines else f'status {done.returncode}'}")
