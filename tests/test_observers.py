"""What is seen does not depend on the order of batches nor on repetition; rules agree with independent forms."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

import qat
from qat.errors import SpecError
from qat.formats import QUANTO
from qat.numerics import QType
from qat.observers import Absmax, Best, MovingAverage, Mse, Observer, ObserverChoice, Percentile

INT8, FLOAT8 = QUANTO.activation_qtypes["int8"], QUANTO.activation_qtypes["float8"]
RULES: dict[str, Any] = {"absmax": Absmax(), "percentile": Percentile(percentile=99.0), "mse": Mse(), "best": Best()}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def observed(batches: list[Tensor], importance: Tensor | None = None) -> Observer:
    observer = Observer()
    for batch in batches:
        observer.update(batch, importance)
    return observer


def batches_of_many_ranges() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = (0.0, 1e-20, 0.3, 1.0, 17.0)
    return [torch.randn(64, 5, generator=generator) * scale for scale in scales] + [torch.tensor([1.0, -2.0, 4.0])]


def test_the_order_of_batches_does_not_matter() -> None:
    batches = batches_of_many_ranges()
    expected = observed(batches)
    for order in itertools.islice(itertools.permutations(batches), 0, None, 40):
        found = observed(list(order))
        for name, buffer in expected.named_buffers():
            assert torch.equal(dict(found.named_buffers())[name], buffer), name


@pytest.mark.parametrize("importance", [None, torch.tensor([1, 2, 3, 4, 5])], ids=["alike", "weighted"])
def test_of_a_large_tensor_every_nth_row_counts_n_times(importance: Tensor | None) -> None:
    x = torch.randn(1001, 5)
    x[1] = 1e3
    part, whole = Observer(), Observer()
    part.update(x, importance, most=715)  # of 5,005 elements: every seventh row, from the first call's number on
    assert int(part.counts.sum()) == 7 * 143 * (5 if importance is None else 15)
    assert float(part.largest) == 1e3
    for _ in range(6):  # then each row was met once
        part.update(x, importance, most=715)
    whole.update(x, importance)
    assert torch.equal(part.counts, 7 * whole.counts)
    small = Observer()
    small.update(x[:143], importance, most=715)
    assert int(small.counts.sum()) == 143 * (5 if importance is None else 15)


@pytest.mark.parametrize("largest", [0, 1, 1000])
def test_counts_beyond_what_float64_tells_apart_have_their_percentiles(largest: int) -> None:
    observer = observed([torch.tensor([1.0, 2.0, 4.0])])
    observer.counts[observer.counts > 0] = 2**53 + largest
    assert observer.percentile(100) == 4
    assert Best().magnitude(observer, INT8) <= 4


def test_the_share_beyond_a_magnitude() -> None:
    observer = observed([torch.tensor([0.5, 1.0, 2.0, 4.0])])
    assert [float(observer.saturated(torch.tensor(x))) for x in (0.25, 1.5, 8.0)] == [1.0, 0.5, 0.0]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0]), min_size=1, max_size=6), st.integers(1, 99))
def test_one_batch_is_as_good_as_many(values: list[float], percent: int) -> None:
    rule = Percentile(percentile=percent)
    many, one = observed([torch.tensor([value]) for value in values]), observed([torch.tensor(values)])
    assert torch.equal(rule.magnitude(many, INT8), rule.magnitude(one, INT8))


@every_rule
@pytest.mark.parametrize("qtype", [INT8, FLOAT8], ids=["int8", "float8"])
def test_seeing_everything_twice_changes_nothing(rule: Any, qtype: QType) -> None:
    # As activation checkpointing does: its second forward shows each batch again.
    once = batches_of_many_ranges()
    twice = [batch for batch in once for _ in range(2)]
    assert torch.equal(rule.magnitude(observed(once), qtype), rule.magnitude(observed(twice), qtype))


def test_absmax_is_the_largest_magnitude() -> None:
    magnitude = Absmax().magnitude(observed([torch.tensor([1.0, -7.5]), torch.tensor([[2.0]])]), INT8)
    assert magnitude == 7.5
    assert magnitude.dtype is torch.float32


@pytest.mark.parametrize("percentile", [1.0, 50.0, 87.5, 99.0, 99.75, 99.99, 100.0], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0], ids=str)
def test_a_percentile_is_numpys_within_one_bin(percentile: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(1000, generator=generator) * spread * factor for factor in (0.5, 1.0, 1.5)]
    found = float(observed(batches).percentile(percentile))
    magnitudes = torch.cat(batches).abs().double().numpy()
    expected = float(np.percentile(magnitudes, percentile, method="inverted_cdf"))
    assert expected <= found <= expected * (1 + 1 / 128 + 1e-6)


def test_the_whole_percentile_is_the_largest_magnitude() -> None:
    observer = observed(batches_of_many_ranges())
    assert torch.equal(observer.percentile(100), observer.largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_shape_and_dtype_is_recorded(dtype: torch.dtype) -> None:
    x = torch.arange(-6.0, 6.0).to(dtype)
    flat, other = observed([x]), observed([x.reshape(2, 3, 2).transpose(0, 2)])
    assert torch.equal(flat.counts, other.counts)
    assert torch.equal(flat.largest, other.largest)
    assert int(observed([x[0]]).counts.sum()) == 1


def test_a_large_tensor_is_recorded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 7)
    whole = observed([x], torch.arange(7))
    monkeypatch.setattr("qat.observers._CHUNK", 20)
    assert torch.equal(observed([x], torch.arange(7)).counts, whole.counts)


def noise(x: Tensor, scale: float, qtype: QType) -> float:
    found = qtype.fake_quantize_activation(x, torch.tensor(scale), torch.float32)
    return float((found - x).double().square().sum() / x.double().square().sum())


@pytest.mark.parametrize("qtype", [INT8, FLOAT8], ids=["int8", "float8"])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0, 3.0], ids=str)
def test_errors_are_those_of_the_numbers_themselves(qtype: QType, share: float) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(2)).exp()
    observer, scale = observed([x, -x]), share * float(x.max()) / qtype.steps
    found = float(observer.errors(torch.tensor(scale), qtype))
    assert found == pytest.approx(noise(x, scale, qtype), rel=0.05)


@pytest.mark.parametrize("qtype", [INT8, FLOAT8], ids=["int8", "float8"])
def test_the_smallest_error_is_found(qtype: QType) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50_000, generator=generator)
    x[:5] *= 40  # few outliers: it pays to clip them
    observer = observed([x])
    found = noise(x, float(Mse().magnitude(observer, qtype)) / qtype.steps, qtype)
    others = [noise(x, float(x.abs().max()) * 2 ** (-j / 12) / qtype.steps, qtype) for j in range(100)]
    assert found <= min(others) * 1.02


def test_channels_count_by_the_weight_that_follows() -> None:
    """The example of `Best`: outliers that small weights follow do not decide."""
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(4096, 32, generator=generator), torch.randn(16, 32, generator=generator)
    x[:, 0] *= 100
    weight[:, 0] /= 100
    importance = (weight.square().sum(0) / weight.square().sum(0).mean() * 256).round().long()
    wanted = x @ weight.t()

    def output_error(magnitude: Tensor) -> float:
        given = INT8.fake_quantize_activation(x, magnitude / 127, torch.float32) @ weight.t()
        return float((given - wanted).square().sum() / wanted.square().sum())

    best = Best().magnitude(observed([x], importance), INT8)
    candidates = [x.abs().max() * 2.0 ** (-j / 12) for j in range(121)]
    assert output_error(best) <= min(map(output_error, candidates)) * 1.1
    assert output_error(best) * 3 < output_error(Mse().magnitude(observed([x]), INT8))


def test_an_empty_batch_is_no_data() -> None:
    assert not observed([torch.empty(0, 4), torch.empty(3, 0)]).initialized


@every_rule
def test_zeros_are_data(rule: Any) -> None:
    observer = observed([torch.zeros(3)])
    assert observer.initialized
    assert rule.magnitude(observer, INT8) == 0
    assert int(observer.calls) == 1


@every_rule
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-30, 1e30], ids=str)
def test_constants_are_data(rule: Any, value: float) -> None:
    magnitude = float(rule.magnitude(observed([torch.full((7, 3), value)]), INT8))
    assert magnitude == pytest.approx(abs(value), rel=0.01)


def test_reset_forgets() -> None:
    observer = observed([torch.full((3,), 1000.0), torch.tensor([float("inf")])])
    observer.reset()
    assert not any(bool(buffer.any()) for buffer in observer.buffers())
    observer.update(torch.ones(3))
    assert observer.largest == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_batch_that_is_not_finite_is_noted(value: float) -> None:
    assert not observed([torch.ones(2)]).nonfinite
    observer = observed([torch.tensor([1.0, value]), torch.ones(2)])
    assert observer.nonfinite
    assert observer.largest.isfinite()


@every_rule
def test_statistics_survive_a_state_dict(rule: Any) -> None:
    observer, again = observed(batches_of_many_ranges()), Observer()
    again.load_state_dict(observer.state_dict())
    for one in (observer, again):
        one.update(torch.full((999,), 30.0))
    assert torch.equal(rule.magnitude(again, INT8), rule.magnitude(observer, INT8))


@every_rule
def test_no_gradient_is_recorded(rule: Any) -> None:
    assert not rule.magnitude(observed([torch.ones(3, requires_grad=True)]), INT8).requires_grad


def test_a_configuration_names_its_kind() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ObserverChoice)
    assert adapter.validate_python({"kind": "percentile", "percentile": 99}) == Percentile(percentile=99)
    assert adapter.validate_python({"kind": "best", "largest_error": 0.1}) == Best(largest_error=0.1)
    with pytest.raises(ValidationError, match="'absmax', 'percentile', 'moving_average', 'best', 'mse'"):
        adapter.validate_python({"kind": "average"})


@pytest.mark.parametrize("value", [0.0, 100.5], ids=str)
def test_a_percentile_lies_between_0_and_100(value: float) -> None:
    with pytest.raises(SpecError, match="Percentile: percentile"):
        Percentile(percentile=value)


def test_a_moving_average_follows_the_largest_of_each_batch() -> None:
    observer, rule = Observer(0.75), MovingAverage(momentum=0.75)
    for largest in (4.0, 8.0, 2.0):
        observer.update(torch.tensor([largest, -1.0]))
    assert rule.magnitude(observer, INT8) == 0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 2
    twice, alone = Observer(0.75), Observer(0.75)
    alone.update(torch.tensor([2.0]))
    twice.update(torch.tensor([6.0]))
    twice.merge(alone)
    assert rule.magnitude(twice, INT8) == 4
    twice.reset()
    assert rule.magnitude(twice, INT8) == 0


def test_a_model_is_calibrated_by_a_moving_average() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
    batches = [torch.full((2, 16), 1.0), torch.full((2, 16), 3.0)]
    qat.prepare(model, spec, observer=MovingAverage(momentum=0.5, largest_error=10))
    qat.calibrate(model, batches)
    assert model[0].input_quantizer.scale == torch.tensor(2.0) / 127  # type: ignore[union-attr]
    state = model.state_dict()
    other = nn.Sequential(nn.Linear(16, 16))
    qat.prepare(other, spec, observer=MovingAverage(momentum=0.5, largest_error=10))
    other.load_state_dict(state)
    assert other[0].input_quantizer.observer.average == 2  # type: ignore[union-attr]
