"""S3 on this machine, for tests and benchmarks: two servers, and a proxy in front of them that makes trouble.

`MotoServer` is moto's, which knows buckets, access rights and S3's own answers, at about a hundred requests a second;
`FolderServer` serves the objects of a local folder quickly, read only or (``writable``) for the holder of `KEYS`.
`FaultyProxy` stands before either, waits, fails and counts. All of them run in threads of this process and are context
managers:

    with FolderServer(folder) as server, FaultyProxy(server.endpoint, latency=0.05, share=1 / 20) as proxy:
        options = StoreOptions(endpoint=proxy.endpoint)   # the folder's files are s3://public/...
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import socket
import struct
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

BUCKET = "public"
KEYS = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "me"}
Fault = Literal["500", "503", "reset", "truncated", "silence", "403", "404"]
FAULTS: tuple[Fault, ...] = ("500", "503", "reset", "truncated")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # many connections at once are the normal case

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go at any time (killed workers); that is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; the delay would be measured, not S3
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Running:
    """A threaded HTTP server of this process, from ``with`` to its end."""

    def __init__(self, handler: type[_Handler]) -> None:
        self._server = _Server(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class FolderServer(_Running):
    """The files of ``folder`` as the objects of the public bucket `BUCKET`: GET (with ranges), HEAD, ListObjectsV2.

    With ``writable`` the bucket is private: every request must be signed with `KEYS` (the signature is not checked),
    and PutObject with its conditions, CopyObject and DeleteObjects work, each in one step. With ``refuses_signed``
    anyone may read, but a request that is signed is denied: the user may not use this bucket.
    """

    def __init__(self, folder: Path, writable: bool = False, refuses_signed: bool = False) -> None:
        root = Path(folder)
        lock = threading.RLock()

        class Handler(_Handler):
            def is_allowed(self) -> bool:
                signed = self.headers.get("Authorization", "")
                known = f"Credential={KEYS['AWS_ACCESS_KEY_ID']}/" in signed
                allowed = not (signed if refuses_signed else writable and not known)
                if not allowed:
                    self.rfile.read(int(self.headers.get("Content-Length", "0")))
                    self.answer(403, _error("AccessDenied", self.path))
                return allowed

            def do_PUT(self) -> None:
                bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
                if not self.is_allowed():
                    return
                data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                source = unquote(self.headers.get("x-amz-copy-source", "")).lstrip("/").partition("/")[2]
                with lock:
                    if bucket != BUCKET or not writable:
                        self.answer(404, _error("NoSuchBucket", bucket))
                    elif not self.holds(root / key):
                        self.answer(412, _error("PreconditionFailed", key))
                    else:
                        _store_file(root, key, (root / source).read_bytes() if source else data)
                        tag = _tag_of(root / key)
                        body = f"<CopyObjectResult><ETag>{escape(tag)}</ETag></CopyObjectResult>" if source else ""
                        self.answer(200, body.encode(), {"ETag": tag})

            def holds(self, path: Path) -> bool:
                if self.headers.get("If-None-Match") == "*":
                    return not path.is_file()
                match = self.headers.get("If-Match")
                return match is None or (path.is_file() and match == _tag_of(path))

            def do_POST(self) -> None:
                if not self.is_allowed():
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
                with lock:
                    keys = re.findall("<Key>(.*?)</Key>", body)
                    for key in keys:
                        _remove_file(root, unescape(key))
                gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
                self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode(), {"Content-Type": "application/xml"})

            def do_GET(self) -> None:
                address = urlsplit(self.path)
                bucket, _, key = unquote(address.path).lstrip("/").partition("/")
                if not self.is_allowed():
                    return
                if bucket != BUCKET:
                    self.answer(404, _error("NoSuchBucket", bucket))
                elif not key:
                    query = {name: values[0] for name, values in parse_qs(address.query).items()}
                    with lock if writable else contextlib.nullcontext():
                        listing = _listing(root, query)
                    self.answer(200, listing, {"Content-Type": "application/xml"})
                else:
                    with lock if writable else contextlib.nullcontext():
                        self.object(root / key, key)

            def do_HEAD(self) -> None:
                self.do_GET()

            def object(self, path: Path, key: str) -> None:
                try:
                    data = path.read_bytes()
                except OSError:
                    self.answer(404, _error("NoSuchKey", key))
                    return
                info = path.stat()
                headers = {
                    "ETag": _tag_of(path) if writable else f'"{info.st_mtime_ns:x}-{info.st_size:x}"',
                    "Last-Modified": formatdate(info.st_mtime, usegmt=True),
                    "Content-Type": "binary/octet-stream",
                    "Accept-Ranges": "bytes",
                }
                wanted = self.headers.get("Range")
                if wanted is None or not data:
                    self.answer(200, data, headers)
                    return
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin = int(first) if first else max(0, len(data) - int(last))
                end = min(int(last) + 1, len(data)) if first and last else len(data)
                if begin >= len(data):
                    self.answer(416, _error("InvalidRange", key))
                    return
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
                self.answer(206, data[begin:end], headers)

        super().__init__(Handler)


class MotoServer:
    """moto's S3 server with a bucket `BUCKET` that anyone may read and a bucket ``private``."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)

    def __enter__(self) -> Self:
        import boto3
        from botocore.config import Config

        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="me",
            aws_secret_access_key="me",
            region_name="us-east-1",
            config=Config(max_pool_connections=16),
        )
        self.client.create_bucket(Bucket=BUCKET, ACL="public-read")
        self.client.create_bucket(Bucket="private")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # moto keeps its buckets in the process, not in the server
        urllib.request.urlopen(f"{self.endpoint}/moto-api/reset", data=b"").close()
        self._server.stop()

    def put(self, key: str, content: bytes, bucket: str = BUCKET) -> None:
        """One object, for anyone to read where the bucket is public."""
        access = "public-read" if bucket == BUCKET else "private"
        self.client.put_object(Bucket=bucket, Key=key, Body=content, ACL=access)

    def upload(self, folder: Path) -> None:
        """All files below ``folder`` into the public bucket, their keys relative to it."""
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda path: self.put(path.relative_to(folder).as_posix(), path.read_bytes()), paths))


class FaultyProxy(_Running):
    """Passes requests on to ``upstream``, each after ``latency`` seconds; a ``share`` of them fails instead.

    Whether the n-th request for an object fails, and how, follows from ``seed``, the object and n alone, so that
    threads do not change it. A fault is a status with S3's XML ("500", "503" SlowDown), a connection reset, or a body
    cut in the middle (one without a body: the answer is lost, what was asked for is done).

    Attributes:
        requests: how many came. failed: how many of each fault were dealt out.
        dropped_headers: not passed on, as a store does that does not know them ("if-none-match").
        always: part of a path -> fault: what every request for such a path gets ("silence": no answer at all).
    """

    def __init__(
        self,
        upstream: str,
        latency: float = 0.0,
        share: float = 0.0,
        seed: int = 0,
        faults: tuple[Fault, ...] = FAULTS,
    ) -> None:
        self.requests = 0
        self.failed: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.sent_bytes = 0
        self.always: dict[str, Fault] = {}
        self.dropped_headers: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self
        host = urlsplit(upstream).netloc

        class Handler(_Handler):
            upstream: http.client.HTTPConnection | None = None

            def do_GET(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                fault = proxy.fault_of(self.command, self.path, share, seed, faults)
                if proxy._closing.wait(latency):
                    self.drop()
                    return
                if fault is None or fault == "truncated":
                    self.passed_on(cut=fault is not None)
                elif fault == "silence":
                    proxy._closing.wait()
                    self.drop()
                elif fault == "reset":
                    self.drop()
                else:
                    code = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied", "404": "NoSuchKey"}[fault]
                    self.answer(int(fault), _error(code, self.path), {"Content-Type": "application/xml"})

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_PUT(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                self.do_GET()

            def passed_on(self, cut: bool) -> None:
                if self.upstream is None:
                    self.upstream = http.client.HTTPConnection(host, timeout=60)
                    self.upstream.connect()
                    self.upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                skip = ("host", "connection", "accept-encoding", *proxy.dropped_headers)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in skip}
                self.upstream.request(self.command, self.path, self.body or None, {**headers, "Host": host})
                response = self.upstream.getresponse()
                body = response.read()
                length = response.headers.get("Content-Length", str(len(body)))
                if cut and len(body) < 2:
                    self.drop()
                    return
                self.send_response_only(response.status)
                for name, value in response.headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding", "keep-alive"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                with proxy._lock:
                    proxy.sent_bytes += len(body)
                if cut:
                    self.wfile.flush()
                    self.close_connection = True

            def drop(self) -> None:
                """Reset the connection: with no time to linger, closing sends RST."""
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

            def finish(self) -> None:
                if self.upstream is not None:
                    self.upstream.close()
                super().finish()

        super().__init__(Handler)

    def fault_of(self, method: str, path: str, share: float, seed: int, faults: tuple[Fault, ...]) -> Fault | None:
        """Count one request and say what becomes of it."""
        plain = unquote(path)
        with self._lock:
            self.requests += 1
            name = f"{method} {plain}"
            self.seen[name] += 1
            number = self.seen[name]
            fault = next((found for part, found in self.always.items() if part in plain), None)
            if fault is None:
                digest = hashlib.sha256(f"{seed} {name} {number}".encode()).digest()
                if int.from_bytes(digest[:8], "big") < share * 2**64:
                    fault = faults[digest[8] % len(faults)]
            if fault is not None:
                self.failed[fault] += 1
        return fault

    def reset(self) -> None:
        """Count anew."""
        with self._lock:
            self.requests, self.sent_bytes = 0, 0
            self.failed.clear()
            self.seen.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()  # lets go of those who wait
        super().__exit__(kind, error, trace)


def _store_file(root: Path, key: str, data: bytes) -> None:
    part = root.with_name(f".{root.name}.part")
    part.write_bytes(data)
    (root / key).parent.mkdir(parents=True, exist_ok=True)
    part.replace(root / key)


def _remove_file(root: Path, key: str) -> None:
    """Remove a file, and the folders that are then empty: a bucket has none."""
    (root / key).unlink(missing_ok=True)
    for folder in (root / key).parents:
        if folder == root or (folder.is_dir() and any(folder.iterdir())):
            break
        if folder.is_dir():
            folder.rmdir()


def _tag_of(path: Path) -> str:
    return f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'


def _error(code: str, resource: str) -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message>'
        f"<Resource>{escape(resource)}</Resource><RequestId>0</RequestId></Error>"
    ).encode()


def _listing(root: Path, query: dict[str, str]) -> bytes:
    """One page of ListObjectsV2; the continuation token is the last key or prefix of the page before."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token") or query.get("start-after", "")
    limit = min(1000, int(query.get("max-keys", "1000")))
    entries = _entries(root, prefix, delimiter)
    names = sorted(name for name in entries if name > after)
    page = names[:limit]
    parts = []
    for name in page:
        path = entries[name]
        if path is None:
            parts.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
            continue
        info = path.stat()
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(info.st_mtime))
        parts.append(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified><Size>{info.st_size}</Size>"
            f"<ETag>&quot;{info.st_mtime_ns:x}-{info.st_size:x}&quot;</ETag><StorageClass>STANDARD</StorageClass></Contents>"
        )
    more = len(names) > len(page)
    token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><Delimiter>{escape(delimiter)}</Delimiter>"
        f"<KeyCount>{len(page)}</KeyCount><MaxKeys>{limit}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>"
        f"{token}{''.join(parts)}</ListBucketResult>"
    ).encode()


def _entries(root: Path, prefix: str, delimiter: str) -> dict[str, Path | None]:
    """Keys that start with ``prefix`` and their files; None for those that ``delimiter`` sums up to a prefix."""
    folder = root / prefix.rpartition("/")[0]
    if not folder.is_dir():
        return {}
    found: dict[str, Path | None] = {}
    if delimiter == "/":
        for entry in os.scandir(folder):
            name = Path(entry.path).relative_to(root).as_posix()
            if name.startswith(prefix):
                found[f"{name}/" if entry.is_dir() else name] = None if entry.is_dir() else Path(entry.path)
        return found
    for above, _, files in os.walk(folder):
        for file in files:
            path = Path(above) / file
            name = path.relative_to(root).as_posix()
            if name.startswith(prefix):
                found[name] = path
    return found


__all__ = ["BUCKET", "FAULTS", "KEYS", "Fault", "FaultyProxy", "FolderServer", "MotoServer"]
