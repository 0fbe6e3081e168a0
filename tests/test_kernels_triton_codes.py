"""The kernels for codes against their specification on the same device; needs a Hopper GPU and is skipped without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qat
from qat import kernels
from qat.formats import QUANTO
from qat.kernels import triton_codes
from qat.layers import QLinear
from qat.numerics import QType, pack_bits, unpack_bits
from qat.observers import Absmax
from qat.quantizers import StraightThrough
from qat.quantizers.activation import ActivationQuantizer
from tests.helpers import same_bits

BYTES = [QUANTO.qtypes[name] for name in ("int8", "float8")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and triton_codes.supports(torch.ones(1, device="cuda"))),
    reason="needs a CUDA GPU of compute capability 9.0 and Triton",
)


@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=lambda dtype: f"given {dtype}")
def test_activations_are_those_of_the_specification(qtype: QType, dtype: torch.dtype, given: torch.dtype) -> None:
    for shape in ((3, 5, 64), (2, 17, 4096), (1, 1000), (8,), (0, 4)):
        x = (torch.randn(shape, device="cuda") * 2).to(given)
        scale = torch.tensor(0.013, device="cuda").to(dtype).float()
        codes, inside, found = kernels.quantize_activation(x, scale, qtype.key, dtype)
        for device in ("cuda", "cpu"):
            wanted, flags = qtype.encode_activation(x.to(device), scale.to(device), dtype)
            assert same_bits(codes.to(device), wanted)
            assert torch.equal(unpack_bits(inside, x.shape).to(device), flags)
        assert torch.equal(found, scale)
        value = kernels.dequantize(codes, scale, dtype, given)
        assert torch.equal(value, qtype.fake_quantize_activation(x, scale, dtype))
        found, flags_too = kernels.fake_quantize_activation(x, scale, qtype.key, dtype)
        assert torch.equal(found, value)
        assert torch.equal(unpack_bits(flags_too, x.shape), unpack_bits(inside, x.shape))
        grad = torch.randn_like(x)
        assert torch.equal(kernels.masked_gradient(grad, inside).cpu(), torch.where(flags, grad.cpu(), 0))


@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_a_weight_have_the_values_that_were_quantized(qtype: QType, dtype: torch.dtype) -> None:
    for shape in ((3, 5), (300, 384), (130, 3000), (64, 14336), (1, 8), (5000, 1)):
        weight = torch.randn(shape, device="cuda") * 0.05
        codes, scale, _ = kernels.quantize_own_range(weight, qtype.key, dtype, qtype.storage)
        for out_dtype in {dtype, torch.float32}:
            expected = kernels.fake_quantize_weight(weight, scale, None, qtype.key, dtype, out_dtype)
            assert same_bits(kernels.dequantize(codes, scale, dtype, out_dtype), expected)


def test_the_gradient_of_an_input_is_masked_where_it_saturated() -> None:
    grad = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    for share in (0.0, 0.0001, 0.5):
        flags = torch.rand(512, 4096, device="cuda") >= share
        found = kernels.masked_product(grad, weight, pack_bits(flags))
        assert torch.equal(found, torch.where(flags, grad @ weight, 0))


@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_not_a_number_is_not_hidden(qtype: QType) -> None:
    x = torch.randn(100, 64, device="cuda")
    x[3, 4] = torch.nan
    options = (torch.tensor(0.01, device="cuda"), qtype.key, torch.bfloat16)
    assert kernels.quantize_activation(x, *options)[2].isnan()
    assert kernels.fake_quantize_activation(x, *options)[0].isnan().nonzero().tolist() == [[3, 4]]


def codes_and_scales(qtype: QType, dtype: torch.dtype, rows: int, depth: int, columns: int) -> tuple[Tensor, ...]:
    x, weight = (torch.randn(n, depth, device="cuda").mul_(60).clamp_(-128, 127) for n in (rows, columns))
    scales = torch.full((), 0.013, device="cuda"), torch.rand(columns, 1, device="cuda") * 1e-3 + 1e-4
    x_scale, scale = (one.to(dtype).float() for one in scales)
    return x.to(qtype.storage), x_scale, weight.to(qtype.storage), scale


SHAPES = [
    (24, 64, 32),
    (8192, 4096, 1024),
    (2400, 4096, 4096),
    (24, 24, 24),
    (7, 64, 64),
    (40, 14336, 272),
    (1, 64, 16),
]


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_products_are_those_of_stock_quanto(
    qtype: QType, dtype: torch.dtype, shape: tuple[int, int, int], biased: bool
) -> None:
    import optimum.quanto  # noqa: F401

    torch.manual_seed(0)
    x, x_scale, weight, scale = codes_and_scales(qtype, dtype, *shape)
    bias = torch.randn(shape[2], device="cuda").to(dtype) if biased else None
    found = kernels.linear_codes(x, x_scale, weight, scale, bias, qtype.key, dtype)
    served = torch.ops.quanto.qbytes_mm(x, weight, x_scale.to(dtype) * scale.to(dtype))
    served = served if bias is None else served + bias
    if not (qtype.floating and dtype is torch.bfloat16):
        assert torch.equal(found, served)
        return
    exact = (x.double() @ weight.double().t()) * (x_scale.double() * scale.double().t())
    exact = exact if bias is None else exact + bias.double()
    ours, theirs = (float((y.double() - exact).norm() / exact.norm()) for y in (found, served))
    assert ours < 1.05 * theirs < 0.005  # bfloat16's half unit is 0.004


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_an_output_quantized_with_its_product_has_the_bits_of_two_steps(
    qtype: QType, dtype: torch.dtype, shape: tuple[int, int, int], biased: bool
) -> None:
    torch.manual_seed(0)
    factors = codes_and_scales(qtype, dtype, *shape)
    bias = torch.randn(shape[2], device="cuda").to(dtype) if biased else None
    y = kernels.linear_codes(*factors, bias, qtype.key, dtype)
    y_scale = (y.float().std() / qtype.steps).to(dtype).float()  # so that a third saturates
    expected, flags = kernels.fake_quantize_activation(y, y_scale, qtype.key, dtype)
    found, inside = kernels.linear_codes_quantized(*factors, bias, y_scale, qtype.key, qtype.key, dtype)
    assert same_bits(found, expected)
    assert torch.equal(unpack_bits(inside, y.shape), unpack_bits(flags, y.shape))
    assert y.numel() < 1000 or 0.1 < unpack_bits(inside, y.shape).float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master", [torch.float32, None], ids=["float32 master", "half master"])
def test_an_int8_layer_with_quantized_outputs_gives_what_the_frozen_one_gives(
    dtype: torch.dtype, master: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 128)).cuda().to(master or dtype), torch.randn(64, 256, device="cuda")
    x = x.to(master or dtype)
    qat.prepare(model, qat.QuantSpec.model_validate({"weights": "int8", "activations": "int8", "dtype": dtype}))
    with torch.autocast("cuda", dtype, enabled=master is not None):
        qat.calibrate(model, [x])
        y = model(x * 3)
    qat.freeze(model)
    assert torch.equal(y, model((x * 3).to(dtype)).dequantize())


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("outputs", [False, True], ids=["", "outputs"])
@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_compiled_layers_equal_eager_ones_with_their_gradients(qtype: QType, outputs: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    master = torch.float32 if autocast else torch.bfloat16
    linear = nn.Linear(256, 128, device="cuda", dtype=master)
    activations = [ActivationQuantizer(qtype, torch.bfloat16, Absmax()).cuda() for _ in range(1 + outputs)]
    for activation, largest in zip(activations, (2.0, 1.0), strict=False):
        activation.observe(torch.full((1,), largest, device="cuda"))
        activation.refresh()
    layer = QLinear.adopt(linear, StraightThrough().make(linear.weight, qtype, torch.bfloat16), *activations)
    x = torch.randn(64, 256, device="cuda", dtype=master, requires_grad=True)
    results = []
    for called in (layer, torch.compile(layer, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = called(x)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    *exact, biases = zip(*results, strict=True)
    for eager, compiled in exact:
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    # A compiler does not round the bias's gradient to bfloat16 before it becomes one of float32.
    torch.testing.assert_close(*biases, rtol=2**-8 if autocast else 0, atol=0)


@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_a_kept_weight_gives_the_gradients_of_one_that_is_quantized_again(qtype: QType) -> None:
    torch.manual_seed(0)
    weight, x = (torch.randn(n, 256, device="cuda").bfloat16() for n in (128, 64))
    grad, results = torch.randn(64, 128, device="cuda").bfloat16(), []
    for master in (torch.bfloat16, torch.float32):  # of the same numbers
        linear = nn.Linear(256, 128, device="cuda", dtype=master)
        linear.weight.data.copy_(weight)
        linear.bias.data.zero_()
        activation = ActivationQuantizer(qtype, torch.bfloat16, Absmax()).cuda()
        activation.observe(torch.full((1,), 2.0, device="cuda"))
        activation.refresh()
        layer = QLinear.adopt(linear, StraightThrough().make(linear.weight, qtype, torch.bfloat16), activation)
        given = x.detach().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(given)
        of_x, of_weight = torch.autograd.grad(y, [given, layer.weight], grad)
        results.append([y.detach(), of_x, of_weight.bfloat16()])
    for again, kept in zip(*results, strict=True):
        assert torch.equal(again, kept)
