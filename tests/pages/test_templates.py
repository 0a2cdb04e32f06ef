"""Templates: they compile, they escape, and the Python code holds no markup of its own."""

from __future__ import annotations

import re
from importlib import resources

import pytest
from jinja2 import UndefinedError

from connectomics.pages import page

TEMPLATES = page.environment().list_templates(extensions=["j2"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_compiles(name: str) -> None:
    page.environment().get_template(name)


def test_templates_are_part_of_the_package() -> None:
    assert resources.files("connectomics.pages").joinpath("templates", "page.html.j2").is_file()
    assert {"report/scores.html.j2", "inspect/patches.html.j2"} <= set(TEMPLATES)


def test_values_are_escaped_and_missing_ones_are_errors() -> None:
    assert page.render("report/header", title="<b>") == "<h1>&lt;b&gt;</h1>"
    assert page.note("<b>") == '<p class="note">&lt;b&gt;</p>'
    with pytest.raises(UndefinedError):
        page.render("report/header")


def test_markup_is_in_the_templates_alone() -> None:
    room = resources.files("connectomics.pages")
    files = [
        f for folder in (room, room / "report", room / "inspect") for f in folder.iterdir() if f.name[-3:] == ".py"
    ]
    assert len(files) > 20
    for file in files:
        code = re.sub(r'""".*?"""', "", file.read_text(encoding="utf-8"), flags=re.S)
        found = set(re.findall(r"<(\w+)[ >]", code))
        assert file.name == "page.py" or not found & {"div", "td", "th", "p", "span", "svg", "details"}, file.name
