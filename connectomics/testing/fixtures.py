"""Pytest fixtures; a ``conftest.py`` imports those it wants. The only module here that needs pytest."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny phantom, to be read only: data root, ``test_crops.csv`` and ``truth.zarr``. Workers of xdist share it."""
    from filelock import FileLock

    from connectomics.phantom import PhantomOptions, make_phantom

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if base.name.startswith("popen-") else base) / "shared-phantom" / "root"
    root.parent.mkdir(exist_ok=True)
    with FileLock(root.with_name("lock")):
        if not root.is_dir():
            make_phantom(root.with_name("unfinished"), PhantomOptions(preset="tiny")).root.rename(root)
    return root
