"""Fixtures of the tests of the page: a browser, a server, and the page in it. A test file says
`pytest_plugins = ["page_fixtures"]`.
"""

from contextlib import contextmanager
from urllib.parse import urlparse

import pytest
from chromium import FLAGS, MISSING, find_chromium
from playwright.sync_api import expect, sync_playwright
from scripted_api import scripted


@pytest.fixture(scope="module")
def browser():
    chromium = find_chromium()
    if chromium is None:
        pytest.fail(MISSING, pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def api(tmp_path, request):
    """A server with the options of `scripted` that a test's parameter holds."""
    with scripted(tmp_path, **getattr(request, "param", {})) as api:
        yield api


@pytest.fixture
def opened(browser, api):
    """Opens the page: (path="", expected errors of the console, other server, context)."""

    @contextmanager
    def opened(path="", errors=(), at=None, **context):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        context.set_default_timeout(10_000)
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((at or api.url) + path)
        host = urlparse(page.url).netloc
        yield page
        context.close()
        # Chromium prints refused requests as errors of its own
        assert [line for line in said if not any(error in line for error in errors)] == []
        hosts = {urlparse(url).netloc for url in asked if not url.startswith(("blob:", "data:"))}
        assert hosts == {host}

    return opened


@pytest.fixture
def page(opened):
    with opened() as page:
        expect(page.locator("#generate")).to_be_enabled()
        yield page
