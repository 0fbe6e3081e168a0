"""`QEmbedding`: only rows that are read are quantized, trained and served alike, and every other table is refused."""

from __future__ import annotations

import copy
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qat
from qat.errors import StateError, TargetError
from qat.formats import QUANTO
from qat.formats.quanto_modules import FrozenEmbedding
from qat.layers import QEmbedding, layer_class
from qat.quantizers.learned_affine import LearnedRange
from tests.architectures import ARCHITECTURES
from tests.helpers import WEIGHT_TYPES, LearnedStep, awkward_weight, same_bits, tiny_model

TOKENS = torch.arange(24).reshape(2, 12) % 64
FOR: Any = {"target": "transformers"}
ALGORITHMS = {
    "straight_through": qat.StraightThrough(),
    "masked": qat.StraightThrough(mask_saturated=True),
    "learned_affine": qat.LearnedAffine(),
    "margin": qat.LearnedAffine(mask_margin=0.5, gradient="stable"),
    "dual_lsq": qat.DualLSQ(),
    "learned_clipping": qat.LearnedClipping(),
    "own": LearnedStep(),
}


def embedding(
    weights: str, algorithm: Any = None, rows: int = 40, dim: int = 256, dtype: torch.dtype = torch.float32
) -> QEmbedding:
    table = nn.Embedding(rows, dim, padding_idx=3)
    table.weight.data = awkward_weight(rows, dim)
    quantizer = (algorithm or qat.LearnedAffine()).make(table.weight, QUANTO.qtypes[weights], dtype)
    for key, parameter in quantizer.named_parameters():
        parameter.data += 0.1 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * ("move" in key)
    return QEmbedding.adopt(table, quantizer)


def gradients(layer: QEmbedding, y: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_rows_are_those_of_the_whole_table_and_so_are_gradients(weights: str, algorithm: Any) -> None:
    layer = embedding(weights, algorithm)
    ids = torch.tensor([[5, 0, 3, 5], [39, 1, 2, 5]])  # one three times, and the padding
    y = layer(ids)
    found = gradients(layer, y)
    table = layer.weight_quantizer.quantize(layer.weight, torch.float32)
    assert torch.equal(y, table.value[ids])
    wanted = gradients(layer, layer.compute(ids, table))
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])
    assert not found["weight"][3].any(), "the padding gets no gradient"
    assert torch.equal(found["weight"].any(1).nonzero()[:, 0], wanted["weight"].any(1).nonzero()[:, 0])


def test_the_table_is_quantized_whole_only_for_more_rows_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = embedding("int4"), []
    quantize = LearnedRange.quantize

    def noted(self: LearnedRange, weight: Tensor, out_dtype: torch.dtype) -> Any:
        seen.append(tuple(weight.shape))
        return quantize(self, weight, out_dtype)

    monkeypatch.setattr(LearnedRange, "quantize", noted)
    few, many = torch.tensor([7, 7, 1]), torch.arange(80) % 40
    y = layer(few)
    assert torch.equal(layer(many)[few], y)
    assert seen == [(3, 256), (40, 256)]


def test_it_computes_in_the_dtype_of_its_table_under_autocast() -> None:
    layer, ids = embedding("int8", dtype=torch.bfloat16), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(ids), layer(ids))
        assert layer(ids).dtype is torch.float32  # as the float one does
    layer.mode = layer.mode._replace(weights=False)
    assert torch.equal(layer(ids), layer.weight[ids])


def llama(**sizes: Any) -> Any:
    return tiny_model("llama", hidden_size=256, num_attention_heads=4, vocab_size=64, **sizes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [32, 70, 128])
def test_a_table_that_was_resized_since_is_refused(size: int, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    qat.prepare(model, qat.QuantSpec(weights="int4", overrides={"*embed_tokens": "int4", "lm_head": "int4"}), **FOR)
    model.resize_token_embeddings(size)
    with pytest.raises(StateError, match=f"its table has {size} rows, but its ranges are for 64: resize it before"):
        model(input_ids=TOKENS % 32)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_frozen_table_takes_no_negative_ids(weights: Any) -> None:
    model = llama(tie_word_embeddings=False)
    qat.prepare(model, qat.QuantSpec(weights=weights, include="*embed_tokens"), **FOR)
    qat.freeze(model)
    for wrong in (-1, 64):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model.model.embed_tokens(torch.tensor([[3, wrong]]))


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "bfloat16"), ("int4", "bfloat16"), ("int2", "float16")])
def test_an_embedding_alone_reloads_equal(tmp_path: Path, weights: Any, dtype: Any) -> None:
    model = llama(tie_word_embeddings=False)
    spec = qat.QuantSpec(weights=weights, dtype=dtype, include=("model.embed_tokens", "*_proj"))
    report = qat.prepare(model, spec, target="transformers")
    (row,) = (row for row in report.inspection.layers if row.name == "model.embed_tokens")
    assert (row.class_name, row.shape, row.weights) == ("Embedding", (64, 256), weights)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    trained = model.model.embed_tokens(TOKENS[:1, :3]).detach()
    qat.freeze(model)
    assert torch.equal(model.model.embed_tokens(TOKENS[:1, :3]).float(), trained)
    qat.export(model, tmp_path / "out", example_inputs={"input_ids": TOKENS})
    qat.verify(tmp_path / "out", reference=model)
    for loaded in (qat.load(tmp_path / "out"), qat.load(tmp_path / "out", model=llama(tie_word_embeddings=False))):
        assert type(loaded.model.embed_tokens) is FrozenEmbedding
        with torch.no_grad():
            assert same_bits(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "BartForConditionalGeneration"])
def test_scaled_embeddings_keep_their_number(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build().eval()
    example: Any = architecture.example()
    with torch.no_grad():
        floats = model(**example).logits
    qat.prepare(model, qat.QuantSpec(weights="int8", dtype="float32", include="*embed_tokens"), target="transformers")
    with torch.no_grad():
        prepared = model(**example).logits
        assert 0 < (prepared - floats).abs().max() < 0.1 * floats.abs().max()
        qat.freeze(model)
        assert torch.equal(model(**example).logits, prepared)
        qat.export(model, tmp_path / "out", example_inputs=example)
        qat.verify(tmp_path / "out", reference=model)
        assert torch.equal(qat.load(tmp_path / "out")(**example).logits, prepared)


def test_every_scaled_embedding_of_transformers_only_multiplies() -> None:
    found = 0
    for info in pkgutil.iter_modules(transformers.models.__path__):
        source = Path(transformers.models.__path__[0]) / info.name / f"modeling_{info.name}.py"
        if not source.is_file() or "ScaledWordEmbedding(nn.Embedding)" not in source.read_text():
            continue
        module = import_module(f"transformers.models.{info.name}.modeling_{info.name}")
        for kind in (c for n, c in vars(module).items() if n.endswith("ScaledWordEmbedding")):
            table = kind(4, 4, 0)
            if layer_class(table) is QEmbedding and QEmbedding.adoption_fault(table) is None:
                body = inspect.getsource(kind.forward).split("\n", 1)[1].strip()
                assert body.startswith("return super().forward(input_ids) * self.embed_scale"), kind
                found += 1
    assert found > 15


def test_options_without_a_quantized_form_are_refused_by_name() -> None:
    for option in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        (name,) = option
        fault = QEmbedding.adoption_fault(nn.Embedding(8, 8, **option))  # type: ignore[arg-type]
        assert fault == f"its option {name}={option[name]} has no quantized form: build the embedding without it"

    class Positions(nn.Embedding):
        pass

    assert "Positions is not exactly nn.Embedding" in str(QEmbedding.adoption_fault(Positions(8, 8)))
    extra = ARCHITECTURES["Gemma3ForCausalLM"].build().model.embed_tokens
    extra.more = nn.Parameter(torch.ones(2))
    assert "is not exactly nn.Embedding" in str(QEmbedding.adoption_fault(extra))


@pytest.mark.parametrize("target", ["quanto", "diffusers"])
def test_stock_loaders_replace_none(target: str) -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(8, 64), "linear": nn.Linear(64, 64)})
    reason = f"the loader of target {target!r} replaces no Embedding: no target for such a model does"
    if target == "quanto":
        report = qat.inspect(model, qat.QuantSpec(include="*"), target=target)
        assert {row.name: row.reason for row in report.layers} == {"embed": reason, "linear": "included by '*'"}
        assert report.warnings == (f"11.0% of the parameters stay float: {reason}",)
        for spec in (qat.QuantSpec(include=("embed", "linear")), qat.QuantSpec(overrides={"em*": "int8"})):
            with pytest.raises(TargetError, match=rf"names embed, but {reason}, or leave the pattern out"):
                qat.inspect(model, spec, target=target)
        qat.inspect(model, qat.QuantSpec(overrides={"embed": "float"}), target=target)
    assert target not in QEmbedding.targets


def test_it_is_float_by_default_and_says_so() -> None:
    report = qat.inspect(llama(tie_word_embeddings=False), qat.QuantSpec(), target="transformers")
    assert "model.embed_tokens" not in {row.name for row in report.layers}
    reason = "embedding, float by default (include it by name to quantize it)"
    assert report.left_float["model.embed_tokens"] == reason


def test_ids_are_no_numbers_to_quantize() -> None:
    model = llama(tie_word_embeddings=False)
    spec = qat.QuantSpec(weights="int8", activations="int8", include=("*embed_tokens", "*_proj"))
    report = qat.prepare(model, spec, target="transformers", example_inputs={"input_ids": TOKENS})
    (row,) = (row for row in report.inspection.layers if row.name == "model.embed_tokens")
    assert row.activations is None
    assert row.reason == "included by '*embed_tokens'; float activations, since it is no linear layer"
    assert model.model.embed_tokens.input_quantizer is None
    qat.calibrate(model, [{"input_ids": TOKENS}])
    assert qat.freeze(model).layers["model.embed_tokens"].activations is None


@pytest.mark.parametrize("start", ["output", "gptq", "best"])
def test_a_start_from_data_leaves_it_at_clip(start: Any) -> None:
    model = llama(tie_word_embeddings=False)
    spec = qat.QuantSpec(weights="int4", include=("*embed_tokens", "*q_proj"))
    report = qat.prepare(model, spec, algorithm=qat.LearnedAffine(start=start), target="transformers")
    assert report.waiting == 2
    before = copy.deepcopy(model.model.embed_tokens.state_dict())
    found = qat.calibrate(model, [{"input_ids": TOKENS}]).starts
    assert set(found) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    for key, value in model.model.embed_tokens.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_needs_linear_layers_names_the_embedding() -> None:
    model = llama(tie_word_embeddings=False)
    spec = qat.QuantSpec(weights="int4", include=("*embed_tokens", "*q_proj"))
    qat.prepare(model, spec, target="transformers")
    with pytest.raises(StateError, match=r"are no plain QLinear: exclude them in the spec \(model.embed_tokens\)"):
        qat.fix_codes(model)
    with pytest.raises(TargetError, match=r"model.embed_tokens \(its loader replaces no Embedding\)"):
        qat.freeze(model, target="quanto")
    qat.freeze(model)
    with pytest.raises(StateError, match=r"can train again \(model.embed_tokens; .* FrozenEmbedding\): exclude"):
        qat.fix_codes(model)


def test_an_export_is_for_a_loader_that_replaces_it(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    qat.prepare(model, qat.QuantSpec(weights="int8", include=("*embed_tokens", "*q_proj")), target="transformers")
    qat.freeze(model)
    with pytest.raises(TargetError, match=r"target 'quanto': its loader cannot hold 1 of .* \(model.embed_tokens\)"):
        qat.export(model, tmp_path / "out", target="quanto")
    assert not (tmp_path / "out").exists()
