"""The runs of a prepared model, and the weights that they read without calling a layer."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import StateError
from qat.freezing import freeze
from qat.layers import inside_layer, quantized_layers
from qat.runs import read_without_call, runs
from qat.spec import QuantSpec
from tests.helpers import tiny_model, tokens

F32 = QuantSpec(dtype="float32")


class Uses(nn.Module):
    """Calls a layer, and does with its weight what a test says."""

    def __init__(self, use: Any = None, *, when: bool | None = None) -> None:
        super().__init__()
        self.layer, self.use, self.when = nn.Linear(64, 32, bias=False), use, when

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(x)
        if self.use is not None and self.when in (None, self.training):
            hidden = hidden + self.use(self.layer, x)
        return hidden


def prepared(use: Any = None, **options: Any) -> Uses:
    model = Uses(use, **options)
    qat.prepare(model, F32)
    return model


READS = {
    "a second product": lambda layer, x: x @ layer.weight.t(),
    "functional": lambda layer, x: nn.functional.linear(x, layer.weight),
    "a cast": lambda layer, x: (x.double() @ layer.weight.to(torch.float64).t()).float(),
    "data": lambda layer, x: x @ layer.weight.data.t(),
    "detached": lambda layer, x: x @ layer.weight.detach().t(),
    "a row": lambda layer, x: x.sum() + layer.weight[0, 0],
    "a penalty": lambda layer, x: layer.weight.square().sum(),
}
NO_READS = {
    "its dtype": lambda layer, x: x.to(layer.weight.dtype).sum(),
    "the dtype of its data": lambda layer, x: x.to(layer.weight.data.dtype).sum(),
    "like it": lambda layer, x: torch.zeros_like(layer.weight).sum() + layer.weight.new_zeros(1),
    "as its type": lambda layer, x: x.to(layer.weight).sum() + x.type_as(layer.weight).sum(),
    "its shape": lambda layer, x: x.sum() * layer.weight.t().shape[0] * layer.weight[1:].shape[0],
    "its copy": lambda layer, x: x.sum() * len(copy.deepcopy(layer.weight)),
    "its forward": lambda layer, x: layer.forward(x),
}


@pytest.mark.parametrize("use", READS.values(), ids=READS)
def test_a_weight_that_is_used_without_a_call_is_refused(use: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = prepared(use)
    for _ in range(3):
        model(torch.randn(2, 64))
    said = "the weights of 1 prepared layers are used without calling their layer, in float (layer)"
    assert caplog.text.count(said) == 1
    with pytest.raises(StateError, match=r"\(layer\): exclude those layers in the spec, or pass allow_reads=True"):
        freeze(model)
    with pytest.raises(StateError, match="allow_reads"):
        freeze(model, allow_unreached=True)
    freeze(model, allow_reads=True)


@pytest.mark.parametrize("use", NO_READS.values(), ids=NO_READS)
def test_what_reads_no_number_of_a_weight_is_no_use(use: Any) -> None:
    model = prepared(use)
    model(torch.randn(2, 64))
    assert read_without_call(model) is None
    freeze(model)


@pytest.mark.parametrize("when", [True, False])
def test_both_modes_are_watched_and_what_one_finds_stays_known(when: bool) -> None:
    model = prepared(READS["a second product"], when=when)
    assert not runs(model)
    for training in (True, False, True):
        model.train(training)(torch.randn(2, 64))
    assert runs(model) == {True, False}
    assert read_without_call(model) is not None


def test_what_calibration_finds_stays_known() -> None:
    model = Uses(READS["a second product"], when=False)
    qat.prepare(model, QuantSpec(activations="int8", dtype="float32"))
    qat.calibrate(model, [torch.randn(2, 64)])
    assert not runs(model)
    model.train()(torch.randn(2, 64))
    with pytest.raises(StateError, match="without calling their layer"):
        freeze(model)


@pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_no_watch_behind(error: type[BaseException]) -> None:
    model = tiny_model("llama")
    qat.prepare(model, F32)
    if error is KeyboardInterrupt:
        handle = model.get_submodule("model").register_forward_pre_hook(_interrupt)
    with pytest.raises(error):
        model(input_ids=tokens() + 100)
    if error is KeyboardInterrupt:
        handle.remove()
    assert not runs(model)
    model(input_ids=tokens())
    assert runs(model)
    assert torch.overrides._len_torch_function_stack() == 0
    assert not inside_layer()
    freeze(model)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_threads_do_not_share_a_watch() -> None:
    failed: list[BaseException] = []

    def run(model: nn.Module) -> None:
        try:
            for _ in range(5):
                model(torch.randn(2, 64))
            assert torch.overrides._len_torch_function_stack() == 0
        except BaseException as error:
            failed.append(error)

    for _ in range(10):
        model = prepared()
        threads = [threading.Thread(target=run, args=(model,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert runs(model)


def test_replicas_of_data_parallel_are_not_watched() -> None:
    model = prepared(READS["a second product"])
    replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    replica.layer = model.layer
    replica(torch.randn(2, 64))
    assert torch.overrides._len_torch_function_stack() == 0
    assert not runs(model)


def test_a_copy_has_runs_of_its_own() -> None:
    model = prepared()
    other = copy.deepcopy(model)
    other(torch.randn(2, 64))
    assert not runs(model)
    assert runs(other)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
def test_a_compiled_function_around_a_layer_reads_nothing() -> None:
    model = prepared()
    compiled = torch.compile(lambda x: model.layer(x), backend="eager")
    model.use = lambda layer, x: compiled(x)
    model(torch.randn(2, 64))
    assert read_without_call(model) is None
    freeze(model, allow_unreached=True)
    assert not any(quantized_layers(model))
