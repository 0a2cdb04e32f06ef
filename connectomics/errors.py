"""The errors of the project.

Every error a user can cause subclasses both :class:`ConnectomicsError`, so that a program can catch all of ours at
once, and the builtin it is a kind of, so that code which knows nothing of us still catches it. A message is one line:
what was expected, what was found, where, and what to do. The command line prints that line and exits with a non-zero
status; anything else that escapes is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConnectomicsError(Exception):
    """Base of every error that the user can mend."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return " ".join(str(part) for part in self.args)


class InputError(ConnectomicsError, ValueError):
    """A value, a shape, a grid or an option is not what is needed."""


class MissingError(ConnectomicsError, FileNotFoundError):
    """A path, a data set, a crop or an array is not there."""


class MetadataError(ConnectomicsError, ValueError):
    """Attributes of an array or a group are absent, broken, or contradict each other."""


class UnknownNameError(ConnectomicsError, KeyError):
    """A name (class, crop, data set, model, loss, configuration key) is not known. See :func:`unknown_name`."""


class ConfigError(ConnectomicsError, ValueError):
    """A configuration does not fit the schema, or its parts do not fit each other."""


class CorruptDataError(ConnectomicsError, OSError):
    """Stored bytes cannot be decoded, are truncated, or hold values that cannot be (NaN in raw)."""


class IncompleteError(ConnectomicsError, RuntimeError):
    """An artefact is only half written: the stage that makes it must be run to its end first."""


class BlocksFailedError(ConnectomicsError, RuntimeError):
    """Some blocks of a task could not be done, also when tried again; all others are."""


class OutOfMemoryError(ConnectomicsError, MemoryError):
    """The memory of the machine or of the GPU does not hold the work, also with the smallest batch."""


class EngineError(ConnectomicsError, RuntimeError):
    """Workers cannot be had: a scheduler that is not reachable, a library that is not installed."""


class WriteError(ConnectomicsError, OSError):
    """Output could not be written (disk full, no permission); nothing half-written was kept as whole."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like ``name``, or None if none comes close."""
    names = [str(k) for k in known]
    found = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if not found:  # sgd is SGD
        lower = {k.lower(): k for k in names}
        found = [lower[k] for k in difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)]
    return found[0] if found else None


def unknown_name(what: str, name: str, known: Iterable[str], where: str = "") -> UnknownNameError:
    """An :class:`UnknownNameError` in one line, with the nearest known name.

    ``what`` is the kind of thing in the singular ("class", "crop"), ``where`` the place that was searched.
    """
    names = sorted(str(k) for k in known)
    close = nearest(name, names)
    place = f" in {where}" if where else ""
    hint = f"; did you mean {close!r}?" if close else "."
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return UnknownNameError(f"unknown {what} {name!r}{place}{hint} Known: {shown or 'none'}")
