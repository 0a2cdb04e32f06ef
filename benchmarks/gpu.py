"""Test and measure the project on a GPU with one command: ``make gpu``, or

    python benchmarks/gpu.py [--minutes 9] [--out outputs/gpu] [--sections tests,inference,training,learning]
        [--device cuda|cpu] [--tiny] [--data DIR]
    python benchmarks/gpu.py --write-data DIR     # a small copy of the data that ``learning`` reads (17 MB)

tests: everything in tests/gpu that is marked ``gpu``. inference: prediction from Zarr to Zarr beside the bare forward
passes and MONAI's inferer. training: patches per second with the real loader beside a constant batch, memory, and where
a step's time goes. learning: a real training (tutorials/lucchi_gpu.yaml) and its foreground IoU against time.

Each section is a process with a share of the time; whatever happens to it, the next one runs. ``gpu.json`` and
``gpu.md`` in ``--out`` are replaced after every row. Needs no network, no writable home and no installation: a checkout
and a Python that has the packages. Without a GPU it runs ``--tiny`` on the CPU. Exit status 1 if anything broke; a goal
that is missed breaks nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

from gpu_sections.record import LeftOutError, Record, Section, one_line

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
#: section -> its share of the time; what one leaves over goes to those after it
SHARES = {"tests": 0.22, "inference": 0.28, "training": 0.27, "learning": 0.23}
_NEEDED = ("torch", "monai", "pytorch_lightning", "zarr", "numba", "tensorstore", "hydra")
_GRACE_S = 20.0  # that a section may run over before it is killed


def main() -> int:
    options = parse()
    if options.worker:
        return work(options)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{sys.executable} lacks {', '.join(missing)}; run 'make install' first, or name a Python that has the "
            "packages of pyproject.toml: make gpu PYTHON=/path/to/python"
        )
        return 2
    if options.write_data is not None:
        from gpu_sections.learning import write_root

        try:
            print(f"wrote {write_root(options.data, options.write_data)}")
        except LeftOutError as reason:
            print(reason)
            return 2
        return 0
    import torch

    if options.device is None and not torch.cuda.is_available():
        print("no GPU here: running the tiny version on the CPU, whose numbers say nothing about a GPU")
        options.tiny = True
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here (pytc doctor says why); leave --device out to run on the CPU")
        return 2
    judged = options.device == "cuda" and not options.tiny
    try:
        record = Record.start(options.out, about(options), goals=judged)
    except OSError as error:
        print(f"cannot write to {options.out} ({error.strerror}); give another folder with --out")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running section is ended too
    with tempfile.TemporaryDirectory(prefix="connectomics-gpu-") as scratch:
        for name in options.sections:
            record = run_section(name, options, Path(scratch))
    print("\n" + record.markdown())
    for line in record.failures:
        print(f"FAILED: {line}")
    return 1 if record.failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="gets gpu.json and gpu.md")
    parser.add_argument("--sections", default=",".join(SHARES), help="comma-separated (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: to see whether everything runs")
    shared = Path(os.environ.get("CONNECTOMICS_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data", help="folder that holds lucchi-train")
    parser.add_argument("--write-data", type=Path, metavar="DIR", help="write what 'learning' reads to DIR, and end")
    parser.add_argument("--worker", choices=tuple(SHARES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sections = [name.strip() for name in options.sections.split(",") if name.strip()]
    unknown = [name for name in options.sections if name not in SHARES]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; expected some of {', '.join(SHARES)}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, found {options.minutes}")
    options.out, options.data = options.out.absolute(), options.data.absolute()
    return options


def about(options: argparse.Namespace) -> dict[str, object]:
    """Date, machine and versions of this run."""
    import torch

    sys.path.insert(0, str(ROOT))
    import connectomics

    gpu = "none"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        card = torch.cuda.get_device_properties(0)
        gpu = f"{count} x {card.name}, {card.total_memory / 2**30:.0f} GiB"
    packages = ("monai", "pytorch-lightning", "numpy", "zarr", "tensorstore", "triton")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": options.device + (", tiny sizes" if options.tiny else ""),
        "GPU": gpu,
        "CPU": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "connectomics": f"{connectomics.__version__}, commit {_commit()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        "Python": platform.python_version(),
        "packages": ", ".join(f"{name} {found}" for name in packages if (found := _version(name)) is not None),
        "command": " ".join(["benchmarks/gpu.py", *sys.argv[1:]]),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def run_section(name: str, options: argparse.Namespace, scratch: Path) -> Record:
    """Run a section in its own process and return the record."""
    record = Record.load(options.out)
    coming = options.sections[options.sections.index(name) :]
    left = 60 * options.minutes - (time.monotonic() - STARTED)
    seconds = max(0.0, left * SHARES[name] / sum(SHARES[other] for other in coming))
    record.begin(name)
    print(f"\n== {name}: up to {seconds:.0f} s", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--seconds", f"{seconds:.0f}"]
    command += ["--out", str(options.out), "--device", options.device, "--data", str(options.data)]
    command += ["--scratch", str(scratch)] + (["--tiny"] if options.tiny else [])
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment(scratch), cwd=scratch, process_group=0)
    state, error = "done", None
    try:
        status = process.wait(seconds + _GRACE_S)
        if status:
            state = "failed"
            error = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        state, error = "cut off", f"still running {_GRACE_S:.0f} s after its time was over"
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what a section that is over has left running
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    record = Record.load(options.out)
    error = record.content["sections"][name]["error"] or error
    record.end(name, state, time.monotonic() - began, error)
    return record


def environment(scratch: Path) -> dict[str, str]:
    """Environment of a section: the checkout on the path, and caches that need no home."""
    caches = {
        "XDG_CACHE_HOME": "cache",
        "MPLCONFIGDIR": "matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "TRITON_HOME": "triton-home",
    }
    chosen = {name: str(scratch / folder) for name, folder in caches.items()}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**chosen, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def work(options: argparse.Namespace) -> int:
    """Run a section in this process."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    record = Record.load(options.out)
    scratch = options.scratch / options.worker
    scratch.mkdir()
    section = Section(options.worker, record, options.device, options.tiny, options.data, scratch, options.seconds)
    try:
        module = importlib.import_module(f"gpu_sections.{options.worker}")
        module.run(section)
    except Exception as error:
        record.content["sections"][options.worker]["error"] = one_line(error)
        record.save()
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
