#!/usr/bin/env python
"""Check that the pinned packages of constraints.txt have wheels for every Python and platform that we name.

    python scripts/resolve_pins.py                       # all
    python scripts/resolve_pins.py --python 3.13 --platform linux-x86_64

pip looks for a wheel of every pinned package that the dependencies of pyproject.toml lead to, and installs nothing. The
exit status is 1 if a combination lacks one. Run it in the project's environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
#: Name -> pip's platform tags, the newest first.
PLATFORMS = {
    "linux-x86_64": [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64"],
    "linux-aarch64": [f"manylinux_2_{n}_aarch64" for n in (28, 27, 24, 17)] + ["manylinux2014_aarch64"],
    "macos-arm64": [f"macosx_{n}_0_arm64" for n in (14, 13, 12, 11)] + ["macosx_10_15_universal2"],
}
#: Pure Python packages that the index has as source only: their wheels are built here.
SOURCE_ONLY = ("antlr4-python3-runtime==4.9.3",)


def pinned(python: str, platform: str) -> list[str]:
    """Return the pins of everything that the package needs, without extras: its dependencies, theirs, and so on.

    Dependencies are those of the installed packages, with markers evaluated for the target. CUDA packages, which torch
    adds on Linux, belong to the build of torch and not to our pins.
    """
    system = "Darwin" if platform.startswith("macos") else "Linux"
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_system": system, "extra": "",
        "sys_platform": system.lower(), "platform_machine": platform.partition("-")[2],
    }  # fmt: skip
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, equals, _ = line.partition("==")
        if equals:
            pins[canonicalize_name(name)] = line.strip()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    left, found = [Requirement(text) for text in project["dependencies"]], set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name not in pins or (requirement.marker and not requirement.marker.evaluate(environment)):
            continue
        found.add(name)
        left += [Requirement(text) for text in metadata.requires(name) or ()]
    return [pins[name] for name in sorted(found)]


def resolve(python: str, platform: str, wheels: Path) -> str:
    """Return "N packages", or the line in which pip says why there is no solution."""
    tags = [word for tag in PLATFORMS[platform] for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq", "--no-deps",
             "--only-binary=:all:", "--python-version", python, *tags, "--target", folder, "--report", str(report),
             "--find-links", str(wheels), *pinned(python, platform)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return f"{len(json.loads(report.read_text(encoding='utf-8'))['install'])} packages"
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: No matching")]
    return f"no solution: {lines[-1] if lines else done.stderr[-200:]}"


def main(arguments: list[str] | None = None) -> int:
    """Print a line per combination; return 1 if one has no solution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this Python; may be repeated")
    parser.add_argument("--platform", action="append", choices=PLATFORMS, help="only this platform; may be repeated")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *SOURCE_ONLY],
            check=True,
        )
        for platform in options.platform or PLATFORMS:
            for python in options.python or PYTHONS:
                found = resolve(python, platform, Path(folder))
                failed += found.startswith("no solution")
                print(f"{platform:14} Python {python}: {found}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
