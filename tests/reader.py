"""Runs commands one after another, each in a process of its own that has the large libraries already.

Importing torch, MONAI and Lightning takes seconds, and the guide has dozens of commands: they are imported here once,
and each command is run by a fork of this process, as `python -m connectomics` or `python script.py` would run it.
Lines of JSON come in at stdin ({"words", "cwd", "said"}: argv, folder, file for what is said), exit codes go out.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys


def answer(words: list[str], cwd: str, said: str) -> None:
    """Become the process of one command; does not return."""
    os.chdir(cwd)
    with open(said, "wb", buffering=0) as file, open(os.devnull, "rb", buffering=0) as nothing:
        for number, stream in ((0, nothing), (1, file), (2, file)):
            os.dup2(stream.fileno(), number)
    program, *arguments = words
    sys.argv = [program, *arguments]
    if program == "pytc":
        runpy.run_module("connectomics", run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit(0)


def main() -> None:
    import connectomics.lightning.module
    import connectomics.models.monai_networks  # noqa: F401

    gc.freeze()  # no collection in a fork has to go through (and so copy) what was imported here
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            answer(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
