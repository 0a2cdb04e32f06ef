"""Starts commands of `pytc`, each in a process of its own that has the large libraries already (see `tests.reader`).

Lines of JSON come in at stdin and are answered by one number a line: {"start": {"words", "cwd", "said"}} by the
process's id, {"wait": id} by its exit status (negative: the signal that ended it). Beside "start", "environment" has
variables that are changed (null: removed).
"""

from __future__ import annotations

import gc
import json
import os
import sys

from tests.reader import answer


def main() -> None:
    import connectomics.cellmap.fetch
    import connectomics.cellmap.ingest
    import connectomics.lightning.module
    import connectomics.lightning.trainer
    import connectomics.models.monai_networks
    import connectomics.pipeline.mesh
    import connectomics.pipeline.predict
    import connectomics.submission  # noqa: F401

    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            os.setsid()
            for name, value in request.get("environment", {}).items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            answer(**request["start"])
        print(child, flush=True)


if __name__ == "__main__":
    main()
