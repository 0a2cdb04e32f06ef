"""Networks by name, losses over known voxels, and the targets of heads.

Importing this package imports neither torch nor MONAI; `connectomics.models.losses` imports torch.
"""

from connectomics.models.registry import (
    build_model,
    check_patch_size,
    dropout_options,
    fixed_patch_size,
    has_deep_supervision,
    list_models,
    register_model,
    required_multiple,
)

__all__ = [
    "build_model",
    "check_patch_size",
    "dropout_options",
    "fixed_patch_size",
    "has_deep_supervision",
    "list_models",
    "register_model",
    "required_multiple",
]
