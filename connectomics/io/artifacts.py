"""What a finished output says of itself, so that a later stage need not trust a path.

The Zarr group of an output has the attribute ``connectomics`` with these keys, beside others of its kind::

    artefact    what it is: probability, uncertainty, labels, submission, ...
    complete    whether it is whole
    id          32 hexadecimal digits, drawn when the output is begun; a resumed run keeps them, a repeated one does not
    made_from   role -> identity of each input, such as {"raw": "content-1f0c...", "probabilities": "5b3e..."}
    version     of connectomics

The identity of an input is its ``id`` if it is an output of ours, else a hash of its content (`content_identity`).
Neither contains where it lies: a folder that was moved, or that is reached through a link or another mount, is the same
artifact.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectomics.errors import IncompleteError, MetadataError, MissingError, WriteError
from connectomics.io import store
from connectomics.io.fingerprint import content_identity, same_content
from connectomics.io.multiscale import Multiscale

ATTRIBUTE = "connectomics"


@dataclass(frozen=True)
class Provenance:
    """What an output was made from, and which of all outputs it is.

    Attributes:
        id: 32 hexadecimal digits. made_from: role of each input -> its identity.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    made_from: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"id": self.id, "made_from": dict(self.made_from)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        """The inverse of `to_dict`; keys that are absent are empty."""
        return cls(str(data.get("id", "")), dict(data.get("made_from", {})))


@dataclass(frozen=True)
class Difference:
    """How what is there differs from what is asked for.

    Attributes:
        settings: names of the parameters. inputs: roles of the inputs that are not the same.
    """

    settings: Collection[str] = ()
    inputs: Collection[str] = ()

    def __bool__(self) -> bool:
        return bool(self.settings or self.inputs)

    def __str__(self) -> str:
        said = []
        if self.settings:
            said.append(f"with other settings ({', '.join(self.settings)})")
        if self.inputs:
            said.append(f"from other {' and '.join(self.inputs)}")
        return "made " + " and ".join(said)


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Roles whose identity does not stand for the same in both, or is in one only."""
    return sorted(
        role for role in before.keys() | now.keys() if not same_content(before.get(role, ""), now.get(role, ""))
    )


def about(location: str | Path) -> dict[str, Any]:
    """The attribute ``connectomics`` of the group at ``location``; {} if nothing is there or it has none."""
    try:
        found = store.read_attrs(store.normalize(str(location))).get(ATTRIBUTE)
    except MissingError as error:
        if isinstance(error, store.StoreError):
            raise
        return {}
    return found if isinstance(found, dict) else {}


def identity(source: Multiscale) -> str:
    """What stands for a volume that is read: its ``id`` if it is an output of ours, else a hash of its content and of
    what it says of itself."""
    found = source.attrs.get(ATTRIBUTE)
    if isinstance(found, dict) and found.get("id"):
        return str(found["id"])
    said = hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{content_identity(source)}-{said}"


def publish(finished: Path, location: Path) -> None:
    """Put a finished folder at ``location``, by renaming; what is there is removed once the new one is in its place.

    Whether it may be replaced is the caller's to decide. Raises `WriteError`; what was there is there then.
    """
    old = _aside(location)
    try:
        if location.exists():
            location.rename(old)
        try:
            finished.rename(location)
        except OSError:
            if old.exists():
                old.rename(location)
            raise
    except OSError as error:
        raise WriteError(f"cannot put {finished} at {location}: {error.strerror or error}") from error
    _remove_aside(location)


def put_aside(location: Path) -> None:
    """Remove the folder at ``location``, which is gone in one step; `WriteError`."""
    try:
        location.rename(_aside(location))
    except OSError as error:
        raise WriteError(f"cannot replace {location}: {error.strerror or error}") from error
    _remove_aside(location)


def _aside(location: Path) -> Path:
    return location.with_name(f".{location.name}.old-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _remove_aside(location: Path) -> None:
    """Remove what was replaced at ``location``, by this run or by one that was killed as it did so."""
    for old in location.parent.glob(f".{glob.escape(location.name)}.old-*"):
        shutil.rmtree(old, ignore_errors=True)


def require_complete(location: str | Path) -> dict[str, Any]:
    """The attribute ``connectomics`` of a finished output (a region's group, or one class in it).

    Raises:
        MissingError: nothing is there. MetadataError: it is no output of this program.
        IncompleteError: the stage that makes it has not come to its end.
    """
    ours = store.read_attrs(store.normalize(str(location))).get(ATTRIBUTE)
    if not isinstance(ours, dict) or "complete" not in ours:
        raise MetadataError(f"{location} has no attribute connectomics.complete: it was not written by this program")
    if ours["complete"] is not True:
        raise IncompleteError(
            f"{location} is only half written ({ours.get('artefact', 'artefact')}); run the stage that makes it again "
            f"with the same options to finish it"
        )
    return ours


def is_complete(location: Path) -> bool:
    """Whether a finished output is there."""
    try:
        require_complete(location)
    except (IncompleteError, MissingError, MetadataError):
        return False
    return True
