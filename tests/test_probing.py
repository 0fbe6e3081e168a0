"""A batch that the model cannot run is refused with the remedy, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qat
from qat.errors import SpecError
from qat.probing import Probe, kept_modes, run, seeded
from qat.spec import QuantSpec
from qat.tensors import matrices


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (mlp().to(torch.bfloat16), torch.ones(2, 32)),
        (mlp(), torch.ones(2, 31)),
        (mlp(), {"input_ids": torch.ones(2, 32)}),
    ],
    ids=["dtype", "shape", "argument"],
)
def test_a_batch_that_the_model_cannot_run_is_refused(model: nn.Sequential, batch: object) -> None:
    model.train()
    with pytest.raises(SpecError, match=r"example_inputs: the model cannot run them \(\w+: .*: pass one batch"):
        qat.prepare(model, QuantSpec(dtype="float32"), example_inputs=batch)
    assert model.training
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model)


def test_a_batch_on_another_device_is_moved_to_the_model() -> None:
    """As a recipe's on a GPU; the meta device stands for one here."""
    model = mlp().to("meta")
    probe = Probe({"0": (model[0], matrices(model[0]))}).watch(model, {"input": torch.ones(2, 32)})
    assert [(x.device.type, tuple(x.shape)) for x in probe.inputs["0"]] == [("meta", (2, 32))] * 2
    qat.prepare(model, QuantSpec(dtype="float32"), example_inputs=torch.ones(2, 32))


def test_a_probe_sees_layouts_and_weights_that_are_read_uncalled() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(32, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.called(x) @ self.read.weight.t()
            return y

    model = Reading()
    probe = Probe({key: (layer, matrices(layer)) for key, layer in model.named_children()}).watch(
        model, torch.ones(2, 32)
    )
    assert probe.read == {"read": "Reading"}
    assert {tuple(x.shape) for x in probe.inputs["called"]} == {(2, 32)}
    assert probe.inputs["read"] == []


def test_an_empty_container_gives_what_it_was_given() -> None:
    """An empty `nn.Sequential` is false: as the result of a hook it would be taken for none, or for the output."""
    model = nn.Sequential(nn.Linear(32, 16), nn.Sequential(), nn.Linear(16, 16))
    assert len(Probe({"2": (model[2], matrices(model[2]))}).watch(model, torch.ones(2, 32)).inputs["2"]) == 2


def test_a_batch_is_one_argument_several_or_named_ones() -> None:
    model, x = nn.Bilinear(4, 4, 2), torch.ones(3, 4)
    expected = model(x, x)
    assert torch.equal(run(model, (x, x)), expected)
    assert torch.equal(run(model, {"input1": x, "input2": x}), expected)
    assert torch.equal(run(nn.Identity(), x), x)


def test_every_module_gets_its_own_mode_back_after_an_error_too() -> None:
    model = mlp()
    model[1].eval()

    @kept_modes(model)
    def fail() -> None:
        model[0].eval()
        model[1].train()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize("in_use", [False, True])
def test_random_numbers_go_on_as_if_nothing_was_drawn(in_use: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    states, seeds = {0: "first", 1: "second"}, list[int]()

    def seed_all(seed: int) -> None:
        seeds.append(seed)
        states.update(dict.fromkeys(states, "seeded"))

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    for seed in (0, None):
        with seeded(seed):
            torch.rand(3)
    assert torch.equal(torch.rand(1), expected)
    assert states == {0: "first", 1: "second"}
    assert seeds == ([0] if in_use else [])
