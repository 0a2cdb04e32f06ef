"""Which networks have channels last on a GPU unless the configuration says so."""

from __future__ import annotations

import pytest

from connectomics.models import build_model
from connectomics.models.memory_format import prefers_channels_last
from tests.models.small_networks import TINY


@pytest.mark.parametrize(("name", "trained", "last"), [
    ("mednext", False, False), ("mednext", True, True), ("unet", False, True), ("residual_unet", False, True),
])  # fmt: skip
def test_depthwise_convolutions_keep_the_format_of_the_training(name: str, trained: bool, last: bool) -> None:
    side, options = TINY[name]
    assert prefers_channels_last(build_model(name, 1, 2, patch_size=[side] * 3, options=options), trained) is last
