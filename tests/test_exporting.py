from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from qat.errors import ExportError, StateError, TargetError
from qat.exporting import export
from qat.files.manifest import MANIFEST_NAME
from qat.formats import QUANTO
from qat.freezing import freeze
from qat.hosts import MODULE, TARGETS, Target
from qat.loading import load
from qat.preparation import prepare
from qat.spec import QuantSpec
from qat.tensors import digest
from tests.exports import (
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

    def test_a_model_without_config_gets_no_config_file(self, tmp_path: Path) -> None:
        report = export(frozen_layers((16, 32), weights="int8"), tmp_path / "out")
        assert sorted(report.files) == ["README.md", "model.safetensors", MANIFEST_NAME, "quanto_qmap.json"]
        assert any("model=" in note for note in report.notes)


def _with_embedding() -> tuple[nn.Module, QuantSpec]:
    return small_llama(tie_word_embeddings=True), QuantSpec(overrides={"lm_head": "int8", "model.embed_tokens": "int8"})


def _with_conv1d() -> tuple[nn.Module, QuantSpec]:
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    return transformers.GPT2LMHeadModel(config), QuantSpec()


def _with_experts() -> tuple[nn.Module, QuantSpec]:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=2, **sizes)
    return transformers.MixtralForCausalLM(config), QuantSpec()


class TestTransformersFiles:
    @pytest.mark.parametrize("made", [_with_embedding, _with_conv1d, _with_experts])
    def test_quanto_s_loader_refuses_layers_that_it_would_leave_unfilled(
        self, tmp_path: Path, made: Callable[[], tuple[nn.Module, QuantSpec]]
    ) -> None:
        from optimum.quanto import QuantizedModelForCausalLM

        model, spec = made()
        prepare(model, spec, target="transformers")
        freeze(model)
        export(model, tmp_path / "out")
        with pytest.raises(ValueError, match="No quantization map found"):
            QuantizedModelForCausalLM.from_pretrained(str(tmp_path / "out"))
        ids = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "out")(ids).logits, model(ids).logits)

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


class TestErrors:
    def test_export_before_freeze(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match=r"qat\.freeze"):
            export(small_llama(), tmp_path / "out")

    def test_unknown_target(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="tensorrt"):
            export(frozen_llama(weights="int8"), tmp_path / "out", target="tensorrt")

    def test_a_directory_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "keep.txt").write_text("mine")
        with pytest.raises(ExportError, match="is not empty, and no manifest says of what"):
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

    @pytest.mark.parametrize(
        ("part", "weights"),
        [(part, kind) for kind in ("int8", "int4") for part in ("codes", "scale", "bias", "layer")]
        + [("shift", "int4")],
    )
    def test_every_part_that_is_written_is_compared_with_freezing(
        self, tmp_path: Path, part: str, weights: str
    ) -> None:
        """The digest of the dequantized weight is not computed again, since these decide it."""
        model = nn.Sequential(nn.Linear(256, 16), nn.Linear(16, 4))
        prepare(model, QuantSpec.model_validate({"weights": weights, "dtype": "float32"}))
        freeze(model)
        layer = model[1]
        data = layer.weight._data
        tensors = {
            "codes": getattr(data, "_data", data),
            "scale": layer.weight._scale,
            "shift": getattr(layer.weight, "_shift", None),
        }
        if part == "layer":
            model[1] = nn.Linear(16, 4)
        else:
            flat = (tensors | {"bias": layer.bias.data})[part].view(-1)
            flat[-1] = flat[-1] + 1
        with pytest.raises(ExportError, match=r"1 layers (are gone|hold other numbers) \(first: '1'\)"):
            export(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_layers_that_hold_what_others_were_frozen_with(self, tmp_path: Path) -> None:
        model = frozen_layers((16, 32), (16, 32), (16, 32), weights="int8")
        model[1], model[2] = model[2], model[1]
        with pytest.raises(ExportError, match=r"2 layers hold other numbers \(first: '1'\)"):
            export(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("weights", "hashed"), [("int8", 0), ("float8", 0), ("int4", 1)])
    def test_codes_of_8_bits_are_hashed_with_their_write_alone(
        self, weights: str, hashed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, codes = frozen_layers((16, 256), weights=weights), []

        def watched(tensor: torch.Tensor) -> str:
            if tensor.numel() == 16 * 256:
                codes.append(tensor)
            return digest(tensor)

        monkeypatch.setattr("qat.formats.base.digest", watched)
        export(model, tmp_path / "out")
        assert len(codes) == hashed

    def test_a_target_that_would_serve_other_numbers(self, tmp_path: Path) -> None:
        model = small_llama()
        model._keep_in_fp32_modules_strict = {"norm"}
        prepare(model, QuantSpec(weights="int8", dtype="bfloat16"))
        freeze(model, allow_unreached=True)
        with pytest.raises(TargetError, match=r"qat\.convert\(directory, output, target='transformers'\)"):
            export(model, tmp_path / "out", target="transformers")


def test_a_new_target_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TARGETS, "mine", Target("mine", QUANTO, MODULE))
    model = frozen_layers((16, 32), weights="int8")
    assert export(model, tmp_path / "out", target="mine").target == "mine"
