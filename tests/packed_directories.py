"""Directories of packed weights, written by hand from models that stock quanto froze, for the plug-in's tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum import quanto
from safetensors.torch import load_file, save_file

from qat.qtypes import QTYPES, group_size

HINT = "packed by qat, load with `import qat.integrations.transformers`"
QUANTO_TYPES = {name: quanto.tensor.qtypes[qtype.quanto_name] for name, qtype in QTYPES.items()}
TYPES = list(QTYPES)
DTYPES = [torch.float32, torch.bfloat16]
UP = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Architecture:
    """A tiny model: how to make it, what to leave float, what to feed it."""

    name: str
    model: str
    config: str
    sizes: dict[str, Any]
    exclude: tuple[str, ...]
    inputs: tuple[str, ...] = ("input_ids",)


# Classifiers and poolers read a non-contiguous slice, on which int8 kernels in bfloat16 raise.
ARCHITECTURES = [
    Architecture(
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        ("lm_head",),
    ),
    Architecture(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 64,
            "hidden_size": 256,
            "ffn_dim": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 256,
        },
        ("lm_head",),
    ),
    Architecture(
        "bert",
        "BertForSequenceClassification",
        "BertConfig",
        {
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_labels": 4,
        },
        ("*pooler*", "classifier"),
    ),
    Architecture(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        {
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        ("classifier",),
        ("pixel_values",),
    ),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 256,
            "d_kv": 64,
            "d_ff": 384,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        ("lm_head", "*.wo"),
        ("input_ids", "decoder_input_ids"),
    ),
]
LLAMA = ARCHITECTURES[0]


def example(architecture: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
        if name == "pixel_values"
        else torch.randint(2, 64, (2, 6), generator=generator)
        for name in architecture.inputs
    }


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
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**{**architecture.sizes, **sizes})
    model = getattr(transformers, architecture.model)(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval()
    skipped = architecture.exclude if exclude is None else exclude
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
            model(**example(architecture, dtype))
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
            "group_size": group_size(names[module.weight_qtype], module.in_features),
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
            "weights": f"{first['weights']}: {HINT}",
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
    inputs = example(architecture, next(reference.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(plain(loaded(**inputs).logits), plain(reference(**inputs).logits))
        assert torch.isfinite(plain(loaded(**inputs).logits)).all()


def load(architecture: Architecture, directory: Path, **options: Any) -> Any:
    return getattr(transformers, architecture.model).from_pretrained(directory, **options)
