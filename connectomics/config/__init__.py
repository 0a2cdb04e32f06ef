"""Run configuration: the typed schema, and its composition with Hydra."""

from connectomics.config.compose import (
    as_config,
    check_config,
    config_from_dict,
    config_to_dict,
    import_plugins,
    known_keys,
    load_config,
    save_config,
    tutorial,
)
from connectomics.config.schema import EPOCH_PATCHES, RunConfig

__all__ = [
    "EPOCH_PATCHES",
    "RunConfig",
    "as_config",
    "check_config",
    "config_from_dict",
    "config_to_dict",
    "import_plugins",
    "known_keys",
    "load_config",
    "save_config",
    "tutorial",
]
