"""Pack predictions into a submission for the CellMap Segmentation Challenge, and check it.

    python scripts/export_cellmap_submission.py --predictions_dir outputs/labels --output_path submission.zip \
        --classes nuc mito --datasets jrc_cos7-1a

A name that ends in .zip gives what the portal takes; any other name gives the folder of the same Zarr group. Data sets
without a test crop in the challenge, as jrc_cos7-1a, are packed on the grids of their predictions.
"""

from __future__ import annotations

import argparse
import sys

from connectomics.errors import ConnectomicsError
from connectomics.submission import export_submission

__all__ = ["export_submission", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; returns the exit status, not zero where the export failed or has errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions_dir", required=True, help="labels or probabilities, Zarr or .npy")
    parser.add_argument("--output_path", default="submission.zarr", help="the submission (default: %(default)s)")
    parser.add_argument("--classes", nargs="+", required=True, metavar="CLASS", help="classes to pack")
    parser.add_argument("--datasets", nargs="+", required=True, metavar="DATASET", help="data sets to pack")
    parser.add_argument("--crops", metavar="TABLE", help="crop table (.csv or .json); default: the challenge's")
    parser.add_argument("--data_root", metavar="ROOT", help="data root with the crops of .npy files that no table has")
    parser.add_argument("--strict", action="store_true", help="fail where a prediction is missing")
    options = parser.parse_args(arguments)
    try:
        result = export_submission(
            options.predictions_dir,
            options.output_path,
            options.classes,
            options.datasets,
            crops=options.crops,
            data_root=options.data_root,
            strict=options.strict,
        )
    except ConnectomicsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(result.summary())
    return 1 if result.has_errors else 0


if __name__ == "__main__":
    sys.exit(main())
