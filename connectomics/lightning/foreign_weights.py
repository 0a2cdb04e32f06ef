"""Weights that other programs trained, by ``model.weights_format``: read without running code, and renamed.

``nnunet``: a checkpoint of nnU-Net v2 (``checkpoint_final.pth``) with its residual encoder, for ``residual_unet``.
``state_dict``: tensors whose names are those of the network here, such as ``model.pt`` of a MONAI bundle with the same
network of MONAI; a file of torch or of safetensors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from connectomics.errors import CorruptDataError, InputError, MissingError

#: Names of nnU-Net's modules (dynamic-network-architectures) -> ours. Its encoder is also listed in the decoder, and
#: layers twice in each block (``all_modules``); these copies are left out.
_NNUNET = (
    (r"encoder\.stem\.convs\.0\.", "stem."),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.", r"encoder.\1.\2.first."),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv2\.", r"encoder.\1.\2.second."),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.(\d+)\.", r"encoder.\1.\2.shortcut.\3."),
    (r"decoder\.stages\.(\d+)\.convs\.0\.", r"decoder.\1."),
    (r"decoder\.transpconvs\.(\d+)\.", r"enlarge.\1."),
)
_COPIES = re.compile(r"\.all_modules\.|^decoder\.encoder\.")
_WRAPPERS = ("state_dict", "network_weights", "model_state_dict", "model", "net")  # keys that hold the tensors
_PREFIXES = ("module.", "_orig_mod.", "network.", "net.")  # of DistributedDataParallel, torch.compile, Lightning


def foreign_weights(path: str | Path, weights_format: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file by our names, and the names in the file that have none.

    Raises:
        MissingError: no such file. CorruptDataError: it cannot be read. InputError: it holds Python objects, which are
            not unpickled, or no tensors of this format.
    """
    stored = _tensors(Path(path))
    if weights_format == "state_dict":
        return stored, []
    found: dict[str, Tensor] = {}
    others = []
    for name, value in stored.items():
        if _COPIES.search(name):
            continue
        ours = _of_nnunet(name)
        if ours is None:
            others.append(name)
        else:
            found[ours] = value
    if not found:
        raise InputError(f"{path} has no tensor of nnU-Net's residual encoder; it has {', '.join(list(stored)[:4])}")
    return found, others


def refuse_text(file: Path) -> None:
    """Raise `InputError` if a file is text, as a web page or a pointer of Git LFS is, and not weights."""
    with file.open("rb") as opened:
        begin = opened.read(200)
    text = begin.decode("utf-8", "ignore")
    if text.strip() and len(begin) - len(text.encode()) < 4 and all(c.isprintable() or c in "\r\n\t" for c in text):
        raise InputError(
            f"{file} holds no weights: it is a text file, which begins with {text.split(chr(10))[0][:60]!r}"
        )


def _of_nnunet(name: str) -> str | None:
    for pattern, ours in _NNUNET:
        match = re.match(pattern, name)
        if match is None:
            continue
        rest = name[match.end() :]
        if not rest.startswith(("conv.", "norm.")):
            return match.expand(ours) + rest if "transpconvs" in pattern else None
        kind, _, last = rest.partition(".")
        if "skip" in pattern:  # there a number has both parts
            place = int(match[3]) + (kind == "norm")
            return f"encoder.{match[1]}.{match[2]}.shortcut.{place}.{last}"
        return f"{match.expand(ours)}{int(kind == 'norm')}.{last}"
    return None


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, wherever in it they are, without prefixes that wrappers add."""
    if not file.is_file():
        raise MissingError(f"model.weights: no file at {file}; give a file of weights")
    refuse_text(file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            # numbers of numpy, in the logs of nnU-Net, are built from plain bytes
            kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
            scalar = np.float64(0).__reduce__()[0]
            safe: list[Any] = [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]
            with torch.serialization.safe_globals(safe):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds Python objects, which are not unpickled for safety; save its state_dict alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptDataError(f"{file} cannot be read as weights ({reason})") from error
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = content.items() if isinstance(content, Mapping) else ()
    found = {str(name): value for name, value in tensors if isinstance(value, Tensor)}
    if not found:
        raise InputError(f"{file} holds no tensors by name; expected a state_dict")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found
