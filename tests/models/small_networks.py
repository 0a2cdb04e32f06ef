"""The smallest of each network that is still the same network: its patch, and its options."""

from __future__ import annotations

from typing import Any

import pytest

TINY: dict[str, tuple[int, dict[str, Any]]] = {
    "mednext": (32, {"init_filters": 4}),
    "unet": (32, {"channels": [4, 8, 8, 8, 8]}),
    "unet_2d": (32, {"features": [4, 8, 8, 8]}),
    "basic_unet": (32, {"features": [4, 4, 8, 8, 8, 4]}),
    "dynunet": (32, {"filters": [4, 4, 8, 8, 8]}),
    "residual_unet": (32, {"strides": [1, 2, 2, 2], "kernel_size": [3, 3, 3, 3]}),
    "segresnet": (16, {"init_filters": 8}),
    "attention_unet": (32, {"channels": [4, 4, 8, 8, 8]}),
    "unetr": (32, {"feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2}),
    "swin_unetr": (64, {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}),
    "flexible_unet": (64, {"decoder_channels": [16, 8, 8, 4, 4]}),
    "vnet": (32, {}),
}
#: MONAI's networks that no tutorial or plan uses; some take seconds.
RARE = ("attention_unet", "basic_unet", "flexible_unet", "segresnet", "swin_unetr", "unetr", "vnet")
#: For tests of each network.
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in RARE)) for name in sorted(TINY)]
