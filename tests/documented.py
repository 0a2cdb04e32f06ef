"""What the API pages in docs/reference show: public functions and classes, and the items of their docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Node = ast.FunctionDef | ast.ClassDef
_ITEM = re.compile(r"[\w*]+(?:, [\w*]+)*: ")


def documented() -> Iterator[tuple[Path, Node]]:
    """Yield the file and the node of each public function, class and method of the modules on the API pages, and of the
    modules that the front door takes its functions from."""
    pages = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    names = set(re.findall(r"^::: ([\w.]+)", pages, re.M)) | {"connectomics"}
    files = {found for name in names for found in [_file(name)] if found is not None}
    for package in [file for file in files if file.name == "__init__.py"]:  # shows what it imports
        files |= {
            found for name in re.findall(r"connectomics\.[\w.]+", package.read_text("utf-8")) if (found := _file(name))
        }
    for file in sorted(files):
        yield from ((file, node) for node in _public(ast.parse(file.read_text("utf-8"))))


def crowded(node: Node) -> list[str]:
    """Return the items of Args, Attributes and Raises that the parser of the pages (griffe, google style) takes for
    the description of the item before (``a: first. b: second.`` on a line), or cuts (further lines without indent)."""
    found = []
    for section, _, text, flat in items(node):
        found += split(section, text, names_of(node))[1:] + [text] * flat
    return found


def names_of(node: Node) -> set[str]:
    """Names of the arguments or attributes."""
    if isinstance(node, ast.FunctionDef):
        return {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    return {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def split(section: str, text: str, names: set[str]) -> list[str]:
    """Return an item's text, cut where a sentence is followed by another name and a colon."""
    parts = re.split(r"(?<=[.;]) (?=\w+(?:, \w+)*: )", text)
    kept = parts[:1]
    for part in parts[1:]:
        heads = part.partition(":")[0].split(", ")
        if all(head in names if section != "Raises" else re.fullmatch(r"[A-Z]\w+Error", head) for head in heads):
            kept.append(part)
        else:
            kept[-1] += f" {part}"
    return kept


def items(node: Node) -> Iterator[tuple[str, tuple[int, int], str, bool]]:
    """Yield section, line numbers in the docstring (begin, end) and text of each item, and whether a further line of
    it has no indent."""
    lines = (ast.get_docstring(node, clean=False) or "").splitlines()
    section, indent, begin, flat = "", 0, -1, False
    for number, line in enumerate([*lines, ""]):
        depth, starts = len(line) - len(line.lstrip()), _ITEM.match(line.strip())
        if begin >= 0 and (not line.strip() or depth <= indent or (depth == indent + 4 and starts)):
            yield section, (begin, number), " ".join(part.strip() for part in lines[begin:number]), flat
            begin, flat = -1, False
        if match := re.fullmatch(r"( *)(Args|Attributes|Raises):", line):
            section, indent = match[2], len(match[1])
        elif line.strip() and depth <= indent:
            section = ""
        elif section and starts and begin < 0:
            begin = number
        elif begin >= 0 and depth == indent + 4:
            flat = True


def _file(name: str) -> Path | None:
    place = ROOT / name.replace(".", "/")
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _public(parent: ast.Module | ast.ClassDef) -> Iterator[Node]:
    for node in parent.body:
        if isinstance(node, Node) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)
