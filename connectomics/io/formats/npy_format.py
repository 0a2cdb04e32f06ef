"""NumPy files; the array is mapped, not read (``.npz`` is read whole: its arrays are compressed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from connectomics.errors import CorruptDataError, InputError
from connectomics.io.formats.source import VolumeSource, array_source


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """``a.npy``, or ``a.npz:name`` (the name may be left out where there is one array)."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CorruptDataError(f"{path} cannot be read as a NumPy file: {error}") from error
    if isinstance(found, np.ndarray):
        return array_source(str(path), found)
    with found:
        if (inner is None and len(found.files) != 1) or (inner is not None and inner not in found.files):
            raise InputError(f"{path} holds {', '.join(found.files) or 'nothing'}; name one: {path}:NAME")
        return array_source(str(path), found[inner or found.files[0]])
