"""Packed weights hold what they were given, and the mark that keeps biases stays through copies and moves."""

from __future__ import annotations

import pytest
import torch
from qat.packing import as_held, keep_bias, pack
from qat.targets import get_target, loses_bias_on_cuda
from torch import nn

import qat
from qat.quantizers import StraightThrough
from tests.helpers import WEIGHT_TYPES


def packed(qtype: str, rows: int = 64) -> tuple[torch.Tensor, object]:
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    quantizer = StraightThrough().make(weight, qtype, torch.bfloat16)
    return quantizer.fake_quantized(weight), pack(quantizer.final(weight), qtype, None)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_a_packed_weight_is_the_trained_one(qtype: str, rows: int) -> None:
    trained, weight = packed(qtype, rows)
    assert torch.equal(weight.dequantize(), trained)
    assert torch.equal(as_held(weight, get_target("diffusers")).dequantize(), trained)


def test_the_mark_that_keeps_a_bias_stays() -> None:
    trained, weight = packed("float8")
    assert weight.activation_qtype is None
    parameter = nn.Parameter(keep_bias(weight), requires_grad=False)
    for held in (parameter, parameter.detach(), parameter.to("cpu"), keep_bias(parameter)):
        assert held.activation_qtype.name == "qfloat8_e4m3fn"
        assert torch.equal(held.dequantize(), trained)


@pytest.mark.parametrize("qtype", ["int8", "int4", "int2"])
def test_other_types_need_no_mark(qtype: str) -> None:
    _, weight = packed(qtype)
    assert keep_bias(weight) is weight
    assert getattr(weight, "activation_qtype", None) is None


@pytest.mark.parametrize("biased", [True, False])
def test_frozen_float8_layers_with_a_bias_are_marked_and_named_by_inspection(biased: bool) -> None:
    model = nn.Sequential(nn.Linear(256, 64, bias=biased))
    spec = qat.QuantSpec(weights="float8")
    report = qat.inspect(model, spec)
    assert any("leaves out on a CUDA GPU" in note for note in report.notes) is biased
    qat.prepare(model, spec)
    qat.freeze(model)
    assert (model[0].weight.activation_qtype is not None) is biased


@pytest.mark.parametrize(
    ("arguments", "loses"),
    [
        (("float8", None, "bfloat16", (64, 128)), True),
        (("float8", None, "float16", (128, 64)), True),
        (("float8", None, "float32", (128, 128)), False),
        (("float8", "float8", "bfloat16", (128, 128)), False),
        (("float8", None, "bfloat16", (64, 64)), False),
        (("int8", None, "bfloat16", (128, 128)), False),
    ],
)
def test_which_layers_lose_their_bias_on_cuda(
    arguments: tuple[str, str | None, str, tuple[int, int]], loses: bool
) -> None:
    assert loses_bias_on_cuda(*arguments) is loses
