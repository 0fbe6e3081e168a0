"""What a run left on the disk: the export's manifest and weights, and a recipe's results and logs beside it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from qat.errors import LoadError, QatError, told
from qat.files.directory import as_path
from qat.files.manifest import Manifest, read_manifest
from qat.files.trusted import MOST_TEXT
from qat.hosts.targets import get_target
from qat.loading import load
from qat.numerics import FrozenWeight

__all__ = ["MARK", "Layer", "RunRecord", "read_run"]

MARK = '<meta name="generator" content="qat report">'
"""By which a page is known as a report, that a later one may replace."""

_BITS = {"F64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "I64": 64}  # others are bytes
_MOST = 4 << 30  # bytes of weight files beyond which codes are not read
_STATISTIC = "quantization/"
_MOST_PICTURE = 8 << 20  # bytes
_MOST_LOG = 1 << 28  # bytes
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = 2.0**128  # what no float32 reaches, and no figure can show
_Float = Annotated[float, Field(gt=-_LARGEST, lt=_LARGEST)]


class _Checked(BaseModel):
    """A part of a file that anybody may have written."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Comparison(_Checked):
    reference: str
    difference: _Float
    standard_error: _Float


class _Row(_Checked):
    name: str
    metrics: dict[str, _Float | None]
    bytes_on_disk: int = Field(ge=0)
    steps: int
    learning_rate: _Float | None = None
    comparison: _Comparison | None = None


_ROWS: TypeAdapter[list[Any]] = TypeAdapter(list[_Row])
_SAMPLES: TypeAdapter[list[Any]] = TypeAdapter(list[dict[str, str]])


@dataclass
class Layer:
    """A quantized layer, as it is served."""

    weights: str
    """Type of its weights; below, that of its activations."""
    activations: str | None
    shape: tuple[int, int]
    input_range: float | None
    """The largest input that its scale reaches, and below the largest output; None without quantized activations."""
    output_range: float | None
    counts: dict[float, int] = field(default_factory=dict)
    """How often each code stands in its weight; empty where codes were not read."""
    errors: list[tuple[int, float]] = field(default_factory=list)
    """Step, and relative quantization error of its weight then, as numerical guards logged it."""

    @property
    def used(self) -> float | None:
        """The effective number of codes, 2 to the entropy, over the number that its type has; None without counts."""
        total = sum(self.counts.values())
        if not total:
            return None
        shares = torch.tensor([count / total for count in self.counts.values() if count], dtype=torch.float64)
        return float(torch.exp2(-(shares * shares.log2()).sum())) / len(self.counts)


@dataclass
class RunRecord:
    """All that a page shows."""

    directory: Path
    manifest: Manifest
    results: list[dict[str, Any]]
    """A recipe's rows, one for each model; empty without a recipe."""
    losses: dict[str, list[tuple[int, float]]]
    """For each training, steps and losses."""
    layers: dict[str, Layer]
    pictures: dict[str, Path]
    """What each shows, and its PNG file."""
    peers: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the same form, of models that others quantized."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """Of a language model: beginnings, under ``prompt``, and by a model's name what it goes on with."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        weights = {tensor.file for tensor in self.manifest.tensors.values()}
        return sum(file.bytes for name, file in self.manifest.files.items() if name in weights)

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of the weight files by what they hold."""
        found: dict[str, int] = defaultdict(int)
        for name, tensor in self.manifest.tensors.items():
            size = prod(tensor.shape) * _BITS.get(tensor.dtype, 8) // 8
            layer = next((layer for layer in _parents(name) if layer in self.layers), None)
            part = "float weights" if layer is None else "scales, shifts, biases"
            if layer is not None and tensor.dtype in ("U8", "I8", "I32", "F8_E4M3"):
                part = f"codes, {self.layers[layer].weights}"
            found[part] += size
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def read_run(run: str | PathLike[str], *, codes: bool = True) -> RunRecord:
    """Gather what a run left.

    Args:
        run: the directory of the export; ``<run>-results.json``, ``<run>-peers.json`` and ``<run>-logs`` beside it
            belong to it.
        codes: load the model too, and count the codes of its layers.

    Raises:
        LoadError: the directory is no export, or its files are not what the export wrote.
    """
    directory = Path(os.path.abspath(as_path(run, LoadError)))
    manifest = read_manifest(directory)
    record = RunRecord(directory, manifest, [], {}, {}, {})
    for name, evidence in manifest.frozen.layers.items():
        steps = 0.0
        if evidence.activations is not None:
            steps = get_target(manifest.target).format.activation_qtypes[evidence.activations].steps
        first, last = (None if s is None else s * steps for s in (evidence.input_scale, evidence.output_scale))
        outputs = last if manifest.frozen.spec.outputs else None
        record.layers[name] = Layer(evidence.weights, evidence.activations, evidence.shape, first, outputs)
    if _is_ended(directory):
        found = [[row.model_dump() for row in _rows(directory, what, _ROWS)] for what in ("results", "peers")]
        record.results, record.peers = found
        record.samples = _rows(directory, "samples", _SAMPLES)
        _read_logs(directory.with_name(f"{directory.name}-logs"), record)
    else:
        record.notes.append("results and logs beside it are not shown: the last run that writes them has not ended")
    if codes:
        _count_codes(record)
    # Named, as recipes do: any name might be that of a picture of another run beside this one.
    for path in sorted((*directory.glob("*.png"), directory.with_name(f"{directory.name}-images.png"))):
        if (
            path.is_file()
            and not path.is_symlink()
            and path.stat().st_size <= _MOST_PICTURE
            and path.read_bytes().startswith(_PNG)
        ):
            title = path.stem.removeprefix(f"{directory.name}-").replace("_", " ")
            record.pictures.setdefault(title, path)
    return record


def _is_ended(directory: Path) -> bool:
    """False where a recipe began a run into this directory, and has not ended it."""
    try:
        state = json.loads((directory.with_name(f"{directory.name}-checkpoints") / "run.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(state, dict) or state.get("ended") is not False


def _rows(directory: Path, what: str, rows: TypeAdapter[list[Any]]) -> list[Any]:
    """The rows of a JSON file that a recipe left beside a directory; none without it."""
    path = directory.with_name(f"{directory.name}-{what}.json")
    if not path.is_file():
        return []
    try:
        if path.stat().st_size > MOST_TEXT:
            raise ValueError(f"it has more than {MOST_TEXT:,} bytes")
        return rows.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        found = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, found['loc']))}: {found['msg']}"[:200] if found else told(error)
        raise LoadError(f"{str(path)!r} holds no {what} of a recipe: {reason}: remove it, or run the recipe") from error


def _read_logs(folder: Path, record: RunRecord) -> None:
    """Losses and statistics of layers; of a run that went on, later rows take the place of earlier ones."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    errors: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(folder.glob("*/metrics.csv"), key=lambda path: (_first_step(path), path)):
        stage = path.parent.name.partition("-from-")[0]
        try:
            for step, key, value in _numbers(path):
                name, _, what = key.removeprefix(_STATISTIC).rpartition("/")
                if key == "train_loss":
                    losses[stage][step] = value
                elif key.startswith(_STATISTIC) and what == "error":
                    errors[name.rpartition("/")[0]][step] = value
        except (OSError, ValueError, csv.Error) as error:
            record.notes.append(f"the log {path.parent.name!r} was not read to its end: {told(error)}")
    for stage, points in losses.items():
        shown = sorted((step, value) for step, value in points.items() if abs(value) < _LARGEST)
        record.losses[stage] = shown
        if missing := len(points) - len(shown):
            record.notes.append(f"{missing} losses of {stage} are inf, NaN or beyond float32, and are not drawn")
    for name, points in errors.items():
        if name in record.layers:
            shown = sorted((step, value) for step, value in points.items() if abs(value) < _LARGEST)
            record.layers[name].errors = shown


def _first_step(path: Path) -> int:
    """Where the fit of a log went on from; clocks and copies change the times of files."""
    found = re.search(r"-from-(\d{1,15})$", path.parent.name)
    return int(found[1]) if found else -1


def _numbers(path: Path) -> Iterator[tuple[int, str, float]]:
    """Step, column and value, of whole lines: a process that is killed leaves a part of one."""
    if not path.is_file() or path.stat().st_size > _MOST_LOG:
        raise ValueError(f"it is no file, or has more than {_MOST_LOG:,} bytes")
    data = path.read_bytes()
    rows = csv.reader(io.StringIO(data[: data.rfind(b"\n") + 1].decode(), newline=""))
    head = next(rows, [])
    wanted = [(column, key) for column, key in enumerate(head) if key == "train_loss" or key.endswith("/error")]
    for row in rows:
        found = dict(zip(head, row, strict=False))
        if len(row) == len(head) and re.fullmatch(r"[0-9]{1,15}", found.get("step", "")):
            for column, key in wanted:
                with suppress(ValueError):
                    yield int(found["step"]), key, float(row[column])


def _count_codes(record: RunRecord) -> None:
    """How often each layer uses each code, of the model as `qat.load` reads it."""
    if record.weight_bytes > _MOST or record.manifest.float_grid:
        record.notes.append("codes were not read: the weights are floats, or too many for this page")
        return
    try:
        model = load(record.directory)
    except QatError as error:
        record.notes.append(f"codes were not read: {str(error).splitlines()[0]}")
        return
    target = get_target(record.manifest.target)
    for name, layer in record.layers.items():
        layer.counts = _counts(target.format.read(model.get_submodule(name)).weight)


def _counts(weight: FrozenWeight) -> dict[float, int]:
    """Of integer codes all that the type has; of float8 those that there are."""
    values, counts = torch.unique(weight.codes.float(), return_counts=True)
    found: dict[float, int] = dict(zip(values.tolist(), counts.tolist(), strict=True))
    qtype = weight.qtype
    if qtype.floating:
        return found
    first, last = min(qtype.code_min, min(found)), max(qtype.code_max, max(found))
    return {float(value): found.get(float(value), 0) for value in range(int(first), int(last) + 1)}


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
