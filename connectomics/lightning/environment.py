"""What a run ran in: versions, machine, and the state of the code, kept beside its results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import connectomics
from connectomics.io.write import write_file

ENVIRONMENT_FILE = "environment.json"


def environment() -> dict[str, Any]:
    """Versions of all installed packages, Python, the machine with its GPUs, the command, and the commit of the code
    (with whether it was changed since) where this package lies in a git checkout."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "connectomics": connectomics.__version__,
        "git": git_state(Path(connectomics.__file__).parent),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID"),
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in metadata.distributions())),
    }


def save_environment(run_dir: Path) -> None:
    """Write `environment` as JSON into a run's folder; a resumed run adds to what was there."""
    file = run_dir / ENVIRONMENT_FILE
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    write_file(file, json.dumps([*earlier, environment()], indent=1).encode())


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder's checkout is at, and whether files were changed since; None where there is no git."""

    def ask(*words: str) -> str | None:
        try:
            said = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return said.stdout.strip() if said.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if not commit or ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed into an environment that happens to lie in somebody else's checkout
    return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
