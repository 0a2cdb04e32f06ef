"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _shared(part: str) -> Path:
    base = Path(os.environ.get("CONNECTOMICS_SHARED", ROOT.parent / "shared"))
    path = base / part
    if not path.exists():
        pytest.skip(f"no {part} beside the checkout (set CONNECTOMICS_SHARED to the folder that holds it)")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real EM with labels (see its README); skipped where it is not there."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """Inputs of the official scorer with its numbers; skipped where they are not there."""
    return _shared("reference")


@pytest.fixture(scope="session")
def shared_facts() -> Path:
    """The challenge's tables; skipped where they are not there."""
    return _shared("facts")
