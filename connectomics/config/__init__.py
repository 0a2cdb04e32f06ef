"""Run configuration: the typed schema, and its composition with Hydra. The schema is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "schema" if name in ("EPOCH_PATCHES", "RunConfig") else "compose"
    return getattr(import_module(f"{__name__}.{module}"), name)
