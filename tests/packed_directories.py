"""Directories of packed weights, written by hand from models that stock quanto froze, for the plug-in's tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum import quanto
from safetensors.torch import load_file, save_file

from qat.formats.quanto_types import QTYPES, QUANTO_NAMES
from tests.architectures import ARCHITECTURES, Architecture

HINT = "load with `import qat.integrations.transformers`: packed by qat as"
QUANTO_TYPES = {name: quanto.tensor.qtypes[QUANTO_NAMES[name]] for name in QTYPES}
TYPES = list(QTYPES)
DTYPES = [torch.float32, torch.bfloat16]
UP = "model.layers.0.mlp.up_proj"


# What each leaves float: the heads, and what reads a non-contiguous slice, on which int8 kernels in bfloat16 raise.
EXCLUDED = {
    "LlamaForCausalLM": ("lm_head",),
    "OPTForCausalLM": ("lm_head",),
    "BertForSequenceClassification": ("*pooler*", "classifier"),
    "ViTForImageClassification": ("classifier",),
    "T5ForConditionalGeneration": ("lm_head", "*.wo"),
}
PACKED = [ARCHITECTURES[name] for name in EXCLUDED]
LLAMA, _, _, VIT, T5 = PACKED


def frozen(
    architecture: Architecture = LLAMA,
    weights: str = "int8",
    dtype: torch.dtype = torch.float32,
    activations: str | None = None,
    overrides: dict[str, str] | None = None,
    exclude: tuple[str, ...] | None = None,
    **sizes: Any,
) -> Any:
    """A random model frozen by stock quanto, in the serving dtype from the start."""
    model = replace(architecture, sizes={**architecture.sizes, **sizes}).build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval()
    skipped = EXCLUDED[architecture.model] if exclude is None else exclude
    kinds = {name: weights for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    for name in kinds:
        kinds[name] = next((kind for pattern, kind in (overrides or {}).items() if fnmatch(name, pattern)), weights)
    for kind in set(kinds.values()):  # linear layers only: quanto would take norms and convolutions too
        include = [n for n in kinds if kinds[n] == kind and not any(fnmatch(n, pattern) for pattern in skipped)]
        quanto.quantize(
            model, weights=QUANTO_TYPES[kind], activations=QUANTO_TYPES.get(activations or ""), include=include
        )
    if activations:
        with quanto.Calibration(streamline=False), torch.no_grad():
            model(**architecture.example(dtype))
    quanto.freeze(model)
    for module in model.modules():
        if isinstance(module, quanto.QLinear):
            weight = module.weight.data
            # TinyGemm keeps 8 * scale - shift; once there and back gives a shift that survives (as freezing does).
            if hasattr(weight, "weight_qbits_tensor") and type(weight) is not quanto.WeightQBitsTensor:
                weight = weight.weight_qbits_tensor().optimize()
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def declared(model: Any) -> dict[str, dict[str, Any]]:
    names = {value: key for key, value in QUANTO_TYPES.items()}
    return {
        name: {
            "weights": names[module.weight_qtype],
            "activations": names.get(module.activation_qtype),
            "group_size": QTYPES[names[module.weight_qtype]].group_size(module.in_features),
        }
        for name, module in model.named_modules()
        if isinstance(module, quanto.QLinear)
    }


def packed_state(model: Any) -> dict[str, torch.Tensor]:
    tied = model.all_tied_weights_keys
    return {key: value.clone() for key, value in model.state_dict().items() if key not in tied}


def write(model: Any, directory: Path) -> Path:
    """Write a directory in the layout that exports have."""
    directory.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.quantization_config = None
    config.save_pretrained(directory)
    save_file(packed_state(model), directory / "model.safetensors", {"format": "pt"})
    modules = declared(model)
    first = next(iter(modules.values()))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")

    def complete(config: dict[str, Any]) -> None:
        config["dtype"] = dtype
        config["architectures"] = [type(model).__name__]
        config["quantization_config"] = {
            "quant_method": "quanto",
            "weights": f"{HINT} {first['weights']}",
            "activations": first["activations"],
            "modules_to_not_convert": [],
            "qat": {"format": 1, "dtype": dtype, "modules": modules},
        }

    edit_config(directory, complete)
    return directory


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_modules(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_config(directory, lambda config: change(config["quantization_config"]["qat"]["modules"]))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    state = {key: value.clone() for key, value in load_file(path).items()}
    change(state)
    save_file(state, path, {"format": "pt"})


def assert_same_state(one: Any, other: Any) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert tensor.shape == right[key].shape, key
        assert torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), right[key].contiguous().view(-1).view(torch.uint8)
        ), key


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.dequantize() if isinstance(value, quanto.QTensor) else value


def assert_same_model(loaded: Any, reference: Any, architecture: Architecture) -> None:
    """Equal tensors, equal tensor classes, equal outputs."""
    assert_same_state(loaded, reference)
    assert type(loaded) is type(reference)
    found = {name: module for name, module in loaded.named_modules() if isinstance(module, quanto.QLinear)}
    assert found.keys() == declared(reference).keys()
    for name, module in found.items():
        assert module.frozen
        assert not module.weight.requires_grad
        assert type(module.weight.data) is type(reference.get_submodule(name).weight.data), name
    inputs = architecture.example(next(reference.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(plain(loaded(**inputs).logits), plain(reference(**inputs).logits))
        assert torch.isfinite(plain(loaded(**inputs).logits)).all()


def load(architecture: Architecture, directory: Path, **options: Any) -> Any:
    return getattr(transformers, architecture.model).from_pretrained(directory, **options)
