"""Files of the given roots, and volumes that are computed chunk by chunk, over HTTP on this machine.

Two kinds of addresses::

    /{secret}/files/{name}/...   a file below the root of that name, and nothing else of the machine
    /{secret}/made/{name}/...    a Zarr v2 multiscale group whose chunks a function computes, such as three-state labels

Only GET and HEAD are answered. Neuroglancer's page comes from another port, so any page may read (CORS); therefore the
server listens on the loopback by default, and its addresses hold a secret that other pages do not know.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import DTypeLike, NDArray

from connectomics.errors import ConnectomicsError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import multiscales_attrs

LOOPBACK = "127.0.0.1"
_EDGE = 64  # voxels of a computed chunk along each axis
_KEPT = 256  # computed chunks in memory, up to 1 MB each


@dataclass(frozen=True)
class MadeVolume:
    """A volume that is computed chunk by chunk; ``values`` returns a part of the grid as (D, H, W) of ``dtype``."""

    grid: VoxelGrid
    dtype: DTypeLike
    values: Callable[[VoxelGrid], NDArray[Any]]

    def document(self, path: str) -> bytes | None:
        """Return the file at a path of the multiscale group, None if there is none."""
        if path == ".zgroup":
            return b'{"zarr_format": 2}'
        if path == ".zattrs":
            return json.dumps(multiscales_attrs([self.grid], "made")).encode()
        if path == "s0/.zarray":
            return json.dumps(self._metadata()).encode()
        found = re.fullmatch(r"s0/(\d{1,9})/(\d{1,9})/(\d{1,9})", path)
        return None if found is None else self._chunk([int(index) for index in found.groups()])

    def _metadata(self) -> dict[str, Any]:
        dtype = np.dtype(self.dtype).newbyteorder("<").str
        return {
            "zarr_format": 2, "shape": list(self.grid.shape), "chunks": [_EDGE] * 3, "dtype": dtype, "fill_value": 0,
            "order": "C", "compressor": None, "filters": None, "dimension_separator": "/",
        }  # fmt: skip

    def _chunk(self, index: list[int]) -> bytes | None:
        begin = [i * _EDGE for i in index]
        shape = [min(_EDGE, n - b) for b, n in zip(begin, self.grid.shape, strict=True)]
        if min(shape) <= 0:
            return None
        out = np.zeros((_EDGE,) * 3, np.dtype(self.dtype).newbyteorder("<"))
        out[: shape[0], : shape[1], : shape[2]] = self.values(self.grid.crop(begin, shape))
        return out.tobytes()


class VolumeServer:
    """Serves roots and made volumes until it is closed; ``url`` is the start of all addresses, with the secret."""

    def __init__(
        self, roots: Mapping[str, Path], made: Mapping[str, MadeVolume], address: str = LOOPBACK, port: int = 0
    ) -> None:
        """Start to serve ``roots`` and ``made`` under their names; ``port`` 0: any free port."""
        secret = secrets.token_urlsafe(16)
        places = {name: Path(root).resolve() for name, root in roots.items()}
        document = lru_cache(maxsize=_KEPT)(lambda name, path: made[name].document(path))

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                given, _, rest = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
                kind, _, rest = rest.partition("/")
                name, _, path = rest.partition("/")
                data: bytes | None = None
                status = 404
                if not secrets.compare_digest(given.encode(), secret.encode()):
                    status = 403
                elif kind == "files" and name in places:
                    data = _file_below(places[name], path)
                elif kind == "made" and name in made:
                    try:
                        data = document(name, path)
                    except ConnectomicsError as error:
                        status, data = 500, None
                        self.log_error("%s", error)
                self._send(200 if data is not None else status, data or b"")

            def _send(self, status: int, data: bytes) -> None:
                part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                headers = {"Access-Control-Allow-Origin": "*", "Accept-Ranges": "bytes"}
                headers["X-Content-Type-Options"] = "nosniff"
                if status == 200 and part is not None and int(part[1]) < len(data):
                    first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                    status, data = 206, data[first : last + 1]
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: Any) -> None:
                """Log no requests."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Ignore that the page has closed the connection."""

        self._server = Server((address, port), Handler)
        self.url = f"http://{address}:{self._server.server_address[1]}/{secret}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _file_below(root: Path, path: str) -> bytes | None:
    """Return the content of a file whose real path, with links resolved, is below ``root``; None for anything else."""
    if "\x00" in path or "\\" in path:
        return None
    place = (root / path.lstrip("/")).resolve()
    if not place.is_relative_to(root) or not place.is_file():
        return None
    return place.read_bytes()
