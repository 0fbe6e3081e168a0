"""What a quantizer promises: the trained weight is the stored weight, and its float32 state stays float32."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field, TypeAdapter, ValidationError, create_model
from torch import Tensor, nn

import qat
from qat.errors import CalibrationError, SpecError
from qat.formats import QUANTO
from qat.numerics import QType, Symmetric
from qat.observers import Absmax, Best
from qat.quantizers import Algorithm, AnyAlgorithm, LearnedAffine, StraightThrough, WeightQuantizer
from qat.quantizers.activation import ActivationQuantizer, fake_quantize_output
from tests.helpers import DTYPES, LearnedStep, awkward_weight, same_bits

QTYPES = QUANTO.qtypes
INT8 = QTYPES["int8"]

ALGORITHMS_UNDER_TEST: list[Algorithm] = [StraightThrough(), LearnedStep(), LearnedStep(start=1.3)]
SHAPES = [(1, 8), (3, 5), (4, 96), (16, 256), (3, 320), (3, 200)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS_UNDER_TEST, ids=str)
def test_the_final_codes_give_the_trained_weight(algorithm: Algorithm, qtype: QType, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        quantizer = algorithm.make(weight, qtype, dtype)
        trained = quantizer.quantize(weight, dtype).value
        frozen, value = quantizer.freeze(weight)
        assert trained.dtype is frozen.dtype is dtype
        assert same_bits(value, trained)
        assert same_bits(frozen.dequantize(), trained)
        assert same_bits(quantizer.quantize(weight, torch.float32).value, trained.float())


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS_UNDER_TEST, ids=str)
def test_a_frozen_weight_has_the_stored_shapes_and_dtypes(algorithm: Algorithm, qtype: QType) -> None:
    weight = awkward_weight(16, 256)
    frozen, _ = algorithm.make(weight, qtype, torch.bfloat16).freeze(weight)
    codes, scale, shift = frozen.codes, frozen.scale, frozen.shift
    groups = 32 if qtype.name in ("int4", "int2") else 16
    assert frozen.qtype is qtype
    assert codes.shape == weight.shape
    assert codes.dtype is qtype.storage
    assert codes.is_contiguous()
    assert (scale.shape, scale.dtype) == ((groups, 1), torch.bfloat16)
    assert (shift is not None) is (groups == 32)
    assert shift is None or (shift.shape, shift.dtype) == ((groups, 1), torch.bfloat16)
    assert not scale.requires_grad


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_dynamic_range_is_that_of_the_weight_now(qtype: QType, dtype: torch.dtype) -> None:
    first, second = awkward_weight(8, 256, seed=1), awkward_weight(8, 256, seed=2)
    quantizer = StraightThrough().make(first, qtype, dtype)
    fresh = StraightThrough().make(second, qtype, dtype)
    assert same_bits(quantizer.quantize(second, dtype).value, fresh.quantize(second, dtype).value)
    assert not list(quantizer.state_dict())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_faster_way_to_the_dynamic_range_gives_the_bits_of_the_plain_one(qtype: QType, dtype: torch.dtype) -> None:
    weight = awkward_weight(8, 256)
    quantizer = StraightThrough().make(weight, qtype, dtype)
    fast = quantizer.quantize(weight, torch.float32)
    plain = quantizer.by_scale(weight, *qtype.scale_shift(*qtype.weight_range(weight)), torch.float32)
    for ours, wanted in zip(fast, plain, strict=True):
        assert ours is wanted is None or (ours is not None and wanted is not None and same_bits(ours, wanted))


def test_every_algorithm_is_registered_and_can_be_configured() -> None:
    adapter: TypeAdapter[Algorithm] = TypeAdapter(AnyAlgorithm)
    for kind, algorithm in {"straight_through": StraightThrough, "learned_affine": LearnedAffine}.items():
        made = adapter.validate_python({"kind": kind})
        assert type(made) is algorithm
        assert made.kind == kind
        assert isinstance(made.make(awkward_weight(4, 64), INT8, torch.bfloat16), WeightQuantizer)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "magic"})


def test_a_second_algorithm_joins_the_union_by_being_registered() -> None:
    union: Any = Annotated[StraightThrough | LearnedAffine | LearnedStep, Field(discriminator="kind")]
    adapter: TypeAdapter[Algorithm] = TypeAdapter(union)
    assert adapter.validate_python({"kind": "learned_step", "start": 0.5}) == LearnedStep(start=0.5)
    assert adapter.validate_python({"kind": "straight_through"}) == StraightThrough()
    with pytest.raises(ValidationError, match=r"'straight_through', .*'learned_step'"):
        adapter.validate_python({"kind": "magic"})
    recipe = create_model("recipe", algorithm=(union, StraightThrough()))
    assert recipe().model_dump()["algorithm"] == StraightThrough().model_dump()
    assert recipe.model_validate({"algorithm": LearnedStep()}).model_dump()["algorithm"]["kind"] == "learned_step"


def test_what_is_abstract_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="quantize"):
        WeightQuantizer(INT8, torch.bfloat16)  # type: ignore[abstract]
    with pytest.raises(TypeError, match="make"):
        Algorithm(kind="none")  # type: ignore[abstract]


def test_an_algorithm_takes_no_unknown_field_and_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        StraightThrough.model_validate({"learning_rate": 1.0})
    with pytest.raises(
        SpecError,
        match=r"^StraightThrough: rate: Extra .*, got 1.0: choose from kind, .*, mask_saturated$",
    ):
        StraightThrough(rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(SpecError, match=r"^StraightThrough: got True without a name: write .*\(float8_backward="):
        StraightThrough(True)  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        StraightThrough().mask_saturated = True


def calibrated(qtype: QType = INT8, dtype: torch.dtype = torch.float32, largest: float = 4.0) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(qtype, dtype, Absmax())
    quantizer.observe(torch.tensor([largest, -1.0]))
    quantizer.refresh()
    return quantizer


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_float32_state_survives_a_cast_of_the_model(cast: str) -> None:
    layer = nn.Linear(8, 4)
    layer.add_module("learned", LearnedStep().make(layer.weight, QTYPES["int4"], torch.bfloat16))
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
    quantizer = LearnedStep().make(awkward_weight(4, 8), QTYPES["int4"], torch.bfloat16)
    quantizer.to(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in quantizer.parameters()} == {("meta", torch.float32)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", [QTYPES[name] for name in ["int8", "float8"]], ids=lambda qtype: qtype.name)
def test_an_activation_scale_is_the_observed_range_in_the_serving_dtype(qtype: QType, dtype: torch.dtype) -> None:
    quantizer = calibrated(qtype, dtype, largest=3.3)
    expected = (torch.tensor(3.3) / qtype.steps).to(dtype).float()
    assert quantizer.scale.dtype is torch.float32
    assert torch.equal(quantizer.scale, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", [QTYPES[name] for name in ["int8", "float8"]], ids=lambda qtype: qtype.name)
def test_activations_that_are_all_zero_give_a_scale_above_zero(qtype: QType, dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(qtype, dtype, Absmax())
    quantizer.observe(torch.zeros(4))
    quantizer.refresh()
    assert quantizer.scale.to(dtype) > 0
    assert torch.equal(fake_quantize_output(torch.zeros(4), quantizer), torch.zeros(4))


def test_a_scale_that_was_never_set_is_asked_for_with_the_remedy() -> None:
    quantizer = ActivationQuantizer(INT8, torch.float32, Absmax())
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
    again = ActivationQuantizer(INT8, torch.float32, Absmax())
    again.load_state_dict(quantizer.state_dict())
    again.require_scale()
    assert again.arrives_quantized is True
    assert torch.equal(again.scale, quantizer.scale)


def test_an_activation_quantizer_keeps_python_values() -> None:
    quantizer = calibrated()
    quantizer.arrives_quantized = True
    assert (quantizer.initialized, quantizer.arrives_quantized, quantizer.enabled) == (True, True, True)
    assert quantizer.state_dict()["_extra_state"].tolist() == [True, True, True, False]


def test_a_channel_that_small_weights_follow_still_counts() -> None:
    """float8 has room for outliers: a channel that counted nothing would be clipped for no gain."""
    x, weight = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)), torch.ones(8, 16)
    x[:, 0] *= 30
    weight[:, 0] /= 30
    scales = {}
    for rule in (Absmax(), Best()):
        quantizer = ActivationQuantizer(QTYPES["float8"], torch.float32, rule)
        quantizer.observe(x, weight)
        quantizer.refresh()
        scales[rule.kind] = float(quantizer.scale)
    assert 0.5 * scales["absmax"] < scales["best"] <= scales["absmax"]


def test_an_empty_tensor_sets_no_scale_and_needs_none() -> None:
    quantizer = ActivationQuantizer(INT8, torch.float32, Absmax())
    empty = torch.empty(0, 4, requires_grad=True)
    quantizer.observe(empty)
    quantizer.refresh()
    assert not quantizer.initialized
    fake_quantize_output(empty, quantizer).sum().backward()
    assert empty.grad is not None
    with pytest.raises(CalibrationError):
        fake_quantize_output(torch.ones(1), quantizer)
    quantizer.observe(torch.ones(3))
    quantizer.refresh()
    before = quantizer.scale.clone()
    quantizer.observe(empty)
    quantizer.refresh()
    assert torch.equal(quantizer.scale, before)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_by_scale_rounds_and_by_served_takes_what_is_rounded(qtype: QType) -> None:
    weight = awkward_weight(8, 256)
    quantizer = StraightThrough().make(weight, qtype, torch.bfloat16)
    scale, shift = (None if t is None else t.requires_grad_() for t in qtype.scale_shift(*qtype.weight_range(weight)))
    assert scale is not None
    found = quantizer.by_scale(weight, scale, shift, torch.float32)
    served = qtype.serve(scale, shift, torch.bfloat16, 256)
    assert same_bits(found.scale.detach(), served[0].detach())
    assert not found.value.requires_grad
    assert found.scale.requires_grad
    assert (found.shift is None) is (shift is None)
    again = quantizer.by_served(weight, *served, torch.float32)
    assert same_bits(again.value, found.value)
    assert again.scale is served[0]


@pytest.mark.parametrize("qtype", [QTYPES[name] for name in ["int8", "float8"]], ids=lambda qtype: qtype.name)
def test_a_saturated_output_gets_no_gradient(qtype: QType) -> None:
    quantizer = calibrated(qtype, largest=1.0)
    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 3.0], requires_grad=True)
    fake_quantize_output(x, quantizer).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_a_type_without_fast_kernels_learns_its_range_by_plain_autograd() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Doubled(Symmetric):
        """A loader that doubles every value, so the scale is served at half its size; its gradient halves too."""

        fused: ClassVar[bool] = False

        def serve(
            self, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, in_features: int
        ) -> tuple[Tensor, Tensor | None]:
            return super().serve(scale / 2, shift, dtype, in_features)

        def decode(self, codes: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
            return 2 * super().decode(codes, scale, shift, dtype)

        def encode(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
            return super().encode(weight, 2 * scale, shift)

    options = {"bits": 8, "code_min": -128, "code_max": 127, "steps": 127, "storage": torch.int8}
    doubled = Doubled(format="test_quantizers", name="int8", **options)  # type: ignore[arg-type]
    weight, found = awkward_weight(4, 64, seed=1), []
    for qtype in (doubled, QTYPES["int8"]):
        quantizer = LearnedAffine(start="minmax").make(weight, qtype, torch.float32)
        nn.init.constant_(quantizer.high_move, 0.125)
        value, scale, _ = quantizer.quantize(weight, torch.float32)
        scale.sum().backward()
        assert quantizer.high_move.grad is not None
        found.append((value, scale.detach(), quantizer.high_move.grad))
    assert same_bits(found[0][0], found[1][0])
    assert torch.equal(2 * found[0][1], found[1][1])
    torch.testing.assert_close(2 * found[0][2], found[1][2], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "activations", "reason"),
    [
        ({"float8_backward": True}, "int8", "float8_backward=True needs layers with float8 weights and float8 act"),
        ({"learn_activations": True}, None, "learn_activations=True needs layers with quantized activations"),
        ({"learn_activations": True, "static_activations": ("*",)}, "int8", "that are not among static_activations"),
        ({"learn_activations": True, "static_activations": ("nope",)}, "int8", "'nope' keeps no layer's scales"),
        ({"static_activations": ("0",)}, "int8", "'0' keeps no layer's scales, which learn_activations=True would"),
    ],
)
def test_an_option_of_the_algorithm_that_no_layer_uses_is_refused(
    options: dict[str, Any], activations: str | None, reason: str
) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    spec = qat.QuantSpec.model_validate({"activations": activations})
    with pytest.raises(qat.SpecError, match=rf"^algorithm: .*{re.escape(reason)}"):
        qat.prepare(model, spec, algorithm=qat.StraightThrough(**options))
    assert type(model[0]) is nn.Linear
