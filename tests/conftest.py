"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectomics.testing.fixtures import phantom  # noqa: F401
from tests.starter import Starter

try:
    from hypothesis import settings
except ModuleNotFoundError:  # tests/gpu needs no more than pytest and the core installation
    settings = None  # type: ignore[assignment,misc]

ROOT = Path(__file__).resolve().parents[1]

if settings is not None:
    # a shared machine is slow at times; a test that fails for that says nothing
    settings.register_profile("steady", deadline=None)
    settings.load_profile("steady")


#: begun first, so that none of them is still running when everything else is done
LONGEST = ("test_the_guide_runs", "test_killed_and_resumed_again", "test_two_processes_on_the_cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


def _shared(part: str) -> Path:
    base = Path(os.environ.get("CONNECTOMICS_SHARED", ROOT.parent / "shared"))
    path = base / part
    if not path.exists():
        pytest.skip(f"no {part} beside the checkout (set CONNECTOMICS_SHARED to the folder that holds it)")
    return path


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts processes that need not import the large libraries."""
    with Starter(tmp_path_factory.mktemp("starter")) as starter:
        yield starter


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
