"""HTTP for pages on this machine: every address holds a secret, and a subclass says what is there."""

from __future__ import annotations

import io
import os
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from connectomics.errors import ConnectomicsError, InputError

LOOPBACK = "127.0.0.1"
_MOST_BODY = 1 << 26  # bytes that one request may send
_PIECE = 1 << 20  # bytes of a file read at a time
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")  # any port: ssh may forward another one


@dataclass(frozen=True)
class Answer:
    """What a request gets: its content (``data``, or that of a ``file``), the HTTP status, and the MIME type."""

    data: bytes = b""
    status: int = 200
    mime: str = "application/octet-stream"
    file: Path | None = None

    def opened(self) -> BinaryIO:
        """Open the content: a part of a large file is read alone."""
        return io.BytesIO(self.data) if self.file is None else self.file.open("rb")


class LocalServer:
    """Serves until it is closed; ``url`` is the start of all addresses, with the secret.

    A request without the secret gets 403. Unless ``any_origin`` is set, so does one of another site's page, and a POST
    that does not name this server as its origin.
    """

    #: Whether pages of other origins may read. The secret, which they do not know, is then the only lock.
    any_origin = False

    def __init__(self, address: str = LOOPBACK, port: int = 0) -> None:
        """Start to serve; ``port`` 0: any free port. Raises `OSError` if the address is not available."""
        self.secret = secrets.token_urlsafe(16)
        self._server = _Server((address, port), _Handler)
        self._server.local = self
        self.url = f"http://{address}:{self._server.server_address[1]}/{self.secret}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def get(self, path: str) -> Answer:
        """Return what is at a path below the secret; raise `InputError` for a bad request."""
        return Answer(status=404)

    def post(self, path: str, query: Mapping[str, str], body: bytes) -> Answer:
        """Take what is sent to a path below the secret; raise `InputError` for a bad request."""
        return Answer(status=405)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    local: LocalServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore that the page has closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._send(self._answer(None))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length) or int(length) > _MOST_BODY:
            self.close_connection = True  # the body stays unread
            self._send(Answer(status=413 if length.isdigit() else 411))
            return
        self._send(self._answer(self.rfile.read(int(length))))  # also of a request that is refused: the next follows it

    def _answer(self, body: bytes | None) -> Answer:
        local, parts = self.server.local, urlsplit(self.path)
        given, _, path = unquote(parts.path).lstrip("/").partition("/")
        if not secrets.compare_digest(given.encode(), local.secret.encode()) or not self._may(writes=body is not None):
            return Answer(status=403)
        try:
            return local.get(path) if body is None else local.post(path, dict(parse_qsl(parts.query)), body)
        except ConnectomicsError as error:
            self.log_error("%s", error)
            return Answer(str(error).encode(), 400 if isinstance(error, InputError) else 500, "text/plain")

    def _may(self, *, writes: bool) -> bool:
        """Whether the request comes from a page of this server, or, to read, from no page."""
        if self.server.local.any_origin:
            return True
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        return bool(_OWN_HOST.fullmatch(host)) and (origin == f"http://{host}" or (origin is None and not writes))

    def _send(self, answer: Answer) -> None:
        headers = {"Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff", "Content-Type": answer.mime}
        if self.server.local.any_origin:
            headers["Access-Control-Allow-Origin"] = "*"
        else:
            headers |= {"Cache-Control": "no-store", "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin"}
        with answer.opened() as content:
            status, size = answer.status, content.seek(0, os.SEEK_END)
            part = _range(self.headers.get("Range", ""), size) if status == 200 else None
            first, end = part or (0, size)
            if part is not None:
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
                status = 206
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(end - first)}.items():
                self.send_header(key, value)
            self.end_headers()
            content.seek(first)
            while self.command != "HEAD" and (data := content.read(min(_PIECE, end - content.tell()))):
                self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def _range(text: str, size: int) -> tuple[int, int] | None:
    """Begin and end (exclusive) of what a header ``Range`` asks for: ``bytes=2-4``, ``bytes=2-``, or ``bytes=-3`` for
    the last three. None if there is no such part."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    if asked is None or not (asked[1] or asked[2]):
        return None
    first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
    return (first, end) if first < end else None
