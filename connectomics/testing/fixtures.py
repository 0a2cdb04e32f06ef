"""Pytest fixtures; a ``conftest.py`` imports those it wants. The only module here that needs pytest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny phantom, to be read only: data root, ``test_crops.csv`` and ``truth.zarr``.

    The workers of pytest-xdist share one.
    """
    from filelock import FileLock

    from connectomics.phantom import PhantomOptions, make_phantom

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "phantom" / "root"
    root.parent.mkdir(exist_ok=True)
    with FileLock(root.parent / "lock"):
        if not root.is_dir():
            make_phantom(root.with_name("unfinished"), PhantomOptions(preset="tiny")).root.rename(root)
    return root
