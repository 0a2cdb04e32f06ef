"""Plain English: words and phrases that the project does not use, in documentation, docstrings and messages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documented import crowded, documented

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = sorted((ROOT / "connectomics").rglob("*.py"))

#: Pattern -> what to write instead.
BANNED = {
    r"told apart|tell(s|ing)? \w+ apart": "distinguish; with instance IDs",
    r"gone on with|go(es)? on (with|from|where)": "resume",
    r"\bmend(s|ed)?\b": "fix",
    r"\banew\b": "again; start over",
    r"\bhangs? on\b": "depends on",
    r"in one go": "at once",
    r"\bcomes? of\b": "results from",
    r"beside others": "comparison",
    r"said beforehand": "check before",
    r"the plan's|the design's|private history": "say what is true now",
    r"\bartefact": "artifact",
    r"colou?r(?<!color)": "color",
    r"\bgrey": "gray",
    r"neighbour": "neighbor",
    r"\bcentre|\bcentring": "center",
    r"\blicence": "license",
    r"nanometre|\bmetre": "nanometer",
    r"(normal|organ|optim|initial|recogn|summar|visual|serial|minim|maxim|general|local)is(e|ed|ing|ation)\b": "-ize",
    r"behaviour": "behavior",
    r"catalogue": "catalog",
    r"\blabell": "label-ed, label-ing",
    r"\bmodell": "model-ed, model-ing",
    r"\bfavour": "favor",
    r"\bhonour": "honor",
    r"\bwhilst\b|\bamongst\b": "while, among",
}
#: Words that files and formats fix.
EXEMPT = re.compile(r"\bartefact\b(?=[ :,`\"])|Color Universal")


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of a Markdown page outside of code."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)


def words_of_code(file: Path) -> Iterator[tuple[int, str]]:
    """Comments and texts (docstrings, messages) of a module."""
    source = file.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, line


def violations(lines: Iterator[tuple[int, str]]) -> list[str]:
    found = []
    for number, line in lines:
        text = EXEMPT.sub("", line)
        for pattern, instead in BANNED.items():
            if match := re.search(pattern, text, re.IGNORECASE):
                found.append(f"{number}: {match[0]!r} ({instead}): {line.strip()[:100]}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_documentation_is_plain_english(page: Path) -> None:
    assert violations(prose(page)) == []


@pytest.mark.parametrize("file", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_speaks_plain_english(file: Path) -> None:
    assert violations(words_of_code(file)) == []


def test_the_check_finds_what_it_looks_for() -> None:
    assert violations(iter([(1, "the objects are told apart")])) != []
    assert violations(iter([(1, "normalised by the centre voxel")])) != []
    assert violations(iter([(1, "normalized colors of the center voxel")])) == []


def test_each_argument_has_its_own_line() -> None:
    """The API pages show what follows on a line as a part of the description before."""
    found = {f"{file.relative_to(ROOT)}, {node.name}": crowded(node) for file, node in documented()}
    assert {where: parts for where, parts in found.items() if parts} == {}


def test_the_check_of_arguments_finds_what_it_looks_for() -> None:
    text = '''
def f(a, b, c, d):
    """Do.

    Args:
        a: first; b: second. None: no part of it.
            More. c, d: both.
        d: last, over two
            lines.

    Raises:
        InputError: wrong. Others: not that. MissingError, StoreError: not
        there.
    """
'''
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert crowded(node) == [
        "b: second. None: no part of it. More.",
        "c, d: both.",
        "MissingError, StoreError: not there.",
        "InputError: wrong. Others: not that. MissingError, StoreError: not there.",
    ]
