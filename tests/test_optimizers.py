"""Any optimizer: learned ranges that it would decay are refused, and freezing says what training left alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat import optimizers
from qat.optimizers import learned_ranges, refuse_decay, unchanged
from tests.exports import small_llama
from tests.training_modules import INT4, INT8

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def layers(algorithm: qat.Algorithm | None = None, spec: qat.QuantSpec = INT4) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    qat.prepare(model, spec, algorithm=algorithm or qat.StraightThrough())
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def warnings_of(freezing: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="qat"):
        freezing()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_an_optimizer_that_decays_learned_ranges_is_refused_at_its_first_step(kind: Any) -> None:
    model = layers(qat.LearnedAffine())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    rule = r"4 learned ranges sit in a group with weight_decay=0.1.*'0\.weight_quantizer\.low_move'.*parameter_groups"
    for _ in range(2):  # and at every further one
        with pytest.raises(qat.TrainingError, match=rule):
            train(model, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_groups_of_the_library_and_optimizers_of_other_models_step_as_before() -> None:
    model = layers(qat.LearnedAffine())
    train(model, torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, weight_decay=0.1)))
    train(layers(), torch.optim.AdamW(layers().parameters(), weight_decay=0.1))
    plain = nn.Linear(64, 8)
    train(plain, torch.optim.AdamW(plain.parameters(), weight_decay=0.1))
    untrained = layers(qat.LearnedAffine())
    for name, parameter in untrained.named_parameters():
        parameter.requires_grad_("_move" not in name)
    train(untrained, torch.optim.AdamW(untrained.parameters(), weight_decay=0.1))


def test_a_group_that_comes_later_and_a_model_that_is_prepared_later_are_looked_at() -> None:
    model = layers(qat.LearnedAffine())
    optimizer = torch.optim.AdamW([model[0].weight], weight_decay=0.1)
    train(model, optimizer)
    optimizer.add_param_group({"params": [model[0].weight_quantizer.high_move]})
    with pytest.raises(qat.TrainingError, match="1 learned ranges"):
        train(model, optimizer)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    train(model, optimizer)
    optimizer.param_groups[1]["weight_decay"] = 0.2
    with pytest.raises(qat.TrainingError, match=r"weight_decay=0.2"):
        train(model, optimizer)

    other = nn.Sequential(nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(other.parameters(), weight_decay=0.1)
    train(other, optimizer)
    qat.prepare(other, INT8, algorithm=qat.LearnedAffine())
    optimizer.add_param_group({"params": [other[0].weight_quantizer.high_move]})
    with pytest.raises(qat.TrainingError, match=r"first: '0\.weight_quantizer\.high_move'"):
        train(other, optimizer)


def test_the_trainer_of_transformers_is_refused_with_its_own_optimizer_and_trains_with_ours(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = {"use_cpu": True, "report_to": [], "max_steps": 2, "weight_decay": 0.1, "disable_tqdm": True}
    options = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, save_strategy="no", **arguments)
    model = small_llama()
    qat.prepare(model, INT4, algorithm=qat.LearnedAffine(), target="transformers")
    with pytest.raises(qat.TrainingError, match=r"weight_decay=0.1.*=grouped_optimizer\(arguments\)"):
        Trainer(model, options, train_dataset=rows).train()
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, weight_decay=0.1))
    Trainer(model, options, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert unchanged(model) == []
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0


def test_freezing_names_ranges_that_an_early_optimizer_never_held(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    qat.prepare(model, INT4, algorithm=qat.LearnedAffine())
    train(model, optimizer)
    (warning,) = warnings_of(lambda: qat.freeze(model), caplog)
    assert warning.startswith("training never changed the learned ranges of 2 layers: no optimizer held them")
    assert warning.endswith(": 0, 1")


def test_freezing_names_the_first_few_of_many_unchanged_layers(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.LayerNorm(64))
    qat.prepare(model, INT4, algorithm=qat.StraightThrough())
    train(model, torch.optim.SGD(model[-1].parameters(), lr=0.5))
    (warning,) = warnings_of(lambda: qat.freeze(model), caplog)
    assert warning.endswith(": 0, 1, 2, 3 and 2 more")


def test_freezing_names_an_untied_head_that_an_early_optimizer_never_held(caplog: pytest.LogCaptureFixture) -> None:
    model = small_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    qat.prepare(model, qat.QuantSpec(weights="int8", include=("*_proj", "lm_head")), target="transformers")
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    (warning,) = warnings_of(lambda: qat.freeze(model), caplog)
    assert warning.startswith("training never changed the weights of 1 layers")
    assert warning.endswith(": lm_head")


def test_one_changed_bit_is_a_change(caplog: pytest.LogCaptureFixture) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = nn.Parameter(torch.randn(300, 7000, dtype=dtype).t())  # not contiguous, more than one part
        before = optimizers._fingerprint(weight)
        assert torch.equal(before, optimizers._fingerprint(weight.detach().clone()))
        with torch.no_grad():
            weight[5000, 17] = torch.nextafter(weight[5000, 17].float(), torch.tensor(9.0)).to(dtype) + 2**-5
        assert not torch.equal(before, optimizers._fingerprint(weight))
    swapped = torch.tensor([1.0, 2.0, -1.0])
    one, other = (optimizers._fingerprint(swapped + torch.tensor([0.0, step, -step])) for step in (0.125, 0.25))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("algorithm", [None, qat.LearnedAffine()], ids=["straight through", "learned"])
def test_freezing_says_nothing_where_training_changed_everything_or_never_began(
    algorithm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trained, left = layers(algorithm), layers(algorithm)
    train(trained, torch.optim.AdamW(qat.parameter_groups(trained, lr=1e-2)))
    left(X)
    assert warnings_of(lambda: qat.freeze(trained), caplog) == []
    assert warnings_of(lambda: qat.freeze(left), caplog) == []


def test_layers_that_need_no_gradient_and_layers_that_never_ran_are_not_named() -> None:
    model = layers(qat.LearnedAffine())
    model[0].requires_grad_(False)
    train(model, torch.optim.SGD(qat.parameter_groups(model, lr=0.1)))
    assert unchanged(model) == []
    model = layers()
    train(model, torch.optim.SGD([model[0].weight], lr=0.1))
    assert [message.rpartition(": ")[2] for message in unchanged(model)] == ["2"]
    assert unchanged(model, ["2"]) == []


def test_ranges_at_the_rate_of_weights_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = layers(qat.LearnedAffine())
    train(model, torch.optim.SGD(qat.parameter_groups(model, lr=0.1)))
    assert "rate of weights" not in caplog.text
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (
        caplog.text.count("4 learned ranges train at the rate of weights (first: '0.weight_quantizer.low_move')") == 1
    )


@pytest.mark.parametrize("rates", [{"lr": -1.0}, {"lr": 1.0, "scale_lr": -1.0}, {"lr": 1.0, "weight_decay": -0.1}])
def test_numbers_below_0_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(qat.TrainingError, match=rf"{list(rates)[-1]}: must be 0 or more, got -"):
        qat.parameter_groups(layers(), **rates)


def test_ranges_of_layers_that_ran_without_gradients_are_said_to_be_so() -> None:
    model = layers(qat.LearnedAffine())
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=0.1))
    with torch.no_grad():
        hidden = model[0](X)
    model[2](hidden.relu()).square().mean().backward()
    optimizer.step()
    found = unchanged(model)
    assert [message.rpartition(": ")[2] for message in found] == ["0", "0"]
    assert all("they never ran with gradients" in message and "optimizer" not in message for message in found)


def test_the_weights_that_are_loaded_before_the_first_step_are_where_training_begins() -> None:
    model = layers()
    model.load_state_dict(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).state_dict())
    train(model, torch.optim.SGD([model[0].weight], lr=0.1))
    assert [message.rpartition(": ")[2] for message in unchanged(model)] == ["2"]


def test_models_and_optimizers_are_let_go() -> None:
    model = layers(qat.LearnedAffine())
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=0.1))
    train(model, optimizer)
    assert model in optimizers._models
    assert optimizer in optimizers._checked
    del model, optimizer
    gc.collect()
    assert all(len(list(model.parameters())) for model in optimizers._models)
    assert len(optimizers._first) <= len(optimizers._models)


def test_a_compiled_step_is_left_alone() -> None:
    model = layers()
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=0.1))
    model(X).square().mean().backward()
    before = model[0].weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(before, model[0].weight)


def test_names_and_groups() -> None:
    model = layers(qat.LearnedAffine(), INT8)
    names = list(learned_ranges(model).values())
    assert names == ["0.weight_quantizer.high_move", "2.weight_quantizer.high_move"]
    refuse_decay(model, [{"params": list(model.parameters()), "weight_decay": 0.0}])
    refuse_decay(model, [{"params": list(model.parameters())}])
    assert learned_ranges(layers()) == {}
