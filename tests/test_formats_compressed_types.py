"""compressed-tensors' grid and packing, held against the package itself: 600 seeded layers, byte for byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from torch import Tensor

import qat
from qat.formats import COMPRESSED_TENSORS, FrozenLayer
from qat.formats.compressed_tensors import _arguments
from qat.formats.compressed_types import QTYPES, pack_words, unpack_words
from qat.layers.functional import fake_quantized
from qat.numerics import QType
from qat.quantizers import LearnedAffine, StraightThrough
from tests.helpers import DTYPES, awkward_weight, one_sided_weight, same_bits

NAMES = sorted({qtype.name for qtype in QTYPES.values()})


def test_a_name_has_the_group_and_the_short_one_means_128() -> None:
    assert QTYPES["int4"] is QTYPES["int4_g128"]
    assert QTYPES["int2"] is QTYPES["int2_g128"]
    sizes = {name: qtype.group_size(256) for name, qtype in QTYPES.items()}
    assert (sizes["int8"], sizes["float8"], sizes["int4_g32"], sizes["int2_g64_zp"]) == (None, None, 32, 64)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(("rows", "length"), [(3, 32), (5, 96), (1, 7), (4, 33)])
def test_words_are_those_of_the_package(bits: int, rows: int, length: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, length), dtype=torch.uint8)
    signed = codes.to(torch.int8) - 2 ** (bits - 1)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(pack_words(codes.t(), bits).t(), pack_to_int32(signed, bits, packed_dim=0)[:, :length])
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, length), codes)


def by_the_package(layer: FrozenLayer, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The value by the package's own unpacking and arithmetic, and its codes from -2^(b-1) up."""
    qtype, shape = layer.weight.qtype, layer.weight.shape
    arguments, scale = QuantizationArgs(**_arguments(qtype)), stored["weight_scale"]
    if "weight" in stored:
        return dequantize(stored["weight"], scale, args=arguments), stored["weight"]
    codes, zero = unpack_from_int32(stored["weight_packed"], qtype.bits, stored["weight_shape"]), None
    if "weight_zero_point" in stored:
        zero = unpack_from_int32(stored["weight_zero_point"], qtype.bits, torch.Size((shape[0], scale.shape[1])), 0)
    return dequantize(codes, scale, zero, arguments), codes


def frozen_layer(
    weight: Tensor, qtype: QType, dtype: torch.dtype, algorithm: qat.Algorithm
) -> tuple[FrozenLayer, Tensor]:
    frozen, value = algorithm.make(weight, qtype, dtype).freeze(weight)
    one = torch.ones((), dtype=dtype)
    return FrozenLayer(frozen, None, COMPRESSED_TENSORS.types(qtype.name, None, dtype), one, one), value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_what_the_package_unpacks(name: str, dtype: str) -> None:
    """14 types, 3 dtypes, 15 layers each, 630 in all: rows of very different sizes, one-sided groups."""
    qtype, serving = QTYPES[name], DTYPES[dtype]
    weights = [awkward_weight(12, 128 * (1 + seed % 2), seed) for seed in range(14)]
    for weight in (*weights, one_sided_weight()):
        layer, trained = frozen_layer(weight, qtype, serving, StraightThrough())
        stored = COMPRESSED_TENSORS.pack(layer)
        shape = (weight.shape[0], weight.shape[1])
        assert {key: (t.dtype, tuple(t.shape)) for key, t in stored.items()} == {
            key: (slot.dtype, slot.shape) for key, slot in COMPRESSED_TENSORS.slots(layer.types, shape, False).items()
        }
        value, codes = by_the_package(layer, stored)
        assert same_bits(value, trained)
        assert same_bits(layer.weight.dequantize(), trained)
        assert torch.equal(
            codes.float(), layer.weight.codes.float() - (2 ** (qtype.bits - 1) if qtype.has_shift else 0)
        )


@pytest.mark.parametrize("name", [name for name in NAMES if not QTYPES[name].floating])
def test_the_packages_own_compression_of_the_values_gives_the_same_bytes(name: str) -> None:
    """In float32, where its quantization loses nothing."""
    from compressed_tensors.compressors import BaseCompressor

    layer, value = frozen_layer(awkward_weight(16, 256, 3), QTYPES[name], torch.float32, StraightThrough())
    stored, arguments = COMPRESSED_TENSORS.pack(layer), QuantizationArgs(**_arguments(QTYPES[name]))
    state = {"weight": value, "weight_scale": stored["weight_scale"]}
    if "weight_zero_point" in stored:
        shape = torch.Size((16, stored["weight_scale"].shape[1]))
        state["weight_zero_point"] = unpack_from_int32(stored["weight_zero_point"], QTYPES[name].bits, shape, 0)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    assert theirs.keys() == stored.keys()
    assert all(torch.equal(theirs[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_rows_of_8_bits_are_those_of_the_package(name: str) -> None:
    layer, value = frozen_layer(awkward_weight(16, 96, 5), QTYPES[name], torch.float32, StraightThrough())
    layer = replace(layer, types=COMPRESSED_TENSORS.types(name, name, torch.float32))  # int8 alone is packed
    stored, arguments = COMPRESSED_TENSORS.pack(layer), QuantizationArgs(**_arguments(QTYPES[name]))
    storage = QTYPES[name].storage
    theirs = quantize(value, stored["weight_scale"].clamp(min=1e-30), None, arguments, dtype=storage)  # type: ignore[arg-type]
    assert torch.equal(theirs.float(), stored["weight"].float())


@pytest.mark.parametrize("bits", [4, 2])
def test_a_zero_point_is_a_code_and_zero_is_a_value(bits: int) -> None:
    qtype = QTYPES[f"int{bits}_g64_zp"]
    layer, value = frozen_layer(one_sided_weight(), qtype, torch.bfloat16, StraightThrough())
    assert layer.weight.shift is not None
    zeros = (layer.weight.shift.float() / layer.weight.scale.float()).round()
    assert zeros.min() >= 0
    assert zeros.max() <= 2**bits - 1
    ends = zeros.view(4, -1)
    assert bool((ends[0] == 0).all())  # groups above zero
    assert bool((ends[1] == 2**bits - 1).all())  # groups below
    assert float(value[0].min()) >= 0.0
    silent = torch.zeros(4, 64)
    assert same_bits(frozen_layer(silent, qtype, torch.bfloat16, LearnedAffine())[1], silent.bfloat16())


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_zp", "int2_g64", "int2_g64_zp"])
def test_learned_ranges_come_nearer_to_the_weight(name: str) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).pow(3)
    quantizer = LearnedAffine().make(weight, QTYPES[name], torch.bfloat16)
    optimizer, errors = torch.optim.Adam(quantizer.parameters(), lr=0.02), []
    for parameter in quantizer.parameters():
        parameter.data += 0.8  # a range that is far too wide
    for _ in range(30):
        value = fake_quantized(weight, quantizer.quantize(weight, torch.float32), quantizer)
        error = (value - weight).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("algorithm", [qat.StretchedElastic(), LearnedAffine(start="seq")])
def test_half_a_zero_point_is_refused(algorithm: qat.Algorithm) -> None:
    with pytest.raises(qat.SpecError, match="float shift"):
        algorithm.make(awkward_weight(4, 64), QTYPES["int2_g32_zp"], torch.bfloat16)
