"""``python -m connectomics`` is ``pytc``."""

import sys

from connectomics.cli import main

sys.exit(main())
