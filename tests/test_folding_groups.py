"""What can be folded is found and keeps all bits; nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.folding.groups import power_of_two
from tests.diffusion_architectures import ARCHITECTURES
from tests.folding_models import INT8, Block, made, outputs, random_vectors, rows, state, unchanged
from tests.helpers import same_bits, tiny_model, tokens

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def batch_of(name: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    if name != "vit":
        return {"input_ids": tokens(seed=seed)}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)}


PRODUCERS = {
    "llama": {"input_layernorm", "post_attention_layernorm", "up_proj"},
    "opt": {"self_attn_layer_norm", "final_layer_norm", "v_proj", "fc1"},
    "vit": {"layernorm_before", "layernorm_after", "v_proj"},
    "bert": {"value"},  # each norm's output is added to what comes later, and GELU is no product
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRODUCERS)
def test_a_folded_model_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = random_vectors(tiny_model(name).to(dtype))
    batch, before = batch_of(name, dtype), state(model)
    wanted = [outputs(model, batch_of(name, dtype, seed)) for seed in range(3)]
    report = qat.fold_outliers(model, [batch], spec=INT8, strength=0.5)
    assert {group.producer.rpartition(".")[2] for group in report.groups} == PRODUCERS[name]
    assert len(report.groups) == 2 * len(PRODUCERS[name])  # two layers
    assert all(group.strength == 0.5 for group in report.groups)
    for group in report.groups:
        for reader in group.readers:
            assert not same_bits(model.state_dict()[f"{reader}.weight"], before[f"{reader}.weight"])
    for seed, expected in enumerate(wanted):
        found = outputs(model, batch_of(name, dtype, seed))
        assert all(same_bits(found[key], value) for key, value in expected.items())


def test_norms_whose_output_goes_elsewhere_too_are_left_out_by_name() -> None:
    report = qat.fold_outliers(tiny_model("bert"), [batch_of("bert", torch.float32)], spec=INT8)
    assert "encoder.layer.0.attention.output.LayerNorm" in report.left_out
    assert "norms cannot be folded: embeddings.LayerNorm" in str(report)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel"])
def test_adaptive_norms_are_folded_into_their_modulation(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = random_vectors(architecture.build()).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    batch, before = architecture.example(torch.float64), state(model)
    wanted = outputs(model, batch)
    report = qat.fold_outliers(model, [batch], spec=INT8, strength=0.5)
    producers = {group.producer for group in report.groups}
    norms = {n.partition(".norm")[0] + ".norm" for n in producers if ".norm" in n}
    assert norms == {f"{n}.norm" for n, _ in model.named_modules() if n.count(".") == 1 and "blocks." in n}
    assert any(not same_bits(model.state_dict()[f"{n}.weight"], before[f"{n}.weight"]) for n in producers)
    found = outputs(model, batch)
    for key, value in wanted.items():
        # One more rounding of 1 + scale, 2^-53 relative, times the depth and width of what follows.
        assert float((found[key] - value).abs().max()) <= 1e-12 * float(value.abs().max())


class OnePlus(nn.Module):
    """The norm of Gemma."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_that_adds_one_is_folded_where_that_can_be_told(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(OnePlus(), nn.Linear(16, 8)).to(dtype), rows(outlier=30).to(dtype)
    wanted, weight = outputs(model, x)["output"], model[0].weight.detach().clone()
    report = qat.fold_outliers(model, [x], spec=INT8, strength=0.75)
    if dtype is torch.bfloat16:
        assert report.left_out == ("0",)
        assert same_bits(model[0].weight.detach(), weight)
        return
    assert [group.producer for group in report.groups] == ["0"]
    factor = (1 + weight) / (1 + model[0].weight.detach())
    assert float(factor.max()) > 1.5
    assert bool((factor <= 2.001 * (1 + weight)).all())  # 1 + weight keeps its precision
    error = (outputs(model, x)["output"] - wanted).abs().max() / wanted.abs().max()
    assert float(error) <= 16 * torch.finfo(dtype).eps


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-8, 9)
    assert power_of_two(exponents).tolist() == [2.0**exponent for exponent in exponents.tolist()]


def test_what_clamps_is_found_although_no_number_of_the_batch_reaches_it() -> None:
    model = made(Block(torch.relu), Block(lambda x: x.clamp(-100, 100)), Block(nn.functional.relu6))
    read: list[Tensor] = []
    model[2].up.register_forward_hook(lambda _, args, y: read.append(y.detach()))  # type: ignore[union-attr, arg-type]
    report = qat.fold_outliers(model, [rows()], spec=INT8)
    assert float(read[0].max()) < 6
    assert [group.producer for group in report.groups] == ["0.norm", "1.norm", "2.norm", "0.up"]


def test_a_block_that_adds_nothing_yet_proves_nothing() -> None:
    model = made(Block(nn.functional.gelu, gate=0.0), Block(torch.relu))
    report = qat.fold_outliers(model, [rows()], spec=INT8)
    assert [group.producer for group in report.groups] == ["0.norm", "1.norm", "1.up"]


@pytest.mark.parametrize("different", range(4))
def test_the_one_of_a_kind_that_cannot_be_folded_is_found(different: int) -> None:
    model = made(*(Block(torch.tanh, post=index == different) for index in range(4)))
    wanted = outputs(model, rows())["output"]
    report = qat.fold_outliers(model, [rows()], spec=INT8, strength=0.5)
    assert report.left_out == (f"{different}.norm",)
    assert len(report.groups) == 3
    assert same_bits(outputs(model, rows())["output"], wanted)


class Shared(nn.Module):
    """One norm at two places, and a linear layer whose weight is used a second time where ``tied``."""

    def __init__(self, *, residual: bool, tied: bool) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.residual, self.tied = residual, tied

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.norm(x)))
        y = self.norm(x)
        y = self.second(y) + (y if self.residual else 0)
        return nn.functional.linear(y, self.first.weight) if self.tied else y


@pytest.mark.parametrize(("residual", "tied"), [(False, False), (True, False), (False, True)], ids=str)
def test_a_norm_or_a_weight_that_is_used_twice(residual: bool, tied: bool) -> None:
    torch.manual_seed(0)
    model = Shared(residual=residual, tied=tied)
    x, before = rows(outlier=30), state(model)
    wanted = outputs(model, x)["output"]
    report = qat.fold_outliers(model, [x], spec=INT8, strength=0.5)
    assert same_bits(outputs(model, x)["output"], wanted)
    if residual or tied:
        assert (report.groups, report.left_out) == ((), ("norm",))
        assert unchanged(model, before)
    else:
        assert [group.readers for group in report.groups] == [("first", "second")]


def test_a_reader_that_stays_float_is_scaled_too() -> None:
    model = tiny_model("llama")
    wanted = outputs(model, batch_of("llama", torch.float32))
    spec = INT8.model_copy(update={"exclude": ("*.k_proj",)})
    report = qat.fold_outliers(model, [batch_of("llama", torch.float32)], spec=spec, strength=0.5)
    assert any(reader.endswith("k_proj") for group in report.groups for reader in group.readers)
    found = outputs(model, batch_of("llama", torch.float32))
    assert all(same_bits(found[key], value) for key, value in wanted.items())


def test_numbers_that_float16_would_lose_are_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).half()
    with torch.no_grad():
        model[0].weight[1] = 3 * 2.0**-24
    before = state(model)
    report = qat.fold_outliers(model, [rows().half()], spec=INT8, strength=0.5)
    assert report.left_out == ("0",)
    assert unchanged(model, before)
