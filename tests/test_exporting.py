from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qat.exporting
import qat.files.shards as layout
from qat.errors import ExportError, StateError, TargetError
from qat.exporting import ExportReport, export
from qat.files.examples import flatten_inputs, flatten_outputs, unflatten_inputs
from qat.files.manifest import MANIFEST_NAME, read_manifest
from qat.formats import QUANTO
from qat.formats.state import ModelState
from qat.freezing import freeze
from qat.hosts import MODULE, TARGETS, Target
from qat.preparation import prepare
from qat.spec import QuantSpec
from tests.exports import (
    IDS,
    TYPES,
    frozen_layers,
    frozen_llama,
    small_llama,
    stored_tensors,
)


class TestQuantoFiles:
    @pytest.mark.parametrize("weights", TYPES)
    def test_the_files_hold_what_quanto_would_save(self, tmp_path: Path, weights: str) -> None:
        model = frozen_llama(weights=weights, dtype="bfloat16")
        export(model, tmp_path / "out")
        expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        found = stored_tensors(tmp_path / "out")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name].float(), tensor.float()), name

    def test_the_quantization_map_is_quanto_s_own(self, tmp_path: Path) -> None:
        from optimum.quanto import quantization_map

        model = frozen_llama(weights="int4", overrides={"*.down_proj": "float8"}, activations="int8", dtype="float32")
        export(model, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "quanto_qmap.json").read_text()) == quantization_map(model)

    def test_config_and_generation_config_come_along(self, tmp_path: Path) -> None:
        model = frozen_llama(weights="int8", dtype="bfloat16")
        model.generation_config.max_new_tokens = 7
        export(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert "quantization_config" not in config
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7

    def test_a_tied_tensor_is_written_once(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out")
        manifest = read_manifest(tmp_path / "out")
        assert manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" not in stored_tensors(tmp_path / "out")

    def test_a_quantized_head_is_no_longer_tied(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8", overrides={"lm_head": "int8"}), tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        assert "lm_head.weight._data" in stored_tensors(tmp_path / "out")

    def test_a_model_without_config_gets_no_config_file(self, tmp_path: Path) -> None:
        report = export(frozen_layers((16, 32), weights="int8"), tmp_path / "out")
        assert sorted(report.files) == ["README.md", "model.safetensors", MANIFEST_NAME, "quanto_qmap.json"]
        assert any("model=" in note for note in report.notes)

    def test_shards_have_an_index_as_transformers_writes_it(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out", max_shard_size="8KB")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        tensors = stored_tensors(tmp_path / "out")
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, framework="pt") as opened:
                assert name in opened.keys()  # noqa: SIM118

    def test_writing_holds_one_converted_layer_at_a_time(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        states = []

        def remember(*args: Any, **kwargs: Any) -> ModelState:
            states.append(ModelState(*args, **kwargs))
            return states[-1]

        monkeypatch.setattr(qat.exporting, "ModelState", remember)
        export(frozen_llama(weights="int4", dtype="bfloat16"), tmp_path / "out")
        assert len([key for key in states[0]._held[1] if key.startswith("weight")]) == 3

    def test_a_tensor_class_without_keys_is_refused(self, tmp_path: Path) -> None:
        model = frozen_layers((16, 32), (8, 16), weights="int8", overrides={"1": "float"})
        packed = model.get_submodule("0").weight
        model.get_submodule("1").weight = nn.Parameter(packed, requires_grad=False)
        with pytest.raises(ExportError, match=r"'1\.weight' is a WeightQBytesTensor"):
            export(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())


class TestTransformersFiles:
    def test_the_quantization_config_names_the_plug_in(self, tmp_path: Path) -> None:
        model = frozen_llama("transformers", weights="int4", activations="int8", dtype="bfloat16")
        export(model, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        group = config["quantization_config"]
        assert group["quant_method"] == "quanto"
        assert "qat.integrations.transformers" in group["weights"]
        assert group["activations"] == "int8"
        assert group["modules_to_not_convert"] == ["lm_head"]
        assert (group["qat"]["format"], group["qat"]["dtype"]) == (1, "bfloat16")
        q_proj = group["qat"]["modules"]["model.layers.0.self_attn.q_proj"]
        assert q_proj == {"weights": "int4", "activations": "int8", "group_size": 128}

    def test_a_load_without_the_plug_in_fails_and_names_it(self, tmp_path: Path) -> None:
        from transformers import QuantoConfig

        export(frozen_llama("transformers", weights="int8"), tmp_path / "out")
        stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        arguments = {key: stored[key] for key in ("weights", "activations", "modules_to_not_convert")}
        with pytest.raises(ValueError, match=r"import qat\.integrations\.transformers"):
            QuantoConfig(**arguments)

    def test_a_module_that_is_no_transformers_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="got a Sequential: use target 'quanto'"):
            export(frozen_layers((16, 32), weights="int8"), tmp_path / "out", target="transformers")

    def test_the_weights_are_those_of_target_quanto(self, tmp_path: Path) -> None:
        model = frozen_llama(weights="int2")
        for target in ("quanto", "transformers"):
            export(model, tmp_path / target, target=target)
        first, second = (tmp_path / name / "model.safetensors" for name in ("quanto", "transformers"))
        assert first.read_bytes() == second.read_bytes()


class TestManifest:
    def test_it_tells_everything(self, tmp_path: Path) -> None:
        model = frozen_llama(weights="int4", dtype="bfloat16")
        config = {"seed": 3, "model": {"source": "tiny"}}
        report = export(model, tmp_path / "out", example_inputs={"input_ids": IDS}, config=config)
        manifest = read_manifest(tmp_path / "out")
        assert (manifest.format, manifest.target, manifest.dtype) == (1, "quanto", "bfloat16")
        assert manifest.model_class == "transformers.models.llama.modeling_llama.LlamaForCausalLM"
        assert manifest.frozen.spec.weights == "int4"
        assert manifest.frozen.algorithm == "straight_through"
        assert len(manifest.frozen.layers) == 7
        assert manifest.environment.torch == torch.__version__
        assert manifest.environment.threads == torch.get_num_threads()
        assert manifest.config == config
        assert (tmp_path / "out" / "qat_config.yaml").read_text() == "seed: 3\nmodel:\n  source: tiny\n"
        assert manifest.files.keys() == report.files.keys() - {MANIFEST_NAME, "README.md"}

    def test_the_report_counts_and_hashes_every_file(self, tmp_path: Path) -> None:
        import hashlib

        report = export(frozen_llama(weights="int8"), tmp_path / "out")
        on_disk = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert {name: record.sha256 for name, record in report.files.items()} == {
            name: hashlib.sha256(data).hexdigest() for name, data in on_disk.items()
        }
        assert report.total_bytes == sum(map(len, on_disk.values()))
        assert "model.safetensors" in str(report)
        assert json.loads(json.dumps(report.to_json()))["total_bytes"] == report.total_bytes

    def test_no_path_of_this_machine_is_written(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out", example_inputs=(IDS,))
        for path in (tmp_path / "out").iterdir():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name

    def test_processors_come_along(self, tmp_path: Path) -> None:
        saved: list[str] = []

        class Processor:
            def save_pretrained(self, directory: str) -> None:
                saved.append(directory)
                (Path(directory) / f"processor-{len(saved)}.json").write_text("{}")

        report = export(frozen_llama(weights="int8"), tmp_path / "out", processor=[Processor(), Processor()])
        assert {"processor-1.json", "processor-2.json"} < set(report.files)

    def test_something_that_cannot_be_saved_is_no_processor(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="save_pretrained"):
            export(frozen_llama(weights="int8"), tmp_path / "out", processor=object())


class TestExamples:
    def test_inputs_come_back_as_they_were(self) -> None:
        inputs = {"ids": IDS, "nested": [(IDS, None), {"flag": True, "text": "a"}], "share": 0.5}
        structure, tensors = flatten_inputs(inputs)
        again = unflatten_inputs(json.loads(json.dumps(structure)), tensors)
        assert torch.equal(again["ids"], IDS)
        assert isinstance(again["nested"][0], tuple)
        assert again["nested"][1] == {"flag": True, "text": "a"}
        assert again["share"] == 0.5

    def test_an_object_among_the_inputs_is_refused(self) -> None:
        with pytest.raises(ExportError, match="'cache' is a object"):
            flatten_inputs({"cache": object()})

    def test_outputs_are_named_by_where_they_stand(self) -> None:
        outputs = flatten_outputs({"logits": IDS, "states": (IDS, [IDS]), "none": None})
        assert list(outputs) == ["logits", "states.0", "states.1.0"]
        assert list(flatten_outputs(IDS)) == ["output"]

    def test_training_mode_is_left_as_it_was(self, tmp_path: Path) -> None:
        model = frozen_llama(weights="int8")
        model.model.train()
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        assert model.model.training
        assert not model.training


class TestErrors:
    def test_export_before_freeze(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match=r"qat\.freeze"):
            export(small_llama(), tmp_path / "out")

    def test_unknown_target(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="tensorrt"):
            export(frozen_llama(weights="int8"), tmp_path / "out", target="tensorrt")

    def test_a_directory_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "keep.txt").write_text("mine")
        with pytest.raises(ExportError, match="overwrite=True"):
            export(frozen_llama(weights="int8"), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]

    def test_an_empty_directory_is_welcome(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        export(frozen_llama(weights="int8"), tmp_path / "out")
        assert (tmp_path / "out" / MANIFEST_NAME).is_file()

    def test_a_file_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(ExportError, match="is a file"):
            export(frozen_llama(weights="int8"), tmp_path / "out", overwrite=True)

    def test_a_model_that_changed_after_freezing(self, tmp_path: Path) -> None:
        model = frozen_llama(weights="int8")
        model.model.layers[0].mlp.up_proj.weight._scale.mul_(2)
        with pytest.raises(ExportError, match=r"changed after qat\.freeze.*up_proj"):
            export(model, tmp_path / "out")

    def test_a_target_that_would_serve_other_numbers(self, tmp_path: Path) -> None:
        model = small_llama()
        model._keep_in_fp32_modules_strict = {"norm"}
        prepare(model, QuantSpec(weights="int8", dtype="bfloat16"))
        freeze(model, allow_unreached=True)
        with pytest.raises(TargetError, match=r"qat\.freeze\(model, target='transformers'\)"):
            export(model, tmp_path / "out", target="transformers")


class TestAllOrNothing:
    @staticmethod
    def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        """Let the disk be full after so many tensors, in the middle of a file."""
        calls = []
        honest: Callable[[torch.Tensor], memoryview] = layout.raw_bytes

        def raw_bytes(tensor: torch.Tensor) -> memoryview:
            calls.append(tensor)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return honest(tensor)

        monkeypatch.setattr(layout, "raw_bytes", raw_bytes)

    def test_a_full_disk_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.full_disk(monkeypatch, after=10)
        with pytest.raises(ExportError, match=r"No space left on device; free space") as caught:
            export(frozen_llama(weights="int8"), tmp_path / "out")
        assert isinstance(caught.value.__cause__, OSError)
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_leaves_the_old_export_untouched(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out")
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        self.full_disk(monkeypatch, after=3)
        with pytest.raises(ExportError):
            export(frozen_llama(weights="int4"), tmp_path / "out", overwrite=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_rename_that_fails_puts_the_old_export_back(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out")
        before = (tmp_path / "out" / MANIFEST_NAME).read_bytes()
        honest = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if self.suffix == ".tmp":
                raise OSError(errno.EIO, "Input/output error")
            return honest(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(ExportError, match="Input/output error"):
            export(frozen_llama(weights="int4"), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / MANIFEST_NAME).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_processor_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        class Broken:
            def save_pretrained(self, directory: str) -> None:
                raise KeyError("vocab")

        with pytest.raises(ExportError, match="KeyError"):
            export(frozen_llama(weights="int8"), tmp_path / "out", processor=Broken())
        assert not list(tmp_path.iterdir())

    def test_overwrite_replaces_the_whole_directory(self, tmp_path: Path) -> None:
        export(frozen_layers((16, 32)), tmp_path / "out")
        (tmp_path / "out" / "stale.bin").write_text("old")
        report: ExportReport = export(frozen_llama(weights="int8"), tmp_path / "out", overwrite=True)
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_is_no_export_is_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ExportError, match=r"holds no qat_manifest.json, so it is no export, and is not replaced"):
            export(frozen_layers((16, 32)), tmp_path, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_new_target_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TARGETS, "mine", Target("mine", QUANTO, MODULE))
    model = frozen_layers((16, 32), weights="int8")
    assert export(model, tmp_path / "out", target="mine").target == "mine"
