#!/usr/bin/env python
"""Train, predict or evaluate from one configuration file, with the plan's flags.

    python scripts/main.py --config tutorials/cellmap_cos7.yaml
    python scripts/main.py --config tutorials/cellmap_cos7.yaml --mode test --checkpoint FILE dataset.crops=[crop234]

It does the same work as the verbs of ``pytc``; see ``pytc --help``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from connectomics.cli.plan_script import main

if __name__ == "__main__":
    sys.exit(main())
