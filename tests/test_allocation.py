"""`search`: exact bytes, a model that stays as it is, searches that go on, and what every target can express."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import qat
from qat.allocation.state import batches_digest
from qat.files.shards import read_headers
from qat.numerics import QType
from qat.quantizers import Quantized
from tests.diffusion_architectures import ARCHITECTURES
from tests.helpers import LearnedStep, LearnedStepQuantizer, same_bits, tiny_model, tokens

INT8 = qat.QuantSpec(dtype="float32")


def chain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 16))


def inputs(seed: int = 0, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 32, generator=generator) for _ in range(count)]


def facts(model: nn.Module) -> list[Any]:
    """All that a search could leave behind, but the numbers."""
    return [
        (name, type(module), module.training, sorted(vars(module)), [len(v) for v in vars(module).values() if hooks(v)])
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]


def hooks(value: Any) -> bool:
    return isinstance(value, dict)


class Unchanged:
    """Checks that a model is what it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.facts = model, facts(model)
        self.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        self.random = torch.get_rng_state()

    def check(self) -> None:
        assert facts(self.model) == self.facts
        state = self.model.state_dict()
        assert state.keys() == self.state.keys()
        assert all(same_bits(state[key], tensor) for key, tensor in self.state.items())
        assert torch.equal(torch.get_rng_state(), self.random)


@pytest.mark.parametrize("score", ["kl", "gradient", "output"])
def test_bytes_are_those_of_the_exported_files(score: Any, tmp_path: Path) -> None:
    model, spec = tiny_model("llama", hidden_size=160, num_hidden_layers=1), qat.QuantSpec()
    kept = Unchanged(model)
    batches = [{"input_ids": tokens(seed=seed)} for seed in (0, 1)]
    report = qat.search(model, spec, batches, budget="int4", score=score, target="transformers", types=("int2", "int8"))
    kept.check()
    assert {layer.weights for layer in report.layers} == {"float", "int2", "int8"}  # float: the head
    assert report.nbytes <= report.budget == qat.inspect(model, qat.QuantSpec(weights="int4")).bytes_after
    assert report.nbytes == sum(layer.nbytes for layer in report.layers)
    assert report.damage == sum(layer.damage for layer in report.layers) > 0
    qat.prepare(model, report.spec, target="transformers")
    qat.freeze(model)
    qat.export(model, tmp_path / "out")
    headers = read_headers((tmp_path / "out").glob("*.safetensors"))
    for layer in report.layers:
        stored = [header.entry for name, header in headers.items() if name.startswith(f"{layer.name}.weight")]
        assert sum(entry.nbytes for entry in stored) == layer.nbytes, layer.name


def test_the_layer_that_matters_gets_the_bits() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 0.01 * self.quiet(x)

    model = Gated()
    for score in ("kl", "gradient"):
        small = qat.inspect(model, qat.QuantSpec(weights="int2", overrides={"loud": "int8"}, dtype="float32"))
        report = qat.search(model, INT8, inputs(), budget=small.bytes_after, score=score)
        assert {layer.name: layer.weights for layer in report.layers} == {"loud": "int8", "quiet": "int2"}
        assert report.nbytes == small.bytes_after
        assert report.spec.resolve("loud").layer.weights == "int8"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_other_models_of_transformers(name: str) -> None:
    model = tiny_model(name)
    batch = {"input_ids": tokens()} if name == "bert" else {"pixel_values": torch.randn(2, 3, 16, 16)}
    kept = Unchanged(model)
    report = qat.search(model, INT8, [batch], budget="int4", score="gradient", target="transformers")
    kept.check()
    assert 0 < report.damage < sum(layer.damages.get("int2", 0) for layer in report.layers)
    assert qat.inspect(model, report.spec, target="transformers").bytes_after == report.nbytes


def test_diffusers_gets_one_type_and_whole_families_of_float_layers() -> None:
    architecture = ARCHITECTURES["FluxTransformer2DModel"]
    model, batch = architecture.build(), architecture.example()
    kept, middle = Unchanged(model), qat.inspect(model, qat.QuantSpec(weights="int4"), target="diffusers").bytes_before
    report = qat.search(model, qat.QuantSpec(), [batch], budget=middle // 2, target="diffusers", score="gradient")
    kept.check()
    types = {layer.weights for layer in report.layers}
    assert len(types) == 2
    assert "float" in types
    families: dict[str, set[str]] = {}
    for layer in report.layers:
        families.setdefault(layer.name.rpartition(".")[2], set()).add(layer.weights)
    assert all(len(kinds) == 1 for kinds in families.values())
    assert not report.spec.overrides
    assert set(qat.prepare(model, report.spec, target="diffusers").layers) == {
        layer.name for layer in report.layers if layer.weights != "float"
    }


def test_what_the_spec_says_stays() -> None:
    spec = qat.QuantSpec(activations="int8", dtype="float32", exclude="0", overrides={"2": "int4"})
    report = qat.search(chain(), spec, inputs(), budget="int8", types=("int2", "int8"))
    assert {layer.name: layer.weights for layer in report.layers} == {"0": "float", "2": "int4", "4": "int8"}
    assert [bool(layer.damages) for layer in report.layers] == [False, False, True]
    assert report.spec.activations == "int8"
    assert report.nbytes == report.budget


def test_a_layer_that_can_have_no_type_of_the_list_stays_float() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 36), nn.Linear(36, 16))  # a kernel cannot run int8 on 36 features in bfloat16
    spec = qat.QuantSpec(weights="int4", overrides={"0": "int4"})
    report = qat.search(model, spec, inputs(), budget="int8", types=("int8",))
    assert [layer.weights for layer in report.layers] == ["int4", "float"]
    assert [layer.weights for layer in qat.inspect(model, report.spec).layers] == ["int4", None]
    report = qat.search(model, qat.QuantSpec(), inputs(), budget="int8")
    assert [layer.weights for layer in report.layers] == ["int8", "int4"]
    assert qat.inspect(model, report.spec).bytes_after == report.nbytes


def test_float_is_a_type_too() -> None:
    model = chain()
    bound = qat.inspect(model, INT8).bytes_before - 1
    report = qat.search(model, INT8, inputs(), budget=bound, types=("int8", "float"))
    assert sorted(layer.weights for layer in report.layers).count("float") == 2
    assert qat.inspect(model, report.spec).bytes_after == report.nbytes <= bound
    with pytest.raises(qat.SpecError, match=r"the float model fits .* nothing would be quantized: give fewer"):
        qat.search(model, INT8, inputs(), budget=bound + 1, types=("int8", "float"))


def test_the_report_prints_and_is_a_configuration() -> None:
    report = qat.search(chain(), INT8, inputs(), budget="int4")
    table = report.table().splitlines()
    assert len(table) == 5
    assert table[-1] == str(report)
    assert "int2 " in table[1]
    assert qat.QuantSpec(**yaml.safe_load(report.yaml())["spec"]) == report.spec


def interrupted(after: int, error: type[BaseException]) -> Callable[[nn.Module, Any], Any]:
    left = [after]

    def forward(model: nn.Module, batch: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error("stop")
        return model(batch)

    return forward


@pytest.mark.parametrize("score", ["kl", "gradient", "output"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_the_model_as_it_was(score: Any, error: type[BaseException]) -> None:
    model = chain().train()
    model[2].eval()
    model[0].requires_grad_(False)
    kept = Unchanged(model)
    for after in (0, 1, 5) if score == "kl" else (0, 1):
        raised = KeyboardInterrupt if error is KeyboardInterrupt else qat.CalibrationError
        with pytest.raises(raised):
            qat.search(model, INT8, inputs(), budget="int4", score=score, forward=interrupted(after, error))
        kept.check()


class Failing(LearnedStep):
    """Its quantizers are interrupted while a layer runs with them."""

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> LearnedStepQuantizer:
        made = super().make(weight, qtype, dtype)

        def quantize(weight: Tensor, out_dtype: torch.dtype) -> Quantized:
            raise KeyboardInterrupt

        made.quantize = quantize  # type: ignore[method-assign]
        return made


@pytest.mark.parametrize("score", ["kl", "gradient", "output"])
def test_an_interrupt_within_a_quantized_layer_leaves_it_as_it_was(score: Any) -> None:
    model = chain()
    kept = Unchanged(model)
    with pytest.raises(KeyboardInterrupt):
        qat.search(model, INT8, inputs(), budget="int4", score=score, algorithm=Failing())
    kept.check()


def test_a_search_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    model, path, runs = chain(), tmp_path / "state.json", []

    def forward(model: nn.Module, batch: Any) -> Any:
        runs.append(0)
        return model(batch)

    options: dict[str, Any] = {"budget": "int4", "state": path}
    with pytest.raises(KeyboardInterrupt):  # two float runs, six a layer
        qat.search(model, INT8, inputs(), forward=interrupted(2 + 6 + 3, KeyboardInterrupt), **options)
    assert list(json.loads(path.read_text())["damages"]) == ["0"]
    report = qat.search(model, INT8, inputs(), forward=forward, **options)
    assert len(runs) == 2 + 2 * 6
    assert report == qat.search(model, INT8, inputs(), budget="int4")
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
    runs.clear()
    qat.search(model, INT8, inputs(), forward=forward, budget="int8", state=path, types=("int2", "int8"))
    assert not runs
    qat.search(model, INT8, inputs(), forward=forward, budget="int8", state=path, types=("int2", "float8"))
    assert len(runs) == 2 + 3 * 2


def test_a_state_of_other_arguments_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    options: dict[str, Any] = {"budget": "int4", "state": path, "score": "output"}
    qat.search(chain(), INT8, inputs(), **options)
    kept = path.read_bytes()
    spec = qat.QuantSpec(dtype="float32", exclude="0")
    for what, call in {
        "batches": lambda: qat.search(chain(), INT8, inputs(1), **options),
        "model": lambda: qat.search(chain(1), INT8, inputs(), **options),
        "spec": lambda: qat.search(chain(), spec, inputs(), **options),
        "score": lambda: qat.search(chain(), INT8, inputs(), **options | {"score": "kl"}),
        "algorithm": lambda: qat.search(chain(), INT8, inputs(), algorithm=qat.StraightThrough(), **options),
        "model and batches": lambda: qat.search(chain(1), INT8, inputs(1), **options),
    }.items():
        with pytest.raises(qat.StateError, match=f"search with another {what}: name another file"):
            call()
    assert path.read_bytes() == kept
    for text in ("", "[]", "{}", '{"facts": 1, "damages": {}}'):
        path.write_text(text)
        with pytest.raises(qat.StateError, match="is no state of a search"):
            qat.search(chain(), INT8, inputs(), **options)
    for damages in ({"0": 3}, {"0": {"int2": "x"}}, {"0": {"int2": float("nan")}}):
        path.write_text(json.dumps(json.loads(kept) | {"damages": damages}))
        with pytest.raises(qat.StateError, match="is no state of a search"):
            qat.search(chain(), INT8, inputs(), **options)
    with pytest.raises(qat.StateError, match=r"there is no folder .*none' for 'state.json'"):
        qat.search(chain(), INT8, inputs(), **options | {"state": tmp_path / "none" / "state.json"})


def test_batches_of_other_names_are_other_batches() -> None:
    x, y = inputs()
    mappings: list[Any] = [{"x": x, "y": y}, {"y": x, "x": y}, {"x": x, "y": 1}, {"x": x, "y": 2}]
    batches = [*([mapping] for mapping in mappings), [(x, y)]]
    assert len({batches_digest(found) for found in batches}) == len(batches)
    assert batches_digest(batches[0]) == batches_digest([{"x": x.clone(), "y": y.clone()}])


def test_a_budget_that_cannot_be_met_is_told_the_smallest_one() -> None:
    model = chain()
    smallest = qat.inspect(model, qat.QuantSpec(weights="int2", exclude="0", dtype="float32")).bytes_after
    spec = qat.QuantSpec(exclude="0", dtype="float32")
    with pytest.raises(qat.SpecError, match=f"budget: must be {smallest:,} bytes at least.*got {smallest - 1:,}"):
        qat.search(model, spec, [], budget=smallest - 1)
    assert qat.search(model, spec, inputs(), budget=smallest).nbytes == smallest


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 3.5}, qat.SpecError, "budget: must be bytes"),
        ({"budget": True}, qat.SpecError, "budget: must be bytes"),
        ({"budget": "int3"}, qat.SpecError, "budget: must be bytes.*'int3'"),
        ({"types": "int4"}, qat.SpecError, "types: must be some of"),
        ({"types": ("int4", "int3")}, qat.SpecError, "types: must be some of"),
        ({"types": ("int8", "q8_0")}, qat.SpecError, r"types: target 'quanto' has .*, got 'q8_0': give types="),
        ({"types": ("float",)}, qat.SpecError, "types: must be some of"),
        ({"types": (["int4"],)}, qat.SpecError, "types: must be some of"),
        ({"score": "fisher"}, qat.SpecError, "score: must be one of"),
        ({"algorithm": "clip"}, qat.StateError, "algorithm: must be an Algorithm"),
        ({"target": "onnx"}, qat.TargetError, "target: must be one of"),
        ({"batches": torch.ones(2, 32)}, qat.CalibrationError, "batches: must be several"),
        ({"batches": []}, qat.CalibrationError, "at least one batch"),
        ({"spec": qat.QuantSpec(exclude="1.*")}, qat.SpecError, "exclude: pattern"),
        ({"model": chain().to("meta")}, qat.StateError, "meta device"),
        ({"model": 3}, qat.SpecError, "model: must be an nn.Module"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": chain(), "spec": INT8, "batches": inputs(), "budget": "int4"} | options
    with pytest.raises(error, match=message):
        qat.search(given.pop("model"), given.pop("spec"), given.pop("batches"), **given)


def test_a_prepared_model_is_refused() -> None:
    model = chain()
    qat.prepare(model, INT8)
    with pytest.raises(qat.StateError, match="start from a float model"):
        qat.search(model, INT8, inputs(), budget="int4")
