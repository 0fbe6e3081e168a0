"""What freezing records: evidence that a reload gives again, and that notices one altered bit."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import quantization_map, requantize
from pydantic import TypeAdapter
from torch import Tensor, nn

import qat
from qat.errors import StateError
from qat.files.evidence import FrozenRecord, LayerEvidence, frozen_record
from qat.formats import QUANTO
from qat.layers import quantized_layers
from qat.numerics import FrozenWeight
from qat.spec import LayerSpec, QuantSpec
from qat.tensors import digest
from tests.helpers import DTYPES, WEIGHT_TYPES, LearnedStep, same_bits

SHAPES = [(1, 8), (3, 5), (16, 256), (32, 256), (5, 192), (3, 200)]


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({f"{out}x{n}": nn.Linear(n, out) for out, n in SHAPES})


def prepared(weights: str, dtype: str) -> tuple[nn.ModuleDict, dict[str, FrozenWeight]]:
    made = model()
    qat.prepare(made, QuantSpec.model_validate({"weights": weights, "dtype": dtype}), algorithm=LearnedStep())
    return made, {name: layer.weight_quantizer.freeze(layer.weight)[0] for name, layer in quantized_layers(made)}


def evidence(module: nn.Module) -> LayerEvidence:
    return QUANTO.read(module).evidence(digest(QUANTO.values(module)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_what_was_packed_is_unpacked_bit_for_bit(weights: str, dtype: str) -> None:
    made, finals = prepared(weights, dtype)
    qat.freeze(made, allow_unreached=True)
    classes = set()
    for name, final in finals.items():
        weight = made[name].weight
        classes.add(type(weight).__name__)
        unpacked = QUANTO.read(made[name]).weight
        assert same_bits(unpacked.codes, final.codes), name
        assert same_bits(unpacked.scale, final.scale), name
        assert (unpacked.shift is None) is (final.shift is None)
        assert unpacked.shift is None or (final.shift is not None and same_bits(unpacked.shift, final.shift)), name
        assert unpacked.qtype is final.qtype
    assert ("TinyGemmWeightQBitsTensor" in classes) is ((weights, dtype) == ("int4", "bfloat16"))


@pytest.mark.loads("quanto", "requantize", weights=WEIGHT_TYPES, equal="codes, values")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_reloaded_layer_gives_the_same_evidence(weights: str, dtype: str) -> None:
    made, _ = prepared(weights, dtype)
    qat.freeze(made, allow_unreached=True)
    record = frozen_record(made)
    again = model().to(DTYPES[dtype])
    requantize(again, {key: t.clone() for key, t in made.state_dict().items()}, quantization_map(made))
    for name, kept in record.layers.items():
        assert evidence(again[name]) == kept, name
        assert evidence(made[name]) == kept


def frozen_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 8))
    overrides = {"2": LayerSpec(weights="int8", activations="int8")}
    spec = QuantSpec(weights="int4", dtype="float32", overrides=overrides)
    qat.prepare(made, spec, target="quanto", algorithm=qat.StraightThrough())
    qat.calibrate(made, [torch.randn(4, 256)])
    qat.freeze(made)
    return made


def test_a_record_tells_the_facts() -> None:
    record = frozen_record(frozen_mlp())
    assert (record.target, record.algorithm, record.spec.weights) == ("quanto", "straight_through", "int4")
    first, last = record.layers["0"], record.layers["2"]
    assert (first.weights, first.activations, first.shape, first.group_size) == ("int4", None, (16, 256), 128)
    assert (last.weights, last.activations, last.shape, last.group_size) == ("int8", "int8", (8, 16), None)
    assert first.shift is not None
    assert first.input_scale is first.output_scale is last.shift is None
    assert last.input_scale is not None
    assert last.input_scale > 0


def alter(weight: Tensor, part: str) -> None:
    """Change one bit of a frozen 8-bit weight."""
    inner: Tensor = weight.__dict__[part]
    inner.view(torch.uint8).view(-1)[0] ^= 1


@pytest.mark.parametrize(
    ("part", "digests"), [("_data", {"codes", "weight"}), ("_scale", {"scale", "weight"})], ids=["codes", "scale"]
)
def test_one_altered_bit_is_noticed(part: str, digests: set[str]) -> None:
    made = frozen_mlp()
    before = frozen_record(made).layers["2"]
    with torch.no_grad():
        alter(made[2].weight, part)
    after = evidence(made[2])
    assert {name for name in ("codes", "scale", "weight") if getattr(after, name) != getattr(before, name)} == digests


def test_an_altered_activation_scale_is_noticed() -> None:
    made = frozen_mlp()
    made[2].input_scale *= 1.5
    assert evidence(made[2]).input_scale != frozen_record(made).layers["2"].input_scale


def test_a_record_survives_json() -> None:
    record = frozen_record(frozen_mlp())
    written = TypeAdapter(FrozenRecord)
    assert written.validate_json(written.dump_json(record)) == record


def test_a_model_that_was_never_frozen_has_no_record() -> None:
    made = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(StateError, match=r"was not frozen: call qat.freeze\(model\) first, on this same module"):
        frozen_record(made)
    qat.prepare(made, QuantSpec(dtype="float32"))
    with pytest.raises(StateError, match="was not frozen"):
        frozen_record(made)
    with pytest.raises(StateError, match=r"model: must be a frozen nn.Module, got str: pass the model first"):
        frozen_record("out")  # type: ignore[arg-type]
