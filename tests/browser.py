"""What a browser finds wrong with a page: for the tests of the report, whose own test shows that it finds faults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts._browser import SCHEMES, WIDTHS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["SCREENS", "Screen", "faults"]

Screen = dict[str, Any]
PAPER = 718  # pixels of A4 between the margins that browsers leave
SCREENS: list[Screen] = [
    *({"width": width, "media": "screen", "scheme": scheme} for width in WIDTHS.values() for scheme in SCHEMES),
    {"width": PAPER, "media": "print", "scheme": "light"},
]

# Lines of text are rectangles, cut to the boxes that scroll. Text over a picture is not judged: no page has any.
_LOOK = r"""() => {
  const found = [], near = 1.5, root = document.documentElement;
  document.querySelectorAll("details").forEach(one => { one.open = true; });
  const tell = (kind, one) =>
    found.push(`${kind}: ${(one.textContent || one.outerHTML).trim().slice(0, 60)} <${one.localName}>`);
  if (root.scrollWidth > root.clientWidth) found.push(`sideways: ${root.scrollWidth} px`);

  const scrolls = one => ["auto", "scroll"].includes(getComputedStyle(one).overflowX);
  const boxes = function* (one) { for (let up = one; up; up = up.parentElement) yield up; };
  const leaves = (rect, one) => {
    for (const up of boxes(one)) {
      if (up.ownerSVGElement) continue;
      if (scrolls(up)) return false;
      const box = up.getBoundingClientRect(), drawn = up.localName === "svg";
      if (rect.left < box.left - near || rect.right > box.right + near) return true;
      if (drawn && (rect.top < box.top - near || rect.bottom > box.bottom + near)) return true;
    }
    return false;
  };
  for (const one of document.body.querySelectorAll("*")) {
    const seen = !one.ownerSVGElement && one.checkVisibility() && one.offsetWidth !== 0;  // <wbr> has no place
    if (seen && leaves(one.getBoundingClientRect(), one.parentElement)) tell("sticks out", one);
  }

  const lines = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode, one = text.parentElement, range = document.createRange();
    if (!text.data.trim() || !one.checkVisibility({ checkVisibilityCSS: true }) || /script|style/.test(one.localName))
      continue;
    range.selectNodeContents(text);
    const rects = [...range.getClientRects()];
    if (rects.some(rect => leaves(rect, one))) tell("sticks out", one);
    for (const rect of rects) {
      let [left, right] = [rect.left, rect.right];
      for (const up of boxes(one)) if (scrolls(up)) {
        const box = up.getBoundingClientRect();
        [left, right] = [Math.max(left, box.left), Math.min(right, box.right)];
      }
      if (right - left > near) lines.push({ text, one, left, right, top: rect.top, bottom: rect.bottom });
    }
    const ratio = contrast(one);
    if (ratio < 4.5) tell(`contrast ${ratio.toFixed(2)}`, one);
  }
  lines.sort((a, b) => a.top - b.top);
  lines.forEach((a, index) => {
    for (const b of lines.slice(index + 1)) {
      if (b.top > a.bottom) break;
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left), high = Math.min(a.bottom, b.bottom) - b.top;
      if (a.text !== b.text && wide > near && high > 0.25 * Math.min(a.bottom - a.top, b.bottom - b.top))
        tell(`overlaps ${b.one.textContent.trim().slice(0, 40)}`, a.one);
    }
  });
  return found;

  function contrast(one) {
    const style = getComputedStyle(one);
    let back = [255, 255, 255];
    const layers = [...boxes(one)].reverse(), over = ([r, g, b, a]) =>
      [r, g, b].map((part, index) => part * a + back[index] * (1 - a));
    for (const up of layers) back = over(numbers(getComputedStyle(up).backgroundColor));
    const ink = numbers(one.ownerSVGElement ? style.fill : style.color);
    for (const up of layers) ink[3] *= Number(getComputedStyle(up).opacity);
    const [a, b] = [over(ink), back].map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }
  function numbers(color) {  // of rgb(1, 2, 3), rgba(1, 2, 3, 0.5): all that getComputedStyle returns here
    const parts = color.match(/[\d.]+/g).map(Number);
    return [...parts, 1].slice(0, 4);
  }
  function light(color) {  // relative luminance: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance
    const [r, g, b] = color.map(part => part / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
}"""


def faults(running: Browser, path: Path, screen: Screen) -> list[str]:
    """Open a file on a screen, or as it is printed, and list what is wrong: kinds of faults and where they are.

    It looks for: a page that scrolls sideways; what sticks out of its box; lines of text over each other; text with a
    contrast below 4.5; messages on the console; requests.
    """
    found: list[str] = []
    address = path.resolve().as_uri()
    page = running.new_page(viewport={"width": screen["width"], "height": 900}, color_scheme=screen["scheme"])
    page.on("console", lambda said: found.append(f"console: {said.text}") if said.type != "log" else None)
    page.on("pageerror", lambda error: found.append(f"console: {error}"))
    page.on("request", lambda sent: sent.url.startswith(("data:", address)) or found.append(f"request: {sent.url}"))
    page.route(lambda url: not url.startswith("file:"), lambda route: route.abort())
    try:
        page.goto(address)
        page.emulate_media(media=screen["media"])
        return found + page.evaluate(_LOOK)
    finally:
        page.close()
