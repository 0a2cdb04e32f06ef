"""A headless Chromium that a test drives as a hand would, by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--mute-audio", "--no-first-run", "--window-size=1200,800",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
]  # fmt: skip


class Tab:
    """The page: ``call`` sends a command of the protocol, ``js`` evaluates an expression."""

    def __init__(self, address: str) -> None:
        websocket = pytest.importorskip("tornado.websocket", reason="the browser is driven by tornado's websocket")
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self._socket = self._loop.run_until_complete(self._connect(websocket, address))
        self.errors: list[str] = []
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    @staticmethod
    async def _connect(websocket: Any, address: str) -> Any:
        return await websocket.websocket_connect(address, max_message_size=1 << 26)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        text = json.dumps({"id": self._number, "method": method, "params": parameters})
        return self._loop.run_until_complete(asyncio.wait_for(self._reply(text, self._number), 30))

    async def _reply(self, text: str, number: int) -> dict[str, Any]:
        await self._socket.write_message(text)
        while True:
            said = json.loads(await self._socket.read_message())
            if said.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(said["params"]["exceptionDetails"]))
            if said.get("method") == "Log.entryAdded" and said["params"]["entry"]["source"] == "security":
                self.errors.append(said["params"]["entry"]["text"])
            if said.get("id") == number:
                assert "error" not in said, said
                return dict(said["result"])

    def js(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < until, f"{expression}: {self.js('document.body.innerText')}"
            time.sleep(0.05)

    def mouse(self, kind: str, x: float, y: float, button: str = "left", **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1, **more)

    def drag(self, places: list[tuple[float, float]], button: str = "left") -> None:
        self.mouse("mouseMoved", *places[0], button="none")
        self.mouse("mousePressed", *places[0], button=button)
        for place in places[1:]:
            self.mouse("mouseMoved", *place, button=button)
        self.mouse("mouseReleased", *places[-1], button=button)

    def key(self, key: str, **more: Any) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()
        self._loop.close()


@contextlib.contextmanager
def browser(url: str, folder: Path) -> Iterator[Tab]:
    """A tab with the page at ``url``; the profile goes to ``folder``."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", url]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        file = folder / "DevToolsActivePort"
        port = _soon(lambda: file.read_text().split()[0] if file.exists() and file.stat().st_size else None)
        tab = Tab(_soon(lambda: _page_of(port, url)))
        try:
            yield tab
        finally:
            tab.close()
    finally:
        running.terminate()
        running.wait()


def _page_of(port: str, url: str) -> str | None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply:
        pages = [p for p in json.load(reply) if p["type"] == "page" and p["url"].startswith(url)]
    return pages[0]["webSocketDebuggerUrl"] if pages else None


def _soon(ask: Callable[[], str | None], seconds: float = 60) -> str:
    until = time.monotonic() + seconds
    while (found := ask()) is None:
        assert time.monotonic() < until, "the browser did not start"
        time.sleep(0.05)
    return found
