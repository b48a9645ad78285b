"""The browser that tries the page: Debian's Chromium, which asks nothing of the network."""

import shutil

_WITHOUT = ("background-networking", "component-update", "sync", "quic", "gpu", "dev-shm-usage")
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in _WITHOUT)]
MISSING = "the page is tried in Chromium: apt-get install chromium"


def find_chromium() -> str | None:
    """Its file; None where it is not installed."""
    return shutil.which("chromium")
