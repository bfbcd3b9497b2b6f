"""A browser without a window, driven over its debugging pipe: real keys, any width, light and dark."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
CODES = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
"""Keys that a test may press, with their virtual key codes."""


class Browser:
    """One page of a browser that ends with the ``with`` block.

    Args:
        profile: an empty folder for the browser's own files.
    """

    def __init__(self, profile: Path) -> None:
        self._to, self._from = os.pipe(), os.pipe()
        self._numbers, self._rest = itertools.count(1), b""
        command = [str(PROGRAM), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=self._wire, close_fds=False, **quiet)
        os.close(self._to[0])
        os.close(self._from[1])
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def _wire(self) -> None:
        """In the child: the pipes become file descriptors 3 and 4, where the browser expects them."""
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in (self._to[0], self._from[1])]
        for end, place in zip(ends, (3, 4), strict=True):
            os.dup2(end, place)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to[1])
        os.close(self._from[0])

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page at a width in CSS pixels, in the light or the dark scheme."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._tell("Emulation.setDeviceMetricsOverride", **size)
        self._tell("Emulation.setEmulatedMedia", features=scheme)
        self._tell("Page.navigate", url=page.resolve().as_uri())
        ready = "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        while self.run("location.href") == "about:blank":
            pass
        self.run(ready)

    def run(self, code: str) -> Any:
        """The value of an expression on the page; promises are awaited."""
        found = self._tell("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key as a person does."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": CODES[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self._tell("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self._tell("Input.dispatchKeyEvent", type="keyUp", **about)

    def paper(self) -> None:
        """Show the page as it is printed, with the events before printing."""
        self._tell("Emulation.setEmulatedMedia", media="print")
        self.run("dispatchEvent(new Event('beforeprint'))")

    def shot(self, file: Path, whole: bool = True) -> Path:
        """Write a PNG of the whole page, or of the window."""
        found = self._tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))
        return file

    def _tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._ask(method, session=self._session, **parameters)

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._to[1], json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                some = os.read(self._from[0], 2**16)
                assert some, "the browser ended"
                self._rest += some
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
