"""Download public data to a local root: exactly the objects a run reads, verified, and resumed after a kill."""

from connectomics.cellmap.fetch.plan import PUBLIC, FetchItem, FetchPlan, RemoteFile, open_source, plan_fetch
from connectomics.cellmap.fetch.transfer import Missing, resolve_table, transfer

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
