"""A weight out of the order of the CPU's int4 kernel: the very numbers that quanto's own way gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat import QuantSpec, freeze, prepare
from qat.formats import QUANTO, quanto_tinygemm
from qat.formats.quanto_tinygemm import is_tinygemm_on_cpu, plain, tinygemm_from_plain, unpacked

SHAPES = [(16, 256), (32, 256), (48, 256), (64, 384), (80, 256), (128, 512), (176, 256), (208, 640)]


def tinygemm(rows: int, columns: int, seed: int = 0) -> nn.Module:
    """A frozen int4 layer in bfloat16, which quanto holds in the kernel's class."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns, rows, dtype=torch.bfloat16))
    prepare(model, QuantSpec(weights="int4"))
    freeze(model)
    assert type(model[0].weight).__name__ == "TinyGemmWeightQBitsTensor"
    return model[0]


def parts(weight: object) -> list[Tensor]:
    return [weight._data.unpack(), weight._scale, weight._shift]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_codes_scales_and_shifts_are_those_of_quantos_own_way(rows: int, columns: int) -> None:
    weight = tinygemm(rows, columns).weight
    assert is_tinygemm_on_cpu(weight)
    assert quanto_tinygemm._block(rows, columns) is not None, "the fast way is not taken here"
    found, wanted = plain(weight), weight.weight_qbits_tensor()
    assert type(found) is type(wanted)
    assert (found.shape, found.stride(), found.qtype, found.axis) == (
        wanted.shape,
        wanted.stride(),
        wanted.qtype,
        wanted.axis,
    )
    for ours, theirs in zip(parts(found), parts(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (1200, 640)])
def test_packing_by_the_order_gives_the_kernel_its_very_numbers(rows: int, columns: int) -> None:
    plain = tinygemm(rows, columns).weight.weight_qbits_tensor()
    found, wanted = tinygemm_from_plain(plain), plain.optimize()
    assert type(found) is type(wanted)
    assert (found.shape, found.stride(), found._data.size()) == (wanted.shape, wanted.stride(), wanted._data.size())
    for ours, theirs in ((found._data._data, wanted._data._data), (found._scale_shift, wanted._scale_shift)):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_codes_are_unpacked_as_quanto_does(rows: int, bits: int) -> None:
    from optimum.quanto.tensor.packed import PackedTensor

    codes = torch.randint(2**bits, (rows, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    packed = PackedTensor.pack(codes, bits)
    assert torch.equal(unpacked(packed), codes)
    assert torch.equal(packed.unpack(), codes)


def test_values_are_those_of_quantos_own_way() -> None:
    layer = tinygemm(80, 256)
    assert torch.equal(QUANTO.values(layer), layer.weight.dequantize())


def test_an_unknown_order_is_left_to_quanto(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tinygemm(64, 256)
    fast = parts(plain(layer.weight))
    monkeypatch.setattr(quanto_tinygemm, "_BLOCKS", (48,))  # neither processor's
    quanto_tinygemm._block.cache_clear()
    try:
        assert quanto_tinygemm._block(64, 256) is None
        slow = parts(plain(layer.weight))
    finally:
        quanto_tinygemm._block.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_other_weights_are_none_of_the_kernels() -> None:
    model = nn.Sequential(nn.Linear(256, 64))
    prepare(model, QuantSpec(weights="int8", dtype="float32"))
    freeze(model)
    assert not is_tinygemm_on_cpu(model[0].weight)
