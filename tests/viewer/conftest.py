"""The viewer in Debian's headless Chromium, before the real service on this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "out/viewer"
# WebGL 2 on the CPU; a browser of root's needs no sandbox where everything is ours.
FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--no-sandbox"]


class Service:
    """`reposer serve` as a process that can be killed and started again at its address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "service", "serve", "--bundles", "avatars", "--port", str(self.port), "--cpu"]
        with open(self._folder / "serve.log", "ab") as log:
            environment = os.environ | {"REPOSER_THREADS": "1"}
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((self._folder / "serve.log").read_text())
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if not (ROOT / "viewer/dist/index.html").is_file():
        pytest.fail("the viewer is not built: scripts/build-viewer")
    running = Service(tmp_path_factory.mktemp("service"))
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def until(page: Page, expression: str) -> None:
    """Wait until a JavaScript expression is true; `wait_for_function` is refused by the page's security policy."""
    deadline = time.monotonic() + 120
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never: {expression}"
        page.wait_for_timeout(100)


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """What the page complained of: errors of its own and refusals by its security policy."""
    return []


@pytest.fixture(scope="module")
def page(browser: Browser, service: Service, complaints: list[str]) -> Iterator[Page]:
    """The page, loaded and connected, its motion standing still."""
    # Small pictures: every pixel is computed on the CPU.  With reduced motion nothing plays by itself.
    page = browser.new_page(viewport={"width": 800, "height": 480}, reduced_motion="reduce", accept_downloads=True)
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if "ecurity" in message.text else None)
    page.goto(f"{service.url}/?lod=preview", wait_until="commit")
    page.wait_for_selector("#connection[data-state=open]")
    until(page, "document.getElementById('time').max > 0")
    yield page
    page.close()


@pytest.fixture
def shoot(page: Page) -> Callable[[str], None]:
    """Keep a picture for people to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    return lambda name: page.screenshot(path=SHOTS / f"{name}.png") and None
