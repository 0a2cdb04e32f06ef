"""One small run that the tests of the command line share."""

from __future__ import annotations

import pytest

from tests.cli.small_way import Way, go


@pytest.fixture(scope="session")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    """The whole way, below a folder whose name has spaces and no Latin letters (read it, do not change it)."""
    return go(tmp_path_factory.mktemp("way") / "mes données ü" / "日本")
