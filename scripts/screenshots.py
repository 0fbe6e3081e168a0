"""Show HTML files as pictures, for people who look at them: a phone and a wide screen, light and dark, and paper.

For each file ``page.html`` it writes ``page-phone-light.png`` and the like, and ``page.pdf``::

    python -m scripts.screenshots outputs/causal_lm/int4-report.html [more.html ...] [--output pictures]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from scripts._browser import SCHEMES, WIDTHS, browser, missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["main", "screenshots"]


def screenshots(running: Browser, pages: Sequence[Path], output: Path) -> Iterator[Path]:
    """Write pictures of HTML files into a folder, and yield the path of each.

    Args:
        running: the browser.
        pages: HTML files, with different names.
        output: the folder, made if needed.
    """
    output.mkdir(parents=True, exist_ok=True)
    for path, (device, width), scheme in product(pages, WIDTHS.items(), SCHEMES):
        page = running.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.goto(path.resolve().as_uri())
        picture = output / f"{path.stem}-{device}-{scheme}.png"
        page.screenshot(path=picture, full_page=True)
        yield picture
        if (device, scheme) == ("desktop", "light"):
            page.pdf(path=(picture := output / f"{path.stem}.pdf"), format="A4")
            yield picture
        page.close()


def main(pages: tyro.conf.Positional[tuple[Path, ...]], /, output: Path = Path("build/screenshots")) -> int:
    """Show HTML files as pictures.

    Args:
        pages: HTML files.
        output: folder of the pictures.
    """
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    with browser() as running:
        for picture in screenshots(running, pages, output):
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
