"""The page of a report: HTML and CSS around the figures, for a phone, a wide screen and paper."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from math import prod
from typing import TYPE_CHECKING, Any

from qat.run_report import figures
from qat.run_report.record import MARK, Layer, RunRecord

if TYPE_CHECKING:
    from qat.verification import VerifyReport

__all__ = ["page"]

_BIN = "loss_bin_"  # how the names of metrics by timestep begin
_WORST = 6  # layers whose codes are drawn
_SHOWN = 400  # layers in the table


def page(record: RunRecord, verified: VerifyReport | None = None) -> str:
    """The whole page; ``verified`` is what a verification of the export found."""
    manifest, spec = record.manifest, record.manifest.frozen.spec
    types = spec.weights + (f" weights, {spec.activation_type} activations" if spec.activation_type else " weights")
    name = manifest.model_class.rpartition(".")[2]
    parts = [
        _header(record, name, types),
        *_results(record),
        *_checks(verified),
        *_training(record),
        *_layers(record),
        *_bytes(record),
    ]
    parts += [*_floats(record), *_samples(record), *_settings(record)]
    style = (files("qat.run_report") / "page.css").read_text(encoding="utf-8")
    title = escape(f"{name}, {types}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{MARK}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(record: RunRecord, name: str, types: str) -> str:
    manifest, spec = record.manifest, record.manifest.frozen.spec
    facts = {
        "target": manifest.target,
        "serving dtype": spec.dtype,
        "algorithm": manifest.frozen.algorithm or "none",
        "quantized layers": str(len(record.layers)),
        "weight files": show_size(record.weight_bytes),
        "directory": record.directory.name,
    }
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in (*manifest.frozen.notes, *record.notes))
    return f"<header><h1>{escape(name)}</h1><p>{escape(types)}</p><dl>{shown}</dl>{notes}</header>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0, exported: int = -1) -> str:
    """A table; its last ``numbers`` columns stand to the right, and the row ``exported`` is marked."""
    texts = len(head) - numbers

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [""] * texts + [" class=number"] * numbers
        found = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))
        return found.replace("_", "_<wbr>") if tag == "th" else found  # names of metrics are long

    marks = ((" class=exported" if number == exported else "", row) for number, row in enumerate(rows))
    body = "".join(f"<tr{mark}>{cells('td', row)}</tr>" for mark, row in marks)
    return f"<div class=wide><table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"


def _rows(record: RunRecord) -> list[dict[str, Any]]:
    return [*record.results, *({**row, "name": f"{row['name']} (peer)"} for row in record.peers)]


def _results(record: RunRecord) -> Iterable[str]:
    rows = _rows(record)
    if not rows:
        return
    names = [name for name in dict.fromkeys(n for row in rows for n in row["metrics"]) if not name.startswith(_BIN)]
    shown = [
        [
            str(row["name"]),
            *(_number(row["metrics"].get(name)) for name in names),
            show_size(row["bytes_on_disk"]),
            str(row["steps"]),
            "–" if row.get("learning_rate") is None else f"{row['learning_rate']:.3g}",
        ]
        for row in rows
    ]
    table = _table(
        ["model", *names, "size to serve", "steps", "learning rate"],
        shown,
        numbers=len(names) + 3,
        exported=len(record.results) - 1,
    )
    compared = [
        f"{row['name']}: mean loss {c['difference']:+.4f} ± {c['standard_error']:.4f} beside that of {c['reference']}."
        for row in rows
        if (c := row.get("comparison"))
    ]
    lines = "".join(f"<p>{escape(line)}</p>" for line in compared)
    yield _section("Results", table, lines, "<div class=grid>", *_by_timestep(record), "</div>")


def _checks(verified: VerifyReport | None) -> Iterable[str]:
    if verified is None:
        return
    rows = [[check.name, "equal" if check.passed else "differs", check.detail] for check in verified.checks]
    yield _section("Verification", _table(["check", "result", "detail"], rows))


def _by_timestep(record: RunRecord) -> Iterable[str]:
    """The loss of a diffusion model along the timesteps, as recipes measure it: in bins of equal width."""
    series = {}
    for row in _rows(record):
        names = [f"{_BIN}{number}" for number in range(len(row["metrics"]))]
        found = [row["metrics"][name] for name in names if name in row["metrics"]]
        points = [((number + 0.5) / len(found), value) for number, value in enumerate(found) if value is not None]
        if points:
            series[str(row["name"])] = points
    if not series:
        return
    axis = "timestep, as a share of all"
    drawn = figures.curves(series, "Loss by timestep", axis, "loss")
    yield _figure(drawn, "Loss by timestep: 0 is an image, 1 is noise.")
    reference = next((c["reference"] for row in record.results if (c := row.get("comparison"))), "")
    base = dict(series.get(reference, ()))
    above = {name: [(x, y - base[x]) for x, y in points if x in base] for name, points in series.items()}
    if above := {name: points for name, points in above.items() if points}:
        drawn = figures.curves(above, "Loss above the reference by timestep", axis, "difference of losses")
        yield _figure(drawn, f"By how much each loss is above that of {reference}.")


def _training(record: RunRecord) -> Iterable[str]:
    drawn = [
        _figure(figures.curves({stage: points}, f"Loss of {stage}", "step", "loss"), f"Loss at each step of {stage}.")
        for stage, points in record.losses.items()
        if points
    ]
    if drawn:
        yield _section("Training", "<div class=grid>", *drawn, "</div>")


def _layers(record: RunRecord) -> Iterable[str]:
    layers, drawn = record.layers, []
    most = f"of all {len(layers)} layers, the {figures.MOST} with the" if len(layers) > figures.MOST else "the"
    if any(layer.errors for layer in layers.values()):
        text = f"Error of quantizing each weight, when training began and when it ended: {most} largest errors."
        drawn.append(_figure(figures.error_changes(layers, "Quantization error by layer"), text))
    if any(layer.input_range for layer in layers.values()):
        text = f"The largest value that the scale of each input and output reaches: {most} largest inputs."
        drawn.append(_figure(figures.ranges(layers, "Activation ranges"), text))
    counted = {name: layer for name, layer in layers.items() if layer.counts}
    worst = sorted(counted, key=lambda name: _badness(counted[name]), reverse=True)[:_WORST]
    for name in worst:
        layer = counted[name]
        text = f"{name}: {layer.weights}, as if {layer.used:.0%} of the codes were used evenly."
        drawn.append(_figure(figures.histogram(layer.counts, f"Codes of {name}"), text))
    told = f"<p>Bars show how often codes are used, in the {len(worst)} layers with the {_measure(counted)}.</p>"
    head = ["layer", "weights", "activations", "shape", "codes in use", "error at the start", "error at the end"]
    rows = [
        [
            name,
            layer.weights,
            layer.activations or "float",
            " × ".join(map(str, layer.shape)),
            "–" if layer.used is None else f"{layer.used:.0%}",
            *(f"{100 * layer.errors[end][1]:#.3g}%" if layer.errors else "–" for end in (0, -1)),
        ]
        for name, layer in list(layers.items())[:_SHOWN]
    ]
    more = f"<p>{len(layers) - _SHOWN} more layers are not shown.</p>" if len(layers) > _SHOWN else ""
    table = f"<details><summary>All layers</summary>{_table(head, rows, numbers=4)}{more}</details>"
    yield _section("Layers", told if worst else "", "<div class=grid>", *drawn, "</div>", table)


def _badness(layer: Layer) -> float:
    return layer.errors[-1][1] if layer.errors else -(layer.used or 0.0)


def _measure(layers: dict[str, Layer]) -> str:
    return "largest error" if any(layer.errors for layer in layers.values()) else "fewest codes in use"


def _bytes(record: RunRecord) -> Iterable[str]:
    found = record.bytes_by_part()
    drawn = figures.bars({name: size / 2**20 for name, size in found.items()}, "Where the bytes are", "MiB")
    float_size = sum(2 * prod(layer.shape) for layer in record.layers.values())
    codes = sum(size for name, size in found.items() if name != "float weights")
    text = f"Quantized layers take {show_size(codes)}, where 16-bit floats would take {show_size(float_size)}."
    yield _section("Where the bytes are", "<div class=grid>", _figure(drawn, text), "</div>")


def _floats(record: RunRecord) -> Iterable[str]:
    left = record.manifest.frozen.left_float
    if not left:
        return
    rows = [[reason, str(count)] for reason, count in Counter(left.values()).most_common()]
    named = _table(["weight", "reason"], list(left.items())[:_SHOWN])
    all_of_them = f"<details><summary>All of them</summary>{named}</details>"
    yield _section("What stays float, and why", _table(["reason", "weights"], rows, numbers=1), all_of_them)


def _samples(record: RunRecord) -> Iterable[str]:
    """Texts and pictures."""
    shown = []
    for sample in record.samples:
        texts = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(text))}</dd></div>" for name, text in sample.items()
        )
        shown.append(f"<dl class=texts>{texts}</dl>")
    pictures = {title: path for title, path in record.pictures.items() if title != "losses" or not record.results}
    for title, path in pictures.items():  # losses are drawn anew from results
        source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        shown.append(
            f'<figure class=whole><img src="{source}" alt="{escape(title)}">'
            f"<figcaption>{escape(title[:1].upper() + title[1:])}</figcaption></figure>"
        )
    if shown:
        yield _section("Samples", *shown)


def _settings(record: RunRecord) -> Iterable[str]:
    manifest = record.manifest
    versions = [[name, str(value)] for name, value in manifest.environment if value is not None]
    settings = json.dumps(manifest.config or manifest.frozen.spec.model_dump(mode="json"), indent=1)
    text = f"<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"
    yield _section("Settings and versions", _table(["what", "value"], versions), text)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}".rstrip(".") if value else "0"


def show_size(count: float) -> str:
    """Show a number of bytes, as 11.00 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
