"""Sections of a crop over HTTP, and strokes back to disk.

Addresses below the secret::

    (nothing)                    the page
    raw/{z}                      uint8 (H + 2 m, W + 2 m): section z of the raw with a margin of m voxels
    labels/{class}/{z}           (H, W) in the labels' type, as stored
    predicted/{class}/{z}        the same of the prediction; unknown outside of it
    labels/{class}/{z}?y=&x=&height=&width=     POST: a rectangle of a section in the labels' type, which is stored
    edits                        the edits of predicted instances, as JSON; POST: one more, or ?undo=1 for one less

Only the page that was opened last may write, as its POST says (``page=``): another one shows sections as they were, and
would give new instances the same IDs.

Values are little endian. Sections of raw may lie up to ``margin[0]`` before the first one and after the last one.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Mapping
from importlib import resources
from itertools import cycle

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.cellmap.editing import EditableLabels
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.pages import page
from connectomics.pages.annotate.edit_log import EditLog
from connectomics.pages.annotate.predicted import PredictedLabels
from connectomics.pages.colors import CLASS_COLORS
from connectomics.pages.local_server import LOOPBACK, Answer, LocalServer

_MARGIN = 32  # voxels of raw shown around the crop, at most, in the plane
_BEFORE = 4  # sections of raw shown before the first one and after the last one, at most
_LARGEST = 4096  # voxels along y and x


class DrawingServer(LocalServer):
    """Serves the page of one crop to this machine, and stores what is drawn."""

    def __init__(
        self,
        title: str,
        raw: Multiscale,
        labels: Mapping[str, EditableLabels],
        predicted: Mapping[str, PredictedLabels],
        port: int = 0,
        edits: EditLog | None = None,
    ) -> None:
        """Start to serve. ``labels`` of all classes are on one grid; ``edits``: where edits of instances are logged.

        Raises `InputError` if it is too large a section, or if the port is not available."""
        self.labels, self._raw, self._predicted, self._title = labels, raw, predicted, title
        self._edits, self._page_id = edits, ""
        self._grid = next(iter(labels.values())).grid
        if max(self._grid.shape[1:]) > _LARGEST:
            raise InputError(
                f"a section has {self._grid.shape[1:]} voxels, at most {_LARGEST} x {_LARGEST} can be drawn"
            )
        self._margin = (min(_BEFORE, self._grid.shape[0]), *(min(_MARGIN, n) for n in self._grid.shape[1:]))
        self._range = self._gray_range()
        self._lock = threading.RLock()
        try:
            super().__init__(LOOPBACK, port)
        except OSError as error:
            raise InputError(
                f"cannot serve at port {port}: {error.strerror}; give another --port, or 0 for any free one"
            ) from error

    def get(self, path: str) -> Answer:
        """Return the page or a section."""
        if path in ("", "index.html"):
            return Answer(self._page().encode(), mime="text/html; charset=utf-8")
        if found := re.fullmatch(r"raw/(-?\d{1,9})", path):
            return Answer(self._raw_section(int(found[1])).tobytes())
        if path == "edits" and self._edits is not None:
            with self._lock:
                return Answer(json.dumps(self._edits.lines()).encode(), mime="application/json")
        kind, name, z = self._section_of(path)
        if kind == "labels" and name in self.labels:
            with self._lock:
                values = self.labels[name].read(z)
        elif kind == "predicted" and name in self._predicted:
            values = self._predicted[name].read(z)
        else:
            return Answer(status=404)
        return Answer(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())

    def post(self, path: str, query: Mapping[str, str], body: bytes) -> Answer:
        """Store a rectangle of a section, or an edit."""
        if query.get("page", self._page_id) != self._page_id:
            return Answer(b"the crop was opened in another tab; reload this page to draw here", 409, "text/plain")
        if path == "edits" and self._edits is not None:
            with self._lock:
                self._edits.undo() if query.get("undo") else self._edits.add(body)
                return Answer(json.dumps(self._edits.lines()).encode(), mime="application/json")
        kind, name, z = self._section_of(path)
        if kind != "labels" or name not in self.labels:
            return Answer(status=404)
        try:
            y, x, height, width = (int(query[key]) for key in ("y", "x", "height", "width"))
        except (KeyError, ValueError) as error:
            raise InputError("a stroke needs whole numbers y, x, height and width") from error
        labels = self.labels[name]
        dtype = labels.dtype.newbyteorder("<")
        if min(height, width) < 1 or len(body) != height * width * dtype.itemsize:
            raise InputError(f"expected {height} x {width} values of {dtype}, got {len(body)} bytes")
        values = np.frombuffer(body, dtype).reshape(height, width).astype(labels.dtype)
        with self._lock:
            labels.write(z, y, x, values)
        return Answer(status=200)

    def close(self) -> None:
        """Stop listening, count the drawn voxels and build the coarser levels."""
        super().close()
        with self._lock:
            for labels in self.labels.values():
                labels.finish()

    @staticmethod
    def _section_of(path: str) -> tuple[str, str, int]:
        found = re.fullmatch(r"(labels|predicted)/([\w+-]+)/(\d{1,9})", path)
        return ("", "", 0) if found is None else (found[1], found[2], int(found[3]))

    def _page(self) -> str:
        assets = resources.files("connectomics.pages").joinpath("assets")
        with self._lock:
            self._page_id = secrets.token_hex(8)
            classes = [
                {
                    "name": name, "kind": labels.kind, "color": color, "absent": labels.absent,
                    "unknown": labels.unknown, "bytes": labels.dtype.itemsize, "predicted": name in self._predicted,
                    "next": self._next(name),
                }
                for (name, labels), color in zip(self.labels.items(), cycle(CLASS_COLORS), strict=False)
            ]  # fmt: skip
        state = {
            "shape": self._grid.shape, "margin": self._margin, "voxel_size": self._grid.voxel_size, "classes": classes,
            "edits": self._edits is not None, "page": self._page_id,
        }  # fmt: skip
        style, script = (
            Markup(assets.joinpath(f"annotate.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js")
        )
        return page.render("annotate", title=self._title, state=state, style=style, script=script)

    def _next(self, name: str) -> int:
        """Return an ID that no object has, drawn or predicted; it may not fit into the type."""
        labels = self.labels[name]
        found = max(labels.largest, self._predicted[name].largest if name in self._predicted else 0) + 1
        return found + (found == labels.unknown)

    def _raw_section(self, z: int) -> NDArray[np.uint8]:
        before, *_ = self._margin
        if not -before <= z < self._grid.shape[0] + before:
            raise InputError(f"the crop has sections 0 to {self._grid.shape[0] - 1}, got {z}")
        values, _ = self._raw.read_raw(self._section_grid(z))
        low, high = self._range
        return np.clip(np.rint((values[0] - low) * (255 / (high - low))), 0, 255).astype(np.uint8)

    def _section_grid(self, z: int) -> VoxelGrid:
        _, my, mx = self._margin
        _, height, width = self._grid.shape
        return self._grid.crop((z, -my, -mx), (1, height + 2 * my, width + 2 * mx))

    def _gray_range(self) -> tuple[float, float]:
        """Raw values shown as black and white at first: all of uint8, else nearly all of the middle section."""
        if self._raw.levels[0].dtype == np.uint8:
            return 0.0, 255.0
        values, inside = self._raw.read_raw(self._section_grid(self._grid.shape[0] // 2))
        if not inside.any():
            return 0.0, 1.0
        low, high = np.percentile(values[inside], (0.1, 99.9))
        return float(low), float(max(high, low + 1e-6))
