"""Anonymous requests to S3: one object, whether it is there, what is below a prefix.

They go through obstore. Its client lives on threads that a child made by fork does not have: there it hangs, even a
new one (measured with obstore 0.12). So a process forked after its parent used obstore sends the same requests with
urllib. Both retry what may pass (5xx, broken connections, bodies cut short, silence) with exponential back-off and
jitter within `StoreOptions.timeout`, and both end in the same errors. 404 means "not there"; every other refusal is a
`StoreError` that names the object.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from connectomics.io.location import StoreError, StoreOptions

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")
R = TypeVar("R")

# seconds before the first repetition, and at most: tensorstore is told the same
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
_DENIED = "access is denied; a bucket that may not be listed says so of objects that are not there, too"

# The process that first used obstore. Its children by fork must not: see the module's docstring.
_obstore_process: int | None = None


def get(bucket: str, key: str, options: StoreOptions) -> bytes | None:
    """The content of one object, None where there is none."""
    store = _store(bucket, options)
    if store is None:
        return _plain("GET", bucket, key, options)
    return _asked(lambda: bytes(store.get(key).bytes()), bucket, key, options)


def head(bucket: str, key: str, options: StoreOptions) -> bool:
    """Whether the object is there."""
    store = _store(bucket, options)
    if store is None:
        return _plain("HEAD", bucket, key, options) is not None
    return _asked(lambda: store.head(key), bucket, key, options) is not None


def children(bucket: str, key: str, options: StoreOptions) -> tuple[list[str], list[str]]:
    """Names of the prefixes ("folders") and of the objects right below ``key``; ``([], [])`` where nothing is."""
    prefix = f"{key}/" if key else ""
    store = _store(bucket, options)
    if store is None:
        return _plain_children(bucket, prefix, options)
    listed = _asked(lambda: store.list_with_delimiter(prefix or None), bucket, key, options)
    if listed is None:
        return [], []
    prefixes = [str(name) for name in listed["common_prefixes"]]
    return [_last(name) for name in prefixes], [_last(str(item["path"])) for item in listed["objects"]]


def files(bucket: str, key: str, options: StoreOptions) -> list[tuple[str, int, str]]:
    """Key, bytes and ETag of every object right below ``key`` (not deeper), by key."""
    prefix = f"{key}/" if key else ""
    store = _store(bucket, options)
    if store is None:
        pages = _plain_pages(bucket, prefix, "/", options)
        return sorted(item for page in pages for item in _contents(page) if item[0] != prefix)
    listed = _asked(lambda: store.list_with_delimiter(prefix or None), bucket, key, options)
    found = [] if listed is None else listed["objects"]
    return sorted((str(o["path"]), int(o["size"]), str(o["e_tag"])) for o in found)


def objects(bucket: str, key: str, options: StoreOptions) -> list[tuple[str, int, str]]:
    """Key, bytes and ETag of every object below ``key``, however deep, by key."""
    prefix = f"{key}/" if key else ""
    store = _store(bucket, options)
    if store is None:
        return sorted(item for page in _plain_pages(bucket, prefix, "", options) for item in _contents(page))
    listed = _asked(
        lambda: [o for page in store.list(prefix or None, chunk_size=1000) for o in page], bucket, key, options
    )
    return sorted((str(o["path"]), int(o["size"]), str(o["e_tag"])) for o in listed or [])


def in_parallel(ask: Callable[[T], R], items: Sequence[T], threads: int = 16) -> list[R]:
    """``ask`` of every item, several at a time; the first error that comes up is raised and the rest is given up."""
    if len(items) < 2:
        return [ask(item) for item in items]
    pool = ThreadPoolExecutor(max_workers=min(threads, len(items)))
    try:
        return list(pool.map(ask, items))
    finally:
        pool.shutdown(cancel_futures=True)


def message(bucket: str, key: str, reason: str, denied: bool = False) -> str:
    """What is said when an object cannot be had."""
    # of the answer's XML only the code says something
    reason = re.sub(r"<\?xml.*", lambda xml: "".join(re.findall(r"<Code>(\w+)", xml.group())), reason, flags=re.S)
    advice = _DENIED if denied else "check the address, the endpoint and public access"
    return f"cannot read s3://{bucket}/{key}: {' '.join(reason.split())[:300]}; {advice}"


# -- obstore ---------------------------------------------------------------------------------------------------------
def _store(bucket: str, options: StoreOptions) -> S3Store | None:
    """The bucket's client in this process; None in a child that must not have one."""
    global _obstore_process
    pid = os.getpid()
    if _obstore_process not in (None, pid):
        return None
    _obstore_process = pid
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
    """The answer; asked again if a listing was cut short, which obstore itself does not do."""
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


# -- urllib, in forked children --------------------------------------------------------------------------------------
def _plain(method: str, bucket: str, key: str, options: StoreOptions, query: str = "") -> bytes | None:
    """The body of one answer; None for 404 (for a bucket that is not there: `StoreError`)."""
    endpoint = options.s3_endpoint or f"https://s3.{options.s3_region}.amazonaws.com"
    url = f"{endpoint.rstrip('/')}/{bucket}/{quote(key)}{query}"
    until = time.monotonic() + options.timeout
    delay = FIRST_DELAY
    for attempt in range(options.retries + 1):
        try:
            request = urllib.request.Request(url, method=method)
            with urllib.request.urlopen(request, timeout=options.attempt_timeout) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            if error.code == 404 and "NoSuchBucket" not in body:
                return None
            reason = f"{error.code} {error.reason} {body}"
            if error.code < 500 and error.code not in (408, 429):
                raise StoreError(message(bucket, key, reason, denied=error.code == 403)) from error
            cause: Exception = error
        except (OSError, http.client.HTTPException) as error:
            reason, cause = f"{type(error).__name__}: {error}", error
        if time.monotonic() + delay > until:
            break
        if attempt < options.retries:
            time.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, LONGEST_DELAY)
    raise StoreError(message(bucket, key, f"{reason} (after {attempt + 1} attempts)")) from cause


def _plain_children(bucket: str, prefix: str, options: StoreOptions) -> tuple[list[str], list[str]]:
    folders: list[str] = []
    found: list[str] = []
    for page in _plain_pages(bucket, prefix, "/", options):
        folders += [_last(item.findtext("{*}Prefix") or "") for item in page.findall("{*}CommonPrefixes")]
        found += [_last(key) for key, _, _ in _contents(page) if key != prefix]
    return folders, found


def _plain_pages(bucket: str, prefix: str, delimiter: str, options: StoreOptions) -> Iterator[ElementTree.Element]:
    query = {"list-type": "2", "prefix": prefix, "delimiter": delimiter}
    while True:
        body = _plain("GET", bucket, "", options, f"?{urlencode(query)}")
        page = _parsed(body, bucket, prefix)
        yield page
        token = page.findtext("{*}NextContinuationToken")
        if not token:
            return
        query["continuation-token"] = token


def _contents(page: ElementTree.Element) -> list[tuple[str, int, str]]:
    items = page.findall("{*}Contents")
    return [(i.findtext("{*}Key") or "", int(i.findtext("{*}Size") or 0), i.findtext("{*}ETag") or "") for i in items]


def _parsed(body: bytes | None, bucket: str, prefix: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(body or b"")
    except ElementTree.ParseError as error:
        raise StoreError(message(bucket, prefix, f"the listing is no XML ({error})")) from error


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


__all__ = ["FIRST_DELAY", "LONGEST_DELAY", "children", "files", "get", "head", "in_parallel", "message", "objects"]
