"""Open a data root."""

from __future__ import annotations

import os

from connectomics.cellmap.catalog import Catalog


def open_root(root: str | os.PathLike[str] | Catalog) -> Catalog:
    """Return the catalog of a data root: data sets, crops, classes, and where each array is.

    Args:
        root: folder or ``s3://`` URL that holds ``{dataset}/{dataset}.zarr``, or a catalog, which is returned.

    Raises:
        MissingError: no such root, or one without data sets.
    """
    return root if isinstance(root, Catalog) else Catalog.open(os.fspath(root))
