"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import multiprocessing
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

# else each of the many processes that are started compiles the package again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if settings is not None:
    # a shared machine is slow at times; a test that fails for that says nothing
    settings.register_profile("steady", deadline=None)
    settings.load_profile("steady")


# whichever test starts the server that forks loader workers: they need not import torch each
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["connectomics.data.loader", "connectomics.data.dataset.build"]
)

# all tests and libraries make a million objects that stay; looking through them again and again takes seconds
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


#: modules that are begun first, so that no long test still runs when everything else is done
LONGEST = ("test_docs", "test_every_engine", "test_odd_places", "test_resume_epoch", "test_train", "test_heads")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules with the longest tests first: whole ones, whose fixtures are then made once."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


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
