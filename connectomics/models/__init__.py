"""Networks by name and losses that look at known voxels only.

Importing this package is cheap: torch and MONAI are imported when a network is built, and the losses live in
`connectomics.models.losses`, which imports torch.
"""

from connectomics.models.registry import (
    build_model,
    check_patch_size,
    fixed_patch_size,
    has_deep_supervision,
    list_models,
    register_model,
    required_multiple,
)

__all__ = [
    "build_model",
    "check_patch_size",
    "fixed_patch_size",
    "has_deep_supervision",
    "list_models",
    "register_model",
    "required_multiple",
]
