from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.quanto import QuantizedModelForCausalLM
from pydantic import TypeAdapter
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import qat.verification
from qat.errors import LoadError, StateError, VerifyError
from qat.exporting import export
from qat.files.manifest import MANIFEST_NAME, file_record
from qat.loading import load
from qat.tensors import meta_names
from qat.verification import Check, VerifyReport, verify
from tests.exports import (
    DTYPES,
    IDS,
    TYPES,
    altered,
    forge_hashes,
    frozen,
    rewrite,
    small_llama,
    unsealed,
)
from tests.helpers import same_bits

LAYER = "model.layers.0.mlp.up_proj"


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An int4 export whose layers are not converted by a kernel, with an example."""
    export(frozen(small_llama(), weights="int4", dtype="float32"), tmp_path / "out", example_inputs={"input_ids": IDS})
    return tmp_path / "out"


def failed(directory: Path, **arguments: Any) -> dict[str, str]:
    """Verify a directory that must fail; the details of the failed checks by name."""
    with pytest.raises(VerifyError) as caught:
        verify(directory, **arguments)
    report: VerifyReport = caught.value.report  # type: ignore[attr-defined]
    assert not report.ok
    assert str(report) == str(caught.value)
    return {check.name: check.detail for check in report.checks if not check.passed}


class TestStockLoadersGiveWhatWasFrozen:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("weights", TYPES)
    def test_causal_language_model(self, tmp_path: Path, weights: str, dtype: str) -> None:
        model = frozen(small_llama(), weights=weights, dtype=dtype)
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        report = verify(tmp_path / "out", model)
        details = {check.name: check.detail for check in report.checks}
        assert details["load"] == "QuantizedModelForCausalLM.from_pretrained"
        assert details["outputs"] == "1 output tensors equal, bit for bit"
        assert details["reference outputs"] == "1 output tensors equal, bit for bit"

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["int8", "float8"])
    def test_causal_language_model_with_activations(self, tmp_path: Path, kind: str, dtype: str) -> None:
        model = frozen(small_llama(), weights=kind, dtype=dtype, activations=kind).eval()
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        served = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
        layer = served._wrapped.model.layers[0].mlp.up_proj
        assert layer.activation_qtype.name == {"int8": "qint8", "float8": "qfloat8_e4m3fn"}[kind]
        for seed in range(4):
            ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                assert same_bits(served(input_ids=ids).logits, model(input_ids=ids).logits)
        (load,) = (check.detail for check in verify(tmp_path / "out", model).checks if check.name == "load")
        assert load == "QuantizedModelForCausalLM.from_pretrained"

    @pytest.mark.loads("quanto", "requantize", weights=TYPES, activations=("int8",))
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("weights", TYPES)
    def test_requantize(self, tmp_path: Path, weights: str, dtype: str) -> None:
        model = frozen(tiny_bert(), weights=weights, dtype=dtype, activations="int8")
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        report = verify(tmp_path / "out", model)
        assert "requantize" in {check.name: check.detail for check in report.checks}["load"]

    @pytest.mark.loads("transformers", "plug-in for transformers", weights=TYPES, activations=("int8",))
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("weights", TYPES)
    def test_transformers_with_the_plug_in(self, tmp_path: Path, weights: str, dtype: str) -> None:
        model = frozen(small_llama(), "transformers", weights=weights, dtype=dtype, activations="int8")
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        assert verify(tmp_path / "out", model).ok

    def test_transformers_without_quantized_outputs(self, tmp_path: Path) -> None:
        spec = {"weights": "int8", "activations": "int8", "quantize_outputs": False}
        model = frozen(small_llama(), "transformers", **spec)
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        assert not (tmp_path / "out" / "quanto_qmap.json").exists()
        assert verify(tmp_path / "out", model).ok
        loaded = load(tmp_path / "out")
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)

    def test_shards(self, tmp_path: Path) -> None:
        model = frozen(small_llama(), weights="int8")
        export(model, tmp_path / "out", max_shard_size="40KB", example_inputs={"input_ids": IDS})
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
        assert verify(tmp_path / "out", model).ok

    @pytest.mark.parametrize("weights", TYPES)
    def test_a_float_grid(self, tmp_path: Path, weights: str) -> None:
        model = frozen(small_llama(), "transformers", weights=weights, dtype="float32")
        export(model, tmp_path / "out", float_grid=True, example_inputs={"input_ids": IDS})
        report = verify(tmp_path / "out", model)
        assert "scales derived afresh" in {check.name: check.detail for check in report.checks}["outputs"]

    def test_a_plain_module_with_odd_sizes(self, tmp_path: Path) -> None:
        def plain() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(37, 21), nn.ReLU(), nn.BatchNorm1d(21), nn.Linear(21, 1))

        model = frozen(plain(), weights="int8", dtype="bfloat16")
        x = torch.randn(5, 37, dtype=torch.bfloat16)
        export(model, tmp_path / "out", example_inputs=(x,))
        float_model = plain()
        assert verify(tmp_path / "out", model, model=float_model).ok
        assert type(float_model[0]) is nn.Linear  # type: ignore[index]
        for fresh in (False, True):
            with pytest.raises(LoadError, match=r"^'.*' has no config.json: pass the float model as model= to"):
                verify(tmp_path / "out", fresh_process=fresh)
        (path := min((tmp_path / "out").glob("model*.safetensors"))).write_bytes(path.read_bytes()[:-1])
        assert "files" in failed(tmp_path / "out")  # which needs no model


class TestTampering:
    """Each with the files' hashes as evidence, and with all hashes recomputed, which leaves the deeper checks."""

    @pytest.mark.parametrize("key", ["weight._data._data", "weight._scale", "weight._shift"])
    def test_one_altered_number_of_a_weight(self, exported: Path, key: str) -> None:
        rewrite(exported / "model.safetensors", altered(f"{LAYER}.{key}", 1 if key.endswith("_data") else 1e-4))
        part = {"weight._data._data": "codes", "weight._scale": "scale", "weight._shift": "shift"}[key]
        assert failed(exported).keys() == {"files"}
        forge_hashes(exported)
        faults = failed(exported)
        assert faults["layers"] == f"{LAYER}: {part}, weight differ from what freezing left"
        assert "numbers differ, by up to" in faults["outputs"]

    def test_one_altered_number_of_a_tensor_that_is_not_quantized(self, exported: Path) -> None:
        rewrite(exported / "model.safetensors", altered("model.norm.weight", 0.5))
        forge_hashes(exported, tensors=False)
        assert failed(exported)["tensors"] == "model.norm.weight differs from what was exported"
        forge_hashes(exported)
        assert failed(exported).keys() == {"outputs"}

    @pytest.mark.parametrize("key", ["input_scale", "output_scale"])
    def test_one_altered_activation_scale(self, tmp_path: Path, key: str) -> None:
        export(frozen(small_llama(), weights="int8", activations="int8"), tmp_path / "out")
        rewrite(tmp_path / "out" / "model.safetensors", altered(f"{LAYER}.{key}", 0.25))
        forge_hashes(tmp_path / "out")
        assert f"{LAYER}: {key} differ" in failed(tmp_path / "out")["layers"]

    @pytest.mark.parametrize("key", [f"{LAYER}.weight._scale", "model.norm.weight"], ids=["scale", "norm"])
    def test_one_renamed_key(self, exported: Path, key: str) -> None:
        def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name.replace(key, f"{key}_"): tensor for name, tensor in tensors.items()}

        rewrite(exported / "model.safetensors", rename)
        assert failed(exported).keys() == {"files"}
        forge_hashes(exported, tensors=False)
        detail = failed(exported)["keys"]
        assert f"{key} is missing" in detail
        assert f"{key}_ is unexpected" in detail
        forge_hashes(exported)
        faults = failed(exported)
        assert (f"{key} is missing" in faults["keys"]) if "keys" in faults else ("model.norm" in faults["model"])

    def test_two_shards_with_exchanged_contents(self, tmp_path: Path) -> None:
        export(frozen(small_llama(), weights="int8"), tmp_path / "out", max_shard_size="40KB")
        first, second = sorted((tmp_path / "out").glob("model-*.safetensors"))[:2]
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
        assert failed(tmp_path / "out").keys() == {"files"}
        forge_hashes(tmp_path / "out", tensors=False)
        assert "lies in model-0000" in failed(tmp_path / "out")["keys"]

    def test_two_layers_with_exchanged_contents(self, exported: Path) -> None:
        pair = ("model.layers.0.self_attn.k_proj.", "model.layers.0.self_attn.v_proj.")

        def exchange(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            swap = {pair[0]: pair[1], pair[1]: pair[0]}
            new = {name: name.replace(old, swap[old]) for name in tensors for old in swap if name.startswith(old)}
            return {new.get(name, name): tensor for name, tensor in tensors.items()}

        rewrite(exported / "model.safetensors", exchange)
        forge_hashes(exported)
        detail = failed(exported)["layers"]
        assert "k_proj" in detail
        assert "v_proj" in detail

    def test_a_truncated_file(self, exported: Path) -> None:
        path = exported / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert failed(exported).keys() == {"files"}
        forge = unsealed(exported)
        forge["files"]["model.safetensors"] = file_record(path).model_dump()
        (exported / MANIFEST_NAME).write_text(json.dumps(forge))
        assert "truncated" in failed(exported)["keys"]

    def test_a_missing_file(self, exported: Path) -> None:
        (exported / "config.json").unlink()
        assert failed(exported)["files"] == "config.json is missing"

    def test_codes_of_another_type_are_not_even_loaded(self, exported: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            name = f"{LAYER}.weight._data._data"
            return {**tensors, name: tensors[name].view(torch.int8)}

        rewrite(exported / "model.safetensors", change)
        forge_hashes(exported)
        faults = failed(exported)
        assert faults.keys() == {"keys"}
        assert "need U8" in faults["keys"]

    def test_a_misaligned_file_is_not_even_loaded(self, tmp_path: Path) -> None:
        export(frozen(small_llama(), weights="int8", dtype="bfloat16"), tmp_path / "out")

        def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            scale = f"{LAYER}.input_scale"
            return {scale: tensors.pop(scale), **tensors}

        rewrite(tmp_path / "out" / "model.safetensors", change)
        forge_hashes(tmp_path / "out")
        assert "not a multiple of 64" in failed(tmp_path / "out")["keys"]

    def test_a_map_that_declares_another_type(self, exported: Path) -> None:
        path = exported / "quanto_qmap.json"
        path.write_text(path.read_text().replace("qint4", "qint2", 1))
        forge_hashes(exported)
        assert "freezing left" in failed(exported)["keys"]

    def test_evidence_of_other_outputs(self, exported: Path) -> None:
        rewrite(exported / "qat_evidence.safetensors", altered("output.logits", 1e-3))
        forge_hashes(exported)
        assert "logits: 1 of 2304 numbers differ, by up to 0.001" in failed(exported)["outputs"]


class TestReference:
    def test_it_says_by_how_much_a_layer_differs(self, tmp_path: Path) -> None:
        model = frozen(small_llama(), weights="int8", dtype="float32")
        export(model, tmp_path / "out")
        weight = model.get_submodule(LAYER).weight
        weight._data[0, 5] = weight._data[0, 5] // 2 + 30
        weight._scale[1] *= 2
        faults = failed(tmp_path / "out", reference=model, inputs={"input_ids": IDS})
        assert f"{LAYER}, codes: 1 of 12288 numbers differ, by up to" in faults["reference layers"]
        assert f"{LAYER}, scale: 1 of 48 numbers differ" in faults["reference layers"]
        assert f"{LAYER}, weight: 25" in faults["reference layers"]
        assert "logits" in faults["reference outputs"]

    def test_it_compares_what_is_not_quantized_too(self, tmp_path: Path) -> None:
        model = frozen(small_llama(), weights="int8", dtype="float32")
        export(model, tmp_path / "out")
        with torch.no_grad():
            model.model.norm.weight[0] = 3
        assert failed(tmp_path / "out", reference=model)["reference layers"].startswith("model.norm.weight: 1 of 256")

    def test_inputs_need_a_reference(self, exported: Path) -> None:
        with pytest.raises(StateError, match="reference"):
            verify(exported, inputs=(IDS,))

    def test_a_reference_must_be_frozen(self, exported: Path) -> None:
        with pytest.raises(StateError, match=r"qat\.freeze"):
            verify(exported, small_llama())


class TestEnvironment:
    @pytest.mark.parametrize(("error", "passes"), [(1e-6, True), (0.5, False)], ids=["rounding", "wrong"])
    def test_elsewhere_a_stated_tolerance_holds(self, exported: Path, error: float, passes: bool) -> None:
        rewrite(exported / "qat_evidence.safetensors", altered("output.logits", error))
        forge_hashes(exported)
        manifest = unsealed(exported)
        manifest["environment"]["cpu_capability"] = "other"
        (exported / MANIFEST_NAME).write_text(json.dumps(manifest))
        if passes:
            check = next(check for check in verify(exported).checks if check.name == "outputs")
            assert "cpu_capability other -> " in check.detail
            assert "0.0001 relative is allowed" in check.detail
        else:
            assert "0.0001 relative is allowed" in failed(exported)["outputs"]

    def test_outputs_are_computed_with_the_threads_of_the_export(
        self, exported: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = unsealed(exported)
        manifest["environment"]["threads"] = 2
        (exported / MANIFEST_NAME).write_text(json.dumps(manifest))
        seen = []
        honest = qat.verification.compute_outputs

        def compute(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
            seen.append(torch.get_num_threads())
            return honest(model, inputs)

        monkeypatch.setattr(qat.verification, "compute_outputs", compute)
        verify(exported)
        assert seen == [2]
        assert torch.get_num_threads() == 1


class TestMeta:
    def test_an_inner_tensor_without_data_is_found(self) -> None:
        model = frozen(small_llama(), weights="int8")
        weight = model.get_submodule(LAYER).weight
        weight._data = weight._data.to("meta")
        assert meta_names(model) == [f"{LAYER}.weight"]


class TestReport:
    report = VerifyReport("out", "quanto", (Check("files", True, "5 files"), Check("keys", False, "a\nb")))

    def test_it_prints_as_a_table(self) -> None:
        assert str(self.report).splitlines() == [
            "out (target 'quanto'): NOT what was frozen",
            "  files  ok      5 files",
            "  keys   FAILED  a",
            "                 b",
        ]

    def test_it_survives_json(self) -> None:
        data = json.loads(json.dumps(self.report.to_json()))
        assert data["ok"] is False
        assert TypeAdapter(VerifyReport).validate_python(data) == self.report

    def test_a_directory_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="not a directory"):
            verify(tmp_path / "nowhere")


class TestFreshProcess:
    @staticmethod
    def answer(monkeypatch: pytest.MonkeyPatch, code: int, stdout: str, stderr: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            return subprocess.CompletedProcess(command, code, stdout, stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    def test_its_report_is_ours(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report = VerifyReport(str(exported), "quanto", (Check("files", True, "5 files"),))
        commands = self.answer(monkeypatch, 0, json.dumps(report.to_json()))
        assert verify(exported, fresh_process=True) == report
        assert [command[:3] + command[4:] for command in commands] == [
            [sys.executable, "-P", "-c", "verify", str(exported), "--json"]
        ]

    def test_a_failure_there_is_one_here(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer(monkeypatch, 1, "", "error: out: NOT what was frozen")
        with pytest.raises(VerifyError, match="NOT what was frozen"):
            verify(exported, fresh_process=True)

    def test_a_process_that_dies_is_told(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer(monkeypatch, -11, "")
        with pytest.raises(VerifyError, match="signal 11"):
            verify(exported, fresh_process=True)

    def test_the_live_model_is_compared_in_this_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = frozen(small_llama(), weights="int8", dtype="float32")
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        there = VerifyReport("out", "quanto", (Check("files", True, "read there"),))
        self.answer(monkeypatch, 0, json.dumps(there.to_json()))
        names = [check.name for check in verify(tmp_path / "out", model, fresh_process=True).checks]
        assert names[0] == "files"
        assert "reference layers" in names
        assert names[-1] == "reference outputs"
