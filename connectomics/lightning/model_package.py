"""A model package: one file with the weights, a description of the training, and a test of the network.

The file is a plain zip::

    model.json            format, version, configuration, classes, channels, voxel size (nm), normalization, scores,
                          license, description, training and validation crops, SHA-256 of the other members
    weights.safetensors   weights and buffers
    test.safetensors      an input and the probabilities that the network gave for it, float32 on the CPU

Nothing in it is unpickled. Loading verifies the checksums, builds the network from the configuration, and runs the test
input, which detects a damaged file, or a library that computes something else, before the network is used.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.config import RunConfig, config_from_dict
from connectomics.data.splits import Split
from connectomics.errors import ConfigError, CorruptDataError, InputError, MissingError
from connectomics.geometry import Triple, triple

if TYPE_CHECKING:
    from connectomics.inference.trained_network import TrainedNetwork

FORMAT = 2  # the format of checkpoints
SUFFIX = ".pytc"
ABOUT, WEIGHTS, TEST = "model.json", "weights.safetensors", "test.safetensors"
_LARGEST_JSON = 1 << 24
_TOLERANCE = 1e-3  # of probabilities: processors differ in the order of sums


@dataclass(frozen=True)
class Package:
    """The description of a packaged model: ``about`` is the content of ``model.json``."""

    path: Path
    about: Mapping[str, Any]

    @property
    def config(self) -> RunConfig:
        """The configuration of its training; raises `ConfigError` if this version cannot read it."""
        try:
            return config_from_dict(dict(self.about["config"]))
        except ConfigError as error:
            version = self.about["version"]
            raise ConfigError(f"the configuration in {self.path} (written by version {version}): {error}") from error

    @property
    def classes(self) -> list[str]:
        """Classes of the first channels, in their order."""
        return list(self.about["classes"])

    @property
    def voxel_size(self) -> Triple:
        """Voxel size of the network's input, nm, z y x."""
        return triple(self.about["voxel_size"])


def is_package(path: str | Path) -> bool:
    """Return whether a file looks like a package (and not like a checkpoint, which is also a zip file)."""
    try:
        with zipfile.ZipFile(path) as file:
            return ABOUT in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def open_package(path: str | Path) -> Package:
    """Return a package without reading its weights.

    Raises:
        MissingError: the file does not exist.
        CorruptDataError: it is damaged.
        InputError: it is not a package, or a later version wrote it.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingError(f"no model package at {file}; make one with `pytc package RUN`")
    data = _member(file, ABOUT, _LARGEST_JSON)
    try:
        about = json.loads(data)
        found = int(about["format"])
        needed = {"version", "classes", "voxel_size", "config", "sha256"}
        if lacking := sorted(needed - set(about)):
            raise CorruptDataError(f"{file}: {ABOUT} has no {', '.join(lacking)}; get the file again")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{file}: {ABOUT} cannot be read ({error!r}); get the file again") from error
    if found > FORMAT:
        raise InputError(
            f"{file} has format {found}, written by version {about['version']}; this version reads up to {FORMAT}: "
            f"update connectomics"
        )
    return Package(file, about)


def split_of(path: str | Path) -> Split | None:
    """Return what the network of a package or checkpoint was trained and validated on; None if nothing says so.

    A package holds it, a checkpoint lies in a run folder with ``split.yaml``. Raises `ConfigError` if it is invalid.
    """
    if is_package(path):
        about = open_package(path).about
        return Split(*(tuple(about.get(name, ())) for name in ("trained_on", "validated_on")))
    file = Path(path).resolve().parent.parent / "split.yaml"
    return Split.load(file) if file.is_file() else None


def check_test(package: Package, module: TrainedNetwork) -> float:
    """Run the test input and return the largest difference of a probability.

    Raises `CorruptDataError` if it is above 0.001: the network does not compute what it computed in training.
    """
    test = package_tensors(package, TEST)
    result = answer(module, [test[name] for name in sorted(n for n in test if n.startswith("input-"))])
    if result.shape != test["output"].shape:
        raise CorruptDataError(
            f"{package.path}: the network gives {tuple(result.shape)} for the test input, the package holds "
            f"{tuple(test['output'].shape)}; get the file again, or use version {package.about['version']}"
        )
    difference = float((result - test["output"]).abs().max())
    if not difference <= _TOLERANCE:
        raise CorruptDataError(
            f"{package.path}: the network's answer to the test input differs by {difference:.3g} (at most "
            f"{_TOLERANCE:g} expected); use version {package.about['version']}, which wrote it, or get the file again"
        )
    return difference


def answer(module: TrainedNetwork, images: Sequence[Any]) -> Any:
    """Return the probabilities of all channels, including heads that are not written, float32 on the CPU."""
    import torch

    with torch.no_grad():
        return module.all_probabilities(*images)


def package_tensors(package: Package, name: str = WEIGHTS) -> dict[str, Any]:
    """Return the tensors of a member on the CPU; raise `CorruptDataError` if its checksum differs."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _member(package.path, name)
    expected = package.about["sha256"].get(name)
    if hashlib.sha256(data).hexdigest() != expected:
        raise CorruptDataError(f"{package.path}: {name} is damaged (its SHA-256 differs); get the file again")
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise CorruptDataError(f"{package.path}: {name} cannot be read ({error}); get the file again") from error


def _member(path: Path, name: str, largest: int | None = None) -> bytes:
    try:
        with zipfile.ZipFile(path) as file:
            info = file.getinfo(name)
            # members are stored without compression, so that a small file cannot expand to a large one
            if info.compress_type != zipfile.ZIP_STORED or (largest is not None and info.file_size > largest):
                raise CorruptDataError(f"{path}: {name} is compressed or too large: not written by `pytc package`")
            return file.read(info)
    except KeyError as error:
        raise InputError(f"{path} is not a model package: it has no {name}; make one with `pytc package`") from error
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, CorruptDataError):
            raise
        raise CorruptDataError(f"{path} cannot be read as a model package ({error}); get the file again") from error
