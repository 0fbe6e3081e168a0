"""`QLinear` with quantized activations: it multiplies codes where the loader does, and gives what the loader gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat import kernels
from qat.layers import Mode, QLinear, QuantizedLayer
from tests.helpers import DTYPES, WEIGHT_TYPES, kept_by
from tests.test_layers import IN, OUT, inputs, layer, served


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
    with torch.no_grad():
        model[0].weight *= 100  # so that float16 holds the product of the scales
    qat.prepare(model, qat.QuantSpec.model_validate({"weights": qtype, "activations": qtype, "dtype": serving}))
    assert not qat.calibrate(model, [x]).kept_float
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


def gradients_of(module: QLinear, x: Tensor, y: Tensor) -> list[Tensor]:
    """Those of a weighted sum, for input, weight and bias, and the gradient of the output, last."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [*torch.autograd.grad(y, [x, module.weight, module.bias], grad), grad]


@pytest.mark.parametrize("activations", [None, "int8", "float8"], ids=str)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_under_autocast_a_float32_master_is_quantized_once_a_step(weights: str, activations: str | None) -> None:
    module = layer(weights, activations=activations, dtype=torch.bfloat16)
    module.output_quantizer = None
    x = inputs(32, IN).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kept, y = kept_by(lambda: module(x))
    coded = weights == activations
    of_weight = module.weight.numel() * (1 if coded else 2)  # which a float layer keeps in bfloat16
    of_input = x.numel() * 2 if activations is None else x.numel() * 9 // 8
    assert kept.beyond(module.weight) <= of_weight + of_input + 2 * 4 * 2 * OUT + 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fake_quantize_weight", None)  # so that a second quantization would fail
        patch.setattr(kernels, "quantize_own_range", None)
        of_x, of_w, of_bias, grad = gradients_of(module, x, y)
    given = x.detach().bfloat16()
    wanted = grad @ served(module)
    if module.input_quantizer is not None:
        qtype, scale = module.input_quantizer.qtype, module.input_quantizer.scale
        inside = qtype.encode_activation(given, scale, torch.bfloat16)[1]
        assert not inside.all()
        given, wanted = qtype.fake_quantize_activation(given, scale, torch.bfloat16), wanted * inside
    assert torch.equal(of_x, wanted.float())
    assert torch.equal(of_w, (grad.t() @ given).float())
    assert torch.equal(of_bias, grad.sum(0).float())


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_a_master_in_the_compute_dtype_is_quantized_again_in_backward(weights: str) -> None:
    module = layer(weights, dtype=torch.bfloat16).to(torch.bfloat16)
    x = inputs(32, IN).bfloat16().requires_grad_()
    kept, y = kept_by(lambda: module(x))
    assert kept.beyond(x, module.weight) <= 4 * OUT + 64
    of_x, of_w, _, grad = gradients_of(module, x, y)
    assert torch.equal(of_x, grad @ served(module))
    assert torch.equal(of_w, grad.t() @ x.detach())


@pytest.mark.parametrize("activations", [None, "int8", "float8"], ids=str)
def test_a_kept_weight_bears_checkpointing_and_frozen_parts(activations: str | None) -> None:
    module, x = layer(activations or "int4", activations=activations, dtype=torch.bfloat16), inputs(32, IN)
    x.requires_grad_()
    results = []
    with torch.autocast("cpu", torch.bfloat16):
        for y in (module(x), checkpoint(module, x, use_reentrant=False)):
            results.append([y.detach(), *gradients_of(module, x, y)])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        kept, _ = kept_by(lambda: module(x.detach()))
        assert kept.beyond(module.weight) <= 2 * x.numel() + y.numel() + 2 * 4 * 2 * OUT + 64  # no copy of the weight
        module.weight.requires_grad_(False)
        assert torch.equal(torch.autograd.grad(module(x), x, results[0][-1])[0], results[0][1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", ["int8", "float8", "int4"])
def test_an_output_quantized_with_the_product_gives_what_two_steps_give(weights: str, dtype: torch.dtype) -> None:
    results = []
    for compute in (QLinear.compute_quantized, QuantizedLayer.compute_quantized):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QLinear, "compute_quantized", compute)
            module = layer(weights, activations="float8" if weights == "float8" else "int8", dtype=dtype).to(dtype)
            x = (inputs(3, 8, IN) * 2).to(dtype).requires_grad_()
            kept, y = kept_by(lambda: module(x))  # noqa: B023
            assert not y.isnan().any()
            results.append([y.detach(), *gradients_of(module, x, y)])
        assert kept.beyond(module.weight) <= (9 * x.numel() + y.numel()) / 8 + 2 * 4 * 2 * OUT + 64
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    output = module.output_quantizer
    assert output is not None
    assert (results[0][0].abs().max().float() / output.scale).round() >= output.qtype.steps  # some saturate
