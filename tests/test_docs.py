"""Every command of the documentation runs, in the order in which a reader meets it."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import connectomics
from connectomics.cli.app import app
from connectomics.io.multiscale import Multiscale
from tests.starter import Starter
from tests.test_house import ROOMS

ROOT = Path(__file__).resolve().parents[1]
#: run by continuous integration itself, from nothing
MAKE = {"make demo", "make test"}
MAKE_PHANTOM = "pytc phantom data/phantom --preset tiny"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(file: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", file.read_text(encoding="utf-8"), re.S)
    return [
        line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")
    ]


def run_all(found: list[str], folder: Path, starter: Starter, small: bool, phantom: Path) -> None:
    """Run commands one after another in a folder; fails with the output of the first that fails.

    ``small``: with a network of fewer channels, a study of one seed, and ``phantom`` for the one that the page makes.
    """
    for name in ("scripts", "connectomics"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tutorials", folder / "tutorials")
    environment = {"FORK_WORKERS": "1"} if small else {}
    if small:
        for name, old, new in (
            ("phantom", "channels: [24, 48, 96, 128]", "channels: [4, 8, 16, 16]"),
            ("studies/phantom", "seeds: [1, 2]", "seeds: [1]"),
        ):
            file = folder / f"tutorials/{name}.yaml"
            text = file.read_text()
            assert text.count(old) == 1
            file.write_text(text.replace(old, new))
        found = [command for command in found if command != MAKE_PHANTOM]
        shutil.copytree(phantom, folder / "data/phantom")
    for command in found:
        program, *words = shlex.split(command)
        words += ["model.options.channels=[4,8,16,16]"] * (small and words[0] == "demo")
        started = starter.run(words if program == "python" else [program, *words], environment, cwd=folder)
        assert started.status == 0, f"{command}\n{started.said[-5000:]}"


AS_WRITTEN = pytest.mark.parametrize(
    "small", [pytest.param(True, id="small"), pytest.param(False, id="as written", marks=pytest.mark.slow)]
)


@AS_WRITTEN
def test_the_guide_runs(tmp_path: Path, starter: Starter, phantom: Path, small: bool) -> None:
    found = commands(ROOT / "docs/guide.md")
    assert len(found) > 12
    assert MAKE_PHANTOM in found
    run_all(found, tmp_path, starter, small, phantom)
    assert (tmp_path / "out/report.html").stat().st_size > 10_000


@AS_WRITTEN
def test_a_whole_cell_runs(tmp_path: Path, starter: Starter, phantom: Path, small: bool) -> None:
    """Every command of the page, the last one until it serves."""
    pytest.importorskip("zmesh", reason="meshes need pip install 'connectomics-cellmap[mesh]'")
    page = ROOT / "docs/whole-cell.md"
    run_all(commands(page), tmp_path, starter, small, phantom)
    place = "cell7.zarr/box_-2_-2_-2_638_638_638/mito"
    for folder in ("out/probabilities", "out/labels"):
        levels = Multiscale.open(tmp_path / folder / place).levels
        assert [level.grid.shape for level in levels] == [(80, 80, 80), (40, 40, 40)]
    assert (tmp_path / "out/tables/contacts_mito_er_30nm.csv").stat().st_size > 0
    pytest.importorskip("neuroglancer", reason="the viewer needs pip install 'connectomics-cellmap[view]'")
    (view,) = shown(page)
    viewer = starter.start([*shlex.split(view), "--state", "state.json"], cwd=tmp_path)
    assert viewer.wait_for(lambda: "\nhttp" in viewer.stdout), viewer.said
    os.kill(viewer.pid, signal.SIGINT)
    viewer.wait()
    assert "  labels of er, ld, mito, nuc in box_-2_-2_-2_638_638_638\n" in viewer.stdout
    state = json.loads((tmp_path / "state.json").read_text())
    (mito,) = (layer for layer in state["layers"] if layer["name"].startswith("mito labels"))
    assert len(mito["source"]) == 3, "labels, properties, meshes"


def test_other_pages_have_no_command_that_is_not_run() -> None:
    run = {command for name in ("guide", "whole-cell") for command in commands(ROOT / f"docs/{name}.md")}
    for page in PAGES:
        unknown = [c for c in commands(page) if c not in run | MAKE]
        assert unknown == [], page.name


def shown(page: Path) -> list[str]:
    """Commands that are shown and cannot be run here (public data, a GPU, a queue): text blocks, cells of tables."""
    text = page.read_text(encoding="utf-8")
    blocks = [b.replace("\\\n", " ") for b in re.findall(r"```text\n(.*?)```", text, re.S)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    cells = [cell for row in re.findall(r"^\|.*\|$", text, re.M) for cell in re.findall(r"`(pytc \w+ [^`]+)`", row)]
    return [line for line in [*lines, *cells] if line.startswith("pytc ") and "..." not in line and "…" not in line]


def test_commands_that_are_only_shown_have_verbs_and_options_that_exist() -> None:
    group: Any = get_command(app)
    found = 0
    for page in PAGES:
        for line in shown(page):
            verb, *words = shlex.split(line, comments=True)[1:]
            command = group.get_command(None, verb)
            assert command is not None, f"{page.name}: {line}"
            try:
                command.make_context(verb, words)
            except Exception as error:  # click's own, which typer does not export
                pytest.fail(f"{page.name}: {line}: {error!r}")
            found += 1
    assert found > 20


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("install", "demo", "test", "test-all", "bench", "lint", "docs", "clean"):
        assert re.search(rf"^{target}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What a link may name after its #, as Python-Markdown makes it of headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_page_has_its_place_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    listed = re.findall(r"([\w/-]+\.md)$", nav, re.M)
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in PAGES[1:])


def test_the_reference_names_modules_and_functions_that_exist() -> None:
    named = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M):
            place = ROOT / name.replace(".", "/")
            front = name.removeprefix("connectomics.") in connectomics.__all__
            assert front or place.with_suffix(".py").exists(), name
            named.add(name)
    elsewhere = {"Box", "VoxelGrid", "__version__"}
    assert {f"connectomics.{name}" for name in set(connectomics.__all__) - elsewhere} <= named


def test_the_ways_of_three_values_pass_places_that_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    ways = page.split("## Three values")[1].split("## Artifacts")[0]
    named = [n for n in re.findall(r"`([\w.]+)`", ways) if n.split(".")[0] in ROOMS and n != "data.patch_size"]
    assert len(named) >= 15
    for name in named:
        assert pkgutil.resolve_name(f"connectomics.{name}"), name


def messages() -> str:
    """Every text of the code, `…` for what is filled in."""
    texts = []
    for file in (ROOT / "connectomics").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts).replace("`", "'")


def test_troubleshooting_has_the_messages_of_the_code() -> None:
    said = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    texts = messages()
    assert len(said) > 20
    assert [m for m in said if not re.search(re.escape(m).replace("…", "[^\n]*?"), texts)] == []


@pytest.mark.slow
def test_the_site_is_built_of_itself(tmp_path: Path) -> None:
    """Strictly: no page without a place, no link or anchor into nothing; and nothing is loaded from elsewhere."""
    pytest.importorskip("material", reason="the site needs pip install 'connectomics-cellmap[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site needs pip install 'connectomics-cellmap[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\" >]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]+href=\"?(https?:[^\" >]+)", text)
        assert loaded == [], page
    reference = (tmp_path / "site/reference/geometry.html").read_text(encoding="utf-8")
    assert "VoxelGrid" in reference
    assert "covering" in reference
