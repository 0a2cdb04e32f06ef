"""Options that several verbs share, and how their values are read.

``~`` is the user's home. Most paths must be on a local disk; places may also be on S3. Data roots are plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig
    from connectomics.io.location import Location


def output_path(location: Location) -> Path:
    """Return the path of a file or folder to write; `WriteError` if it is a URL."""
    from connectomics.io.location import local_path

    return local_path(location)


def input_path(location: Location) -> Path:
    """Return the path of a file or folder to read; `MissingError` if it is a URL."""
    from connectomics.errors import MissingError
    from connectomics.io.location import is_url, normalize

    if is_url(location):
        raise MissingError(
            f"cannot read {location}: expected a path on a local disk, got a URL. Copy it here first (only data roots, "
            "and what decode, measure, mesh, export and status read, may be s3:// URLs)"
        )
    return Path(normalize(location))


def output_place(location: Location) -> Path:
    """Return a local path or S3 place to write to; `WriteError` for another URL."""
    from connectomics.io.place import output_place

    return output_place(location, credentials=False)


def input_place(location: Location) -> Path:
    """Return a local path or S3 place to read from; `MissingError` for another URL."""
    from connectomics.io.place import S3Path, place

    return found if isinstance(found := place(location), S3Path) else input_path(location)


OutOption = partial(typer.Option, parser=output_path, metavar="PATH")
OutArgument = partial(typer.Argument, parser=output_path)
InOption = partial(typer.Option, parser=input_path, metavar="PATH")
InArgument = partial(typer.Argument, parser=input_path)
OutPlaceOption = partial(typer.Option, parser=output_place, metavar="PATH")
OutPlaceArgument = partial(typer.Argument, parser=output_place)
InPlaceOption = partial(typer.Option, parser=input_place, metavar="PATH")
InPlaceArgument = partial(typer.Argument, parser=input_place)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value ..., such as training.max_epochs=3", show_default=False)
]
EngineOverrides = Annotated[
    list[str] | None, typer.Argument(help="engine.key=value ..., such as engine.workers=8", show_default=False)
]
Classes = Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")]
Crops = Annotated[list[str] | None, typer.Option("--crop", help="Only this crop (crop234); may be repeated.")]
Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="Only this data set; may be repeated.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or cuda:1; default: a GPU if there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Only resume: fail if nothing was started. With --overwrite: replace output made with other settings, "
        "keep output made with these.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cost; do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Port = Annotated[int, typer.Option(help="Port of the page; 0: any free port.", min=0, max=65535)]
Browser = Annotated[bool, typer.Option("--open", help="Open the browser.")]
Checkpoint = Annotated[Path | None, InOption(help="Resume from this checkpoint.")]
ResumeRun = Annotated[
    bool, typer.Option("--resume", help="Resume from the run folder's last checkpoint; start if there is none.")
]
FastDevRun = Annotated[bool, typer.Option("--fast-dev-run", help="Run one batch of everything.")]
RulesConfig = Annotated[Path | None, InOption("--config", help="Configuration whose score.rules to use.")]
Rules = Annotated[str | None, typer.Option("--rules", help="Short for score.rules=...")]


def rules_of(config: Path | None, overrides: Sequence[str] | None, given: str | None) -> str:
    """Return the rules that ``--rules`` names, else ``score.rules`` of a configuration with overrides."""
    from connectomics.config import load_config

    return load_config(config, overrides, None if given is None else f"score.rules={given}").score.rules


def engine_config(overrides: Sequence[str] | None) -> EngineConfig:
    """Return the engine of ``engine.key=value`` overrides; `ConfigError` for a key of another group."""
    from connectomics.config import load_config
    from connectomics.errors import ConfigError

    for override in overrides or ():
        if not override.lstrip("+").startswith("engine."):
            raise ConfigError(f"expected engine.key=value, got {override!r}; see --help for the options of this verb")
    return load_config(None, overrides).engine


def voxel_size_of(text: str) -> tuple[float, float, float]:
    """Return ``8`` or ``16,8,8`` (z, y, x) as three sizes in nm."""
    from connectomics.errors import InputError

    size = numbers_of(text, "--voxel-size", (1, 3), "one number or three (z,y,x) in nm")
    size = size * 3 if len(size) == 1 else size
    if not min(size) > 0:
        raise InputError(f"--voxel-size: expected sizes above 0 nm, got {text}")
    return size[0], size[1], size[2]


def numbers_of(text: str, option: str, lengths: Sequence[int], expected: str) -> list[float]:
    """Return comma-separated numbers; `InputError` unless there are as many as one of ``lengths``."""
    from connectomics.errors import InputError

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in lengths:
        raise InputError(f"{option}: expected {expected}, got {text!r}")
    return numbers
