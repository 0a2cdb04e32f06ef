"""What a blockwise decoding is: one frozen value, saved beside its output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from connectomics.decoding.labels import BLOCK
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import ConfigError, MetadataError, MissingError
from connectomics.geometry import Index
from connectomics.io import store
from connectomics.io.write import write_file


@dataclass(frozen=True)
class ComponentsTask:
    """Connected components of one class's probabilities.

    Attributes:
        input: location of the multiscale group of the probabilities (uint8, value/255; its finest level is read).
        output: local folder of the multiscale group of the labels.
        class_name: which class it is, recorded with the output.
        parameters: ``threshold``, ``connectivity`` and ``min_size_nm3`` of the method ``cc3d``.
        block_shape: voxels held at once, z y x; fastest in whole chunks of 64, right for any.
        source: what the probabilities were made from, recorded with the output.

    Raises:
        ConfigError: parameters that need the whole array: another method, hole filling, a boundary class.
    """

    input: str
    output: str
    class_name: str
    parameters: DecodeParameters
    block_shape: Index = BLOCK
    source: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        z, y, x = (int(n) for n in self.block_shape)
        object.__setattr__(self, "block_shape", (z, y, x))
        object.__setattr__(self, "source", json.loads(json.dumps(dict(self.source))))  # as it comes back from the file
        if min(z, y, x) < 1:
            raise ConfigError(f"block_shape must be three positive numbers of voxels (z, y, x), found {(z, y, x)}")
        if reason := needs_whole_array(self.parameters):
            raise ConfigError(
                f"decoding {self.class_name} block by block: {reason} needs the whole array in memory; "
                f"leave it out, or decode the array whole"
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "block_shape": list(self.block_shape), "source": dict(self.source)}

    @classmethod
    def load(cls, path: str | Path) -> ComponentsTask:
        """The task stored in a JSON file; `MissingError`, and `MetadataError` for one of another kind."""
        data = store.read_json(path)
        if data is None:
            raise MissingError(f"no task at {path}")
        known = {f.name for f in fields(cls)}
        if wrong := sorted(set(data) ^ known):
            raise MetadataError(f"{path} must have the keys {sorted(known)}; unknown or absent: {', '.join(wrong)}")
        return cls(**{**data, "parameters": DecodeParameters.from_dict(data["parameters"], str(path))})

    def save(self, path: str | Path) -> None:
        """Store as JSON, in one step."""
        write_file(Path(path), json.dumps(self.to_dict(), indent=2).encode())

    def differences(self, other: ComponentsTask) -> list[str]:
        """Names of the fields that make the output of the two tasks different: all but the shape of the blocks."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if name != "block_shape" and mine[name] != theirs[name]]


def needs_whole_array(parameters: DecodeParameters) -> str:
    """Which of the parameters cannot be decided block by block, or "" where all can."""
    if parameters.method != "cc3d":
        return f"method {parameters.method}"
    if parameters.fill_holes:
        return "fill_holes"
    return f"boundary {parameters.boundary}" if parameters.boundary else ""
