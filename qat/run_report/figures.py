"""Figures of a report, as SVG that takes the colours of the page around it.

matplotlib draws them with stand-ins for the colours of text and lines, and the page's own take their place: so one
figure suits a light and a dark screen, and paper. They are as wide as a phone; a wider page shows several in a row.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from qat.run_report.record import Layer

__all__ = ["MOST", "bars", "curves", "error_changes", "histogram", "ranges"]

_TEXT, _LINE = "#010203", "#040506"  # stand-ins for colours of the page
_SERIES = ("#2f7ed8", "#e8871e", "#2ca05a", "#b45bc9", "#d64550")  # seen on white and on black
MOST = 16  # layers of a figure
_LONGEST = 25  # letters of a layer's name


def _style() -> AbstractContextManager[None]:
    text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    lines = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color", "legend.edgecolor")
    options: Any = dict.fromkeys(lines, _LINE) | dict.fromkeys(text, _TEXT)
    return rc_context(options | {
        "svg.fonttype": "none", "svg.hashsalt": "qat", "text.parse_math": False,
        "font.size": 10, "font.family": "sans-serif",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.5,
        "axes.axisbelow": True, "legend.frameon": False, "legend.handlelength": 1, "legend.handletextpad": 0.4,
        "figure.constrained_layout.use": True,
    })  # fmt: skip


def _figure(height: float = 2.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.2, height))
    return figure, figure.subplots()


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element, named for those who cannot see it."""
    file = io.StringIO()
    # As large as what it holds: the layout alone may leave no room for a label.
    options: Any = {"bbox_inches": "tight", "pad_inches": 0.1, "metadata": {"Date": None, "Creator": None}}
    figure.savefig(file, format="svg", transparent=True, **options)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor").replace(_LINE, "var(--line)")
    label = escape(title)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>', lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label="{label}">', text
    )
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str, y: str) -> str:
    """Lines over steps or the like."""
    with _style():
        names = len(series) if len(series) > 1 else 0
        figure, axes = _figure(2.8 + 0.2 * names)
        for (name, points), color in zip(series.items(), _SERIES * len(series), strict=False):
            marker = "o" if len(points) < 12 else None
            axes.plot(*zip(*points, strict=True), color=color, label=name, linewidth=1.5, marker=marker, markersize=4)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(
            MaxNLocator(6, integer=all(isinstance(p[0], int) for s in series.values() for p in s))
        )
        if names:
            figure.legend(loc="outside upper left")
        return _svg(figure, title)


def bars(values: Mapping[str, float], title: str, x: str) -> str:
    """Horizontal bars with their names; the largest come first."""
    with _style():
        shown = dict(sorted(values.items(), key=lambda item: -item[1]))
        figure, axes = _figure(0.8 + 0.26 * len(shown))
        drawn = axes.barh(range(len(shown)), list(shown.values()), color=_SERIES[0], height=0.7)
        axes.bar_label(drawn, fmt="%.3g", padding=3)
        axes.margins(x=0.12)
        axes.set_yticks(range(len(shown)), [_short(name) for name in shown])
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, title)


def error_changes(layers: Mapping[str, Layer], title: str) -> str:
    """For the layers that end with the largest error: where it was when training began, and where it ended."""
    with _style():
        measured = {name: layer.errors for name, layer in layers.items() if layer.errors}
        shown = dict(sorted(measured.items(), key=lambda item: -item[1][-1][1])[:MOST])
        figure, axes = _figure(1.1 + 0.26 * len(shown))
        first, last = [[100 * errors[end][1] for errors in shown.values()] for end in (0, -1)]
        rows = range(len(shown))
        axes.hlines(rows, first, last, color=_LINE, linewidth=1)
        axes.plot(first, rows, "o", color=_SERIES[1], markersize=8, fillstyle="none", label="at the start")
        axes.plot(last, rows, "o", color=_SERIES[0], markersize=5, label="at the end")
        axes.set_yticks(rows, [_short(name) for name in shown])
        axes.invert_yaxis()
        axes.set_xlabel("error, % of the weight")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
        return _svg(figure, title)


def ranges(layers: Mapping[str, Layer], title: str) -> str:
    """The largest input and output that each layer's scales reach, on a logarithmic axis."""
    with _style():
        shown = {n: layer for n, layer in layers.items() if layer.input_range}
        shown = dict(sorted(shown.items(), key=lambda item: -(item[1].input_range or 0.0))[:MOST])
        figure, axes = _figure(1.1 + 0.26 * len(shown))
        rows = range(len(shown))
        axes.plot([layer.input_range for layer in shown.values()], rows, "o", color=_SERIES[0], label="input")
        outputs = [(layer.output_range, row) for row, layer in zip(rows, shown.values(), strict=True)]
        outputs = [(value, row) for value, row in outputs if value]
        if outputs:
            axes.plot(*zip(*outputs, strict=True), "D", color=_SERIES[1], markersize=4, label="output")
        reached = [value for layer in shown.values() for value in (layer.input_range, layer.output_range) if value]
        first, last = min(reached) / 1.6, max(reached) * 1.6  # so far apart that a tick is between them
        axes.set_xscale("log")
        axes.set_xlim(first, last)
        # Plain numbers: matplotlib's own ticks here are formulas, which an SVG without its font shows as their source.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if last < 100 * first else (1,), numticks=6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(rows, [_short(name) for name in shown])
        axes.invert_yaxis()
        axes.set_xlabel("largest value of the range")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
        return _svg(figure, title)


def histogram(counts: Mapping[float, int], title: str) -> str:
    """How often each code is used, in percent."""
    with _style():
        figure, axes = _figure(2.2)
        total = sum(counts.values())
        shares = [100 * count / total for count in counts.values()]
        width = 0.8 if len(counts) < 64 else 1.0
        axes.bar(range(len(counts)), shares, color=_SERIES[0], width=width)
        codes = list(counts)
        ticks = sorted({0, len(codes) // 2, len(codes) - 1})
        axes.set_xticks(ticks, [f"{codes[tick]:g}" for tick in ticks])
        axes.set(xlabel="code", ylabel="% of the weight")
        axes.grid(visible=False, axis="x")
        return _svg(figure, title)


def _short(name: str) -> str:
    """The end of a layer's name, where the whole one takes more room than a figure has."""
    parts = name.split(".")
    while len(".".join(parts)) > _LONGEST and len(parts) > 2:
        del parts[0]
    return ".".join(parts)
