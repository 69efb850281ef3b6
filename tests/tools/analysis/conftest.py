"""A headless browser, driven over a pipe with the standard library alone, and an analysis of a small model."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NEEDED = "TITANS_BUILD_NEEDS_BROWSER"
"""If set, a missing browser fails the tests instead of skipping them."""
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
PIPE = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for at, pipe in enumerate(pipes, 3):
    os.dup2(pipe, at)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Replaces itself by a browser, which reads commands from descriptor 3 and writes answers to descriptor 4."""
SECONDS = 60


class Browser:
    """One page; its requests and its errors are recorded."""

    def __init__(self, program: str, profile: Path) -> None:
        from_here, self._to = os.pipe()
        self._from, to_here = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", PIPE, str(from_here), str(to_here), program, f"--user-data-dir={profile}", *FLAGS],
            pass_fds=(from_here, to_here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_here)
        os.close(to_here)
        self._buffer, self._number, self._session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser has gone"
            self._buffer += part
        first, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        method, given = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(given["exceptionDetails"].get("exception", {}).get("description") or str(given))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.errors.append(given["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.errors.append(str(given["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])

    def open(self, page: Path) -> None:
        """Load a page from the disk and wait until all of its plots are drawn."""
        self.errors.clear()
        self.requests.clear()
        self.ask("Page.navigate", url=page.as_uri())
        plots = "[...document.querySelectorAll('.plotly-graph-div')]"
        self.wait(
            f"location.href === '{page.as_uri()}' && document.readyState === 'complete' && {plots}.length > 0 && "
            f"{plots}.every(plot => plot.querySelector('.main-svg'))"
        )

    def wait(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < end, f"not within {SECONDS} s: {condition}; {self.errors}"
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def window(self, width: int, height: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def mouse(self, kind: str, x: float, y: float, **given: Any) -> None:
        self.ask("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **given)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the window, after it was scrolled into view."""
        self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
        rectangle = self.run(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        return rectangle["x"], rectangle["y"], rectangle["width"], rectangle["height"]

    def screenshot(self, path: Path) -> bytes:
        """The whole page as PNG, written to ``path``."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        data = base64.b64decode(shot["data"])
        path.write_bytes(data)
        return data

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        reason = f"the page is tested in a real browser, and there is none of {', '.join(PROGRAMS)} on the PATH"
        if os.environ.get(NEEDED):
            pytest.fail(f"{reason}, although {NEEDED} is set")
        pytest.skip(f"{reason} (on Debian: apt-get install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
