"""What a quantizer promises: the trained weight is the stored weight, and its float32 state stays float32."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError, create_model
from qat.qtypes import QTYPES
from torch import Tensor, nn

from qat import numerics
from qat.errors import CalibrationError
from qat.observers import Absmax
from qat.quantizers import ALGORITHMS, Algorithm, AnyAlgorithm, StraightThrough, WeightQuantizer, any_of
from qat.quantizers.activation import ActivationQuantizer, fake_quantize_output
from tests.helpers import DTYPES, WEIGHT_TYPES, LearnedStep, awkward_weight, same_bits

ALGORITHMS_UNDER_TEST: list[Algorithm] = [StraightThrough(), LearnedStep(), LearnedStep(start=1.3)]
SHAPES = [(1, 8), (3, 5), (4, 96), (16, 256), (3, 320), (3, 200)]


def decoded(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    codes, scale, shift = quantizer.final(weight)
    return numerics.decode(
        codes, scale.float(), None if shift is None else shift.float(), quantizer.qtype, quantizer.dtype
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS_UNDER_TEST, ids=str)
def test_the_final_codes_give_the_trained_weight(algorithm: Algorithm, qtype: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        quantizer = algorithm.make(weight, qtype, dtype)
        trained = quantizer.fake_quantized(weight)
        assert trained.dtype is dtype
        assert same_bits(decoded(quantizer, weight), trained)


@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS_UNDER_TEST, ids=str)
def test_final_has_the_stored_shapes_and_dtypes(algorithm: Algorithm, qtype: str) -> None:
    weight = awkward_weight(16, 256)
    codes, scale, shift = algorithm.make(weight, qtype, torch.bfloat16).final(weight)
    groups = 32 if QTYPES[qtype].affine else 16
    assert codes.shape == weight.shape
    assert codes.dtype is getattr(torch, QTYPES[qtype].storage)
    assert (scale.shape, scale.dtype) == ((groups, 1), torch.bfloat16)
    assert (shift is not None) is QTYPES[qtype].affine
    assert shift is None or (shift.shape, shift.dtype) == ((groups, 1), torch.bfloat16)
    assert not scale.requires_grad


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_the_dynamic_range_is_that_of_the_weight_now(qtype: str, dtype: torch.dtype) -> None:
    first, second = awkward_weight(8, 256, seed=1), awkward_weight(8, 256, seed=2)
    quantizer = StraightThrough().make(first, qtype, dtype)
    fresh = StraightThrough().make(second, qtype, dtype)
    assert same_bits(quantizer.fake_quantized(second), fresh.fake_quantized(second))
    assert not list(quantizer.state_dict())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_the_faster_way_to_the_dynamic_range_gives_the_bits_of_the_plain_one(qtype: str, dtype: torch.dtype) -> None:
    weight = awkward_weight(8, 256)
    quantizer = StraightThrough().make(weight, qtype, dtype)
    fast, plain = quantizer.serving(weight), WeightQuantizer.serving(quantizer, weight)
    assert same_bits(fast[0], plain[0])
    assert fast[1] is plain[1] is None or (
        fast[1] is not None and plain[1] is not None and same_bits(fast[1], plain[1])
    )


def test_every_algorithm_is_registered_and_can_be_configured() -> None:
    adapter: TypeAdapter[Algorithm] = TypeAdapter(AnyAlgorithm)
    for kind, algorithm in ALGORITHMS.items():
        made = adapter.validate_python({"kind": kind})
        assert type(made) is algorithm
        assert made.kind == kind
        assert isinstance(made.make(awkward_weight(4, 64), "int8", torch.bfloat16), WeightQuantizer)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "magic"})


def test_a_second_algorithm_joins_the_union_by_being_registered() -> None:
    union = any_of({**ALGORITHMS, "learned_step": LearnedStep})
    adapter: TypeAdapter[Algorithm] = TypeAdapter(union)
    assert adapter.validate_python({"kind": "learned_step", "start": 0.5}) == LearnedStep(start=0.5)
    assert adapter.validate_python({"kind": "straight_through"}) == StraightThrough()
    with pytest.raises(ValidationError, match=r"'straight_through', .*'learned_step'"):
        adapter.validate_python({"kind": "magic"})
    recipe = create_model("recipe", algorithm=(union, StraightThrough()))
    assert recipe().model_dump() == {"algorithm": {"kind": "straight_through", "mask_saturated": False}}
    assert recipe.model_validate({"algorithm": LearnedStep()}).model_dump()["algorithm"]["kind"] == "learned_step"


def test_what_is_abstract_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="scale_shift"):
        WeightQuantizer("int8", torch.bfloat16)  # type: ignore[abstract]
    with pytest.raises(TypeError, match="make"):
        Algorithm(kind="none")  # type: ignore[abstract]


def test_an_algorithm_takes_no_unknown_field_and_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        StraightThrough.model_validate({"learning_rate": 1.0})
    with pytest.raises(ValidationError, match="frozen"):
        StraightThrough().mask_saturated = True


def calibrated(qtype: str = "int8", dtype: torch.dtype = torch.float32, largest: float = 4.0) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(qtype, dtype, Absmax().make())
    quantizer.observe(torch.tensor([largest, -1.0]))
    return quantizer


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_float32_state_survives_a_cast_of_the_model(cast: str) -> None:
    layer = nn.Linear(8, 4)
    layer.add_module("learned", LearnedStep().make(layer.weight, "int4", torch.bfloat16))
    layer.add_module("activation", calibrated())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    getattr(layer, cast)()
    assert layer.weight.dtype is not torch.float32
    for name, tensor in layer.state_dict().items():
        if "." in name:
            assert same_bits(tensor, before[name]), name
    layer.to(torch.bfloat16)
    assert {p.dtype for p in layer.get_submodule("learned").parameters()} == {torch.float32}


def test_float32_state_moves_between_devices() -> None:
    quantizer = LearnedStep().make(awkward_weight(4, 8), "int4", torch.bfloat16)
    quantizer.to(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in quantizer.parameters()} == {("meta", torch.float32)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", ["int8", "float8"])
def test_an_activation_scale_is_the_observed_range_in_the_serving_dtype(qtype: str, dtype: torch.dtype) -> None:
    quantizer = calibrated(qtype, dtype, largest=3.3)
    expected = (torch.tensor(3.3) / QTYPES[qtype].scale_max).to(dtype).float()
    assert quantizer.scale.dtype is torch.float32
    assert torch.equal(quantizer.scale, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", ["int8", "float8"])
def test_activations_that_are_all_zero_give_a_scale_above_zero(qtype: str, dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(qtype, dtype, Absmax().make())
    quantizer.observe(torch.zeros(4))
    assert quantizer.scale.to(dtype) > 0
    assert torch.equal(fake_quantize_output(torch.zeros(4), quantizer), torch.zeros(4))


def test_a_scale_that_was_never_set_is_asked_for_with_the_remedy() -> None:
    quantizer = ActivationQuantizer("int8", torch.float32, Absmax().make())
    with pytest.raises(CalibrationError, match=r"run qat.calibrate\(model, batches\)"):
        quantizer.require_scale()
    calibrated().require_scale()


def test_a_scale_of_exactly_1_counts_as_set() -> None:
    quantizer = calibrated(largest=127.0)
    assert quantizer.scale == 1
    quantizer.require_scale()


def test_an_activation_quantizer_survives_a_state_dict() -> None:
    quantizer = calibrated(largest=5.0)
    quantizer.arrives_quantized = True
    again = ActivationQuantizer("int8", torch.float32, Absmax().make())
    again.load_state_dict(quantizer.state_dict())
    again.require_scale()
    assert again.arrives_quantized is True
    assert torch.equal(again.scale, quantizer.scale)


@pytest.mark.parametrize("qtype", ["int8", "float8"])
def test_a_saturated_output_gets_no_gradient(qtype: str) -> None:
    quantizer = calibrated(qtype, largest=1.0)
    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 3.0], requires_grad=True)
    fake_quantize_output(x, quantizer).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
