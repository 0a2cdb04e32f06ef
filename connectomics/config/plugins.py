"""Modules of the user's own (``plugins``), imported wherever a configuration becomes a network."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from connectomics.errors import ConfigError, MissingError


def import_plugins(names: Sequence[str]) -> None:
    """Import the modules, which register what they add (`register_model`, `register_loss`, ...); again is no work.

    They are found as Python finds modules: installed, or in a folder of PYTHONPATH. Nothing is added to where it looks,
    so that a checkpoint or package from elsewhere cannot name a file that happens to lie beside it.

    Raises:
        MissingError: there is no such module, or one that it imports is not installed. ConfigError: it fails.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            absent = str(error.name)
            if name == absent or name.startswith(f"{absent}."):
                raise MissingError(
                    f"plugins: there is no module {name!r}; install it, or name its folder in PYTHONPATH "
                    f"(PYTHONPATH=FOLDER pytc ...)"
                ) from error
            raise MissingError(f"plugins: {name} needs {absent}, which is not installed; install it") from error
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"plugins: {name} cannot be imported: {type(error).__name__}: {reason}") from error
