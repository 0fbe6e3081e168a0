"""Arguments that are told apart and put together again are those of the call that they came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.data import DataError
from recipes.data.templates import Template, merged_arguments


def called(*numbers: int) -> dict[str, Any]:
    """A transformer's arguments for examples of these numbers, one of every kind that is understood."""
    batch = torch.tensor(numbers)
    return {
        "latents": torch.zeros(len(numbers), 4),
        "timestep": torch.full((len(numbers),), 0.5),
        "words": batch[:, None].expand(-1, 3).float(),
        "label": batch,
        "ids": torch.arange(5),
        "nested": {"pooled": batch.bfloat16()[:, None], "none": None, "deeper": {"flag": True}},
        "pair": (torch.ones(2, 2), batch * 2.0),
        "counts": list(numbers),
        "shares": [number / 3 for number in numbers],
        "odd": [number % 2 == 1 for number in numbers],
        "texts": [torch.full((number,), 1.5) for number in numbers],
        "longest": torch.arange(max(numbers)),
        "shapes": [[(1, 8, 8)]] * len(numbers),
        "none": None,
        "mode": "full",
    }


def template() -> Template:
    arguments = merged_arguments(called(1), called(4), called(1, 4), ("latents", "timestep"))
    return Template(arguments, "latents", (4,), torch.float32, torch.float32, 1000.0)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and bool(one == two)


@pytest.mark.parametrize("numbers", [(2,), (1, 4), (3, 1, 2), (5, 5, 5, 5)], ids=str)
def test_a_batch_of_rows_is_the_call_for_that_batch(numbers: tuple[int, ...]) -> None:
    made = template()
    rows = [made.rows(called(number)) for number in numbers]
    filled = made.fill(rows, torch.zeros(len(numbers), 4), torch.full((len(numbers),), 500.0))
    expected = called(*numbers)
    del expected["none"]  # what is none for all is left out
    assert filled.keys() == expected.keys()
    for name, value in expected.items():
        assert same(filled[name], value), name


@pytest.mark.parametrize("example", [0, 1])
def test_rows_come_from_any_example_of_a_call(example: int) -> None:
    made = template()
    both, alone = made.rows(called(3, 3), example), made.rows(called(3))
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[path], alone[path]) for path in both)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("ids", {"ids": torch.arange(6)}),
        ("ids", {"ids": torch.arange(5).flip(0)}),
        ("ids", {"ids": torch.arange(5).float()}),
        ("words", {"words": None}),
        ("counts", {"counts": ["two"]}),
        ("shapes", {"shapes": [[(1, 8, 9)]]}),
        ("none", {"none": 3}),
        ("mode", {"mode": "half"}),
        ("pair", {"pair": (torch.ones(2, 2),)}),
        (r"pair\.0", {"pair": (torch.zeros(2, 2), torch.ones(1))}),
        (r"nested\.deeper\.flag", {"nested": called(2)["nested"] | {"deeper": {"flag": False}}}),
        ("nested", {"nested": {}}),
        ("new", {"new": torch.ones(1)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_that_does_not_fit_is_an_error(path: str, change: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=rf"^model: the argument {path} of the transformer depends on the caption: it is"
    ):
        template().rows(called(2) | change)


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(2, 2) + 1),
        (torch.zeros(3), torch.zeros(3), torch.zeros(6)),
        (torch.zeros(3), torch.zeros(3), torch.ones(3)),
        (torch.tensor(1), torch.tensor(2), torch.tensor(2)),
        ([1], [2], [2, 1]),
        ([1, 1], [2, 2], [1, 1, 2, 2]),
        ((1,), (2,), (2,)),
        (None, 1, 1),
        ("one", "two", "two"),
    ],
    ids=[
        "two rows for one caption",
        "joined",
        "changes in a batch",
        "no dimension",
        "another order",
        "two items each",
        "tuple",
        "none or not",
        "text",
    ],
)
def test_arguments_of_no_known_kind_are_an_error(first: Any, second: Any, both: Any) -> None:
    with pytest.raises(
        DataError, match=r"^model: the argument x(\.0)? of the transformer depends on the captions in a"
    ):
        merged_arguments({"x": first}, {"x": second}, {"x": both}, ())
