"""S3 requests through obstore: read, write and remove objects, ask whether one exists, list a prefix.

Requests that can succeed later (5xx, broken connection, truncated body, silence) are retried with exponential backoff
and jitter within `StoreOptions.timeout`. 404 means "absent"; every other refusal is a `StoreError` that names the
object, or for a write a `WriteError`.

Requests are signed if there are credentials (`has_credentials`). If these are refused where anyone may read, the bucket
is read anonymously. Writing needs credentials.
"""

from __future__ import annotations

import configparser
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, TypeVar

from connectomics.errors import WriteError
from connectomics.io.location import StoreError, StoreOptions, refuse_forked_process

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")
R = TypeVar("R")

# Seconds before the first retry, and at most between retries; tensorstore gets the same values.
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
_THREADS = 16
_DENIED = "access is denied; a bucket that does not allow listing also answers this for objects that do not exist"
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_REFUSED = re.compile("403 Forbidden|ExpiredToken|InvalidToken|InvalidAccessKeyId")
# the answer to the second request for a body that was cut, if the object was removed or replaced in between
_REPLACED = re.compile("(?s)404 Not Found(?!.*NoSuchBucket)|416 Range Not Satisfiable")
_LARGE, _LARGE_S = 4 << 20, 600.0  # bytes in one request that may take longer than silence otherwise may, and how long
_anonymous = set[tuple[str, str | None]]()  # buckets (with their endpoint) that refuse our credentials to read


def has_credentials() -> bool:
    """Return whether requests can be signed: with the keys in the environment, else with those of ``AWS_PROFILE`` in
    ``~/.aws``, which are put into the environment, from where both libraries and the workers take them."""
    if _KEYS[0] not in os.environ:
        files = (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config"))
        paths = tuple(os.environ.get(name) or os.path.expanduser(f"~/.aws/{file}") for name, file in files)
        os.environ.update(_keys_of(os.environ.get("AWS_PROFILE") or "default", *paths))
    return all(os.environ.get(name) for name in _KEYS[:2])


@lru_cache(maxsize=8)
def _keys_of(profile: str, credentials: str, config: str) -> dict[str, str]:
    """The keys of a profile; {} if it has none."""
    found = configparser.RawConfigParser()
    try:
        found.read([config, credentials])
    except configparser.Error as error:
        raise StoreError(f"cannot read the credentials in {credentials}: {' '.join(str(error).split())}") from error
    sections = [found[name] for name in (profile, f"profile {profile}") if found.has_section(name)]
    keys = next((section for section in sections if all(name in section for name in _KEYS[:2])), None)
    return {} if keys is None else {name: keys[name] for name in _KEYS if name in keys}


def require_credentials(bucket: str, key: str) -> None:
    """Raise `WriteError` if there are no credentials to write with."""
    if not has_credentials():
        raise _not_written(bucket, key, "")


def is_signed(bucket: str, options: StoreOptions) -> bool:
    """Return whether requests that read from the bucket are signed; known after the first of them."""
    return (bucket, options.s3_endpoint) not in _anonymous and has_credentials()


def get(bucket: str, key: str, options: StoreOptions) -> bytes | None:
    """Return the content of one object, None if it does not exist."""
    found = get_with_tag(bucket, key, options)
    return None if found is None else found[0]


def get_with_tag(bucket: str, key: str, options: StoreOptions) -> tuple[bytes, str] | None:
    """Return content and ETag of one object, None if it does not exist."""

    def ask(store: S3Store) -> tuple[bytes, str]:
        found = store.get(key)
        return bytes(found.bytes()), str(found.meta["e_tag"])

    return _asked(ask, bucket, key, options)


def get_range(bucket: str, key: str, begin: int, end: int, options: StoreOptions) -> bytes | None:
    """Return the bytes of an object from ``begin`` to ``end`` (or its own end), None if it does not exist."""

    def ask(store: S3Store) -> bytes:
        return bytes(store.get(key, options={"range": (begin, end)}).bytes())

    return _asked(ask, bucket, key, options)


def download(bucket: str, key: str, file: IO[bytes], options: StoreOptions) -> None:
    """Write the content of an object into ``file``; `StoreError` if it does not exist."""

    def ask(store: S3Store) -> bool:
        file.seek(0)
        file.truncate()
        for part in store.get(key).stream():
            file.write(part)
        file.flush()
        return True

    if _asked(ask, bucket, key, options, large=True) is None:
        raise StoreError(message(bucket, key, "no such object"))


def head(bucket: str, key: str, options: StoreOptions) -> int | None:
    """Return the bytes of an object, None if it does not exist."""
    return _asked(lambda store: int(store.head(key)["size"]), bucket, key, options)


def put(
    bucket: str,
    key: str,
    data: bytes | bytearray | memoryview | IO[bytes],
    options: StoreOptions,
    *,
    match: str | None = None,
) -> str | None:
    """Store an object, which appears whole or not at all; return its ETag.

    Args:
        data: sent in one request; a file is sent in parts.
        match: condition. "": only if there is no such object; an ETag: only if it has this ETag. Then None is returned
            if the condition does not hold. Some stores ignore conditions (`connectomics.tasks.lease` finds out).

    Raises:
        WriteError: no credentials, no such bucket, no permission, or no answer.
    """
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    in_parts, size = True, _LARGE
    if isinstance(data, bytes | bytearray | memoryview):
        in_parts, size = False, len(data)
    how: Any = {} if match is None else {"mode": "create" if match == "" else {"e_tag": match}}

    def ask(store: S3Store) -> str | None:
        try:
            return str(store.put(key, data, use_multipart=None if in_parts else False, **how)["e_tag"])
        except (AlreadyExistsError, PreconditionError):
            return None

    return _asked(ask, bucket, key, options, writes=True, large=size >= _LARGE)


def copy(bucket: str, key: str, to: str, options: StoreOptions) -> None:
    """Copy an object within its bucket; the store does it alone."""
    _asked(lambda store: store.copy(key, to), bucket, key, options, writes=True, large=True)


def delete(bucket: str, keys: Sequence[str], options: StoreOptions) -> None:
    """Remove objects; those that do not exist do not count."""
    if keys:
        _asked(lambda store: store.delete(list(keys)), bucket, keys[0], options, writes=True)


def children(bucket: str, key: str, options: StoreOptions) -> tuple[list[str], list[str]]:
    """Return the names of the prefixes ("folders") and of the objects directly below ``key``."""
    prefixes, found = _listed(bucket, key, options)
    return [name.rstrip("/").rpartition("/")[2] for name in prefixes], [name.rpartition("/")[2] for name, *_ in found]


def files(bucket: str, key: str, options: StoreOptions) -> list[tuple[str, int, str]]:
    """Return key, bytes and ETag of every object directly below ``key`` (not deeper), sorted by key."""
    return sorted(_listed(bucket, key, options)[1])


def objects(bucket: str, key: str, options: StoreOptions) -> list[tuple[str, int, str]]:
    """Return key, bytes and ETag of every object below ``key``, at any depth, sorted by key."""
    return sorted(item for page in pages(bucket, key, options) for item in page)


def pages(bucket: str, key: str, options: StoreOptions) -> Iterator[list[tuple[str, int, str]]]:
    """Yield key, bytes and ETag of every object below ``key``, at any depth, a thousand at a time, in no order."""
    last: str | None = None  # a broken listing goes on after it

    def ask(store: S3Store) -> list[tuple[str, int, str]]:
        listed = store.list(f"{key}/" if key else None, offset=last, chunk_size=1000)
        return [_described(item) for item in next(iter(listed), [])]

    while page := _asked(ask, bucket, key, options):
        yield page
        last = max(item[0] for item in page)


def newest(bucket: str, key: str, options: StoreOptions) -> datetime | None:
    """Return when the last of the objects below ``key`` was written, or the object itself; None if there is none."""

    def ask(store: S3Store) -> datetime:
        times = (item["last_modified"] for page in store.list(f"{key}/", chunk_size=1000) for item in page)
        return max(times, default=None) or store.head(key)["last_modified"]

    return _asked(ask, bucket, key, options)


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
    advice = _DENIED if denied else "check the address, the endpoint and public access"
    return f"cannot read s3://{bucket}/{key}: {_short(reason)}; {advice}"


def _not_written(bucket: str, key: str, reason: str) -> WriteError:
    if reason == "":
        why = "there are no credentials"
        advice = f"set {_KEYS[0]} and {_KEYS[1]}, or AWS_PROFILE and ~/.aws/credentials"
    elif _REFUSED.search(reason):
        why, advice = f"access is denied ({_short(reason)})", "check the credentials and their permission to write"
    elif "NoSuchBucket" in reason or "404 Not Found" in reason:
        why, advice = f"there is no bucket {bucket}", "create it, or check its name and AWS_ENDPOINT_URL"
    else:
        why, advice = _short(reason), "check AWS_ENDPOINT_URL and the network, then rerun the same command"
    return WriteError(f"cannot write s3://{bucket}/{key}: {why}; {advice}")


def _short(reason: str) -> str:
    # the answer's XML says nothing beyond its code
    reason = re.sub(r"<\?xml.*", lambda xml: "".join(re.findall(r"<Code>(\w+)", xml.group())), reason, flags=re.S)
    return " ".join(reason.split())[:300]


def _listed(bucket: str, key: str, options: StoreOptions) -> tuple[list[str], list[tuple[str, int, str]]]:
    prefix = f"{key}/" if key else None
    listed = _asked(lambda store: store.list_with_delimiter(prefix), bucket, key, options)
    if listed is None:
        return [], []
    return [str(name) for name in listed["common_prefixes"]], [_described(item) for item in listed["objects"]]


def _described(item: Any) -> tuple[str, int, str]:
    return str(item["path"]), int(item["size"]), str(item["e_tag"])


@lru_cache(maxsize=64)
def _open(
    bucket: str, endpoint: str | None, region: str, retries: int, timeout: float, attempt: float, keys: tuple[str, ...]
) -> S3Store:
    from obstore.store import S3Store

    names = ("access_key_id", "secret_access_key", "session_token")
    signing: Any = dict(zip(names, keys, strict=False)) if keys else {"skip_signature": True}
    seconds = timedelta(seconds=attempt)
    client: Any = {"allow_http": True, "connect_timeout": min(seconds, timedelta(seconds=30)), "read_timeout": seconds}
    if endpoint is not None:  # obstore refuses None, which would mean Amazon's
        signing["endpoint"] = endpoint
    if attempt >= _LARGE_S:
        client["timeout"] = seconds
    return S3Store(
        bucket,
        region=region,
        virtual_hosted_style_request=False,
        client_options=client,
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=timeout),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_DELAY),
                "max_backoff": timedelta(seconds=LONGEST_DELAY),
                "base": 2,
            },
        },
        **signing,
    )


def _store(bucket: str, options: StoreOptions, signed: bool, large: bool) -> S3Store:
    keys = tuple(os.environ[name] for name in _KEYS if os.environ.get(name)) if signed else ()
    timeout, attempt = (_LARGE_S, _LARGE_S) if large else (options.timeout, options.attempt_timeout)
    return _open(bucket, options.s3_endpoint, options.s3_region, options.retries, timeout, attempt, keys)


def _asked(
    ask: Callable[[S3Store], T],
    bucket: str,
    key: str,
    options: StoreOptions,
    *,
    writes: bool = False,
    large: bool = False,
) -> T | None:
    """The answer, None for "absent". Retries what obstore itself does not: truncated listings, objects that others
    replace or remove while they are read, and conditional writes whose connection breaks (if the first was done, the
    condition of the second does not hold)."""
    from obstore.exceptions import BaseError

    refuse_forked_process("S3")
    if writes:
        require_credentials(bucket, key)
    signed = writes or is_signed(bucket, options)
    delay, left = FIRST_DELAY, options.retries
    while True:
        try:
            answer = ask(_store(bucket, options, signed, large))
        except (BaseError, OSError) as error:
            reason = str(error).split("Debug source")[0]
            if isinstance(error, FileNotFoundError) and not writes:
                return None
            if signed and not writes and _REFUSED.search(reason):  # perhaps anyone may read
                try:
                    answer = ask(_store(bucket, options, False, large))
                except FileNotFoundError:
                    return None
                except (BaseError, OSError):
                    raise StoreError(message(bucket, key, reason, denied=True)) from error
                _anonymous.add((bucket, options.s3_endpoint))
                return answer
            given_up = f"after {options.retries} retries" in reason
            broken = "response body" in reason or ("error sending request" in reason and not given_up)
            broken |= not writes and _REPLACED.search(reason) is not None
            if not broken or not left:
                if writes:
                    raise _not_written(bucket, key, reason) from error
                raise StoreError(message(bucket, key, reason, denied="403 Forbidden" in reason)) from error
        else:
            return answer
        left -= 1
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, LONGEST_DELAY)
