"""Digests that are plain sha256, where the data of a tensor is, which tensors a file holds, and how two differ."""

from __future__ import annotations

import hashlib
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn

import qat
from qat.spec import QuantSpec
from qat.tensors import (
    Difference,
    difference,
    digest,
    inner_tensors,
    map_tensors,
    model_device,
    own_tensors,
    same_bits,
    stored_tensors,
)


def test_a_digest_is_the_sha256_of_the_bytes() -> None:
    values = torch.tensor([[1.5, -2.0], [0.0, 7.0]])
    expected = hashlib.sha256(np.array([1.5, -2.0, 0.0, 7.0], dtype="<f4").tobytes()).hexdigest()
    assert digest(values) == digest(values.t().contiguous().t()) == digest(nn.Parameter(values)) == expected
    assert digest(torch.tensor(3, dtype=torch.int8)) == hashlib.sha256(b"\x03").hexdigest()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float16], ids=str
)
def test_a_digest_reads_every_stored_dtype_and_notices_one_bit(dtype: torch.dtype) -> None:
    values = torch.arange(12.0).reshape(3, 4).to(dtype)
    altered = values.clone()
    altered.view(torch.uint8)[2, -1] ^= 1
    assert digest(values) != digest(altered)
    assert digest(values) == digest(values.reshape(4, 3))


def quantized() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(256, 16))
    qat.prepare(model, QuantSpec(weights="int4", dtype="float32"))
    qat.freeze(model, allow_unreached=True)
    return model


def test_the_parts_of_a_quantized_weight_hold_its_data() -> None:
    plain = torch.ones(2)
    assert inner_tensors(plain)[0] is plain
    parts = inner_tensors(quantized()[0].weight.data)  # type: ignore[arg-type]
    assert sorted(str(part.dtype) for part in parts) == ["torch.float32", "torch.float32", "torch.uint8"]
    assert all(type(part) is torch.Tensor for part in parts)


def test_the_device_of_a_model() -> None:
    assert model_device(quantized()).type == "cpu"
    assert model_device(nn.Linear(2, 2, device="meta")).type == "meta"
    assert model_device(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert model_device(nn.Identity()).type == "cpu"


def test_what_a_file_holds_of_a_model() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    model["two"] = model["one"]
    model["norm"].register_buffer("table", torch.ones(1), persistent=False)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert [name for name, _ in own_tensors(model["norm"])] == list(norm)
    assert [name for name, _ in own_tensors(nn.Linear(2, 2, bias=False))] == ["weight"]
    linear = [f"{name}.{key}" for name in ("one", "two") for key in ("weight", "bias")]
    assert sorted(name for name, _ in stored_tensors(model)) == sorted([*linear, *(f"norm.{key}" for key in norm)])
    assert stored_tensors(model["one"]).__next__()[1] is model["one"].weight


def test_a_function_reaches_the_tensors_in_every_container() -> None:
    batch = [UserDict({"x": torch.ones(1), "n": 3}), (torch.zeros(1), None), {"y": [torch.ones(1)]}]
    assert map_tensors(lambda x: x + 1, batch) == [
        {"x": torch.tensor([2.0]), "n": 3},
        (torch.tensor([1.0]), None),
        {"y": [torch.tensor([2.0])]},
    ]


def test_how_two_tensors_differ() -> None:
    one = torch.tensor([1.0, 2.0, 3.0])
    assert difference(one, one.clone()) is None
    other = difference(one, torch.tensor([1.0, 2.5, 3.0]))
    assert other == Difference(1, 3, 0.5)
    assert str(other) == "1 of 3 numbers differ, by up to 0.5"
    assert not other.forms
    nan = difference(one, torch.tensor([1.0, float("nan"), 3.0]))
    assert nan == Difference(1, 3, float("inf"))
    zeros = difference(torch.zeros(2), -torch.zeros(2))  # equal numbers, other bits
    assert zeros == Difference(0, 2, 0.0)
    cast = difference(one, one.bfloat16())
    assert str(cast) == "torch.bfloat16 (3,) instead of torch.float32 (3,)"
    assert cast is not None
    assert cast.forms
    assert str(difference(one, one[:2])) == "torch.float32 (2,) instead of torch.float32 (3,)"


@pytest.mark.parametrize("count", [0, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_same_bits_are_more_than_equal_numbers(count: int, dtype: torch.dtype) -> None:
    bits = torch.arange(count * dtype.itemsize, dtype=torch.uint8)
    held = torch.cat([bits.new_zeros(dtype.itemsize), bits]).view(dtype)[1:]  # of another offset in its memory
    assert same_bits(held, bits.view(dtype))
    assert not same_bits(held, torch.cat([held, held[:1]]) if count else held[None])
    for at in range(len(bits)):
        other = bits.clone()
        other[at] ^= 1
        assert not same_bits(held, other.view(dtype))


def test_same_bits_tell_zeros_and_dtypes_apart_and_know_not_a_number() -> None:
    zeros, nan = torch.zeros(2, 2), torch.full((3,), float("nan"))
    assert not same_bits(zeros, -zeros)
    assert not same_bits(zeros, zeros.int())
    assert not same_bits(zeros, zeros.view(4))
    assert same_bits(zeros, zeros.t())
    assert same_bits(nan, nan.clone())
