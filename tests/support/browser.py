"""Drive Chromium, without a window, over the pipe of its DevTools protocol."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120  # for any answer of the browser
# The protocol uses the file descriptors 3 and 4.
ON_3_AND_4 = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """One page of the browser. `events` has every event that it reported, in order."""

    def __init__(self, read: int, write: int):
        self.read, self.write = read, write
        self.pending, self.number, self.session = b"", 0, None
        self.events: list[dict] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params) -> dict:
        """Send a command and return its result; raise RuntimeError if the browser refuses it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression, or of what its promise resolves to."""
        found = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait_until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} stayed false"
            time.sleep(0.1)

    def open(self, path: Path, width: int, height: int) -> None:
        """Show a file in a window of this size, and wait until it is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait_until("document.readyState === 'complete' && location.protocol === 'file:'")

    def move_mouse(self, x: float, y: float) -> None:
        for near in (3, 0):
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + near, y=y + near)

    def errors(self) -> list[str]:
        """Return every exception, error of the log, and call of console.error or console.warn."""
        found = [e for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] != "info":
                found.append(event)
            if event.get("method") == "Runtime.consoleAPICalled" and params["type"] != "log":
                found.append(event)
        return [json.dumps(event) for event in found]

    def requests(self) -> list[str]:
        """Return every address that was requested, data: addresses left out."""
        sent = [e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        addresses = [params["request"]["url"] for params in sent]
        return [address for address in addresses if not address.startswith("data:")]

    def _receive(self) -> dict:
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.read], [], [], SECONDS)
            chunk = os.read(self.read, 1 << 16) if ready else b""
            assert chunk, "the browser gave no answer"
            self.pending += chunk
        message, _, self.pending = self.pending.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_tab(program: str, profile: Path):
    """Start the browser with an empty profile; yield its one tab; end the browser."""
    to_browser, to_us = os.pipe(), os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += ["--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [sys.executable, "-c", ON_3_AND_4, str(to_browser[0]), str(to_us[1]), program, *flags],
        pass_fds=(to_browser[0], to_us[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(to_us[1])
    try:
        yield Tab(to_us[0], to_browser[1])
    finally:
        os.close(to_browser[1])
        os.close(to_us[0])
        process.terminate()
        process.wait(timeout=SECONDS)
