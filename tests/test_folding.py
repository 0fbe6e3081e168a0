"""Folding takes SmoothQuant's factors where they lower the error of quantization, and changes nothing when it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
import qat.folding
from qat.errors import CalibrationError, QatError, SpecError, StateError
from qat.layers import quantized_layers
from tests.folding_models import INT8, Block, made, outputs, random_vectors, rows, state, unchanged
from tests.helpers import same_bits, tiny_model, tokens


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
    plain = quantization_error(tiny_model("llama", num_hidden_layers=1), False, "int8")
    outlying = quantization_error(with_outliers(tiny_model("llama", num_hidden_layers=1)), False, "int8")
    folded = quantization_error(with_outliers(tiny_model("llama", num_hidden_layers=1)), True, "int8")
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


ABOVE = rows(outlier=30).abs()
NAN = rows()
NAN[5, 5] = torch.nan


class Branch(nn.Module):
    """Reads its norm a second time where the first number of the batch is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.linear(y) + (y if x[0, 0] > 0 else 0)


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
        (
            lambda m: Branch(),
            [-ABOVE, ABOVE],
            {"strength": 0.5},
            CalibrationError,
            "for batch 1: pass that batch first",
        ),
    ],
    ids=range(14),
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
    measure = qat.folding._error

    def fails(layers: Any, factor: Tensor) -> float:
        if not unchanged(model, before):
            folded.append(True)
            raise KeyboardInterrupt
        return measure(layers, factor)

    def differ(found: Any, wanted: Any, groups: Any) -> bool:
        folded.append(not unchanged(model, before))
        return False

    if where == "in the last check":
        monkeypatch.setattr("qat.folding.agree", differ)
    else:
        monkeypatch.setattr("qat.folding._error", fails)
    with pytest.raises((CalibrationError, KeyboardInterrupt), match=r"other outputs for batch 0|^$"):
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


class Odd(nn.Module):
    """Gives what is no tensor."""

    def __init__(self, give: Any) -> None:
        super().__init__()
        self.norm, self.linear, self.give = nn.LayerNorm(32), nn.Linear(32, 32), give

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        return self.give(h, self.linear(h))


def test_numbers_and_arrays_are_compared_and_an_output_without_either_is_refused() -> None:
    spec, x = qat.QuantSpec(activations="int8"), torch.randn(8, 32)
    for give in (lambda h, y: (h.sum().item(), y), lambda h, y: {"h": h.numpy(), "y": y}):
        assert not qat.fold_outliers(Odd(give), [x], spec=spec, strength=0.5).groups
    with pytest.raises(CalibrationError, match="returns a SimpleNamespace without tensors that could"):
        qat.fold_outliers(Odd(lambda h, y: SimpleNamespace(h=h, y=y)), [x], spec=spec)


class Nothing(nn.Module):
    """Two norms; a reader of one gets no rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.empty = nn.LayerNorm(16), nn.LayerNorm(16)
        self.reader, self.idle = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.reader(self.norm(x)), self.idle(self.empty(x[:0]))


def test_norms_whose_readers_get_empty_tensors_stay_as_they_are() -> None:
    model = Nothing()
    report = qat.fold_outliers(model, [torch.randn(4, 16)], spec=INT8, strength=0.5)
    assert [group.producer for group in report.groups] == ["norm"]
    assert report.left_out == ("empty",)
    assert torch.equal(model.empty.weight, torch.ones(16))


def test_a_function_may_run_the_model_and_what_it_returns_need_not_say_anything() -> None:
    model, expected = made(Block()), made(Block())
    x = rows(outlier=30)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(batch.pop("x"))  # the caller's batch keeps it
        model(rows(1))

    report = qat.fold_outliers(model, [{"x": x}], spec=INT8, strength=0.5, forward=forward)
    assert str(report) == "folded 2 of 2 groups"
    qat.fold_outliers(expected, [torch.cat([x, rows(1)])], spec=INT8, strength=0.5)
    assert unchanged(model, state(expected))


def test_a_function_that_generates_proves_by_every_call_of_the_model() -> None:
    model = with_outliers(tiny_model("llama"))
    prompt = {"input_ids": tokens()}

    def forward(model: Any, batch: Any) -> Any:
        return model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)

    wanted = outputs(model, prompt)
    report = qat.fold_outliers(model, [prompt], spec=INT8, target="transformers", strength=0.5, forward=forward)
    assert len(report.groups) == 6
    assert all(same_bits(found, wanted[key]) for key, found in outputs(model, prompt).items())


def test_a_function_that_shows_what_is_folded_prevents_the_fold() -> None:
    model = made(Block())
    report = qat.fold_outliers(
        model, [rows()], spec=INT8, strength=0.5, forward=lambda model, x: model[0].norm(x) + model(x)
    )
    assert [group.producer for group in report.groups] == ["0.up"]


def test_a_function_that_fails_or_never_calls_the_model_is_told() -> None:
    with pytest.raises(CalibrationError, match=r"batch 0 \(KeyError: 'y'\): mend the function forward"):
        qat.fold_outliers(made(Block()), [{}], spec=INT8, forward=lambda model, batch: model(batch["y"]))
    with pytest.raises(CalibrationError, match=r"returns a list without tensors .* or return them from forward"):
        qat.fold_outliers(made(Block()), [rows()], spec=INT8, forward=lambda model, batch: None)
