"""An embedding tied to its head: one master, one quantizer, one table on disk, and the tie again after a load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import qat
from qat.errors import SpecError, TargetError
from qat.hosts import get_target
from qat.training.cage import cage_step
from tests.architectures import ARCHITECTURES
from tests.helpers import WEIGHT_TYPES, same_bits, tiny_model

TOKENS = torch.arange(24).reshape(2, 12) % 64
BOTH = ("model.embed_tokens", "lm_head")
RANGES = ("model.embed_tokens.weight_quantizer.low_move", "model.embed_tokens.weight_quantizer.high_move")


def llama(**sizes: Any) -> Any:
    sizes = {"hidden_size": 256, "vocab_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": True, **sizes}
    return tiny_model("llama", **sizes)


def prepared(include: tuple[str, ...] = (*BOTH, "*_proj"), **spec: Any) -> Any:
    model = llama()
    algorithm = qat.LearnedAffine()
    spec = {"weights": "int4", "dtype": "float32", **spec}
    qat.prepare(model, qat.QuantSpec(include=include, **spec), algorithm=algorithm, target="transformers")
    return model


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-3))
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings is True


CASES = [
    *((weights, dtype, None) for weights in WEIGHT_TYPES for dtype in ("float32", "bfloat16")),
    ("int8", "float16", None),
    ("int8", "bfloat16", "int8"),
    ("float8", "bfloat16", "float8"),
]


@pytest.mark.loads("transformers", "plug-in for transformers", layers=("embedding",), weights=WEIGHT_TYPES)
@pytest.mark.loads("transformers", "qat.load, model", layers=("embedding",), weights=WEIGHT_TYPES, equal="outputs")
@pytest.mark.parametrize(("weights", "dtype", "activations"), CASES)
def test_both_reload_equal_from_one_table(tmp_path: Path, weights: Any, dtype: Any, activations: Any) -> None:
    model = llama()
    spec = qat.QuantSpec(weights=weights, dtype=dtype, activations=activations, include=(*BOTH, "*_proj"))
    report = qat.prepare(model, spec, target="transformers", example_inputs={"input_ids": TOKENS})
    assert report.untied == ()
    rows = {row.name: row for row in report.inspection.layers}
    assert rows["lm_head"].shared_with == "model.embed_tokens"
    assert rows["lm_head"].reason == "included by 'lm_head'; tied to model.embed_tokens, one table for both"
    assert (rows["lm_head"].bytes_before, rows["lm_head"].bytes_after) == (0, 0)
    assert report.inspection.parameters == sum(p.numel() for p in llama().parameters())
    assert report.inspection.quantized_share < 1
    if activations is not None:
        qat.calibrate(model, [{"input_ids": TOKENS}])
    train(model)
    qat.freeze(model)
    assert is_tied(model)
    qat.export(model, tmp_path / "out", example_inputs={"input_ids": TOKENS})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tables = [key for key in file.keys() if "weight" in key and key.startswith(BOTH)]  # noqa: SIM118
    assert len(tables) == (2 if weights in ("int8", "float8") else 3)
    assert all(key.startswith("model.embed_tokens.weight.") for key in tables)
    qat.verify(tmp_path / "out", reference=model)
    for loaded in (qat.load(tmp_path / "out"), qat.load(tmp_path / "out", model=llama())):
        assert is_tied(loaded)
        assert same_bits(logits(loaded), logits(model))


def test_one_master_and_one_range_get_the_gradients_of_both_uses() -> None:
    model = prepared(weights="int4")
    assert is_tied(model)
    assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer
    names = dict(model.named_parameters())
    assert set(RANGES) <= names.keys()
    assert not any(key.startswith("lm_head.") for key in names)
    assert not any(key.startswith("lm_head.weight_quantizer") for key in model.state_dict())
    groups = [p for group in qat.parameter_groups(model, lr=1e-3) for p in group["params"]]
    assert len({id(p) for p in groups}) == len(groups)

    found: list[list[torch.Tensor]] = []
    for use in ("both", "head", "rows"):
        model.zero_grad()
        hidden = model.model.embed_tokens(TOKENS)
        hidden = hidden.detach() if use == "head" else hidden
        table = model.lm_head
        y = table(hidden) if use != "rows" else torch.nn.functional.linear(hidden, _value(table))
        y.square().sum().backward()
        found.append([names[key].grad for key in ("model.embed_tokens.weight", *RANGES)])
    for both, head, rows in zip(*found, strict=True):
        assert head.any()
        assert rows.any()
        torch.testing.assert_close(both, head + rows, rtol=1e-4, atol=1e-4 * float(both.abs().max()))


def _value(layer: Any) -> torch.Tensor:
    value: torch.Tensor = layer.weight_quantizer.quantize(layer.weight, torch.float32).value
    return value.detach()


def test_copies_checkpoints_and_resumed_training_keep_the_tie(tmp_path: Path) -> None:
    model = prepared()
    train(model)
    duplicate = copy.deepcopy(model)
    assert is_tied(duplicate)
    assert duplicate.lm_head.weight_quantizer is duplicate.model.embed_tokens.weight_quantizer
    assert duplicate.lm_head.weight_quantizer is not model.lm_head.weight_quantizer
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = prepared()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert is_tied(other)
    assert torch.equal(logits(other), logits(model))
    for one in (model, other):
        train(one)
    assert torch.equal(logits(other), logits(model))
    moved = other.double()
    assert moved.lm_head.weight_quantizer is moved.model.embed_tokens.weight_quantizer


@pytest.mark.parametrize("head", [True, False], ids=["both names", "one name"])
def test_a_float_checkpoint_starts_the_shared_range_afresh(head: bool) -> None:
    floats, model = llama(), prepared()
    floats.lm_head.weight.data *= 2
    state = floats.state_dict()
    if not head:  # as safetensors files have it
        del state["lm_head.weight"]
    model.load_state_dict(state, strict=head)
    spec = qat.QuantSpec(weights="int4", dtype="float32", include=(*BOTH, "*_proj"))
    qat.prepare(floats, spec, algorithm=qat.LearnedAffine(), target="transformers")
    assert torch.equal(logits(model), logits(floats))


@pytest.mark.parametrize("name", BOTH)
def test_one_of_both_is_untied_as_before(tmp_path: Path, name: str) -> None:
    model = llama()
    spec = qat.QuantSpec(weights="int8", include=(name, "*_proj"))
    report = qat.prepare(model, spec, target="transformers")
    assert report.untied == (name,)
    assert model.config.tie_word_embeddings is False
    train(model)
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs={"input_ids": TOKENS})
    qat.verify(tmp_path / "out", reference=model)
    assert same_bits(logits(qat.load(tmp_path / "out")), logits(model))


def test_types_that_differ_are_refused_with_both_names() -> None:
    spec = qat.QuantSpec(overrides={"model.embed_tokens": "int8", "lm_head": "int4"})
    message = r"overrides: model.embed_tokens int8 and lm_head int4 are one tied weight, .* give both the same"
    with pytest.raises(SpecError, match=message):
        qat.inspect(llama(), spec, target="transformers")


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "BertForMaskedLM"])
def test_all_names_of_a_table_stay_one(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build().eval()
    example: Any = architecture.example()
    ends = ("*word_embeddings", "*decoder") if name.startswith("Bert") else ("*shared", "*embed_tokens", "lm_head")
    spec = qat.QuantSpec(weights="int8", dtype="float32", include=ends)
    report = qat.prepare(model, spec, target="transformers")
    assert report.untied == ()
    assert sum(row.shared_with is not None for row in report.inspection.layers) == (1 if len(ends) == 2 else 3)
    with torch.no_grad():
        expected = model(**example).logits
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs=example)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert sum(key.endswith("weight._data") for key in file.keys()) == 1  # noqa: SIM118
    qat.verify(tmp_path / "out", reference=model)
    with torch.no_grad():
        found = qat.load(tmp_path / "out")(**example).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_start_from_data_leaves_a_shared_table_at_clip() -> None:
    model = llama()
    spec = qat.QuantSpec(weights="int4", include=(*BOTH, "*q_proj"))
    report = qat.prepare(model, spec, algorithm=qat.LearnedAffine(start="gptq"), target="transformers")
    assert report.waiting == 1
    before = model.lm_head.weight.clone()
    assert set(qat.calibrate(model, [{"input_ids": TOKENS}]).starts) == {"model.layers.0.self_attn.q_proj"}
    assert torch.equal(model.lm_head.weight, before)


def test_cage_pulls_it_once() -> None:
    model = prepared(include=BOTH)
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=0.1))
    start, value = model.lm_head.weight.detach().clone(), _value(model.lm_head)
    assert cage_step(model, optimizer, strength=5.0) == 1
    assert torch.equal(model.lm_head.weight, start.lerp(value, 0.5))


def test_settling_keeps_the_tie() -> None:
    model = prepared(dtype="bfloat16")
    qat.freeze(model)
    assert type(model.lm_head.weight).__name__ == "TinyGemmWeightQBitsTensor"
    weight = torch.nn.Parameter(model.lm_head.weight.weight_qbits_tensor(), requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight = weight
    get_target("transformers").settle(model)
    assert type(model.lm_head.weight).__name__ == "TinyGemmWeightQBitsTensor"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_target_that_ties_nothing_refuses_it() -> None:
    with pytest.raises(TargetError, match=r"model.embed_tokens \(its loader ties no weights\)"):
        qat.freeze(prepared(), target="quanto")


def test_a_search_gives_both_one_type() -> None:
    spec = qat.QuantSpec(include=(*BOTH, "*q_proj"), dtype="float32")
    report = qat.search(
        llama(), spec, [{"input_ids": TOKENS}], budget="int4", types=("int2", "int8"), target="transformers"
    )
    types = {choice.name: choice.weights for choice in report.layers}
    assert types["lm_head"] == types["model.embed_tokens"]
    rows = {row.name: row for row in qat.inspect(llama(), report.spec, target="transformers").layers}
    assert rows["lm_head"].shared_with == "model.embed_tokens"


def test_a_prepared_model_is_saved_by_its_library(tmp_path: Path) -> None:
    prepared(include=BOTH).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {key for key in file.keys() if "quantizer" in key or "lm_head" in key}  # noqa: SIM118
    assert names >= set(RANGES)
    assert all(name.startswith("model.embed_tokens.weight_quantizer.") for name in names)
