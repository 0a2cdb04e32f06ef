"""The command ``pytc``: each verb parses its options and calls one function of `connectomics.pipeline`.

Nothing heavy is imported here: a verb imports what it needs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

#: Errors of the file system that a path, a permission or a quota causes, and not a bug of ours.
_USER_ERRORS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT}
    | {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP}
)

# otherwise the interpreter visits all objects of torch and MONAI once more before it exits, which takes a second
atexit.register(gc.freeze)

#: Environment variable: modules to import before the command line is parsed. They may add formats and verbs, which no
#: configuration names.
PLUGINS = "PYTC_PLUGINS"
_INTERRUPTED = 130
_LOUDNESS = ("-v", "--verbose", "-q", "--quiet")


_RESUMES = "interrupted; rerun the same command to resume"
#: What is said after Ctrl-C, by verb; other verbs keep nothing.
_INTERRUPTED_VERBS = {
    **dict.fromkeys(
        ("fetch", "predict", "decode", "measure", "mesh", "run-task", "tune", "merge", "export", "study"), _RESUMES
    ),
    "ingest": (
        "interrupted; the volume in progress was dropped, finished ones are kept: leave those out of the command, or "
        "add --overwrite"
    ),
    "demo": "interrupted; rerun it with --overwrite, which starts over",
    "train": "interrupted before training started: rerun the same command",
}


class InterruptError(Exception):
    """Ctrl-C, with the message for the user; "" prints nothing."""


def _after_interrupt(arguments: Sequence[str]) -> str:
    """The message for a command, by its verb; a verb that knows more raises `InterruptError` itself."""
    verb = next((word for word in arguments if not word.startswith("-")), "")
    message = _INTERRUPTED_VERBS.get(verb, "interrupted; nothing unfinished was kept: rerun the same command")
    return message + (" (add --resume to --overwrite)" if message == _RESUMES and "--overwrite" in arguments else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 success, 1 bad input, 2 bad usage, 130 interrupted.

    Without arguments, print the help.
    """
    from connectomics.cli.app import command

    plugins = os.environ.get(PLUGINS, "").replace(",", " ").split()
    if plugins:
        from connectomics.config import import_plugins

        if status := run_guarded(lambda: import_plugins(plugins)):
            return status
    given = join_lists(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    loudness = [word for word in given if word in _LOUDNESS]  # also after the verb
    given = [*loudness, *[word for word in given if word not in _LOUDNESS]]
    return run_guarded(lambda: command()(args=given, standalone_mode=False), _after_interrupt(given))


def join_lists(words: Sequence[str]) -> list[str]:
    """Return the words with lists joined that the shell split at spaces: ``dataset.crops=['crop234', 'crop236']``
    without quotes arrives as two words. Words whose brackets do not balance before the next option stay as they are."""
    joined: list[str] = []
    left = list(words)
    while left:
        whole, taken = left[0], 1
        if re.match(r"[+~]*[\w.@/]+=", whole):
            while _open_brackets(whole) > 0 and taken < len(left) and not re.match(r"--|[\w.]+=", left[taken]):
                whole, taken = f"{whole} {left[taken]}", taken + 1
            if _open_brackets(whole):
                whole, taken = left[0], 1
        joined.append(whole)
        del left[:taken]
    return joined


def _open_brackets(text: str) -> int:
    return sum(text.count(bracket) for bracket in "[{") - sum(text.count(bracket) for bracket in "]}")


def run_guarded(work: Callable[[], object], interrupted: str = _RESUMES) -> int:
    """Call ``work()`` and return the exit status; an error of the user's becomes one line on stderr.

    ``interrupted`` is printed after Ctrl-C, unless ``work`` raises `InterruptError` with a message of its own.
    """
    import typer

    # ClickException, which typer does not export
    usage_error: Any = typer.BadParameter.__mro__[2]
    from connectomics.errors import ConnectomicsError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("pytorch_lightning", "lightning", "hydra", "botocore", "numba", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        status = work()
        if status == _INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt, InterruptError) as error:
        said = str(error) if isinstance(error, InterruptError) else interrupted
        if said:
            print(said, file=sys.stderr)
        return _INTERRUPTED
    except usage_error as error:
        error.show()
        return 2
    except ConnectomicsError as error:
        if logging.getLogger("connectomics").isEnabledFor(logging.DEBUG):  # pytc -v
            traceback.print_exc()
        return _say(str(error))
    except BrokenPipeError:  # the reader of our output has closed (`pytc describe | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _say(f"no space left on the disk ({error.filename or 'while writing'}); free some and rerun")
        if error.errno == errno.EFBIG:
            return _say(f"{error.filename or 'a file'} is larger than the limit of file sizes (ulimit -f); raise it")
        if error.errno in _USER_ERRORS and error.filename is not None:
            return _say(f"{error.filename}: {error.strerror}; check the path and its permissions")
        raise
    return status if isinstance(status, int) else 0


def _say(message: str) -> int:
    print(f"error: {' '.join(_of_worker(message).split())}", file=sys.stderr)
    return 1


def _of_worker(message: str) -> str:
    """The message of a loader worker's error, which torch passes on as the worker's whole traceback."""
    if not (message.startswith("Caught ") and "Original Traceback" in message):
        return message
    raised = re.findall(r"^[\w.]+(?:Error|Exception): (.*)", message, flags=re.MULTILINE)
    return str(raised[-1]) if raised else message


__all__ = ["InterruptError", "join_lists", "main", "run_guarded"]
