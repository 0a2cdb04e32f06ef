"""Errors that a user can cause.

Each subclasses `ConnectomicsError`, so that a program can catch all of them at once, and the builtin error of its kind.
The message is one line: what is wrong, what was expected and found, and how to fix it. The command line prints it and
exits with a non-zero status. Any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager


class ConnectomicsError(Exception):
    """Base of every error that a user can cause and fix."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return " ".join(str(part) for part in self.args)


class InputError(ConnectomicsError, ValueError):
    """A value, a shape, a grid or an option is not valid here."""


class MissingError(ConnectomicsError, FileNotFoundError):
    """A path, a data set, a crop or an array does not exist."""


class MetadataError(ConnectomicsError, ValueError):
    """Attributes of an array or a group are absent, broken, or contradict each other."""


class UnknownNameError(ConnectomicsError, KeyError):
    """A name (class, crop, data set, model, loss, configuration key) is unknown; see `unknown_name`."""


class ConfigError(ConnectomicsError, ValueError):
    """A configuration does not fit the schema, or its parts do not fit each other."""


class CorruptDataError(ConnectomicsError, OSError):
    """Stored bytes cannot be decoded, are truncated, or hold impossible values (NaN in raw)."""


class IncompleteError(ConnectomicsError, RuntimeError):
    """An artifact is only half written; rerun the stage that makes it."""


class BlocksFailedError(ConnectomicsError, RuntimeError):
    """Some blocks of a task failed repeatedly; all others are done."""


class OutOfMemoryError(ConnectomicsError, MemoryError):
    """The memory of the machine or the GPU does not suffice, even with the smallest batch."""


class EngineError(ConnectomicsError, RuntimeError):
    """No worker can start: the scheduler is not reachable, or a library is not installed."""


class WriteError(ConnectomicsError, OSError):
    """Output could not be written (disk full, no permission); nothing half-written counts as complete."""


@contextmanager
def as_write_error(doing: str, advice: str = "") -> Iterator[None]:
    """Turn an `OSError` into a `WriteError`: ``{doing}: {why}; {advice}``. A `ConnectomicsError` passes unchanged."""
    try:
        yield
    except ConnectomicsError:
        raise
    except OSError as error:
        raise WriteError("; ".join(filter(None, (f"{doing}: {error.strerror or error}", advice)))) from error


def number_of(count: int, what: str) -> str:
    """Return ``1 box``, ``2 boxes``: a number with its noun, whose singular is ``what``."""
    plural = re.sub("([^aeiou])y$", r"\1ie", what)
    plural += "es" if re.search("(s|x|ch|sh)$", what) else "s"
    return f"{count} {what if count == 1 else plural}"


def first_of(names: Iterable[str], most: int) -> str:
    """Return the first names of many: ``a, b, c, ...``."""
    shown = list(names)
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to ``name``, or None."""
    names = [str(k) for k in known]
    found = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if not found:  # sgd is SGD
        lower = {k.lower(): k for k in names}
        found = [lower[k] for k in difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)]
    return found[0] if found else None


def unknown_name(what: str, name: str, known: Iterable[str], where: str = "") -> UnknownNameError:
    """Return an `UnknownNameError` that suggests the nearest known name.

    ``what`` is the kind of thing, singular ("class", "crop"); ``where`` is the place that was searched.
    """
    names = sorted(str(k) for k in known)
    close = nearest(name, names)
    place = f" in {where}" if where else ""
    hint = f"; did you mean {close!r}?" if close else "."
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return UnknownNameError(f"unknown {what} {name!r}{place}{hint} Known: {shown or 'none'}")


def require_known(what: str, names: Iterable[str] | None, known: Collection[str], where: str = "") -> None:
    """Raise `unknown_name` for the first of the names that is not known."""
    for name in names or ():
        if name not in known:
            raise unknown_name(what, name, known, where)
