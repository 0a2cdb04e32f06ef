"""What all disturbances begin with."""

from __future__ import annotations

import pytest

from tests.chaos.kit import Whole
from tests.starter import Starter


@pytest.fixture(scope="session")
def whole(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"), starter)
