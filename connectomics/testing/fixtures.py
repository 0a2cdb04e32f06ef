"""Pytest fixtures; a ``conftest.py`` imports those it wants. The only module here that needs pytest."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny phantom, to be read only: data root, ``test_crops.csv`` and ``truth.zarr``."""
    from connectomics.phantom import PhantomOptions, make_phantom

    return make_phantom(tmp_path_factory.mktemp("phantom") / "root", PhantomOptions(preset="tiny")).root
