"""Which blocks are found."""

from __future__ import annotations

import pytest
from torch import nn

import qat
from qat.blocks import find_blocks
from qat.errors import SpecError


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 128)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(128, 128)) for _ in range(experts))


def test_blocks_of_float_and_prepared_models_are_the_same() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block(), Block()]), "head": nn.Linear(128, 2)})
    names = [f"layers.{number}" for number in range(3)]
    assert list(find_blocks(model)) == names
    qat.prepare(model, qat.QuantSpec(weights="int4"))
    assert list(find_blocks(model)) == names


def test_experts_inside_a_block_are_no_blocks() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(3), Block(3)])})
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]


def test_a_model_of_one_block_has_one() -> None:
    assert list(find_blocks(nn.ModuleDict({"layers": nn.ModuleList([Block()])}))) == ["layers.0"]


def test_encoder_and_decoder_both_count() -> None:
    model = nn.ModuleDict({part: nn.ModuleList([Block(), Block()]) for part in ("encoder", "decoder")})
    assert list(find_blocks(model)) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Sequential(Block()),
    ],
    ids=["layer", "list of layers", "sequence of one"],
)
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(SpecError, match="no list of blocks of one class"):
        find_blocks(model)
