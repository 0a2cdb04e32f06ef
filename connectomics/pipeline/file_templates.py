"""Files that verbs write for other programs (make, SLURM, LSF), from ``templates/``."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("connectomics.pipeline"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip


def from_template(name: str, /, **values: Any) -> str:
    """Return the text of ``templates/{name}.j2``."""
    return str(_environment().get_template(f"{name}.j2").render(values))
