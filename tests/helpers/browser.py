"""Use pages in headless Chromium as readers do, and notice what goes wrong in them; playwright drives the browser."""

import base64
import importlib.util
import io
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tests.helpers.html_pages import CHROMIUM

# Why no page can be opened; "" if one can.
WHY_NO_BROWSER = ("needs Chromium, which is not installed" if CHROMIUM is None else
                  "needs playwright, which is not installed" if importlib.util.find_spec("playwright") is None else "")
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
# Drawn by the processor, and without a network.
_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")


@contextmanager
def open_browser(*arguments):
    """Start Chromium; yield playwright's Browser."""
    from playwright.sync_api import sync_playwright  # is not installed everywhere

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*_ARGUMENTS, *arguments])
        try:
            yield browser
        finally:
            browser.close()


class Window:
    """A page that is open, with nothing kept from other windows.

    problems:  what was logged as an error or a warning, exceptions, and dialogs
    requests:  addresses of all that was requested, the page's own first
    """

    def __init__(self, browser, path: Path, address: str = "", **settings: Any):
        """Open a page and wait until it is read. address: from "#"; settings: of playwright's `new_context`"""
        self.context = browser.new_context(**{**DESKTOP, **settings})
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text, {"error", "warning"}))
        self.page.on("pageerror", lambda error: self._note("exception", str(error), {"exception"}))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url + address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def _note(self, kind, text, noted):
        if kind in noted:
            self.problems.append(f"{kind}: {text}")

    def _on_dialog(self, dialog):
        self._note("dialog", dialog.message, {"dialog"})
        dialog.dismiss()

    def run(self, script: str, argument: Any = None) -> Any:
        """Return the value of an expression, or what a function of the argument returns."""
        return self.page.evaluate(script, argument)

    def wait(self, script: str, argument: Any = None, seconds: float = 20) -> Any:
        """Return the first true value of an expression. (The page's policy forbids playwright's own waiting.)"""
        end = time.monotonic() + seconds
        while not (value := self.run(script, argument)):
            if time.monotonic() > end:
                raise AssertionError(f"not so within {seconds} s: {script}")
            time.sleep(0.02)
        return value

    def settle(self) -> None:
        """Wait until what was changed is drawn."""
        self.run("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def text(self, selector: str) -> str:
        """Return the text of the first element as it is in the document, hidden parts too."""
        return self.run("selector => document.querySelector(selector).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("selector => [...document.querySelectorAll(selector)].map(each => each.textContent)", selector)

    def is_shown(self, selector: str) -> bool:
        return self.page.locator(selector).first.is_visible()

    def pixels(self, selector: str) -> np.ndarray:
        """Return the pixels of a canvas, uint8 [H, W, 3]."""
        url = self.run("selector => document.querySelector(selector).toDataURL()", selector)
        return np.array(PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))
