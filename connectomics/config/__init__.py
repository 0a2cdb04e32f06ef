"""What a run is: the typed schema, and Hydra's composition onto it."""

from connectomics.config.compose import (
    as_config,
    config_from_dict,
    config_to_dict,
    known_keys,
    load_config,
    save_config,
    tutorial,
)
from connectomics.config.plugins import import_plugins
from connectomics.config.schema import EPOCH_PATCHES, RunConfig

__all__ = [
    "EPOCH_PATCHES",
    "RunConfig",
    "as_config",
    "config_from_dict",
    "config_to_dict",
    "import_plugins",
    "known_keys",
    "load_config",
    "save_config",
    "tutorial",
]
