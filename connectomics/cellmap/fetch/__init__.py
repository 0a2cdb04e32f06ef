"""Public data to a local root: exactly the objects that a run reads, verified, and resumed where it was killed."""

from connectomics.cellmap.fetch.plan import PUBLIC, FetchItem, FetchPlan, RemoteFile, open_source, plan_fetch
from connectomics.cellmap.fetch.table import resolve_table
from connectomics.cellmap.fetch.transfer import Missing, transfer

__all__ = [
    "PUBLIC",
    "FetchItem",
    "FetchPlan",
    "Missing",
    "RemoteFile",
    "open_source",
    "plan_fetch",
    "resolve_table",
    "transfer",
]
