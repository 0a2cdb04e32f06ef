"""What is left of a verb that Ctrl-C ended, and how to go on. One line, and true for each of them."""

from __future__ import annotations

from collections.abc import Sequence

#: Of verbs that keep what they finished.
GOES_ON = "interrupted; run the same command again: what is finished is kept"
_ANEW = "interrupted; nothing half-done is kept: run the same command again"
_KEEPING = ("fetch", "predict", "decode", "measure", "mesh", "run-task", "tune", "export")
_OTHERS = {
    "ingest": (
        "interrupted; the volume under way is dropped, finished ones are kept: leave those out and run again, or give "
        "--overwrite"
    ),
    "demo": "interrupted; run it again with --overwrite, which begins anew",
    "train": "interrupted before training began: run the same command again",
}


class InterruptError(Exception):
    """Ctrl-C, with what is to be said about it; "" says nothing."""


def what_is_kept(arguments: Sequence[str]) -> str:
    """The line for a command, by its verb; a verb that knows more raises `InterruptError` itself."""
    verb = next((word for word in arguments if not word.startswith("-")), "")
    if verb in _KEEPING:
        return GOES_ON + (" (with --resume beside --overwrite)" if "--overwrite" in arguments else "")
    return _OTHERS.get(verb, _ANEW)
