"""What stock diffusers makes of an export, with no code of ours, is what was frozen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qat
from qat.errors import ExportError, TargetError, VerifyError
from qat.exporting import export
from qat.files.manifest import read_manifest
from qat.freezing import freeze
from qat.preparation import prepare
from qat.spec import QuantSpec
from qat.verification import verify
from qat.verification.outputs import compute_outputs
from tests.exports import (
    DTYPES,
    TYPES,
    altered,
    code_offsets,
    flux_inputs,
    forge_hashes,
    frozen,
    frozen_flux,
    frozen_layers,
    frozen_llama,
    rewrite,
    small_flux,
    stored_tensors,
    unpack_weight,
)
from tests.test_exporting_float_grid import narrow_codes

pytestmark = pytest.mark.filterwarnings("ignore:.*[qQ]uanto.*deprecated:FutureWarning")

LAYER = "transformer_blocks.0.attn.to_q"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Loads every directory named on the command line, and leaves what it found beside it.
STOCK = """
import sys, warnings
import torch
from diffusers import AutoModel
from safetensors.torch import load_file, save_file
warnings.simplefilter("ignore")
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    inputs = {name: tensor.clone() for name, tensor in load_file(directory + ".inputs").items()}  # aligned
    model = AutoModel.from_pretrained(directory, dtype=inputs["hidden_states"].dtype)
    with torch.no_grad():
        output = model(**inputs).sample
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state | {"output": output}, directory + ".found")
assert not [name for name in sys.modules if name.partition(".")[0] == "qat"]
"""


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.float(), right.float())


@pytest.mark.loads("diffusers", "stock diffusers", weights=TYPES, equal="codes, outputs")
@pytest.mark.slow
def test_a_process_without_qat_serves_what_was_frozen(tmp_path: Path) -> None:
    models = {}
    for weights in TYPES:
        for dtype in DTYPES:
            directory = str(tmp_path / f"{weights}-{dtype}")
            models[directory] = frozen_flux(weights=weights, dtype=dtype)
            export(models[directory], directory)
            save_file(flux_inputs(dtype), directory + ".inputs")
    done = subprocess.run([sys.executable, "-c", STOCK, *models], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for directory, model in models.items():
        found = load_file(directory + ".found")
        (output,) = compute_outputs(model, load_file(directory + ".inputs")).values()
        assert same(found.pop("output"), output), directory
        state = model.state_dict()
        assert found.keys() == state.keys()
        assert [name for name in state if not same(found[name], state[name])] == []


class TestFiles:
    def test_names_and_configuration_are_those_of_diffusers(self, tmp_path: Path) -> None:
        model = frozen_flux(weights="int4", exclude=("*norm_out.linear", "*.linear"))
        model.register_to_config(_name_or_path="somewhere")
        before = dict(model.config)
        report = export(model, tmp_path / "out")
        assert dict(model.config) == before
        assert {"config.json", WEIGHTS, "README.md"} < set(report.files)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["_class_name"] == "FluxTransformer2DModel"
        assert config["quantization_config"] == {
            "quant_method": "quanto",
            "weights_dtype": "int4",
            "modules_to_not_convert": ["linear"],
        }
        assert "_name_or_path" not in config

    def test_codes_are_aligned(self, tmp_path: Path) -> None:
        export(frozen_flux(weights="int8"), tmp_path / "out", max_shard_size="200KB")
        offsets = code_offsets(tmp_path / "out")
        assert len(offsets) == 28
        assert not [name for name, start in offsets.items() if start % 64]

    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_shards_have_diffusers_names_and_index(self, tmp_path: Path, weights: str) -> None:
        model = frozen_flux(weights=weights)
        export(model, tmp_path / "out", max_shard_size="200KB", example_inputs=flux_inputs("bfloat16"))
        index = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2
        assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
        assert index["weight_map"].keys() == model.state_dict().keys()
        assert verify(tmp_path / "out", model).ok

    def test_a_parameter_of_two_modules_is_written_for_both(self, tmp_path: Path) -> None:
        # The stock loader puts tensors into modules one by one, and ties nothing again.
        model = small_flux()
        model.x_embedder.bias = model.context_embedder.bias
        frozen(model, "diffusers", exclude=("*_embedder",), dtype="float32")
        export(model, tmp_path / "out", example_inputs=flux_inputs("float32"))
        assert {"x_embedder.bias", "context_embedder.bias"} < stored_tensors(tmp_path / "out").keys()
        assert verify(tmp_path / "out", model).ok


class TestStockLoads:
    @pytest.mark.parametrize("weights", TYPES)
    def test_codes_are_equal_under_every_dtype(self, tmp_path: Path, weights: str) -> None:
        from diffusers import AutoModel, FluxTransformer2DModel, QuantoConfig

        model = frozen_flux(weights=weights)
        export(model, tmp_path / "out")
        config = QuantoConfig(weights_dtype=weights)  # type: ignore[no-untyped-call]
        stock = FluxTransformer2DModel.from_pretrained
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            declared = stock(tmp_path / "out", quantization_config=config)
        loads = [
            (declared, torch.float32),
            (AutoModel.from_pretrained(str(tmp_path / "out")), torch.float32),
            (stock(tmp_path / "out", dtype=torch.float16), torch.float16),
        ]
        for loaded, dtype in loads:
            for name in read_manifest(tmp_path / "out").frozen.layers:
                parts = zip(
                    unpack_weight(model.get_submodule(name).weight),
                    unpack_weight(loaded.get_submodule(name).weight),
                    strict=True,
                )
                for part, (old, new) in enumerate(parts):
                    assert old is None or same(old.to(dtype) if part else old, new), name

    @pytest.mark.parametrize("weights", TYPES)
    def test_saved_again_and_loaded_again_it_is_the_same(self, tmp_path: Path, weights: str) -> None:
        # Only tensors are compared: stock code does not align the codes that it saves.
        from diffusers import AutoModel

        export(frozen_flux(weights=weights, exclude=("*.linear",)), tmp_path / "out")
        first = AutoModel.from_pretrained(str(tmp_path / "out"), dtype=torch.bfloat16)
        first.save_pretrained(tmp_path / "again")
        second = AutoModel.from_pretrained(str(tmp_path / "again"), dtype=torch.bfloat16)
        old, new = first.state_dict(), second.state_dict()
        assert old.keys() == new.keys()
        assert [name for name in old if not same(old[name], new[name])] == []
        left, right = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "again"))
        right.pop("_name_or_path")
        assert left == right

    def test_verify_says_that_the_dtype_must_be_given(self, tmp_path: Path) -> None:
        model = frozen_flux(weights="int8")
        export(model, tmp_path / "out", example_inputs=flux_inputs("bfloat16"))
        report = verify(tmp_path / "out", model)
        details = {check.name: check.detail for check in report.checks}
        assert details["load"] == (
            "FluxTransformer2DModel.from_pretrained with dtype=torch.bfloat16; without one diffusers loads "
            "float32, and outputs differ"
        )
        assert details["outputs"] == details["reference outputs"] == "1 output tensors equal, bit for bit"


class TestOtherTargets:
    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_classes_of_tensors_are_compared(self, tmp_path: Path, weights: str) -> None:
        model = frozen_flux("quanto", weights=weights)
        kind = type(model.get_submodule(LAYER).weight.data).__name__
        if weights == "int8":
            assert export(model, tmp_path / "out", target="diffusers").target == "diffusers"
            return
        assert kind == "TinyGemmWeightQBitsTensor"
        with pytest.raises(TargetError, match=r"in another dtype or class, .*qat.convert\(.*target='diffusers'\)"):
            export(model, tmp_path / "out", target="diffusers")

    def test_freezing_holds_what_stock_diffusers_holds(self) -> None:
        model = frozen_flux(weights="int4")
        assert type(model.get_submodule(LAYER).weight.data).__name__ == "WeightQBitsTensor"

    def test_a_model_that_was_moved_is_exported_as_it_was_frozen(self, tmp_path: Path) -> None:
        model = frozen_flux(weights="int4")
        layer = model.get_submodule(LAYER)
        layer.weight = nn.Parameter(layer.weight.optimize(), requires_grad=False)  # as a move between devices does
        assert type(layer.weight.data).__name__ == "TinyGemmWeightQBitsTensor"
        export(model, tmp_path / "out", example_inputs=flux_inputs("bfloat16"))
        assert verify(tmp_path / "out", model).ok

    @pytest.mark.loads("quanto", "requantize", weights=("int4",), activations=("none", "int8"))
    @pytest.mark.parametrize("activations", [None, "int8"])
    def test_target_quanto_loads_and_verifies(self, tmp_path: Path, activations: str | None) -> None:
        dtype = "float32" if activations else "bfloat16"
        model = small_flux()
        prepare(model, QuantSpec.model_validate({"weights": "int4", "activations": activations, "dtype": dtype}))
        if activations:
            qat.calibrate(model, [flux_inputs("float32")])
        freeze(model, allow_unreached=True)
        export(model, tmp_path / "out", example_inputs=flux_inputs(dtype))
        assert {WEIGHTS, "quanto_qmap.json"} < {path.name for path in (tmp_path / "out").iterdir()}
        report = verify(tmp_path / "out", model)
        assert "requantize" in {check.name: check.detail for check in report.checks}["load"]
        loaded = qat.load(tmp_path / "out")
        left, right = (compute_outputs(m, flux_inputs(dtype))["sample"] for m in (loaded, model))
        assert torch.equal(left, right)


class TestFloatGrid:
    @pytest.mark.loads("diffusers", "QuantoConfig", weights=TYPES, equal="codes")
    @pytest.mark.parametrize("weights", TYPES)
    def test_a_stock_load_gives_the_codes_back(self, tmp_path: Path, weights: str) -> None:
        from diffusers import AutoModel, QuantoConfig

        model = frozen_flux(weights=weights, dtype="float32", exclude=("*.linear",))
        export(model, tmp_path / "out", float_grid=True, example_inputs=flux_inputs("float32"))
        arguments = read_manifest(tmp_path / "out").stock_arguments
        assert arguments == {"weights_dtype": weights, "modules_to_not_convert": ["linear"]}
        config = QuantoConfig(**arguments)  # type: ignore[no-untyped-call]
        loaded = AutoModel.from_pretrained(str(tmp_path / "out"), dtype=torch.float32, quantization_config=config)
        for name in read_manifest(tmp_path / "out").frozen.layers:
            old, new = (unpack_weight(m.get_submodule(name).weight)[0] for m in (model, loaded))
            assert same(old, new), name
        assert verify(tmp_path / "out", model).ok

    def test_from_single_file_reads_it_as_floats_and_quantizes_nothing(self, tmp_path: Path) -> None:
        """A fact of diffusers 0.42: `from_single_file` takes every file for packed when it is given a QuantoConfig.

        When this fails, `float_grid` can promise `from_single_file` too.
        """
        from diffusers import FluxTransformer2DModel, QuantoConfig

        model = frozen_flux(weights="int8", dtype="float32")
        export(model, tmp_path / "out", float_grid=True)
        file, arguments = str(tmp_path / "out" / WEIGHTS), {"config": str(tmp_path / "out")}
        loaded = FluxTransformer2DModel.from_single_file(file, **arguments, dtype=torch.float32)
        assert torch.equal(loaded.get_submodule(LAYER).weight, model.get_submodule(LAYER).weight.dequantize())
        config = QuantoConfig(weights_dtype="int8")  # type: ignore[no-untyped-call]
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            FluxTransformer2DModel.from_single_file(file, **arguments, quantization_config=config)

    def test_a_code_that_would_change_is_refused(self, tmp_path: Path) -> None:
        model = frozen_flux(weights="int8", dtype="float32")
        narrow_codes(model.get_submodule(LAYER), model, LAYER)
        with pytest.raises(ExportError, match=rf"1 of 28 layers: {LAYER} \(\d+ codes\)"):
            export(model, tmp_path / "out", float_grid=True)


class TestRefusals:
    def test_another_librarys_model(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="models of diffusers, got a Sequential: pass the pipeline's transformer"):
            prepare(nn.Sequential(nn.Linear(8, 8)), QuantSpec(), target="diffusers")
        for model in (frozen_layers((16, 32)), frozen_llama()):
            with pytest.raises(TargetError, match="target 'diffusers' loads models of diffusers"):
                export(model, tmp_path / "out", target="diffusers")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ({"activations": "int8"}, "diffusers has none"),
            ({"overrides": {"*.to_q": "int4"}}, "one weight type a model"),
            ({"exclude": ("proj_out",)}, r"would also exclude \['single_transformer_blocks.0.proj_out'\]"),
        ],
        ids=["activations", "mixed types", "last part of a name"],
    )
    def test_a_spec_that_diffusers_cannot_express(self, spec: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(small_flux(), QuantSpec(**spec), target="diffusers")

    def test_freezing_for_diffusers_what_was_prepared_for_quanto(self) -> None:
        model = small_flux()
        prepare(model, QuantSpec(exclude=("proj_out",)))
        with pytest.raises(TargetError, match=r"some called \['proj_out'\] are quantized and others not"):
            freeze(model, target="diffusers", allow_unreached=True)

    @pytest.mark.parametrize(
        ("tampering", "check"),
        [
            ("code", "layers"),
            ("scale", "layers"),
            ("key", "keys"),
            ("bias", "tensors"),
            ("config", "model"),
        ],
    )
    def test_a_tampered_directory_does_not_verify(self, tmp_path: Path, tampering: str, check: str) -> None:
        out = tmp_path / "out"
        export(frozen_flux(weights="int8"), out)
        file, layer = out / WEIGHTS, f"{LAYER}.weight"
        if tampering == "config":
            config = json.loads((out / "config.json").read_text())
            config["quantization_config"]["weights_dtype"] = "float8"
            (out / "config.json").write_text(json.dumps(config))
        elif tampering == "key":
            rewrite(file, lambda tensors: {key.replace("attn.to_q", "attn.to_x"): t for key, t in tensors.items()})
        else:
            key = {"code": f"{layer}._data", "scale": f"{layer}._scale", "bias": f"{LAYER}.bias"}[tampering]
            rewrite(file, altered(key, 1))
        for again in (False, True):  # noticed by the hashes, and without them
            if again:
                forge_hashes(out, tensors=False)
            with pytest.raises(VerifyError) as caught:
                verify(out)
            failed = {check.name for check in caught.value.report.checks if not check.passed}  # type: ignore[attr-defined]
            assert (check if again else "files") in failed

    def test_swapped_shards_do_not_verify(self, tmp_path: Path) -> None:
        export(frozen_flux(weights="int8"), tmp_path / "out", max_shard_size="200KB")
        one, other = sorted((tmp_path / "out").glob("diffusion*.safetensors"))[:2]
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
        forge_hashes(tmp_path / "out", tensors=False)
        with pytest.raises(VerifyError, match=r"lies in diffusion_pytorch_model-0000\d.* instead of"):
            verify(tmp_path / "out")
