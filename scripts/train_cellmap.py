#!/usr/bin/env python
"""Training for the CellMap Segmentation Challenge: ``scripts/main.py`` under the plan's other name.

python scripts/train_cellmap.py --config tutorials/cellmap_cos7.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from connectomics.cli.plan_script import main

if __name__ == "__main__":
    sys.exit(main())
