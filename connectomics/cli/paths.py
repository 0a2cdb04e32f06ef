"""Paths on the command line: what is written goes to a local disk, and ``~`` is the user's home.

Every option or argument that is a `Path` is made here. Places that may also be an S3 URL (data roots) are plain text.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from connectomics.io.location import Location


def output_path(location: Location) -> Path:
    """The path of something that is written; `WriteError` if it is a URL."""
    from connectomics.io.location import local_path

    return local_path(location)


def input_path(location: Location) -> Path:
    """The path of something that is read from a local disk; `MissingError` if it is a URL."""
    from connectomics.errors import MissingError
    from connectomics.io.location import is_url, normalize

    if is_url(location):
        raise MissingError(
            f"cannot read {location}: expected a path on a local disk, got a URL. Copy it here first (only data roots "
            "may be s3:// URLs)"
        )
    return Path(normalize(location))


OutOption = partial(typer.Option, parser=output_path, metavar="PATH")
OutArgument = partial(typer.Argument, parser=output_path)
InOption = partial(typer.Option, parser=input_path, metavar="PATH")
InArgument = partial(typer.Argument, parser=input_path)
