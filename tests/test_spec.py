"""Precedence of patterns, and that every mistake in a spec is found where it is made."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError, create_model

from qat.errors import QatError, SpecError
from qat.spec import LayerSpec, QuantSpec, WeightType
from tests.helpers import one_of

WEIGHTS = get_args(WeightType)

NAMES = ["encoder.0.to_q", "encoder.0.to_out", "encoder.1.to_q", "encoder.1.to_out", "lm_head"]


def types(spec: QuantSpec) -> dict[str, str]:
    resolved = {name: spec.resolve(name).layer for name in NAMES}
    return {name: "float" if layer is None else layer.weights for name, layer in resolved.items()}


def test_the_default_quantizes_everything() -> None:
    assert types(QuantSpec()) == dict.fromkeys(NAMES, "int8")
    assert QuantSpec().resolve("lm_head").explicit is False


def test_overrides_beat_exclude_beats_include() -> None:
    spec = QuantSpec(weights="int4", include="encoder.*", exclude="*.to_q", overrides={"encoder.1.*": "int2"})
    assert types(spec) == {
        "encoder.0.to_q": "float",
        "encoder.0.to_out": "int4",
        "encoder.1.to_q": "int2",
        "encoder.1.to_out": "int2",
        "lm_head": "float",
    }


def test_the_last_matching_override_wins() -> None:
    one = QuantSpec(overrides={"*": "int4", "lm_head": "float8"})
    other = QuantSpec(overrides={"lm_head": "float8", "*": "int4"})
    assert types(one)["lm_head"] == "float8"
    assert types(other)["lm_head"] == "int4"


@pytest.mark.parametrize(
    ("spec", "name", "reason", "explicit"),
    [
        (QuantSpec(), "lm_head", "", False),
        (QuantSpec(exclude="lm_*"), "lm_head", "excluded by 'lm_*'", True),
        (QuantSpec(include="lm_*"), "lm_head", "included by 'lm_*'", True),
        (QuantSpec(include="encoder.*"), "lm_head", "matches no include pattern", False),
        (QuantSpec(overrides={"lm_head": "int4"}), "lm_head", "override 'lm_head'", True),
        (QuantSpec(overrides={"lm_head": "float"}), "lm_head", "override 'lm_head': float", True),
    ],
    ids=["default", "exclude", "include", "not included", "override", "override to float"],
)
def test_a_resolution_says_why(spec: QuantSpec, name: str, reason: str, explicit: bool) -> None:
    resolution = spec.resolve(name)
    assert (resolution.reason, resolution.explicit) == (reason, explicit)


def test_patterns_are_case_sensitive_and_match_the_whole_name() -> None:
    spec = QuantSpec(exclude=("LM_HEAD", "to_q"))
    assert "float" not in types(spec).values()


def test_a_type_name_takes_the_models_activations_and_a_layer_spec_its_own() -> None:
    spec = QuantSpec(activations="int8", overrides={"lm_head": "int4", "*.to_q": LayerSpec(weights="int4")})
    head, query = spec.resolve("lm_head").layer, spec.resolve("encoder.0.to_q").layer
    assert head is not None
    assert query is not None
    assert (head.activations, query.activations) == ("int8", None)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (QuantSpec(), None),
        (QuantSpec(activations="float8"), "float8"),
        (QuantSpec(overrides={"a": LayerSpec(weights="int8", activations="int8")}), "int8"),
    ],
    ids=["none", "default", "in an override only"],
)
def test_the_activation_type_is_found_wherever_it_is_named(spec: QuantSpec, kind: str | None) -> None:
    assert spec.activation_type == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int3"}, f"weights\n.*{one_of(*WEIGHTS)}.*'int3'"),
        ({"activations": "int4"}, "activations\n.*'int8' or 'float8'.*'int4'"),
        ({"dtype": "float64"}, "dtype\n.*'float32', 'bfloat16' or 'float16'.*'float64'"),
        ({"overrides": {"lm_head": "int5"}}, "lm_head.*\n.*'int5'"),
        ({"weight": "int8"}, "weight\n.*Extra inputs are not permitted"),
        (
            {"activations": "int8", "overrides": {"a": LayerSpec(weights="int8", activations="float8")}},
            r"one activation type, but this spec names \['float8', 'int8'\]: choose one",
        ),
    ],
    ids=["weights", "activations", "dtype", "override", "unknown field", "two activation types"],
)
def test_a_wrong_spec_is_refused_where_it_is_made(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        QuantSpec.model_validate(arguments)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            {"weights": "int3", "activation": "int8"},
            [
                f"QuantSpec: weights: Input should be {one_of(*WEIGHTS)}, got 'int3'",
                "QuantSpec: activation: Extra inputs are not permitted, got 'int8': choose from weights, activations, ",
            ],
        ),
        (
            {
                "overrides": {
                    "a": "int5",
                    "b": {"weights": "int8", "x": 1},
                    "c": {"weights": "float", "activations": "int8"},
                    "d": 3,
                }
            },
            [
                f"overrides.a: Input should be {one_of(*WEIGHTS, 'float')}, got 'int5'",
                "overrides.b.x: Extra inputs are not permitted, got 1: choose from weights, activations",
                "overrides.c: a layer with weights='float' cannot have quantized activations: leave activations out",
                "overrides.d: Input should be a valid dictionary or instance of LayerSpec, got 3",
            ],
        ),
        (
            {"quantize_outputs": "perhaps"},
            ["quantize_outputs: Input should be a valid boolean, unable to interpret input, got 'perhaps'"],
        ),
    ],
    ids=["two faults", "overrides", "type"],
)
def test_making_a_spec_lists_all_faults_in_one_error_of_ours(arguments: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(SpecError) as raised:
        QuantSpec(**arguments)
    assert isinstance(raised.value, ValueError)
    for message in messages:
        assert str(raised.value).count(message) == 1
    assert len(str(raised.value).splitlines()) == len(messages)


def test_a_spec_without_an_arguments_name_is_told_to_give_it() -> None:
    with pytest.raises(SpecError, match=r"^QuantSpec: got 'int4' without a name: write QuantSpec\(weights=\.\.\.\)$"):
        QuantSpec("int4")  # type: ignore[misc]
    with pytest.raises(SpecError, match=r"^QuantSpec: got a Sequential without a name"):
        QuantSpec(torch.nn.Sequential(torch.nn.Linear(1, 1)))  # type: ignore[misc]


def test_within_a_configuration_pydantic_collects_the_faults_of_a_spec() -> None:
    recipe = create_model("Recipe", spec=(QuantSpec, QuantSpec()), steps=(int, 1))
    with pytest.raises(ValidationError) as raised:
        recipe.model_validate({"spec": {"weights": "int3"}, "steps": "many"})
    assert [fault["loc"] for fault in raised.value.errors()] == [("spec", "weights"), ("steps",)]


def test_a_float_layer_cannot_have_activations() -> None:
    with pytest.raises(SpecError, match="leave activations out"):
        LayerSpec(weights="float", activations="int8")


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        QuantSpec().weights = "int4"  # type: ignore[misc]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_dtype(dtype: str) -> None:
    assert QuantSpec.model_validate({"dtype": dtype}).torch_dtype is getattr(torch, dtype)


def test_a_dtype_of_torch_is_taken_by_its_name() -> None:
    assert QuantSpec(dtype=torch.float16) == QuantSpec(dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"dtype: .*'float32', 'bfloat16' or 'float16', got 'float64'$"):
        QuantSpec(dtype=torch.float64)  # type: ignore[arg-type]


def test_a_spec_survives_json() -> None:
    spec = QuantSpec(
        weights="int4",
        activations="int8",
        include=("a.*",),
        exclude="b",
        overrides={"c": "float", "d": LayerSpec(weights="int2"), "a": "int8"},
    )
    again = QuantSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert list(again.overrides) == ["c", "d", "a"]  # their order decides


def test_patterns_that_match_are_fine() -> None:
    QuantSpec(include="encoder.*", exclude="*to_q", overrides={"lm_head": "int4"}).check_patterns(NAMES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantSpec(exclude="lm_haed"), "exclude: pattern 'lm_haed' .* did you mean 'lm_head'\\?"),
        (QuantSpec(include="*.to_k"), "include: pattern '\\*.to_k' .* did you mean '\\*.to_q'"),
        (QuantSpec(exclude="to_q"), "exclude: pattern 'to_q' .*: a pattern matches the whole name; .*'\\*.to_q'"),
        (QuantSpec(exclude="encodr.0.to_q"), "did you mean 'encoder.0.to_q'"),
        (QuantSpec(exclude="encoder.0"), "it names a module that holds layers; did you mean 'encoder.0.*'\\?"),
        (
            QuantSpec(overrides={"xyzzy": "int4"}),
            "overrides: pattern 'xyzzy' .*; layers here: .*'encoder.0.to_q'",
        ),
    ],
    ids=["misspelt", "by its last part", "without a star", "a whole name", "a module", "nothing near"],
)
def test_a_pattern_that_matches_nothing_is_refused_with_a_suggestion(spec: QuantSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message) as raised:
        spec.check_patterns(NAMES)
    assert isinstance(raised.value, QatError)
    assert isinstance(raised.value, ValueError)


def test_one_error_lists_all_patterns_at_fault() -> None:
    with pytest.raises(SpecError, match=r"(?s)'nope'.*'neither'"):
        QuantSpec(include="nope", exclude="neither").check_patterns(NAMES)


EXPERTS = "a Experts, whose weights have no quantized form"
OTHERS = {
    "encoder.0.experts": EXPERTS,
    "encoder.1.experts": EXPERTS,
    "encoder.0.c_attn": "a Conv1D, whose weights have no quantized form",
}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            QuantSpec(include=("*experts*", "*to_q")),
            "include: pattern '*experts*' matches no layer that can be quantized, only encoder.0.experts and the like: "
            "a Experts, whose weights have no quantized form",
        ),
        (
            QuantSpec(overrides={"*.c_attn": "int8"}),
            "overrides: pattern '*.c_attn' matches no layer that can be quantized, only encoder.0.c_attn and the like: "
            "a Conv1D, whose weights have no quantized form",
        ),
        (
            QuantSpec(overrides={"*.c_attn": LayerSpec(weights="int8")}),
            "overrides: pattern '*.c_attn' matches no layer that can be quantized, only encoder.0.c_attn and the like: "
            "a Conv1D, whose weights have no quantized form",
        ),
    ],
    ids=["include", "override", "layer spec"],
)
def test_a_pattern_that_asks_to_quantize_what_cannot_be_is_told_so(spec: QuantSpec, message: str) -> None:
    with pytest.raises(SpecError) as raised:
        spec.check_patterns(NAMES, OTHERS)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(exclude="*experts*"),
        QuantSpec(overrides={"*experts*": "float"}),
        QuantSpec(overrides={"*experts*": LayerSpec(weights="float")}),
        QuantSpec(include="encoder.*"),
    ],
    ids=["exclude", "override to float", "layer spec of float", "among linear layers"],
)
def test_a_pattern_that_leaves_float_what_is_float_anyway_is_fine(spec: QuantSpec) -> None:
    spec.check_patterns(NAMES, OTHERS)
    if not spec.include:
        with pytest.raises(SpecError, match="matches no layer that can be quantized"):
            spec.check_patterns(NAMES)
