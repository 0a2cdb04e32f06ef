"""Write a trained network as a model of the BioImage Model Zoo (bioimage.io): weights that run without this package."""

from __future__ import annotations

import io
import math
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.config import RunConfig
from connectomics.config.heads import channel_names
from connectomics.errors import InputError, MissingError, require_known
from connectomics.io.normalization import Normalization
from connectomics.io.replacing import write_file
from connectomics.lightning.network import model_options
from connectomics.models.registry import required_multiple
from connectomics.pipeline.file_templates import from_template
from connectomics.pipeline.package import checkpoint_of, target_of, test_images
from connectomics.pipeline.runs import Run

if TYPE_CHECKING:
    import torch

    from connectomics.inference.trained_network import TrainedNetwork

_STEP = 32  # voxels: sizes of the input are a test image and multiples of this more, if patch and network allow them
_CLOSE = 1e-4  # of probabilities, between the network and the exported one

Images = list[NDArray[np.float32]]


def write_bioimageio(
    source: str | Path | Run,
    out: str | Path | None = None,
    *,
    dataset: str | None = None,
    authors: Sequence[str] = (),
    license_name: str = "",
    description: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a network as a bioimage.io model, a zip with ``rdf.yaml``, TorchScript weights, and test tensors.

    Its input is raw, which the description maps to what the network was trained on; its output are probabilities. The
    weights are checked against the network, also at a second size of the input.

    Args:
        source: a run or its folder (for its best checkpoint), a checkpoint or a model package.
        out: the file, written atomically; None: ``{run}.bioimageio.zip``.
        dataset: the training data set whose gray range to describe; may be left out if all have the same.
        authors: their names. license_name: of the weights, an SPDX identifier. description: what it is for.

    Returns:
        The file.

    Raises:
        MissingError: no such run, or bioimageio.spec is not installed. UnknownNameError: the data set.
        InputError: data sets differ in their gray ranges, the network cannot be traced, or a value is not allowed in a
            description. WriteError: the file exists (with ``overwrite``: and is no bioimage.io model).
    """
    from connectomics.lightning.checkpoints import load_network

    try:
        import bioimageio.spec as spec
    except ModuleNotFoundError as error:
        raise MissingError(
            "--format bioimageio needs bioimageio.spec: pip install 'connectomics-cellmap[bioimageio]'"
        ) from error
    checkpoint, name = checkpoint_of(source)
    target = target_of(f"{name}.bioimageio.zip" if out is None else out, is_model, "bioimage.io model", overwrite)
    module = load_network(checkpoint)
    config = module.config
    normalization = _normalization(config, dataset)
    raw = [_raw_of(image, normalization) for image in test_images(config)]
    images = [prepared(values, normalization) for values in raw]
    weights, traced, result = _exported(module, images)
    multiple = required_multiple(config.model.architecture, model_options(config))
    steps = [math.lcm(_STEP, n) for n in multiple]
    flexible = not config.data.inputs and all(n % s == 0 for n, s in zip(images[0].shape[2:], steps, strict=True))
    if flexible:
        more = [(0, 0), (0, 0), (0, steps[0]), (0, 0), (0, steps[2])]
        flexible = _agree(module, traced, [np.pad(images[0], more, "wrap")])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(folder)
        (place / "weights.pt").write_bytes(weights)
        np.save(place / "probabilities.npy", result)
        for number, values in enumerate(raw):
            np.save(place / f"{_input(number)}.npy", values)
        low, high = normalization.range
        about = from_template(
            "bioimageio.md", name=name, description=description, low=low, high=high,
            classes=config.dataset.classes, voxel_size=config.dataset.voxel_size,
        )  # fmt: skip
        (place / "README.md").write_text(about, encoding="utf-8")
        said = {
            "name": re.sub(r"[^\w\- ()+]", "-", name if len(name) > 4 else f"{name} network")[:128],
            "description": description or f"Segments {', '.join(config.dataset.classes)} in volume electron microscopy",
            "authors": [{"name": author} for author in authors],
            **({"license": license_name} if license_name else {}),
        }
        model = _described(config, place, said, raw, result, _preprocessing(normalization), steps if flexible else None)
        content = io.BytesIO()
        spec.save_bioimageio_package_to_stream(model, output_stream=content)
    write_file(target, content.getvalue())
    return target


def is_model(path: Path) -> bool:
    """Return whether a file looks like a bioimage.io model."""
    try:
        with zipfile.ZipFile(path) as file:
            return bool({"rdf.yaml", "bioimageio.yaml"} & set(file.namelist()))
    except (OSError, zipfile.BadZipFile):
        return False


def _input(number: int) -> str:
    return f"raw_{number}" if number else "raw"


# -- gray values -------------------------------------------------------------------------------------------------------
def _normalization(config: RunConfig, dataset: str | None) -> Normalization:
    known = config.data.normalization
    if not known:
        return Normalization()
    if dataset is not None:
        require_known("data set", [dataset], known, "the model's normalization")
    found = {name: Normalization.from_dict(entry, name) for name, entry in known.items()}
    if dataset is None and any(one != next(iter(found.values())) for one in found.values()):
        raise InputError(
            f"the network was trained with another gray range for each data set ({', '.join(found)}); a bioimage.io "
            "model has one: name the data set with --dataset"
        )
    return found[dataset or next(iter(found))]


def _raw_of(unit: NDArray[np.float32], normalization: Normalization) -> NDArray[Any]:
    """Return raw values for values from 0 to 1: whole numbers if the gray range looks like those of a camera."""
    low, high = normalization.range
    values = low + (high - low) * unit.astype(np.float64)
    smallest, largest = min(low, high), max(low, high)
    if smallest < 0 or largest - smallest < 8 or largest >= 1 << 16:
        return values.astype(np.float32)
    return np.rint(values).astype(np.uint8 if largest < 1 << 8 else np.uint16)


def prepared(raw: NDArray[Any], normalization: Normalization) -> NDArray[np.float32]:
    """Return the network's input by the operations of `_preprocessing`."""
    low, high = normalization.range
    unit = np.clip(raw.astype(np.float32) * np.float32(1 / (high - low)) + np.float32(-low / (high - low)), 0, 1)
    return ((unit - np.float32(normalization.mean)) / np.float32(normalization.std)).astype(np.float32)


def _preprocessing(normalization: Normalization) -> list[dict[str, Any]]:
    low, high = normalization.range
    return [
        {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
        {"id": "scale_linear", "kwargs": {"gain": 1 / (high - low), "offset": -low / (high - low)}},
        {"id": "clip", "kwargs": {"min": 0.0, "max": 1.0}},
        {"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": normalization.mean, "std": normalization.std}},
        {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},  # else raw's type would be restored
    ]


# -- weights -----------------------------------------------------------------------------------------------------------
def _exported(module: TrainedNetwork, images: Images) -> tuple[bytes, Any, NDArray[np.float32]]:
    """Return TorchScript of the network, that network as others load it, and the probabilities that it gives."""
    import torch

    class Probabilities(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module.network

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return module.probabilities(*inputs)

    tensors = tuple(torch.from_numpy(image) for image in images)
    wrapped = Probabilities().eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = _stored(torch.jit.trace(wrapped, tensors, check_trace=False))
            traced = torch.jit.load(io.BytesIO(weights))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the network {module.config.model.architecture} cannot be traced: {reason}") from error
    if not _agree(module, traced, images):
        raise InputError("the traced network gives other probabilities than the network; package it with --format pytc")
    with torch.no_grad():
        return weights, traced, traced(*tensors).numpy()


def _stored(traced: torch.jit.ScriptModule) -> bytes:
    """Return TorchScript without its debug records, which name folders of this machine."""
    import torch

    whole, kept = io.BytesIO(), io.BytesIO()
    torch.jit.save(traced, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as target:
        for member in source.infolist():
            if not member.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(member.filename, (1980, 1, 1, 0, 0, 0)), source.read(member))
    return kept.getvalue()


def _agree(module: TrainedNetwork, traced: Any, images: Images) -> bool:
    import torch

    tensors = [torch.from_numpy(image) for image in images]
    with torch.no_grad():
        expected = module.probabilities(*tensors)
        try:
            found = traced(*tensors)
        except RuntimeError:  # sizes that the trace has as constants
            return False
    return bool(found.shape == expected.shape and (found - expected).abs().max() <= _CLOSE)


# -- the description ---------------------------------------------------------------------------------------------------
def _described(
    config: RunConfig,
    place: Path,
    said: Mapping[str, Any],
    raw: Sequence[NDArray[Any]],
    result: NDArray[np.float32],
    preprocessing: Sequence[Mapping[str, Any]],
    steps: Sequence[int] | None,
) -> Any:
    """Return bioimageio.spec's description of a model whose files lie in ``place``.

    ``steps``: multiples of these voxels (z y x) may be added to its input; None: it has one size."""
    import torch
    from bioimageio.spec import ValidationContext
    from bioimageio.spec.model.v0_5 import ModelDescr
    from pydantic import ValidationError

    sizes = [config.dataset.voxel_size, *(item.voxel_size for item in config.data.inputs)]

    def axes(number: int, shape: Sequence[int], channels: Sequence[str], is_output: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"type": "batch"}, {"type": "channel", "channel_names": list(channels)}]
        for index, (axis, n, nm) in enumerate(zip("zyx", shape[2:], sizes[number], strict=True)):
            size: Any = int(n)
            if steps is not None:
                size = {"tensor_id": "raw", "axis_id": axis} if is_output else {"min": int(n), "step": steps[index]}
            found.append({"type": "space", "id": axis, "size": size, "unit": "nanometer", "scale": float(nm)})
        return found

    inputs = [
        {
            "id": _input(number),
            "axes": axes(number, values.shape, ["raw"], False),
            "test_tensor": {"source": place / f"{_input(number)}.npy"},
            "data": {"type": values.dtype.name},
            "preprocessing": preprocessing,
        }
        for number, values in enumerate(raw)
    ]
    output = {
        "id": "probabilities",
        "description": "the probability of each class, by itself",
        "axes": axes(0, result.shape, [re.sub(r"\W", "_", channel) for channel in channel_names(config)], True),
        "test_tensor": {"source": place / "probabilities.npy"},
        "data": {"type": "float32", "range": [0.0, 1.0]},
    }
    weights = {"source": place / "weights.pt", "pytorch_version": torch.__version__.split("+")[0]}
    fields: dict[str, Any] = {
        "type": "model",
        "format_version": ModelDescr.implemented_format_version,
        **said,
        "documentation": {"source": place / "README.md"},
        "tags": ["electron-microscopy", "3d", "segmentation", "connectomics", *config.dataset.classes],
        "inputs": inputs,
        "outputs": [output],
        "weights": {"torchscript": weights},
    }
    try:
        with ValidationContext(root=place, perform_io_checks=True):
            return ModelDescr.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function"))
        raise InputError(f"bioimage.io does not allow this description: {where}: {first['msg']}") from error
