"""Operators are called as given, traced as opaque, and leave no gradient behind."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.operators import fake_operator, operator

CALLS = []


@operator
def _halved_for_a_test(x: Tensor, note: str) -> Tensor:
    CALLS.append(note)
    return x / 2


@fake_operator("halved_for_a_test")
def _(x: Tensor, note: str) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_is_its_function_under_torchs_own_name() -> None:
    CALLS.clear()
    assert torch.equal(torch.ops.qat.halved_for_a_test(torch.ones(3), "eager"), torch.full((3,), 0.5))
    assert CALLS == ["eager"]
    assert str(torch.ops.qat.halved_for_a_test.default._schema).endswith("(Tensor x, str note) -> Tensor")


def test_a_compiler_calls_it_without_looking_inside() -> None:
    CALLS.clear()
    compiled = torch.compile(lambda x: torch.ops.qat.halved_for_a_test(x, "compiled") + 1, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 1.5))
    assert CALLS == ["compiled"] * 2  # a side effect that tracing the function would have lost
    torch.library.opcheck(torch.ops.qat.halved_for_a_test, (torch.ones(3), "checked"))
