from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from recipes.data import DataError
from recipes.data.labels import Labelled, for_model, numbered


def rows(values: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [str(number) for number in range(len(values))], "kind": values})


def with_names(values: list[int], names: list[str]) -> Dataset:
    features = Features({"text": Value("string"), "kind": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["a"] * len(values), "kind": values}, features=features)


def made(values: list[Any], held_out: list[Any]) -> Labelled:
    return numbered(rows(values), rows(held_out), "kind", "'here'")


@pytest.mark.parametrize(
    ("values", "held_out", "classes", "named"),
    [
        (["b", "a", "b"], ["a"], ("a", "b"), True),
        ([2, 0, 2], [1], ("0", "1", "2"), False),
        ([True, False], [True], ("0", "1"), False),
    ],
    ids=["names", "integers", "truth values"],
)
def test_labels_become_indices(values: list[Any], held_out: list[Any], classes: tuple[str, ...], named: bool) -> None:
    found = made(values, held_out)
    assert (found.classes, found.named) == (classes, named)
    assert found.train["label"][:] == [classes.index(str(int(v)) if not named else v) for v in values]
    assert found.evaluation["label"][:] == [classes.index(str(int(v)) if not named else v) for v in held_out]
    assert found.train.column_names == ["text", "label"]
    assert str(found) == f"{len(values)} examples to train on, 1 to evaluate on, {len(classes)} classes"


def test_names_of_the_data_set_keep_their_order_and_those_without_an_example() -> None:
    found = numbered(with_names([1, 0], ["z", "a", "m"]), with_names([0], ["a", "z"]), "kind", "'here'")
    assert (found.classes, found.named) == (("z", "a", "m"), True)
    assert found.train["label"][:] == [1, 0]
    assert found.evaluation["label"][:] == [1]  # by its name, for this split counts otherwise


def test_a_column_called_label_is_replaced() -> None:
    part = rows(["a", "b"]).rename_column("kind", "label")
    assert numbered(part, part, "label", "'here'").train["label"][:] == [0, 1]
    both = rows(["a", "b"]).add_column("label", [7, 7])
    assert numbered(both, both, "kind", "'here'").train["label"][:] == [0, 1]


@pytest.mark.parametrize(
    ("values", "held_out", "message"),
    [
        (["a", None], ["a"], r"row 1 of 'here' has no 'kind': fill or remove"),
        ([0.5, 1.5], [0.5], r"must hold class names, or integers from 0, but holds float: name another"),
        (["a", "a"], ["a"], r"fewer than two classes \(a\): give data with more"),
        (
            ["a", "b"],
            ["a", "c"],
            r"row 1 of the evaluation data .* label 'c', which is none .* \('a', 'b'\)",
        ),
        ([0, 1, -1], [0], r"row 2 of the training data of 'here' has the label -1"),
        ([0, 1], [2], r"row 0 of the evaluation data of 'here' has the label 2"),
    ],
    ids=["missing", "fractions", "one class", "unknown name", "negative", "too large"],
)
def test_bad_labels_are_one_clear_error(values: list[Any], held_out: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.label_field: .*{message}"):
        made(values, held_out)


def test_a_row_without_a_class_of_a_data_set_with_names_is_an_error() -> None:
    with pytest.raises(DataError, match="row 1 of the training data of 'here' has the label -1"):
        numbered(with_names([0, -1], ["a", "b"]), with_names([0], ["a", "b"]), "kind", "'here'")


def test_a_missing_column_is_an_error_with_the_columns_that_there_are() -> None:
    with pytest.raises(DataError, match=r"data\.label_field: 'here' has no column 'class'; its columns: text, kind"):
        numbered(rows(["a", "b"]), rows(["a"]), "class", "'here'")


@pytest.mark.parametrize(
    ("values", "id2label", "expected"),
    [
        (["cat", "dog"], {0: "dog", 1: "cow", 2: "cat"}, [2, 0]),
        (["cat", "dog"], {0: "LABEL_0", 1: "LABEL_1"}, [0, 1]),
        ([1, 0], {0: "dog", 1: "cat"}, [1, 0]),
        ([1, 0], {0: "dog", 1: "cat", 2: "cow"}, [1, 0]),
    ],
    ids=["names match", "the model has no names", "the data has no names", "fewer numbers than outputs"],
)
def test_labels_are_the_outputs_of_the_model(values: list[Any], id2label: dict[int, str], expected: list[int]) -> None:
    found = for_model(made(values, values), id2label, "'here'")
    assert found.train["label"][:] == expected
    assert found.evaluation["label"][:] == expected


@pytest.mark.parametrize(
    ("values", "id2label", "message"),
    [
        (["a", "b", "c"], {0: "a", 1: "b"}, r"'here' has 3 classes, but the model has 2: give .* --new-head"),
        (["a", "b"], {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, r"'here' has 2 classes, but the model has 3"),
        ([0, 4], {0: "a", 1: "b"}, r"'here' has 5 classes, but the model has 2"),
        (["a", "x"], {0: "a", 1: "b"}, r"'here' has the classes 'x', which the model does not know; it knows 'a', 'b'"),
    ],
    ids=["too many", "too few", "numbers", "other names"],
)
def test_other_classes_than_those_of_the_model_are_an_error(
    values: list[Any], id2label: dict[int, str], message: str
) -> None:
    with pytest.raises(DataError, match=rf"^data\.source: {message}"):
        for_model(made(values, values), id2label, "'here'")
