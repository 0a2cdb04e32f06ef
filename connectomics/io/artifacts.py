"""What a finished output says about itself, so that a later stage need not trust a path.

The Zarr group of an output has the attribute ``connectomics`` with these keys, and further ones that depend on it::

    ``artefact``  kind of output: probability, uncertainty, labels, submission, ... (this spelling is fixed on disk)
    complete    whether it is complete
    id          32 hexadecimal digits, drawn when the output is started; resuming keeps them, a rerun draws new ones
    made_from   role -> identity of each input, such as {"raw": "content-1f0c...", "probabilities": "5b3e..."}
    version     version of connectomics

The identity of an input is its ``id`` if this program wrote it, else a hash of its content (`content_identity`).
Neither depends on the location: a folder that was moved, or is reached through a link or another mount, is the same
artifact.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from connectomics.errors import IncompleteError, MetadataError, MissingError
from connectomics.io import store
from connectomics.io.fingerprint import content_identity, same_content
from connectomics.io.multiscale import Multiscale
from connectomics.io.replacing import publish as publish
from connectomics.io.replacing import put_aside as put_aside

ATTRIBUTE = "connectomics"
_NAMES = {"labels": "labels", "probability": "probabilities", "affinity": "affinities"}  # of kinds, in messages


@dataclass(frozen=True)
class Provenance:
    """Identity of an output and of what it was made from.

    Attributes:
        id: 32 hexadecimal digits.
        made_from: role of each input -> its identity.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    made_from: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"id": self.id, "made_from": dict(self.made_from)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        """Read ``id`` and ``made_from`` from attributes that also hold other keys; missing ones are empty."""
        return cls(str(data.get("id", "")), dict(data.get("made_from", {})))


@dataclass(frozen=True)
class Difference:
    """How an existing output differs from the requested one.

    Attributes:
        settings: names of the parameters that differ.
        inputs: roles of the inputs that differ.
    """

    settings: Collection[str] = ()
    inputs: Collection[str] = ()

    def __bool__(self) -> bool:
        return bool(self.settings or self.inputs)

    def __str__(self) -> str:
        parts = []
        if self.settings:
            parts.append(f"with other settings ({', '.join(self.settings)})")
        if self.inputs:
            parts.append(f"from other {' and '.join(self.inputs)}")
        return "made " + " and ".join(parts)


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the roles whose identities stand for different inputs, or that only one mapping has."""
    roles = before.keys() | now.keys()
    return sorted(role for role in roles if not same_content(before.get(role, ""), now.get(role, "")))


def about(location: str | Path) -> dict[str, Any]:
    """Return the attribute ``connectomics`` of the group at ``location``; {} if there is no group or attribute."""
    try:
        found = store.read_attrs(location).get(ATTRIBUTE)
    except store.StoreError:
        raise
    except MissingError:
        return {}
    return found if isinstance(found, dict) else {}


def identity(source: Multiscale) -> str:
    """Return the identity of a volume: its ``id`` if this program wrote it, else a hash of its content and attribute
    ``connectomics``."""
    found = source.attrs.get(ATTRIBUTE)
    if isinstance(found, dict) and found.get("id"):
        return str(found["id"])
    attribute = hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{content_identity(source)}-{attribute}"


def marks(said: Any) -> dict[str, str]:
    """Return what identifies an array, as far as its attribute ``connectomics`` says so: its ``id``, and hashes of the
    ``model``, of ``decode`` and of edits (``edited``). Arrays of a submission have the same hashes, but no ID."""
    said = said if isinstance(said, Mapping) else {}
    made = {"model": said.get("source", said).get("model"), "decode": said.get("decode")}
    found = {name: json.dumps(portable(value), sort_keys=True) for name, value in made.items() if value}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items()}
    edited = {"edited": str(said.get("edited", ""))} if hashes else {}
    return hashes | edited | ({"id": str(said["id"])} if said.get("id") else {})


def portable(value: Any) -> Any:
    """Return attributes without ids of runs, and absolute paths cut to their last part: a submission is published, and
    the same on every machine."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items() if key not in ("id", "made_from")}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def require_complete(location: str | Path, *kinds: str, foreign: bool = False) -> dict[str, Any]:
    """Return the attribute ``connectomics`` of a finished output (a region's group, or one class in it).

    Args:
        kinds: what it may be (its ``artefact``); none: anything.
        foreign: whether to accept arrays of other programs, which have no such attribute; {} for these.

    Raises:
        MissingError: nothing exists there.
        MetadataError: this program did not write it, or it is of another kind.
        IncompleteError: the stage that writes it has not finished.
    """
    ours = store.read_attrs(location).get(ATTRIBUTE)
    if not ours and foreign:
        return {}
    verbs = " or ".join(sorted({"decode" if kind == "labels" else "predict" for kind in kinds}))
    verb = verbs or "the stage that writes it"
    found = ours.get("artefact") if isinstance(ours, dict) else "an array of another program"
    if not isinstance(ours, dict) or (kinds and found not in kinds):
        wanted = " or ".join(_NAMES.get(kind, f"a {kind} head") for kind in kinds) or "an output"
        raise MetadataError(
            f"{location}: expected {wanted} written by {verbs or 'this program'}, got {found}; run {verb} first"
        )
    if ours.get("complete") is not True:
        raise IncompleteError(f"{location} is only half written; run {verb} to its end first, with the same options")
    return ours


def is_complete(location: Path) -> bool:
    """Return whether a finished output exists at ``location``."""
    try:
        require_complete(location)
    except (IncompleteError, MissingError, MetadataError):
        return False
    return True
