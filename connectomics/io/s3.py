"""Anonymous S3 requests through obstore: read one object, ask whether it exists, list a prefix.

Requests that can succeed later (5xx, broken connection, truncated body, silence) are retried with exponential backoff
and jitter within `StoreOptions.timeout`. 404 means "absent"; every other refusal is a `StoreError` that names the
object.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from connectomics.io.location import StoreError, StoreOptions, refuse_forked_process

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")
R = TypeVar("R")

# Seconds before the first retry, and at most between retries; tensorstore gets the same values.
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
_THREADS = 16
_DENIED = "access is denied; a bucket that does not allow listing also answers this for objects that do not exist"


def get(bucket: str, key: str, options: StoreOptions) -> bytes | None:
    """Return the content of one object, None if it does not exist."""
    store = _store(bucket, options)
    return _asked(lambda: bytes(store.get(key).bytes()), bucket, key, options)


def head(bucket: str, key: str, options: StoreOptions) -> bool:
    """Return whether the object exists."""
    store = _store(bucket, options)
    return _asked(lambda: store.head(key), bucket, key, options) is not None


def children(bucket: str, key: str, options: StoreOptions) -> tuple[list[str], list[str]]:
    """Return the names of the prefixes ("folders") and of the objects directly below ``key``."""
    prefixes, found = _listed(bucket, key, options)
    return [name.rstrip("/").rpartition("/")[2] for name in prefixes], [name.rpartition("/")[2] for name, *_ in found]


def files(bucket: str, key: str, options: StoreOptions) -> list[tuple[str, int, str]]:
    """Return key, bytes and ETag of every object directly below ``key`` (not deeper), sorted by key."""
    return sorted(_listed(bucket, key, options)[1])


def objects(bucket: str, key: str, options: StoreOptions) -> list[tuple[str, int, str]]:
    """Return key, bytes and ETag of every object below ``key``, at any depth, sorted by key."""
    prefix = f"{key}/" if key else None
    store = _store(bucket, options)
    listed = _asked(lambda: [o for page in store.list(prefix, chunk_size=1000) for o in page], bucket, key, options)
    return sorted(_described(item) for item in listed or [])


def in_parallel(ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call ``ask`` for every item in several threads; raise the first error and cancel the rest."""
    if len(items) < 2:
        return [ask(item) for item in items]
    pool = ThreadPoolExecutor(max_workers=min(_THREADS, len(items)))
    try:
        return list(pool.map(ask, items))
    finally:
        pool.shutdown(cancel_futures=True)


def message(bucket: str, key: str, reason: str, denied: bool = False) -> str:
    """Return the error message for an object that cannot be read."""
    # the answer's XML says nothing beyond its code
    reason = re.sub(r"<\?xml.*", lambda xml: "".join(re.findall(r"<Code>(\w+)", xml.group())), reason, flags=re.S)
    advice = _DENIED if denied else "check the address, the endpoint and public access"
    return f"cannot read s3://{bucket}/{key}: {' '.join(reason.split())[:300]}; {advice}"


def _listed(bucket: str, key: str, options: StoreOptions) -> tuple[list[str], list[tuple[str, int, str]]]:
    store = _store(bucket, options)
    listed = _asked(lambda: store.list_with_delimiter(f"{key}/" if key else None), bucket, key, options)
    if listed is None:
        return [], []
    return [str(name) for name in listed["common_prefixes"]], [_described(item) for item in listed["objects"]]


def _described(item: Any) -> tuple[str, int, str]:
    return str(item["path"]), int(item["size"]), str(item["e_tag"])


def _store(bucket: str, options: StoreOptions) -> S3Store:
    refuse_forked_process()
    return _open(
        bucket, options.s3_endpoint, options.s3_region, options.retries, options.timeout, options.attempt_timeout
    )


@lru_cache(maxsize=64)
def _open(
    bucket: str, endpoint: str | None, region: str, retries: int, timeout: float, attempt_timeout: float
) -> S3Store:
    from obstore.store import S3Store

    attempt = timedelta(seconds=attempt_timeout)
    return S3Store(
        bucket,
        endpoint=endpoint,
        region=region,
        skip_signature=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "connect_timeout": attempt, "read_timeout": attempt},
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=timeout),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_DELAY),
                "max_backoff": timedelta(seconds=LONGEST_DELAY),
                "base": 2,
            },
        },
    )


def _asked(ask: Callable[[], T], bucket: str, key: str, options: StoreOptions) -> T | None:
    """The answer, None for "absent". Retries truncated listings, which obstore itself does not do."""
    from obstore.exceptions import BaseError

    delay = FIRST_DELAY
    for left in reversed(range(options.retries + 1)):
        try:
            return ask()
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            reason = str(error).split("Debug source")[0]
            if "response body" not in reason or not left:
                raise StoreError(message(bucket, key, reason, denied="403 Forbidden" in reason)) from error
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, LONGEST_DELAY)
    return None
