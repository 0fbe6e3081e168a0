"""Packed weights hold what they were given, and the mark that keeps biases stays through copies and moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import SpecError
from qat.formats import QUANTO, FrozenLayer
from qat.numerics import QType
from qat.quantizers import StraightThrough
from qat.tensors import digest
from tests.helpers import DTYPES, same_bits

QTYPES = QUANTO.qtypes


def frozen(
    qtype: QType, rows: int = 64, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, FrozenLayer]:
    """The trained value and the record of a layer with 256 inputs."""
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    final, value = StraightThrough().make(weight, qtype, dtype).freeze(weight)
    one = torch.ones((), dtype=dtype)
    types = QUANTO.types(qtype.name, None, dtype)
    return value, FrozenLayer(final, torch.randn(rows).to(dtype) if bias else None, types, one, one)


def built(layer: FrozenLayer, *, plain_on_cpu: bool = False) -> Any:
    out_features, in_features = layer.weight.shape
    shape = (out_features, in_features)
    return QUANTO.build(layer.types, shape, QUANTO.pack(layer), like=nn.Linear(2, 2), plain_on_cpu=plain_on_cpu)


@pytest.mark.parametrize("plain_on_cpu", [False, True])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_packed_weight_is_the_trained_one(qtype: QType, rows: int, plain_on_cpu: bool) -> None:
    trained, layer = frozen(qtype, rows)
    module = built(layer, plain_on_cpu=plain_on_cpu)
    assert torch.equal(module.weight.dequantize(), trained)
    assert torch.equal(QUANTO.values(module), trained)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_what_is_packed_and_built_is_read_again(qtype: QType, rows: int, dtype: torch.dtype, bias: bool) -> None:
    trained, layer = frozen(qtype, rows, bias=bias, dtype=dtype)
    tensors = QUANTO.pack(layer)
    slots = QUANTO.slots(layer.types, (rows, 256), bias)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == {
        key: (slot.dtype, slot.shape) for key, slot in slots.items()
    }
    assert {key for key, slot in slots.items() if slot.is_code} == {key for key in tensors if "._data" in key}
    assert QUANTO.nbytes(layer.types, (rows, 256)) == sum(
        t.numel() * t.itemsize for key, t in tensors.items() if key.startswith("weight")
    )
    module = built(layer)
    assert QUANTO.is_frozen(module)
    assert not QUANTO.is_frozen(nn.Linear(2, 2))
    again = QUANTO.read(module)
    assert QUANTO.declared(module) == again.types == layer.types
    assert same_bits(again.weight.codes, layer.weight.codes)
    assert same_bits(again.weight.scale, layer.weight.scale)
    assert (again.weight.shift is None) is (layer.weight.shift is None)
    assert again.weight.shift is None or layer.weight.shift is None or same_bits(again.weight.shift, layer.weight.shift)
    assert same_bits(again.weight.dequantize(), trained)
    assert again.evidence(digest(trained)) == layer.evidence(digest(trained))


@pytest.mark.parametrize("plain_on_cpu", [False, True])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_weight_that_moved_is_settled_in_the_class_of_its_loader(qtype: QType, plain_on_cpu: bool) -> None:
    trained, layer = frozen(qtype)
    module = built(layer, plain_on_cpu=plain_on_cpu)
    wanted = type(module.weight.data)
    assert QUANTO.is_settled(module, plain_on_cpu=plain_on_cpu)
    module.to("cpu")
    moved = type(module.weight.data) is not wanted
    assert QUANTO.is_settled(module, plain_on_cpu=plain_on_cpu) is not moved
    QUANTO.settle(module, plain_on_cpu=plain_on_cpu)
    assert type(module.weight.data) is wanted
    assert QUANTO.is_settled(module, plain_on_cpu=plain_on_cpu)
    assert torch.equal(module.weight.dequantize(), trained)


def test_codes_that_a_file_leaves_unaligned_are_copied() -> None:
    trained, layer = frozen(QTYPES["int8"])
    tensors = QUANTO.pack(layer)
    codes = tensors["weight._data"]
    shifted = torch.empty(codes.numel() + 1, dtype=codes.dtype)[1:].view(codes.shape).copy_(codes)
    assert shifted.data_ptr() % 64
    module: Any = QUANTO.build(layer.types, (64, 256), tensors | {"weight._data": shifted}, like=nn.Linear(2, 2))
    assert module.weight._data.data_ptr() % 64 == 0
    assert torch.equal(module.weight.dequantize(), trained)


def test_the_mark_that_keeps_a_bias_stays() -> None:
    trained, layer = frozen(QTYPES["float8"])
    assert built(layer).weight.activation_qtype is None
    _, layer = frozen(QTYPES["float8"], bias=True)
    module = built(layer)
    parameter = module.weight
    QUANTO.settle(module, plain_on_cpu=False)
    for held in (parameter, parameter.detach(), parameter.to("cpu"), module.to("cpu").weight, module.weight):
        assert held.activation_qtype.name == "qfloat8_e4m3fn"
        assert torch.equal(held.dequantize(), trained)
    assert QUANTO.declared(module) == layer.types  # the mark is one of the weight, not of the layer


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_other_types_need_no_mark(name: str) -> None:
    _, layer = frozen(QTYPES[name], bias=True)
    assert getattr(built(layer).weight, "activation_qtype", None) is None


@pytest.mark.parametrize("biased", [True, False])
def test_frozen_float8_layers_with_a_bias_are_marked_and_named_by_inspection(biased: bool) -> None:
    model = nn.Sequential(nn.Linear(256, 64, bias=biased))
    spec = qat.QuantSpec(weights="float8")
    report = qat.inspect(model, spec)
    assert any("leaves out on a CUDA GPU" in note for note in report.notes) is biased
    qat.prepare(model, spec)
    qat.freeze(model, allow_unreached=True)
    assert (model[0].weight.activation_qtype is not None) is biased


@pytest.mark.parametrize(
    ("weights", "activations", "dtype", "shape", "loses"),
    [
        ("float8", None, torch.bfloat16, (64, 128), True),
        ("float8", None, torch.float16, (128, 64), True),
        ("float8", None, torch.float32, (128, 128), False),
        ("float8", "float8", torch.bfloat16, (128, 128), False),
        ("float8", None, torch.bfloat16, (64, 64), False),
        ("int8", None, torch.bfloat16, (128, 128), False),
    ],
    ids=str,
)
def test_which_layers_lose_their_bias_on_cuda(
    weights: str, activations: str | None, dtype: torch.dtype, shape: tuple[int, int], loses: bool
) -> None:
    types = QUANTO.types(weights, activations, dtype)
    for notice in (notices := QUANTO.notices([(types, shape, True)])):
        for text in (notice.warning, notice.text):
            assert text.startswith("1 float8 layers have a bias that optimum-quanto 0.2.7 leaves out")
    assert len(notices) == loses
    assert not QUANTO.notices([(types, shape, False)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QUANTO.types("int3", None, torch.float32), r"weights: format 'quanto' has .*'int8'\], got 'int3'"),
        (lambda: QUANTO.types("int8", "int4", torch.float32), r"activations: .*\['float8', 'int8'\], got 'int4'"),
    ],
    ids=["weights", "activations"],
)
def test_a_type_that_the_format_lacks_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        call()
