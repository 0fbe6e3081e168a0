"""A headless Chromium of the machine, driven by playwright, which brings no browser of its own here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["SCHEMES", "WIDTHS", "browser", "missing"]

WIDTHS = {"phone": 390, "desktop": 1440}  # pixels
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
          "--disable-sync", "--disable-gpu")  # fmt: skip


def missing() -> str | None:
    """What a browser needs and this machine lacks, with the remedy; None where all is there."""
    if find_spec("playwright") is None:
        return "needs the package playwright: pip install -e '.[dev]' -c constraints.txt"
    return None if _executable() else "needs a Chromium: apt-get install chromium"


@contextmanager
def browser() -> Iterator[Browser]:
    """A running browser, without a sandbox: it opens files that were made here."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=_executable(), chromium_sandbox=False, args=list(_QUIET))
        try:
            yield running
        finally:
            running.close()


def _executable() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)
