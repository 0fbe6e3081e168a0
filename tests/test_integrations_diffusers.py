"""The plug-in for diffusers: equal to the stock loader, single files, diffusers 1.0, and what it refuses.

Stock code is tested elsewhere in this process, so each test here registers the plug-in and takes it away again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qat
from qat.errors import LoadError
from qat.exporting import export
from qat.quantizers import StraightThrough
from scripts.stock_diffusers import state_portrait
from tests.diffusion_architectures import ARCHITECTURES
from tests.exports import DTYPES, TYPES, flux_inputs, frozen_flux, rewrite, small_flux

pytestmark = pytest.mark.filterwarnings("ignore:.*[qQ]uanto.*deprecated:FutureWarning")

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Register the plug-in for the rest of a test."""
    from diffusers.loaders import single_file_model
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    def registered() -> Any:
        needs_conversion = single_file_model._should_convert_state_dict_to_diffusers
        monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "quanto", AUTO_QUANTIZER_MAPPING["quanto"])
        monkeypatch.setattr(single_file_model, "_should_convert_state_dict_to_diffusers", needs_conversion)
        import qat.integrations.diffusers as plugin

        plugin.register()
        return plugin

    return registered


@pytest.fixture
def plugin(register: Callable[[], Any]) -> Any:
    return register()


def from_directory(directory: Path, dtype: str = "bfloat16", **arguments: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(str(directory), dtype=getattr(torch, dtype), **arguments)


def from_file(directory: Path, dtype: str = "bfloat16", file: Path | None = None, **arguments: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    options = {"config": str(directory), "dtype": getattr(torch, dtype), **arguments}
    return FluxTransformer2DModel.from_single_file(str(file or directory / WEIGHTS), **options)


def config(weights: str, floats: list[str] | None = None) -> Any:
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype=weights, modules_to_not_convert=floats)  # type: ignore[no-untyped-call]


def portrait(model: Any, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """Every stored tensor, and the output."""
    inputs = {name: tensor.clone() for name, tensor in flux_inputs(dtype).items()}
    with torch.no_grad():
        output = model(**inputs).sample
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | {"output": output}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, one in left.items():
        assert one.dtype == right[name].dtype, name
        assert torch.equal(one.float(), right[name].float()), name


@pytest.mark.loads("diffusers", "plug-in for diffusers", weights=TYPES, equal="codes, outputs")
@pytest.mark.loads("diffusers", "plug-in for diffusers, single file", weights=TYPES, equal="codes, outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", TYPES)
def test_packed_weights_load_as_by_stock_code_and_from_single_files(
    weights: str, dtype: str, tmp_path: Path, register: Callable[[], Any]
) -> None:
    export(frozen_flux(weights=weights, dtype=dtype, exclude=("*to_k",)), tmp_path / "out")
    by_stock = from_directory(tmp_path / "out", dtype)
    stock = portrait(by_stock, dtype)
    register()
    loaded = from_directory(tmp_path / "out", dtype)
    assert loaded.device.type == "cpu"
    assert_equal(portrait(loaded, dtype), stock)
    for floats in (None, ["to_k"]):
        single = from_file(tmp_path / "out", dtype, quantization_config=config(weights, floats))
        assert single.config.quantization_config.modules_to_not_convert == ["to_k"]
        assert_equal(portrait(single, dtype), stock)
    kinds = [{name: type(p.data) for name, p in model.named_parameters()} for model in (loaded, single)]
    assert kinds[0] == kinds[1]
    for model in (loaded, single):  # by this, torch.matmul chooses the order of its sums
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in by_stock.parameters()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", TYPES)
def test_float_weights_are_quantized_as_by_stock_code_and_from_single_files(
    weights: str, dtype: str, tmp_path: Path, register: Callable[[], Any]
) -> None:
    small_flux().save_pretrained(tmp_path)
    stock = portrait(from_directory(tmp_path, dtype, quantization_config=config(weights, ["to_k"])), dtype)
    register()
    loads = [
        load(tmp_path, dtype, quantization_config=config(weights, ["to_k"])) for load in (from_directory, from_file)
    ]
    for loaded in loads:
        assert_equal(portrait(loaded, dtype), stock)
    loads[1].save_pretrained(tmp_path / "again")
    again = portrait(from_directory(tmp_path / "again", dtype), dtype)
    if dtype == "bfloat16" and weights == "int4":  # freshly quantized, it is in the order of another kernel
        del again["output"], stock["output"]
    assert_equal(again, stock)


@pytest.mark.parametrize("name", ["HunyuanDiT2DModel", "WanAnimateTransformer3DModel"])
def test_other_classes_load_as_by_stock_code(name: str, tmp_path: Path, register: Callable[[], Any]) -> None:
    """They have parameters at their top; one keeps layers in float32, and builds buffers that no file holds."""
    model = ARCHITECTURES[name].build()
    qat.prepare(model, qat.QuantSpec(weights="int8", dtype="bfloat16"), target="diffusers", algorithm=StraightThrough())
    qat.freeze(model, allow_unreached=True)
    export(model, tmp_path / "out")

    def found() -> dict[str, str]:
        return state_portrait(type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16))

    stock = found()
    register()
    assert found() == stock
    if hasattr(type(model), "from_single_file"):
        loaded = type(model).from_single_file(
            str(tmp_path / "out" / WEIGHTS),
            config=str(tmp_path / "out"),
            dtype=torch.bfloat16,
            quantization_config=config("int8"),
        )
        assert state_portrait(loaded) == stock


# Diffusers 1.0, as far as it can be known: the helper for deprecations raises from that version on, or all is gone.
ONE = """
import sys, warnings
import diffusers, torch
from diffusers.quantizers import auto, quantization_config
from safetensors.torch import load_file, save_file
warnings.simplefilter("error", FutureWarning)
torch.set_num_threads(1)
folder, gone = sys.argv[1], sys.argv[2] == "gone"
diffusers.__version__ = "1.0.0"
if gone:
    del auto.AUTO_QUANTIZER_MAPPING["quanto"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"]
    del quantization_config.QuantoConfig, auto.QuantoConfig, auto.QuantoQuantizer
    for name in [name for name in sys.modules if name.startswith("diffusers.quantizers.quanto")]:
        sys.modules[name] = None
cls = diffusers.FluxTransformer2DModel
try:
    cls.from_pretrained(folder + "/int8")
    raise SystemExit("stock code still loads")
except ValueError as error:
    print(error)
if "qat" in sys.argv[3]:
    import qat
    qat.load(folder + "/int8")
import qat.integrations.diffusers
from diffusers import QuantoConfig
for weights in sys.argv[4:]:
    inputs = {name: tensor.clone() for name, tensor in load_file(folder + "/inputs").items()}
    path = folder + "/" + weights
    single = {"config": path, "quantization_config": QuantoConfig(weights_dtype=weights)}
    models = {
        "directory": cls.from_pretrained(path, dtype=torch.bfloat16),
        "file": cls.from_single_file(path + "/diffusion_pytorch_model.safetensors", dtype=torch.bfloat16, **single),
        "float": cls.from_pretrained(
            folder + "/float", dtype=torch.bfloat16, quantization_config=QuantoConfig(weights_dtype=weights)
        ),
    }
    for how, model in models.items():
        with torch.no_grad():
            output = model(**inputs).sample
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state | {"output": output}, f"{path}-{how}")
"""


@pytest.mark.parametrize(("how", "types"), [("refusing", ("int8",)), ("gone", ("int8", "int4"))])
def test_diffusers_1_loads_with_the_plugin_what_it_refuses_without(
    how: str, types: tuple[str, ...], tmp_path: Path
) -> None:
    save_file(flux_inputs("bfloat16"), tmp_path / "inputs")
    small_flux().save_pretrained(tmp_path / "float")
    for weights in types:
        export(frozen_flux(weights=weights), tmp_path / weights)
    first = "qat" if how == "gone" else "plugin"
    command = [sys.executable, "-c", ONE, str(tmp_path), how, first, *types]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("1.0.0" if how == "refusing" else "Unknown quantization type, got quanto") in done.stdout
    for weights in types:
        stock = portrait(from_directory(tmp_path / weights))
        for place in ("directory", "file"):
            assert_equal(load_file(tmp_path / f"{weights}-{place}"), stock)
        quantized = from_directory(tmp_path / "float", quantization_config=config(weights))
        assert_equal(load_file(tmp_path / f"{weights}-float"), portrait(quantized))


@pytest.mark.usefixtures("plugin")
def test_float8_weights_with_a_bias_are_marked_for_cuda(tmp_path: Path) -> None:
    export(frozen_flux(weights="float8"), tmp_path / "packed")
    small_flux().save_pretrained(tmp_path / "float")
    made = config("float8")
    for loaded in (
        from_directory(tmp_path / "packed"),
        from_file(tmp_path / "packed", quantization_config=made),
        from_directory(tmp_path / "float", quantization_config=made),
        from_file(tmp_path / "float", quantization_config=made),
    ):
        layers = [module for module in loaded.modules() if hasattr(module, "weight_qtype")]
        assert len(layers) == 28
        assert {layer.weight.activation_qtype.name for layer in layers} == {"qfloat8_e4m3fn"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weights", TYPES)
def test_on_a_gpu_it_computes_what_qat_load_gives(weights: str, tmp_path: Path, register: Callable[[], Any]) -> None:
    export(frozen_flux(weights=weights), tmp_path / "out")
    inputs = {name: tensor.cuda() for name, tensor in flux_inputs("bfloat16").items()}
    wanted = qat.load(tmp_path / "out", device="cuda")(**inputs).sample
    register()
    for loaded in (
        from_directory(tmp_path / "out").cuda(),
        from_file(tmp_path / "out", quantization_config=config(weights)).cuda(),
        from_file(tmp_path / "out", quantization_config=config(weights), device="cuda"),
    ):
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).sample, wanted)


@pytest.mark.usefixtures("plugin")
def test_original_names_of_float_files_are_converted(tmp_path: Path) -> None:
    model = ARCHITECTURES["LTXVideoTransformer3DModel"].build()
    model.save_pretrained(tmp_path)
    names = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}

    def original(name: str) -> str:
        return "model.diffusion_model." + ".".join(names.get(part, part) for part in name.split("."))

    save_file(
        {original(name): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()},
        tmp_path / "file.safetensors",
    )
    wanted = type(model).from_pretrained(tmp_path, quantization_config=config("int8"))
    found = type(model).from_single_file(
        str(tmp_path / "file.safetensors"), config=str(tmp_path), quantization_config=config("int8")
    )
    assert state_portrait(found) == state_portrait(wanted)


Tensors = dict[str, torch.Tensor]


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("attn.to_q", "attn.to_x"): tensor for name, tensor in tensors.items()}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def in_float(tensors: Tensors) -> Tensors:
    values = tensors[f"{LAYER}.weight._data"] * tensors[f"{LAYER}.weight._scale"]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{LAYER}.")}
    return kept | {f"{LAYER}.weight": values, f"{LAYER}.bias": tensors[f"{LAYER}.bias"]}


class TestRefusals:
    @pytest.fixture
    def out(self, tmp_path: Path, plugin: Any) -> Path:
        export(frozen_flux(weights="int8", exclude=("*to_k",)), tmp_path / "out")
        return tmp_path / "out"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (renamed, rf"{LAYER}\.weight\._data is missing \(needed for int8\)"),
            (without(f"{LAYER}.bias"), rf"- {LAYER}\.bias is missing"),
            (without(f"{LAYER}.weight._scale"), rf"- {LAYER}\.weight\._scale is missing"),
            (
                without("norm_out.linear.bias", "transformer_blocks.0.attn.to_k.weight"),
                r"attn\.to_k\.weight is missing",
            ),
            (
                lambda tensors: tensors | {"stray": torch.ones(2)},
                "stray belongs to nothing in a FluxTransformer2DModel",
            ),
            (in_float, f"{LAYER} is declared int8, but the files hold a float weight"),
            (lambda t: t | {f"{LAYER}.weight._data": t[f"{LAYER}.weight._data"].view(torch.uint8)}, "is U8"),
        ],
        ids=["names", "bias", "scale", "float weight", "stray", "float", "dtype"],
    )
    def test_files_that_do_not_fit(self, out: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
        rewrite(out / WEIGHTS, change)
        with pytest.raises(LoadError, match=message):
            from_directory(out)
        with pytest.raises(LoadError, match=message):
            from_file(out, quantization_config=config("int8", ["to_k"]))

    @pytest.mark.parametrize(
        ("weights", "floats", "message"),
        [
            ("int4", ["to_k"], "needed for int4"),
            ("float8", ["to_k"], r"_data is I8 \[256, 256\], but float8 weights"),
            ("int8", [], "attn.to_k is declared int8, but the files hold a float weight"),
            ("int8", ["to_k", "to_q"], r"attn.to_q is packed, but .* leaves it float \(modules_to_not_convert=\["),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, out: Path, weights: str, floats: list[str], message: str) -> None:
        fields = json.loads((out / "config.json").read_text())
        fields["quantization_config"] |= {"weights_dtype": weights, "modules_to_not_convert": floats}
        (out / "config.json").write_text(json.dumps(fields))
        with pytest.raises(LoadError, match=message):
            from_directory(out)
        with pytest.raises(LoadError, match=message):
            from_file(out, quantization_config=config(weights, floats))

    def test_one_last_name_packed_and_float(self, out: Path) -> None:
        rewrite(out / WEIGHTS, in_float)  # of two layers called to_q
        with pytest.raises(LoadError, match=r"single_transformer_blocks.0.attn.to_q is packed, but .*'to_q'"):
            from_file(out, quantization_config=config("int8"))

    def test_a_directory_that_lost_its_declaration_needs_the_argument(self, out: Path) -> None:
        wanted = portrait(from_directory(out))
        fields = json.loads((out / "config.json").read_text())
        del fields["quantization_config"]
        (out / "config.json").write_text(json.dumps(fields))
        assert_equal(portrait(from_directory(out, quantization_config=config("int8"))), wanted)

    @pytest.mark.usefixtures("plugin")
    def test_float_files_that_lack_a_layer(self, tmp_path: Path) -> None:
        small_flux().save_pretrained(tmp_path)
        rewrite(tmp_path / WEIGHTS, without(f"{LAYER}.weight"))
        with pytest.raises(LoadError, match=rf"the files hold nothing for {LAYER}\.weight of a FluxTransformer2DModel"):
            from_directory(tmp_path, quantization_config=config("int8"))

    def test_device_maps_and_types(self, out: Path, plugin: Any) -> None:
        with pytest.raises(LoadError, match="spreads the model, which packed weights cannot: use one device"):
            from_directory(out, device_map={"transformer_blocks": "cpu", "": "cpu"})
        with pytest.raises(LoadError, match=r"weights_dtype: must be one of int8, .*, got 'int3'"):
            plugin.QuantoConfig(weights_dtype="int3")
        for device_map in ("cpu", "auto"):
            assert_equal(portrait(from_directory(out, device_map=device_map)), portrait(from_directory(out)))

    def test_a_model_without_linear_layers_is_said(self, plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
        quantizer = plugin.PackedQuantizer(plugin.QuantoConfig("int8", ["to_k"]), pre_quantized=False)
        model = small_flux()
        quantizer.quantization_config.modules_to_not_convert = [
            name.rpartition(".")[2] for name, _ in model.named_modules()
        ]
        quantizer.preprocess_model(model)
        assert "FluxTransformer2DModel has no linear layer to quantize" in caplog.text


def test_verify_says_who_loaded(tmp_path: Path, register: Callable[[], Any]) -> None:
    model = frozen_flux(weights="int8")
    export(model, tmp_path / "out")
    for by_plugin in (False, True):
        if by_plugin:
            register()
        details = {check.name: check.detail for check in qat.verify(tmp_path / "out", model).checks}
        assert details["load"].endswith("; by qat.integrations.diffusers") is by_plugin
