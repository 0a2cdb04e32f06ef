"""How tensorstore reads: its caches, threads and retries."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from connectomics.io import s3
from connectomics.io.location import StoreOptions


@lru_cache(maxsize=16)
def context_of(options: StoreOptions) -> Any:
    """Return tensorstore's context for these options, one for all arrays of this process."""
    import tensorstore

    delays = {"initial_delay": f"{s3.FIRST_DELAY:g}s", "max_delay": f"{s3.LONGEST_DELAY:g}s"}
    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": options.cache_bytes},
            "data_copy_concurrency": {"limit": options.threads},
            "file_io_concurrency": {"limit": max(1, options.threads)},
            "s3_request_concurrency": {"limit": 16},
            "s3_request_retries": {"max_retries": options.retries, **delays},
        }
    )


@contextlib.contextmanager
def http_timeouts(options: StoreOptions) -> Iterator[None]:
    """Make tensorstore give up on a silent server; by default it waits forever.

    It reads these limits only from the environment, when it opens its first S3 array. Values the user set are kept.
    """
    seconds = str(max(1, int(options.attempt_timeout)))
    wanted = {
        "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": seconds,
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": seconds,
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "100",
    }
    ours = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
