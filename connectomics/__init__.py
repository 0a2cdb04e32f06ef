"""CellMap volumes from disk to a scored submission, on PyTorch Lightning, MONAI and Hydra."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from connectomics.inference.trained_network import TrainedNetwork

__version__ = "0.1.0"


def load_model(path: str | PathLike[str]) -> TrainedNetwork:
    """The network of a model package (`pytc package`) or of a checkpoint, on the CPU, in evaluation mode.

    A package is checked first: its sums, and its answer to the input that lies in it. ``model.config`` says how it was
    trained, ``model.classes`` what its channels are, ``model.probabilities(image)`` gives (B, C, D, H, W) float32 for
    images (B, 1, D, H, W) at ``model.config.dataset.voxel_size`` nm, and ``model.normalization(dataset).input(raw)``
    makes the image, float32, of raw values.

    Raises `MissingError`, `CorruptDataError`, `InputError`, `ConfigError`.
    """
    from connectomics.lightning.checkpoints import load_network

    return load_network(str(path))


def _writable(folder: str) -> bool:
    """Whether ``folder`` can be made and written to."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _ensure_numba_cache() -> None:
    """Let numba keep its compiled kernels in the temporary folder if it can write neither beside the code nor to the
    user's cache folder (a read-only installation without a home, as on some cluster nodes); it would refuse to work."""
    user = os.path.expanduser(os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "numba"))
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__pycache__")
    if "NUMBA_CACHE_DIR" in os.environ or _writable(beside) or _writable(user):
        return
    import tempfile

    folder = os.path.join(tempfile.gettempdir(), f"connectomics-numba-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        mine = os.stat(folder).st_uid == os.getuid() and not os.path.islink(folder)
    except OSError:
        mine = False
    # numba runs what lies there, so the folder must be this user's own
    os.environ["NUMBA_CACHE_DIR"] = folder if mine else tempfile.mkdtemp(prefix="connectomics-numba-")


_ensure_numba_cache()  # before anything imports numba, which reads the variable once

__all__ = ["__version__", "load_model"]
