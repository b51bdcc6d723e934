"""A real browser for tests of pages: the system's chromium, headless, driven by Playwright. It reaches this machine only.

Debian: apt-get install -y --no-install-recommends chromium; pip install playwright
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHONE, DESKTOP = 390, 1440  # widths in CSS pixels
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"


def missing() -> list[str]:
    """What is not installed."""
    there = {"chromium": shutil.which("chromium"), "playwright": importlib.util.find_spec("playwright")}
    return [name for name, found in there.items() if not found]


needs_browser = pytest.mark.skipif(
    bool(missing()) and not os.environ.get("REQUIRE_BROWSER"),
    reason=f"no browser ({', '.join(missing())}); see browser.py. Set REQUIRE_BROWSER: no skip",
)


@dataclass(frozen=True)
class Tab:
    """A tab with what went on in it.

    requests: every address asked for, but data and blob ones; problems: console errors and warnings, exceptions, requests
    that failed or were answered with an error.
    """

    page: "Page"
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window: 0 where nobody has to scroll sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def elsewhere(self) -> list[str]:
        """Requests that would have left this machine."""
        here = ("file://", "http://localhost:", "http://127.0.0.1:", "ws://localhost:", "ws://127.0.0.1:")
        return [url for url in self.requests if not url.startswith(here)]


@contextmanager
def tab(width: int = DESKTOP, height: int = 900, dark: bool = False) -> Iterator[Tab]:
    """A window of this size with one empty tab; `tab.page.set_viewport_size` changes it."""
    assert not missing(), f"not installed: {missing()}"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:  # one at a time: its event loop would be in the way of other tests'
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", OFFLINE])
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        out = Tab(page)
        noted = out.problems.append
        page.on("console", lambda m: m.type in ("error", "warning") and noted(f"console {m.type}: {m.text}"))
        page.on("pageerror", lambda error: noted(f"exception: {error}"))
        page.on("requestfailed", lambda request: noted(f"failed: {request.url[:200]} {request.failure}"))
        page.on("response", lambda r: r.status >= 400 and noted(f"answered {r.status}: {r.url[:200]}"))
        page.on("request", lambda r: r.url.startswith(("data:", "blob:")) or out.requests.append(r.url))
        page.on("websocket", lambda socket: out.requests.append(socket.url))
        yield out
        browser.close()


@contextmanager
def opened(path: Path, width: int = DESKTOP, dark: bool = False) -> Iterator[Tab]:
    """A page from disk."""
    with tab(width, dark=dark) as out:
        out.page.goto(path.resolve().as_uri())
        yield out
