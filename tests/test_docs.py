"""Every command of the documentation runs, in the order in which a reader meets it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: run by continuous integration itself, from nothing
MAKE = {"make demo", "make test"}


def commands(file: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", file.read_text(encoding="utf-8"), re.S)
    return [
        line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    for name in ("tutorials", "scripts", "connectomics"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str, place: Path) -> None:
    words = shlex.split(command)
    program = {"pytc": [sys.executable, "-m", "connectomics"], "python": [sys.executable]}[words[0]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, *words[1:]], capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_the_guide_runs(place: Path) -> None:
    found = commands(ROOT / "docs/guide.md")
    assert len(found) > 12
    for command in found:
        run(command, place)
    assert (place / "out/report.html").stat().st_size > 10_000


def test_other_pages_have_no_command_that_is_not_run() -> None:
    guide = set(commands(ROOT / "docs/guide.md"))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        unknown = [c for c in commands(page) if c not in guide | MAKE]
        assert unknown == [], page.name


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("install", "demo", "test", "test-all", "bench", "lint", "clean"):
        assert re.search(rf"^{target}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
