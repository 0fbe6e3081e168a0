"""Class labels: what a data set says of them, and which outputs of a model they are.

Names are safer than numbers: two lists of classes may have the same length and another order. So where a data set and
a model both name their classes, the names are matched, and names that the model does not know are an error. Only where
one side has no names do the numbers count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from recipes.data import DataError
from recipes.data.sources import quiet_bars, require_column

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Labelled", "for_model", "numbered", "require_labels"]

LABEL = "label"


@dataclass(frozen=True)
class Labelled:
    """Examples with the column ``label``, the index of each example's class."""

    train: Dataset
    evaluation: Dataset
    classes: tuple[str, ...]
    """The names of the classes, in the order of the indices."""
    named: bool
    """False: the data set has numbers only, and ``classes`` are these numbers."""

    def __str__(self) -> str:
        """One line."""
        return (
            f"{len(self.train)} examples to train on, {len(self.evaluation)} to evaluate on, {len(self.classes)} "
            "classes"
        )


def numbered(train: Dataset, evaluation: Dataset, field: str, source: str) -> Labelled:
    """Turn a column of class names, or of integers, into the column ``label`` of indices.

    Args:
        train: has the column ``field``: class names, integers from 0, or the ``ClassLabel`` of ``datasets``.
        evaluation: the same column.
        field: its name.
        source: where the data comes from, for messages.

    Raises:
        DataError: there is no such column, a label is missing or of another type or negative, there are fewer than
            two classes, or the evaluation has a class that the training has not.

    >>> from datasets import Dataset
    >>> found = Dataset.from_dict({"kind": ["dog", "cat", "dog"]})
    >>> done = numbered(found, found.select([0]), "kind", "an example")
    >>> done.classes, done.train["label"][:]
    (('cat', 'dog'), [1, 0, 1])
    """
    from datasets import ClassLabel

    values, held_out = _values(train, field, source), _values(evaluation, field, source)
    if isinstance(train.features[field], ClassLabel):
        classes, named = tuple(train.features[field].names), True
    elif isinstance(values[0], str):
        classes, named = tuple(sorted(set(values))), True
    else:
        classes, named = tuple(map(str, range(max(values) + 1))), False
    if len(classes) < 2:
        raise DataError(
            f"data.label_field: {field!r} of {source} has fewer than two classes ({', '.join(classes)}): give data "
            "with more, or name another column"
        )
    indices: dict[Any, int] = {(name if named else number): number for number, name in enumerate(classes)}
    for part, found in (("training", values), ("evaluation", held_out)):
        if (row := next((row for row, value in enumerate(found) if value not in indices), None)) is not None:
            raise DataError(
                f"data.label_field: row {row} of the {part} data of {source} has the label {found[row]!r}, which is "
                f"none of the classes to train on ({_few(classes)}): mend or remove such rows"
            )
    numbers = ([indices[value] for value in found] for found in (values, held_out))
    return Labelled(
        _with_labels(train, field, next(numbers)), _with_labels(evaluation, field, next(numbers)), classes, named
    )


def require_labels(part: Dataset, field: str, source: str) -> list[Any]:
    """Return a column of class names or of integers; called before rows are held out, its errors number all rows.

    Raises:
        DataError: there is no such column, or a label is missing or of another type.
    """
    require_column(part, "label_field", field, source)
    values: list[Any] = part[field][:]
    _check_values(values, field, source)
    return values


def _values(part: Dataset, field: str, source: str) -> list[Any]:
    """Names or integers; what has no name in a ``ClassLabel``, such as -1, stays an integer."""
    from datasets import ClassLabel

    values = require_labels(part, field, source)
    if isinstance(feature := part.features[field], ClassLabel):
        return [feature.names[value] if value >= 0 else value for value in values]
    return values


def _check_values(values: Sequence[Any], field: str, source: str) -> None:
    types = {type(value) for value in values}
    if (row := next((row for row, value in enumerate(values) if value in (None, "")), None)) is not None:
        raise DataError(f"data.label_field: row {row} of {source} has no {field!r}: fill or remove such rows")
    if not values or len(types) > 1 or not types <= {str, int, bool}:
        found = " and ".join(sorted(kind.__name__ for kind in types)) or "nothing"
        raise DataError(
            f"data.label_field: {field!r} of {source} must hold class names, or integers from 0, but holds {found}: "
            "name another column"
        )


def _with_labels(part: Dataset, field: str, indices: list[int]) -> Dataset:
    from datasets import Features, Value

    added = "label of the model"  # no name that a column has; removing the last column would remove the rows too
    with quiet_bars():
        kept = part.add_column(added, indices, feature=Features({added: Value("int64")})[added])
        kept = kept.remove_columns([name for name in {field, LABEL} if name in part.column_names])
        return kept.rename_column(added, LABEL)


def for_model(data: Labelled, id2label: Mapping[int, str], source: str) -> Labelled:
    """Let ``label`` be the index of the model's output for that class.

    Args:
        data: what `numbered` returned.
        id2label: the model's classes, as its configuration has them.
        source: where the data comes from, for messages.

    Raises:
        DataError: the model has another number of classes, or other ones.

    >>> from datasets import Dataset
    >>> found = numbered(Dataset.from_dict({"kind": ["cat", "dog"]}), Dataset.from_dict({"kind": ["cat"]}), "kind", "x")
    >>> for_model(found, {0: "dog", 1: "cat", 2: "cow"}, "x").train["label"][:]
    [1, 0]
    """
    outputs = {name: index for index, name in id2label.items()}
    remedy = "give a model of these classes, or replace its output layer (on a command line --new-head)"
    if data.named and set(data.classes) <= set(outputs):
        places = [outputs[name] for name in data.classes]
        train, evaluation = (
            _with_labels(part, LABEL, [places[label] for label in part[LABEL]])
            for part in (data.train, data.evaluation)
        )
        return replace(data, train=train, evaluation=evaluation, classes=tuple(id2label.values()))
    count, known = len(data.classes), len(id2label)
    if count > known or (data.named and count != known):
        raise DataError(f"data.source: {source} has {count} classes, but the model has {known}: {remedy}")
    if data.named and not all(re.fullmatch(r"LABEL_\d+", name) for name in outputs):
        unknown = sorted(set(data.classes) - set(outputs))
        raise DataError(
            f"data.source: {source} has the classes {_few(unknown)}, which the model does not know; it knows "
            f"{_few(list(outputs))}: rename them, or {remedy}"
        )
    return data


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
