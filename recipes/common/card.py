"""What a recipe adds to the model card of its export: results, in a section and as metadata, and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import ExportError
from qat.exporting.card import CARD_NAME
from qat.files.whole import explained, whole_file
from qat.hosts.configurations import hub_name

if TYPE_CHECKING:
    from recipes.common.results import ResultRow

__all__ = ["add_results", "add_section"]


def add_results(
    directory: Path,
    rows: Sequence[ResultRow],
    metrics: Sequence[str],
    source: str | None,
    text: str = "",
    pictures: Mapping[str, str | PathLike[str]] | None = None,
    task: str | None = None,
) -> None:
    """Append the section Results to the card of an export, and its own figures to the metadata that a hub reads.

    Args:
        directory: of the export.
        rows: one for each model; the last one is the export.
        metrics: names of those to show.
        source: what the run was asked to read; None: the recipe's default. It is named where it is a hub's name.
        text: before the table.
        pictures: as for `add_section`.
        task: what the model is for, as the hub calls it, where its class does not say so.

    Raises:
        ExportError: as `add_section`.
    """
    from huggingface_hub import EvalResult, ModelCard

    lines = [f"| model | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    lines += [f"| {row.name} | {' | '.join(f'{row.metrics[name]:.4g}' for name in metrics)} |" for row in rows]
    add_section(directory, "Results", "\n".join([*([text, ""] if text else []), *lines]), pictures)
    path = directory / CARD_NAME
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    data: Any = card.data
    data.pipeline_tag = data.pipeline_tag or task
    name = hub_name(source or "")
    data.datasets = [name] if name else None
    if data.pipeline_tag is not None:
        where = {"task_type": data.pipeline_tag, "dataset_type": name or "custom"}
        where["dataset_name"] = name or ("own data" if source else "default data of the recipe")
        found = {metric: rows[-1].metrics[metric] for metric in metrics}
        data.model_name = directory.name
        data.eval_results = [
            EvalResult(**where, metric_type=metric, metric_value=value)
            for metric, value in found.items()
            if isfinite(value)
        ]
    with whole_file(path, beside=directory) as made:
        made.write_text(str(card), encoding="utf-8")


def add_section(
    directory: str | PathLike[str],
    title: str,
    text: str,
    pictures: Mapping[str, str | PathLike[str]] | None = None,
) -> None:
    """Append a section to the model card of an export, and copy its pictures beside the card.

    Args:
        directory: what `qat.export` wrote.
        title: the section's heading, one line.
        text: Markdown.
        pictures: what each shows (the text that stands for it), and its PNG file.

    Raises:
        ExportError: the directory cannot be written or has no model card, the title is not one line, or a picture is no
            PNG file.

    >>> import tempfile, qat
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> _, _ = qat.prepare(model, qat.QuantSpec(weights="int8")), qat.freeze(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = qat.export(model, folder)
    ...     add_section(folder, "Results", "Loss 0.25.")
    ...     print((Path(folder) / "README.md").read_text()[-23:])
    ## Results
    <BLANKLINE>
    Loss 0.25.
    """
    folder = Path(directory).absolute()
    card = folder / CARD_NAME
    if not card.is_file():
        raise ExportError(
            f"directory: {str(folder)!r} has no {CARD_NAME} to add a section to: give a directory that qat.export wrote"
        )
    if not title.strip() or "\n" in title:
        raise ExportError(f"title: must be one line of text, got {title!r}: put more into text")
    files = {shown: Path(path) for shown, path in (pictures or {}).items()}
    for shown, path in files.items():
        if path.suffix.lower() != ".png" or not path.is_file():
            raise ExportError(f"pictures: {shown!r} must be a PNG file, got {str(path)!r}: save it as one first")
    lines = [f"## {title.strip()}", text.strip()]
    lines += [f"![{shown}]({path.name.replace(' ', '%20')})" for shown, path in files.items()]
    with explained(card):
        written = card.read_text(encoding="utf-8").rstrip()
    with whole_file(card, beside=folder) as made:  # first: an export is replaced only if its card shows its pictures
        made.write_text("\n\n".join([written, *filter(None, lines)]) + "\n", encoding="utf-8")
    for path in files.values():
        if path.parent.resolve() != folder.resolve():
            with whole_file(folder / path.name, beside=folder) as made:
                shutil.copyfile(path, made)
