"""A headless Chromium driven over a pipe with the DevTools protocol: no further dependency."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Page", "find_chromium", "opened"]

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for found in map(shutil.which, names) if found), None)


class Page:
    """One open page.

    Attributes:
        messages: every error and warning of the console, and every uncaught exception.
        requests: addresses of everything the page asked for, itself included.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer, self._number, self._session = b"", 0, ""
        self._loaded, self._scripts = False, True
        self.messages: list[str] = []
        self.requests: list[str] = []

    def attach(self) -> None:
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def view(self, width: int, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Set the size of the window and the colour scheme that the reader prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})

    def without_scripts(self) -> None:
        self._scripts = False
        self._call("Emulation.setScriptExecutionDisabled", {"value": True})

    def open(self, path: Path) -> None:
        """Open a file and wait until it has loaded."""
        self._loaded = False
        self._call("Page.navigate", {"url": path.resolve().as_uri()})
        while not self._loaded:
            self._receive()
        self.settle()

    def settle(self) -> None:
        """Wait until the browser has drawn twice."""
        if not self._scripts:
            time.sleep(0.3)
            return
        wait = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self._call("Runtime.evaluate", {"expression": wait, "awaitPromise": True})

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        answer = self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release one key."""
        facts = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        down = {"type": "keyDown" if text else "rawKeyDown", **facts}
        self._call("Input.dispatchKeyEvent", {**down, "text": text} if text else down)
        self._call("Input.dispatchKeyEvent", {"type": "keyUp", **facts})
        self.settle()

    def move_mouse(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
        self.settle()

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, move over the others, let go at the last."""
        steps = [("mousePressed", points[0]), *(("mouseMoved", point) for point in points[1:])]
        for kind, (x, y) in [*steps, ("mouseReleased", points[-1])]:
            facts = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            pressed = 0 if kind == "mouseReleased" else 1
            self._call("Input.dispatchMouseEvent", {**facts, "buttons": pressed})
        self.settle()

    def touch(self, *points: tuple[float, float]) -> None:
        """The same with a finger."""
        steps = [("touchStart", points[0]), *(("touchMove", point) for point in points[1:])]
        for kind, (x, y) in steps:
            event = {"type": kind, "touchPoints": [{"x": x, "y": y}]}
            self._call("Input.dispatchTouchEvent", event)
        self._call("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        self.settle()

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a picture of the page."""
        how = {"format": "png", "captureBeyondViewport": whole}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", how)["data"]))

    def print(self) -> bytes:
        """The page on A4 paper, as PDF."""
        how = {"paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self._call("Page.printToPDF", how)["data"])

    def close(self) -> None:
        self._session = ""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self._call("Browser.close")

    def _call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._number
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("the browser does not answer")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.messages.append(str(facts["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.messages.append(str(facts["entry"]))
        elif event == "Runtime.consoleAPICalled":
            self.messages.append(str(facts["args"]))


@contextlib.contextmanager
def opened(chromium: str) -> Iterator[Page]:
    """A browser of its own with an empty profile; ended and forgotten on leaving."""
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol speaks over file descriptors 3 (to the browser) and 4 (from it).
        redirect = f'exec "$0" "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        process = subprocess.Popen(
            ["bash", "-c", redirect, chromium, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_browser[0], from_browser[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        page = Page(to_browser[1], from_browser[0])
        try:
            page.attach()
            yield page
        finally:
            page.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            if process.poll() is None:
                process.kill()
                process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])
