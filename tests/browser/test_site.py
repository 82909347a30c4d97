"""The site in a real browser: ``pip install -e '.[dev,browser]'``, and ``python -m pytest tests/browser``.

It takes the system's Chromium; where there is none, or no playwright, it is skipped.
"""

import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY

sync_api = pytest.importorskip("playwright.sync_api", reason="it wants the extra 'browser'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    # The driver's own transports are closed by the event loop that it stops.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
PAGES = ["", "guides/memory/", "reference/memory/", "reference/models/"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """A page that notes what it asks of others than the site."""
    size, scheme = request.param
    width, height = SIZES[size]
    opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    elsewhere: list[str] = []
    opened.on(
        "request", lambda asked: None if asked.url.startswith((address, "data:")) else elsewhere.append(asked.url)
    )
    yield opened
    opened.close()
    assert elsewhere == []


def search(page: Any, words: str) -> None:
    """Type *words* into the search box once there is somebody to read them."""
    page.locator("input.md-search__input").click()
    page.locator(".md-search-result__meta", has_text="Type to start searching").wait_for()
    page.keyboard.type(words)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_its_window_and_takes_its_colours(page: Any, address: str, path: str) -> None:
    page.goto(address + path)

    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    scheme = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
    is_dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert scheme == ("slate" if is_dark else "default")


def test_no_page_scrolls_sideways_on_a_phone(browser: Any, address: str) -> None:
    with urllib.request.urlopen(f"{address}search/search_index.json") as index:
        paths = {entry["location"].partition("#")[0] for entry in json.load(index)["docs"]}
    width, height = SIZES["phone"]
    page = browser.new_page(viewport={"width": width, "height": height})
    too_wide = []
    for path in sorted(paths):
        page.goto(address + path)
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            too_wide.append(path)
    page.close()

    assert "reference/command-line/" in paths
    assert too_wide == []


@pytest.mark.parametrize(
    ("words", "page_title"),
    [
        ("store_memory", "Memory"),
        ("postgres", "Scaling and PostgreSQL"),
        ("BusyError", "Errors"),
    ],
)
def test_the_search_answers_first_with_the_page_that_is_meant(
    browser: Any, address: str, words: str, page_title: str
) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    search(page, words)

    sync_api.expect(page.locator(".md-search-result__item h1").first).to_have_text(page_title)
    page.close()


def test_the_search_finds_a_method_and_its_types_lead_to_their_enum(browser: Any, address: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    search(page, "store_memory")
    result = page.locator("a.md-search-result__link", has_text="store_memory")
    result.first.wait_for()
    hrefs = result.evaluate_all("links => links.map(link => link.getAttribute('href'))")
    method = next(href for href in hrefs if "#moai_flow.memory.SwarmDB.store_memory" in href)
    page.locator(f"a.md-search-result__link[href='{method}']").first.click()

    signature = page.locator("[id='moai_flow.memory.SwarmDB.store_memory'] ~ .doc-signature").first
    assert "ttl_hours" in signature.inner_text()
    signature.get_by_text("MemoryTypeLike").first.click()
    page.wait_for_url("**/reference/enums/**")
    assert page.locator("[id='moai_flow.memory.MemoryType']").is_visible()
    page.close()
