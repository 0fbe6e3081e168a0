"""GGUF's blocks, held against the package gguf and against diffusers' own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from diffusers.quantizers.gguf import utils as of_diffusers
from torch import Tensor

import qat
from qat.formats.gguf_types import BLOCK, FLOAT16_QTYPES, QTYPES, pack_blocks, unpack_blocks
from qat.layers import QLinear
from qat.layers.packed import PackedForm
from qat.numerics import QType, moved_range
from qat.quantizers import Algorithm
from qat.starts import DATA_STARTS, RANGE_STARTS
from qat.starts.base import Start, output_error
from tests.helpers import DTYPES, awkward_weight, same_bits

TYPES = [pytest.param(qtype, id=qtype.key) for table in (QTYPES, FLOAT16_QTYPES) for qtype in table.values()]
ALGORITHMS: list[Algorithm] = [
    qat.StraightThrough(),
    qat.LearnedAffine(),
    qat.LearnedAffine(start="hqq", mask_margin=0.5),
    qat.LearnedClipping(),
]


def by_gguf(blocks: Tensor, qtype: QType, dtype: torch.dtype) -> Tensor:
    kind = gguf.GGMLQuantizationType[qtype.name.upper()]
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)).to(dtype)


def by_diffusers(blocks: Tensor, qtype: QType, dtype: torch.dtype) -> Tensor:
    kind = gguf.GGMLQuantizationType[qtype.name.upper()]
    return of_diffusers.dequantize_gguf_tensor(of_diffusers.GGUFParameter(blocks, quant_type=kind)).to(dtype)


LOADERS: dict[str, Callable[[Tensor, QType, torch.dtype], Tensor]] = {"gguf": by_gguf, "gguf-float16": by_diffusers}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", TYPES)
def test_seeded_layers_are_what_the_loader_computes_bit_for_bit(qtype: QType, dtype: torch.dtype) -> None:
    for seed in range(100):
        weight = awkward_weight(1 + seed % 9, BLOCK * (1 + seed % 7), seed)
        frozen, trained = qat.StraightThrough().make(weight, qtype, dtype).freeze(weight)
        blocks = pack_blocks(frozen)
        assert same_bits(LOADERS[qtype.format](blocks, qtype, dtype), trained)
        again = unpack_blocks(blocks, qtype, dtype)
        assert same_bits(again.codes, frozen.codes)
        assert same_bits(again.scale, frozen.scale)
        assert again.shift is None or same_bits(again.shift, frozen.shift)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("qtype", TYPES)
def test_learned_ranges_keep_the_promise_too(algorithm: Algorithm, qtype: QType) -> None:
    for seed, dtype in enumerate(DTYPES.values()):
        weight = awkward_weight(5, 96, seed)
        quantizer = algorithm.make(weight, qtype, dtype)
        for amount in (0.0, 0.1, 2.0):  # the last makes ends cross
            with torch.no_grad():
                for parameter in quantizer.parameters():
                    parameter.add_(amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
            frozen, trained = quantizer.freeze(weight)
            assert bool(trained.isfinite().all())
            assert same_bits(LOADERS[qtype.format](pack_blocks(frozen), qtype, dtype), trained)


@pytest.mark.parametrize("qtype", TYPES)
def test_all_that_learned_affine_learns_gets_gradients(qtype: QType) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 8)
    quantizer = qat.LearnedAffine().make(layer.weight, qtype, torch.bfloat16)
    QLinear.adopt(layer, quantizer)(torch.randn(4, 96)).square().sum().backward()
    for parameter in (layer.weight, *quantizer.parameters()):
        assert parameter.grad is not None
        assert bool(parameter.grad.any())


@pytest.mark.parametrize("qtype", TYPES)
def test_starts_are_better_than_the_whole_range(qtype: QType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 64, generator=generator), torch.randn(256, 64, generator=generator)
    moments = x.t() @ x / len(x)

    def error(start: Start) -> float:
        return output_error(start, weight, qtype, torch.bfloat16, moments)

    whole = error(Start("minmax", qtype.weight_range(weight), weight))
    for name in ("clip", "hqq"):
        assert error(Start(name, RANGE_STARTS[name](weight, qtype, torch.bfloat16), weight)) <= whole
    for find in DATA_STARTS.values():
        assert error(find(weight, qtype, torch.bfloat16, moments)) < whole


@pytest.mark.parametrize("name", ["stretched_elastic", "dual_lsq"])
def test_other_algorithms_refuse_by_name(name: str) -> None:
    algorithm = {"stretched_elastic": qat.StretchedElastic, "dual_lsq": qat.DualLSQ}[name]()
    with pytest.raises(qat.SpecError, match="choose another algorithm such as LearnedAffine"):
        algorithm.make(torch.ones(4, 32), QTYPES["q4_0"], torch.float32)


def test_automatic_learns_ranges_at_four_bits_alone() -> None:
    made = {name: qat.Automatic().for_type(qtype).kind for name, qtype in QTYPES.items()}
    assert made == {"q8_0": "straight_through", "q4_0": "learned_affine", "q4_1": "learned_affine"}


@pytest.mark.parametrize("qtype", TYPES)
def test_our_own_range_is_no_worse_than_that_of_the_package(qtype: QType) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType[qtype.name.upper()]
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    ours = qat.StraightThrough().make(weight, qtype, torch.float32).freeze(weight)[1]
    assert (ours - weight).square().sum() <= 1.001 * (theirs - weight).square().sum()


def test_the_largest_magnitude_of_q4_0_gets_the_code_minus_eight() -> None:
    weight = torch.tensor([[0.8] + 31 * [0.1], [-0.8] + 31 * [0.1]])
    frozen = qat.StraightThrough().make(weight, QTYPES["q4_0"], torch.float32).freeze(weight)[0]
    assert frozen.codes[:, 0].tolist() == [-8, -8]
    assert (frozen.scale.sign().flatten().tolist(), frozen.scale.dtype) == ([-1.0, 1.0], torch.float16)


def test_a_range_from_zero_to_a_negative_end_mirrors_one_to_a_positive_end() -> None:
    ends = torch.tensor([[-2.0], [2.0]])
    for move in (0.5, 0.0, -0.9, -0.999, -3.0):
        _, high = moved_range(None, ends, None, torch.full((2, 1), move))
        assert high[0] == -high[1]
        assert abs(high[1]) >= 2 / 128


def test_float16_ends_where_it_ends() -> None:
    for qtype in QTYPES.values():
        frozen, _ = qat.StraightThrough().make(torch.ones(1, 32), qtype, torch.float32).freeze(torch.full((1, 32), 1e9))
        assert bool(frozen.scale.isfinite().all())


def test_a_group_that_float16_holds_no_scale_for_follows_its_weights() -> None:
    weight = torch.full((1, 32), 1e-7)
    quantizer = qat.LearnedAffine().make(weight, QTYPES["q8_0"], torch.float32)
    assert bool(quantizer.quantize(torch.ones(1, 32), torch.float32).value.round().eq(1).all())


@pytest.mark.parametrize("qtype", TYPES)
def test_an_adapters_base_holds_such_codes_too(qtype: QType) -> None:
    weight = awkward_weight(4, 64)
    frozen, trained = qat.StraightThrough().make(weight, qtype, torch.bfloat16).freeze(weight)
    form: Any = PackedForm(qtype, frozen.shape, torch.bfloat16, torch.float32)
    assert torch.equal(form.weight(form.pack(frozen.codes), frozen.scale, frozen.shift), trained.float())
