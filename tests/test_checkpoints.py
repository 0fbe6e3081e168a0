"""Checkpoints into prepared models: float ones start quantizers afresh, and nothing is half loaded."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import StateError
from qat.layers import QuantizedLayer, quantized_layers
from qat.preparation import prepare
from qat.quantizers import LearnedAffine, StraightThrough
from qat.spec import QuantSpec
from tests.helpers import LearnedStep, same_bits

F32 = QuantSpec(dtype="float32")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8))


def arrives_quantized(layer: QuantizedLayer) -> bool:
    return layer.input_quantizer is not None and layer.input_quantizer.arrives_quantized


def inputs() -> Tensor:
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("algorithm", [StraightThrough(), LearnedStep()], ids=lambda a: str(a.kind))
def test_a_float_checkpoint_loads_strictly_and_says_that_quantizers_start_afresh(
    algorithm: StraightThrough | LearnedStep, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = {name: tensor + 1 for name, tensor in mlp().state_dict().items()}
    model = mlp()
    prepare(model, F32, algorithm=algorithm)
    with caplog.at_level(logging.WARNING, logger="qat"):
        model.load_state_dict(checkpoint, strict=True)
    assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in checkpoint.items())
    stateful = isinstance(algorithm, LearnedStep)
    assert ("holds no quantizer state (a float checkpoint): 3 quantizers start afresh" in caplog.text) is stateful


def test_a_prepared_checkpoint_loads_silently_and_computes_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model, again = mlp(), mlp()
    spec = QuantSpec(weights="int4", activations="int8", dtype="float32")
    for one in (model, again):
        prepare(one, spec, algorithm=LearnedStep())
    qat.calibrate(model, [inputs()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with caplog.at_level(logging.WARNING, logger="qat"):
        again.load_state_dict(model.state_dict(), strict=True)
    assert not caplog.text
    assert same_bits(again(inputs()), model(inputs()))
    arrives = [arrives_quantized(layer) for _, layer in quantized_layers(model)]
    assert arrives == [False, True, False]
    assert [arrives_quantized(layer) for _, layer in quantized_layers(again)] == arrives


def test_quantizer_keys_of_some_layers_only_are_refused() -> None:
    model = mlp()
    prepare(model, F32, algorithm=LearnedStep())
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("2.weight_quantizer")}
    with pytest.raises(StateError, match=r"1 of 3 lack theirs \(first: '2'\): load a whole float or prepared"):
        model.load_state_dict(state, strict=True)


def test_a_partial_load_keeps_the_scales_of_layers_whose_weight_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    prepare(model, QuantSpec(activations="int8", dtype="float32"), algorithm=LearnedStep())
    qat.calibrate(model, [inputs()])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({"2.bias": torch.ones(32)}, strict=False)
    assert not caplog.text
    changed = {name for name, tensor in model.state_dict().items() if not same_bits(tensor, before[name])}
    assert changed == {"2.bias"}
    model(inputs())


def test_a_partial_load_with_a_weight_starts_that_layer_afresh(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    prepare(model, F32, algorithm=LearnedStep())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({"2.weight": 2 * before["2.weight"]}, strict=False)
    changed = {name for name, tensor in model.state_dict().items() if not same_bits(tensor, before[name])}
    assert changed == {"2.weight", "2.weight_quantizer.log_scale"}
    assert "1 quantizers start afresh" in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_a_float_checkpoint_of_a_part_of_the_model_starts_its_layers_afresh(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(mlp(), nn.ZeroPad1d((0, 248)), mlp())
    prepare(model, F32, algorithm=LearnedStep())
    model(inputs())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[2].load_state_dict({name: 2 * tensor for name, tensor in mlp().state_dict().items()}, strict=strict)
    changed = {name for name, tensor in model.state_dict().items() if not same_bits(tensor, before[name])}
    assert changed >= {f"2.{i}.weight_quantizer.log_scale" for i in (0, 2, 4)}
    assert not any(name.startswith("0.") for name in changed)
    assert caplog.text.count("1 quantizers start afresh") == 3
    assert [layer.reached for _, layer in quantized_layers(model)] == [True] * 3 + [False] * 3


def test_a_part_of_one_layers_quantizer_keys_is_refused() -> None:
    model = mlp()
    prepare(model, QuantSpec(weights="int4"), algorithm=LearnedStep())
    state = model.state_dict()
    del state["0.weight_quantizer.shift"]
    with pytest.raises(RuntimeError, match=r"a part of its quantizers' state .'0.weight_quantizer.shift'"):
        model.load_state_dict(state, strict=True)


def test_a_float_checkpoint_of_a_wrapper_is_completed_too_and_left_as_it_was() -> None:
    wrapper, checkpoint = nn.ModuleDict({"model": mlp()}), nn.ModuleDict({"model": mlp()}).state_dict()
    prepare(wrapper["model"], F32, algorithm=LearnedStep())
    before = dict(checkpoint)
    wrapper.load_state_dict(checkpoint, strict=True)
    assert checkpoint == before
    assert [layer.reached for _, layer in quantized_layers(wrapper)] == [False] * 3
    again = mlp()
    prepare(again, F32, algorithm=LearnedStep())
    assert same_bits(wrapper["model"](inputs()), again(inputs()))


def test_a_checkpoint_for_a_copy_says_nothing_of_the_original() -> None:
    model = mlp()
    prepare(model, F32, algorithm=LearnedStep())
    copied = copy.deepcopy(model)
    copied.load_state_dict(mlp().state_dict(), strict=True)
    assert [layer.reached for _, layer in quantized_layers(copied)] == [False] * 3
    assert [layer.reached for _, layer in quantized_layers(model)] == [False] * 3


def test_a_missing_weight_is_still_missing() -> None:
    model = mlp()
    prepare(model, F32, algorithm=LearnedStep())
    state = mlp().state_dict()
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight"'):
        model.load_state_dict(state, strict=True)


def test_a_part_of_a_layers_quantizer_state_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    prepare(model, QuantSpec(weights="int4"), algorithm=LearnedAffine())
    parameters = {key: value.detach().clone() for key, value in model.named_parameters()}
    with pytest.raises(StateError, match="layer '0' has only a part of its quantizers' state"):
        model.load_state_dict(parameters, strict=False)
