"""Folding keeps what a model computes, folds all that can be folded and nothing else, and lowers errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
import qat.folding
from qat.errors import CalibrationError, QatError, SpecError, StateError
from qat.files.examples import flatten_outputs
from qat.folding.groups import Group, power_of_two
from qat.folding.proof import Proof
from qat.layers import quantized_layers
from tests.diffusion_architectures import ARCHITECTURES
from tests.helpers import same_bits, tiny_model, tokens

INT8 = qat.QuantSpec(activations="int8", dtype="float32")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def batch_of(name: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    if name != "vit":
        return {"input_ids": tokens(seed=seed)}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)}


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return flatten_outputs(model(**batch) if isinstance(batch, dict) else model(batch))


def random_vectors(model: nn.Module) -> nn.Module:
    """Norms with weights other than one, and biases other than zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.mul_(1 + noise).add_(noise.to(parameter.dtype), alpha=0.1)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(same_bits(tensor, before[key]) for key, tensor in model.state_dict().items())


class Block(nn.Module):
    """A norm before two linear layers around a function; its output is added to its input, or to the norm's."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = torch.relu, *, post: bool = False, gate: float = 1.0
    ) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.between, self.post, self.gate = between, post, gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.gate * self.down(self.between(self.up(y))) + (y if self.post else x)


def made(*blocks: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    for block in blocks:
        for child in block.modules():
            if isinstance(child, nn.Linear | nn.LayerNorm):
                child.reset_parameters()
    return nn.Sequential(*blocks).eval()


def rows(seed: int = 0, outlier: float = 1.0) -> Tensor:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= outlier
    return x


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


def test_factors_are_those_of_smoothquant_rounded_to_powers_of_two() -> None:
    model = random_vectors(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)))
    x, before = rows(outlier=50), state(model)
    read = model[0](x).detach().double().numpy()
    weight = before["1.weight"].double().numpy()
    qat.fold_outliers(model, [x[:40], x[40:]], spec=INT8, strength=0.75)
    exponents = 0.75 * np.log2(np.abs(read).max(0)) - 0.25 * np.log2(np.abs(weight).max(0))
    expected = 2 ** np.round(exponents - np.sort(exponents)[7])
    assert len(set(expected)) > 2
    assert np.array_equal(before["0.weight"].numpy() / model[0].weight.detach().numpy(), expected)
    assert np.array_equal(before["0.bias"].numpy() / model[0].bias.detach().numpy(), expected)
    assert np.array_equal(model[1].weight.detach().numpy() / before["1.weight"].numpy(), np.tile(expected, (8, 1)))


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-8, 9)
    assert power_of_two(exponents).tolist() == [2.0**exponent for exponent in exponents.tolist()]


def test_channels_of_zeros_keep_their_scale() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[1].weight[:, 5] = 0
    x, before = rows(), state(model)
    wanted = outputs(model, x)["output"]
    assert len(qat.fold_outliers(model, [x], spec=INT8, strength=1).groups) == 1
    assert torch.equal(model[0].weight[5], before["0.weight"][5])
    assert torch.equal(model[1].weight[:, 2], before["1.weight"][:, 2])
    assert same_bits(outputs(model, x)["output"], wanted)


@torch.no_grad()
def with_outliers(model: nn.Module) -> nn.Module:
    """The same function, with two channels a norm and a gate that are 30 times as large."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        attention, mlp = layer.self_attn, layer.mlp
        for source, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj, (mlp.down_proj,)),
        ):
            source.weight[[3, 11]] *= 30
            for reader in readers:
                reader.weight[:, [3, 11]] /= 30
    return model


def quantization_error(model: nn.Module, folded: bool, kind: str) -> float:
    spec = qat.QuantSpec.model_validate({"activations": kind, "dtype": "float32"})
    batches = [{"input_ids": tokens(4, 16, seed)} for seed in range(2)]
    test = {"input_ids": tokens(4, 16, 9)}
    wanted = outputs(model, test)["logits"]
    if folded:
        report = qat.fold_outliers(model, batches, spec=spec, target="transformers")
        assert all(group.error_after <= group.error_before for group in report.groups)
        assert {"input_layernorm", "up_proj"} <= {g.producer.split(".")[-1] for g in report.groups if g.strength > 0}
    qat.prepare(model, spec, target="transformers", observer=qat.Best(largest_error=1.0))
    qat.calibrate(model, batches)
    return float((outputs(model, test)["logits"] - wanted).square().sum() / wanted.square().sum())


def test_folding_lowers_the_error_of_a_model_with_outliers() -> None:
    plain = quantization_error(tiny_model("llama"), False, "int8")
    outlying = quantization_error(with_outliers(tiny_model("llama")), False, "int8")
    folded = quantization_error(with_outliers(tiny_model("llama")), True, "int8")
    assert outlying > 2 * plain
    assert folded < outlying / 2


def test_best_leaves_a_group_alone_that_does_not_profit() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    x = torch.where(rows() > 0, 1.0, -1.0)  # all channels alike, as are all columns
    with torch.no_grad():
        model[1].weight.copy_(torch.where(rows(1)[:8] > 0, 1.0, -1.0))
    before = state(model)
    (group,) = qat.fold_outliers(model, [x], spec=INT8).groups
    assert (group.strength, group.error_after) == (0, group.error_before)
    assert unchanged(model, before)


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


def test_modes_hooks_and_random_numbers_are_as_before() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Dropout(), nn.Linear(16, 16), nn.Dropout())
    model[3].eval()
    generator = torch.get_rng_state()
    assert len(qat.fold_outliers(model, [rows()], spec=INT8, strength=0.5).groups) == 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model] == [True, True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def prepared(model: nn.Module) -> nn.Module:
    qat.prepare(model, INT8)
    return model


NAN = rows()
NAN[5, 5] = torch.nan


class Counting(nn.Module):
    """Gives another answer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(16, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) + self.calls


@pytest.mark.parametrize(
    ("change", "batches", "arguments", "error", "message"),
    [
        (prepared, [rows()], {}, StateError, "prepared or frozen already"),
        (lambda m: m.to("meta"), [rows()], {}, StateError, "0.norm.weight is on the meta device"),
        (None, [rows()], {"spec": qat.QuantSpec()}, SpecError, "name a type of activations"),
        (None, [rows()], {"strength": 0}, SpecError, "at most 1, or 'best', got 0"),
        (None, [rows()], {"strength": 1.5}, SpecError, "got 1.5"),
        (None, [rows()], {"strength": "most"}, SpecError, "got 'most'"),
        (None, [], {}, CalibrationError, "at least one batch"),
        (None, rows(), {}, CalibrationError, r"pass \[batch\]"),
        (None, [NAN], {}, CalibrationError, r"batch 0 gives inf or NaN in the input of layer '0.up'"),
        (None, [rows(), NAN], {}, CalibrationError, r"batch 1 gives inf or NaN in the input of layer '0.up'"),
        (None, [rows()[:, :8]], {}, CalibrationError, "cannot run batch 0 .RuntimeError"),
        (None, [rows(), rows()[:, :8]], {}, CalibrationError, "cannot run batch 1 .RuntimeError"),
        (lambda m: nn.Sequential(m, Counting()), [rows()], {}, CalibrationError, "two runs of batch 0"),
    ],
    ids=range(13),
)
def test_a_failure_changes_nothing(
    change: Callable[[nn.Module], nn.Module] | None, batches: Any, arguments: Any, error: type[QatError], message: str
) -> None:
    model: nn.Module = made(Block(), Block())
    model = change(model) if change is not None else model
    before = state(model)
    with pytest.raises(error, match=message):
        qat.fold_outliers(model, batches, **({"spec": INT8} | arguments))
    meta = any(tensor.is_meta for tensor in before.values())
    assert meta or unchanged(model, before)
    assert change is prepared or not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("where", ["while errors are measured", "in the last check"])
def test_a_late_failure_takes_back_what_was_folded(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Block(), Block())
    before, folded = state(model), []
    measure, holds = qat.folding._error, Proof.holds

    def fails(layers: Any, factor: Tensor) -> float:
        if not unchanged(model, before):
            folded.append(True)
            raise KeyboardInterrupt
        return measure(layers, factor)

    def differs(self: Proof, groups: Sequence[Group]) -> bool:
        if len(groups) == 4:  # all together
            folded.append(not unchanged(model, before))
        return holds(self, groups) and len(groups) < 4

    if where == "in the last check":
        monkeypatch.setattr(Proof, "holds", differs)
    else:
        monkeypatch.setattr("qat.folding._error", fails)
    with pytest.raises((CalibrationError, KeyboardInterrupt), match="gives other outputs|^$"):
        qat.fold_outliers(model, [rows(outlier=30)], spec=INT8, strength=0.5)
    assert folded == [True]
    assert unchanged(model, before)


def test_the_report_prints_a_line_for_each_group() -> None:
    model = made(Block())
    report = qat.fold_outliers(model, (x for x in [rows(outlier=100), rows(1)]), spec=INT8, strength=0.5)
    assert str(report) == "folded 2 of 2 groups"
    lines = report.table().splitlines()
    assert lines[0].split() == ["producer", "strength", "before", "after", "readers"]
    assert [line.split()[0] for line in lines[1:]] == ["0.norm", "0.up"]
    assert lines[1].split()[-1] == "0.up"


def test_a_folded_model_is_prepared_like_any_other() -> None:
    model = made(Block(), Block())
    qat.fold_outliers(model, [rows()], spec=INT8)
    twice = copy.deepcopy(model)
    qat.fold_outliers(twice, [rows()], spec=INT8)  # which finds what is left to gain, and harms nothing
    qat.prepare(model, INT8)
    assert len(list(quantized_layers(model))) == 4
