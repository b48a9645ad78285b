"""The browser that tries the page: Debian's Chromium, which asks nothing of the network."""

import shutil

_WITHOUT = ("background-networking", "component-update", "sync", "quic", "gpu", "dev-shm-usage")
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in _WITHOUT)]


def find_chromium() -> str:
    """Its file. Raises FileNotFoundError, which says how to install it."""
    found = shutil.which("chromium")
    if found is None:
        raise FileNotFoundError("the page is tried in Chromium: apt-get install chromium")
    return found
