"""`QLinear` with quantized activations: it multiplies codes where the loader does, and gives what the loader gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.layers import Mode, QLinear
from tests.helpers import DTYPES, WEIGHT_TYPES, kept_by
from tests.test_layers import IN, OUT, inputs, layer


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", ["int8", "float8"])
def test_quantized_activations_give_what_the_frozen_layer_gives(qtype: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        prepared = layer(qtype, activations=qtype, dtype=dtype, bias=bias).to(dtype)
        x = (inputs(3, 8, IN) * 2).to(dtype)  # of which some saturate
        y = prepared(x)
        model = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).to(dtype)
        qat.prepare(model, qat.QuantSpec.model_validate({"weights": qtype, "activations": qtype, "dtype": dtype}))
        model[0].load_state_dict(prepared.state_dict())
        qat.freeze(model)
        assert torch.equal(y, model(x).dequantize())


def test_codes_are_multiplied_only_where_nothing_else_is_rounded() -> None:
    module, x = layer("int8", activations="int8", dtype=torch.bfloat16), inputs(3, IN)

    def multiplies(module: QLinear, x: Tensor, dtype: torch.dtype) -> bool:
        calls: list[object] = []
        quantizer = module.weight_quantizer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantizer, "quantize_to_codes", lambda w: calls.append(w) or quantizer.quantize(w, dtype))
            module(x)
        return bool(calls)

    assert not multiplies(module, x, torch.float32)  # computes in float32, and is served in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert multiplies(module, x, torch.bfloat16)
    module.to(torch.bfloat16)
    assert multiplies(module, x.bfloat16(), torch.bfloat16)
    module.mode = Mode(codes=False)
    assert not multiplies(module, x.bfloat16(), torch.bfloat16)
    assert not multiplies(layer("int4", activations="int8"), x, torch.float32)
    assert not multiplies(layer("float8", activations="int8"), x, torch.float32)
    assert not multiplies(layer("int8"), x, torch.float32)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_quantized_activations_keep_nine_bits_an_input_and_one_an_output(weights: str) -> None:
    module = layer(weights, activations="int8")
    x = inputs(32, IN).requires_grad_()
    kept, y = kept_by(lambda: module(x))
    scales = 4 * OUT * (4 if weights in ("int4", "int2") else 1)  # and shifts, of two groups a row
    assert kept.beyond(module.weight) <= (9 * x.numel() + y.numel()) / 8 + scales + 64
    assert kept.beyond(module.weight) < 4 * x.numel()


def test_float8_gradients_are_used_where_the_algorithm_asks_for_them() -> None:
    torch.manual_seed(0)
    spec = qat.QuantSpec(weights="float8", activations="float8", dtype="float32")
    x, gradients = torch.randn(32, 64), []
    for float8 in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
        qat.prepare(model, spec, algorithm=qat.StraightThrough(float8_backward=float8))
        qat.calibrate(model, [x])
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        gradients.append([given.grad, model[0].weight.grad, model[2].weight.grad])
        odd = model(x[:30])  # rows that no fast kernel takes get the exact gradient
        odd.square().sum().backward()
    for exact, near in zip(*gradients, strict=True):
        assert exact is not None
        assert near is not None
        assert 0.001 < (near - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("serving", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("qtype", ["int8", "float8"])
def test_under_autocast_to_the_serving_dtype_a_float32_layer_gives_what_the_frozen_one_gives(
    qtype: str, serving: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(IN, OUT)), inputs(5, IN) * 3
    qat.prepare(model, qat.QuantSpec.model_validate({"weights": qtype, "activations": qtype, "dtype": serving}))
    qat.calibrate(model, [x])
    with torch.autocast("cpu", serving):
        y = model(x)
    qat.freeze(model)
    assert torch.equal(y, model(x.to(serving)).dequantize())


def test_an_empty_batch_has_float8_gradients_too() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    spec = qat.QuantSpec(weights="float8", activations="float8", dtype="float32")
    qat.prepare(model, spec, algorithm=qat.StraightThrough(float8_backward=True))
    qat.calibrate(model, [torch.randn(4, 32)])
    model(torch.randn(0, 32)).sum().backward()
    assert not model[0].weight.grad.any()
