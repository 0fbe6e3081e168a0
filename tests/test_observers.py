"""Ranges do not depend on the order of batches nor on repetition, and agree with numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from qat.errors import CalibrationError
from qat.observers import Absmax, AbsmaxObserver, Observer, ObserverChoice, Percentile, PercentileObserver

OBSERVERS = {"absmax": Absmax(), "percentile": Percentile(percentile=99.0)}


def observed(choice: Absmax | Percentile, batches: list[Tensor]) -> Observer:
    observer = choice.make()
    for batch in batches:
        observer.update(batch)
    return observer


def batches_of_many_ranges() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = (0.0, 1e-20, 0.3, 1.0, 17.0)
    return [torch.randn(64, 5, generator=generator) * scale for scale in scales] + [torch.tensor([1.0, -2.0, 4.0])]


@pytest.mark.parametrize("choice", OBSERVERS.values(), ids=OBSERVERS)
def test_the_order_of_batches_does_not_matter(choice: Absmax | Percentile) -> None:
    batches = batches_of_many_ranges()
    expected = observed(choice, batches)
    for order in itertools.islice(itertools.permutations(batches), 0, None, 40):
        found = observed(choice, list(order))
        assert torch.equal(found.magnitude(), expected.magnitude())
        for name, buffer in expected.named_buffers():
            assert torch.equal(dict(found.named_buffers())[name], buffer), name


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0]), min_size=1, max_size=6), st.integers(1, 99))
def test_values_on_the_edge_of_a_range_do_not_bring_the_order_back(values: list[float], percent: int) -> None:
    choice = Percentile(percentile=percent)
    forward = observed(choice, [torch.tensor([value]) for value in values])
    backward = observed(choice, [torch.tensor([value]) for value in reversed(values)])
    assert torch.equal(forward.magnitude(), backward.magnitude())


@pytest.mark.parametrize("choice", OBSERVERS.values(), ids=OBSERVERS)
def test_seeing_everything_twice_changes_nothing(choice: Absmax | Percentile) -> None:
    # As activation checkpointing does: its second forward shows each batch again.
    once = batches_of_many_ranges()
    twice = [batch for batch in once for _ in range(2)]
    assert torch.equal(observed(choice, once).magnitude(), observed(choice, twice).magnitude())


def test_absmax_is_the_largest_magnitude() -> None:
    observer = observed(Absmax(), [torch.tensor([1.0, -7.5]), torch.tensor([[2.0]])])
    assert observer.magnitude() == 7.5
    assert observer.magnitude().dtype is torch.float32


@pytest.mark.parametrize("percentile", [1.0, 50.0, 87.5, 99.0, 99.75, 99.99, 100.0], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0], ids=str)
def test_a_percentile_is_numpys_within_one_bin(percentile: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(1000, generator=generator) * spread * factor for factor in (0.5, 1.0, 1.5)]
    found = float(observed(Percentile(percentile=percentile), batches).magnitude())
    magnitudes = torch.cat(batches).abs().double().numpy()
    expected = float(np.percentile(magnitudes, percentile, method="inverted_cdf"))
    bin_width = 2.0 ** np.ceil(np.log2(magnitudes.max())) / 4096
    assert expected <= found <= expected + bin_width * 1.001


def test_the_whole_percentile_is_the_largest_magnitude() -> None:
    batches = batches_of_many_ranges()
    largest = observed(Absmax(), batches).magnitude()
    assert torch.equal(observed(Percentile(percentile=100.0), batches).magnitude(), largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choice", OBSERVERS.values(), ids=OBSERVERS)
def test_any_shape_and_dtype_is_recorded(choice: Absmax | Percentile, dtype: torch.dtype) -> None:
    x = torch.arange(-6.0, 6.0).to(dtype)
    flat = observed(choice, [x])
    assert torch.equal(flat.magnitude(), observed(choice, [x.reshape(2, 3, 2).transpose(0, 2)]).magnitude())
    assert flat.magnitude().dtype is torch.float32


@pytest.mark.parametrize("choice", OBSERVERS.values(), ids=OBSERVERS)
class TestEveryObserver:
    def test_a_range_before_any_data_is_refused(self, choice: Absmax | Percentile) -> None:
        with pytest.raises(CalibrationError, match="before any batch was seen: calibrate first"):
            choice.make().magnitude()

    def test_an_empty_batch_is_no_data(self, choice: Absmax | Percentile) -> None:
        assert not observed(choice, [torch.empty(0, 4)]).initialized

    def test_zeros_are_data(self, choice: Absmax | Percentile) -> None:
        observer = observed(choice, [torch.zeros(3)])
        assert observer.initialized
        assert observer.magnitude() == 0

    def test_reset_forgets(self, choice: Absmax | Percentile) -> None:
        observer = observed(choice, [torch.full((3,), 1000.0)])
        observer.reset()
        with pytest.raises(CalibrationError):
            observer.magnitude()
        observer.update(torch.ones(3))
        assert observer.magnitude() == 1

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    def test_a_batch_that_is_not_finite_is_refused(self, choice: Absmax | Percentile, value: float) -> None:
        with pytest.raises(CalibrationError, match="inf or NaN activations: check the model and the data"):
            choice.make().update(torch.tensor([1.0, value]))

    def test_statistics_survive_a_state_dict(self, choice: Absmax | Percentile) -> None:
        observer = observed(choice, batches_of_many_ranges())
        again = choice.make()
        again.load_state_dict(observer.state_dict())
        assert torch.equal(again.magnitude(), observer.magnitude())
        for one in (observer, again):
            one.update(torch.full((999,), 30.0))
        assert torch.equal(again.magnitude(), observer.magnitude())

    def test_no_gradient_is_recorded(self, choice: Absmax | Percentile) -> None:
        observer = observed(choice, [torch.ones(3, requires_grad=True)])
        assert not observer.magnitude().requires_grad


def test_observers_are_made_by_their_configuration() -> None:
    assert isinstance(Absmax().make(), AbsmaxObserver)
    made = Percentile(percentile=95).make()
    assert isinstance(made, PercentileObserver)
    assert made.percentile == 95


def test_a_configuration_names_its_kind() -> None:
    adapter: TypeAdapter[Absmax | Percentile] = TypeAdapter(ObserverChoice)
    assert adapter.validate_python({"kind": "percentile", "percentile": 99}) == Percentile(percentile=99)
    assert adapter.validate_python({"kind": "absmax"}) == Absmax()
    with pytest.raises(ValidationError, match="'absmax', 'percentile'"):
        adapter.validate_python({"kind": "average"})


@pytest.mark.parametrize("value", [0.0, 100.5], ids=str)
def test_a_percentile_lies_between_0_and_100(value: float) -> None:
    with pytest.raises(ValidationError, match="percentile"):
        Percentile(percentile=value)
