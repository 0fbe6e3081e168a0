"""Operators are called as given, traced as opaque, leave no gradient behind, and have a faster form per device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from qat import kernels
from qat.kernels import cpu
from qat.numerics import Affine, QType, Symmetric
from qat.operators import OptionalResult, operator
from tests.helpers import awkward_weight, same_bits

CALLS = []


@operator(lambda x, note: torch.empty_like(x))
def halved_for_a_test(x: Tensor, note: str) -> Tensor:
    """Half of ``x``."""
    CALLS.append(note)
    return x / 2


def test_an_operator_is_its_function_under_torchs_own_name() -> None:
    CALLS.clear()
    assert halved_for_a_test is torch.ops.qat.halved_for_a_test.default
    assert halved_for_a_test.__doc__ == "Half of ``x``."
    assert torch.equal(halved_for_a_test(torch.ones(3), "eager"), torch.full((3,), 0.5))
    assert CALLS == ["eager"]
    assert str(torch.ops.qat.halved_for_a_test.default._schema).endswith("(Tensor x, str note) -> Tensor")


def test_a_compiler_calls_it_without_looking_inside() -> None:
    CALLS.clear()
    compiled = torch.compile(lambda x: halved_for_a_test(x, "compiled") + 1, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 1.5))
    assert CALLS == ["compiled"] * 2  # a side effect that tracing the function would have lost
    torch.library.opcheck(torch.ops.qat.halved_for_a_test, (torch.ones(3), "checked"))


@operator(lambda x, both: (torch.empty_like(x), torch.empty_like(x) if both else None))
def split_for_a_test(x: Tensor, both: bool) -> tuple[Tensor, OptionalResult]:
    return x + 1, x + 2 if both else None


@pytest.mark.parametrize("both", [True, False], ids=["both", "one"])
def test_a_result_may_be_none_eagerly_and_compiled(both: bool) -> None:
    def total(x: Tensor) -> Tensor:
        one, other = split_for_a_test(x, both)
        return one if other is None else one + other

    expected = torch.full((3,), 5.0 if both else 2.0)
    for call in (total, torch.compile(total, fullgraph=True)):
        assert torch.equal(call(torch.ones(3)), expected)
    torch.library.opcheck(split_for_a_test, (torch.ones(3), both))


@operator(lambda x, exact, **_: torch.empty_like(x), CPU="test_operators_fast_tripling")
def tripled_for_a_test(x: Tensor, exact: bool, *, after: Tensor | None = None) -> Tensor:
    return x * 3


@pytest.fixture
def fast_tripling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that exists in memory only, with a form for the CPU that is told apart by its wrong result."""
    module = ModuleType("test_operators_fast_tripling")
    module.__dict__["tripled_for_a_test"] = lambda x, exact: x * 4
    module.__dict__["supports"] = lambda x, exact: not exact
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fast_tripling")
def test_a_faster_form_runs_where_it_is_registered_and_supports_the_arguments() -> None:
    call = tripled_for_a_test
    assert torch.equal(call(torch.ones(2), False), torch.full((2,), 4.0))
    assert torch.equal(call(torch.ones(2), False, after=torch.ones(1)), torch.full((2,), 4.0))
    assert torch.equal(call(torch.ones(2), True), torch.full((2,), 3.0))
    assert call(torch.ones(2, device="meta"), False).shape == (2,)  # shapes need neither form
    with torch.inference_mode():
        assert torch.equal(call(torch.ones(2), False), torch.full((2,), 4.0))
    with torch.no_grad():
        assert not call(torch.ones(2, requires_grad=True), False).requires_grad


@dataclass(frozen=True, kw_only=True)
class _Floored(Symmetric):
    """Codes are rounded down: an arithmetic that no kernel knows."""

    fused: ClassVar[bool] = False

    def encode(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        codes = (self.grouped(weight.detach()).float() / scale).floor()
        return codes.clamp(self.code_min, self.code_max).to(self.storage).reshape(weight.shape)


@dataclass(frozen=True, kw_only=True)
class _ZeroPoint(Affine):
    """The shift is a whole number of steps, as with an integer zero point."""

    fused: ClassVar[bool] = False

    def serve(
        self, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        scale, _ = super().serve(scale, None, dtype, in_features)
        return scale, None if shift is None else scale * (shift / scale).round()


UNFUSED = {
    "floored": _Floored(
        format="test_operators", name="int8", bits=8, code_min=-128, code_max=127, steps=127, storage=torch.int8
    ),
    "zero point": _ZeroPoint(
        format="test_operators", name="int4", bits=4, code_min=0, code_max=15, steps=15, storage=torch.uint8
    ),
}


@pytest.mark.parametrize("qtype", UNFUSED.values(), ids=UNFUSED)
def test_a_type_that_is_not_fused_takes_the_specification_on_a_cpu(
    qtype: QType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fake_quantize_weight", "scale_gradients"):
        monkeypatch.setattr(cpu, name, lambda *_: pytest.fail("the fast form ran"))
    weight, dtype = awkward_weight(6, 256), torch.bfloat16
    weight[0, 0] = 1.0  # no row without a range
    value, scale, shift = kernels.quantize_own_range(weight, qtype.key, dtype, torch.float32)
    expected = qtype.serve(*qtype.scale_shift(*qtype.weight_range(weight)), dtype, 256)
    assert same_bits(scale, expected[0])
    assert (shift is None and expected[1] is None) or same_bits(shift, expected[1])  # type: ignore[arg-type]
    assert same_bits(value, qtype.fake_quantize(weight, scale, shift, dtype, torch.float32))
    assert same_bits(value, kernels.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, torch.float32))
    grad = torch.randn(6, 256)
    found, wanted = (
        kernels.scale_gradients(weight, scale, shift, qtype.key, grad),
        qtype.scale_gradients(weight, scale, shift, grad),
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None and theirs is None) or same_bits(ours, theirs)  # type: ignore[arg-type]
