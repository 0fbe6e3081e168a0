"""What several test files share: tiny models, independent reference implementations, file tampering.

Import it as `from tests.helpers import ...`. A reference implementation here never calls the code it judges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat.numerics import QType
from qat.quantizers import Algorithm, Quantized, WeightQuantizer


def one_of(*names: str) -> str:
    """How pydantic lists what may be given."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}"


WEIGHT_TYPES = ("int8", "float8", "int4", "int2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Array = NDArray[np.float64]

# Bits of the significand (the leading one included) and the exponent of the smallest subnormal.
_FLOATS = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24), "float8": (4, -9)}
# Smallest code, largest code, and the largest code that a range is divided by.
_CODES = {"int8": (-128, 127), "float8": (-448, 448), "int4": (0, 15), "int2": (0, 3)}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit, the sign of zero included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def round_float(values: Array, kind: str) -> Array:
    """Round float64 numbers to a narrower float format, half to even; no overflow."""
    precision, smallest = _FLOATS[kind]
    step = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - precision, smallest))
    rounded: Array = np.rint(values / step) * step
    return rounded


def reference_quantize(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, dtype: str, group: int | None
) -> tuple[Array, Array]:
    """Codes and values of a weight in numpy's float64, each step rounded on purpose; both ``(out, in)``.

    ``group`` is the number of elements that share a scale, None for a whole row.
    """
    rows = weight.detach().double().numpy().reshape(scale.shape[0], group or weight.shape[1])
    steps = scale.detach().double().numpy()
    offsets = np.zeros_like(steps) if shift is None else shift.detach().double().numpy()
    low, high = _CODES[qtype]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = round_float(round_float(rows + offsets, "float32") / steps, "float32")
    codes = np.where(steps == 0, 0, codes)
    codes = (
        round_float(np.clip(codes, low, high), "float8") if qtype == "float8" else np.clip(np.rint(codes), low, high)
    )
    values = round_float(steps * codes, dtype)
    if shift is not None:
        values = round_float(values - offsets, dtype)
    return codes.reshape(weight.shape), values.reshape(weight.shape)


def awkward_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A float32 weight with a zero row, a constant row, an outlier, and rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    weight *= torch.logspace(-2, 1, out_features).unsqueeze(1)
    if out_features > 2:
        weight[seed % out_features] = 0.0
        weight[(seed + 1) % out_features] = 0.03
        weight[(seed + 2) % out_features, seed % in_features] = 5.0
    return weight


def one_sided_weight() -> Tensor:
    """Groups above zero, below zero, from zero up, and around it: ``(4, 256)``."""
    rows = torch.rand(4, 256, generator=torch.Generator().manual_seed(0))
    return torch.stack([rows[0] + 0.5, -rows[1] - 0.5, rows[2] * (rows[2] > 0.3), rows[3] - 0.5])


class LearnedStepQuantizer(WeightQuantizer):
    """The logarithm of the scale is a parameter, and so is the shift of an affine type."""

    def __init__(self, weight: Tensor, qtype: QType, dtype: torch.dtype, start: float) -> None:
        super().__init__(qtype, dtype, masked=True)
        affine = qtype.name in ("int4", "int2")
        size = next((n for n in (128, 96, 64, 32) if weight.shape[1] % n == 0), None) if weight.shape[1] > 128 else None
        rows = weight.detach().float().reshape(-1, size) if affine and size else weight.detach().float()
        low, high = rows.amin(1, keepdim=True) * start, rows.amax(1, keepdim=True) * start
        scale = (high - low) / _CODES[qtype.name][1] if affine else torch.maximum(-low, high) / _CODES[qtype.name][1]
        self.log_scale = nn.Parameter(scale.clamp(min=1e-5).log())
        self.shift = nn.Parameter(-low) if affine else None

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        return self.by_scale(weight, self.log_scale.exp(), self.shift, out_dtype)


class LearnedStep(Algorithm):
    """An algorithm that the library does not know: what one has to write for a new one is exactly this."""

    kind: Literal["learned_step"] = "learned_step"
    start: float = 0.8
    """Part of the weight's range that the first scale covers; below 1, so that weights saturate."""

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> LearnedStepQuantizer:
        return LearnedStepQuantizer(weight, qtype, dtype, self.start)


def tiny_model(name: str, **sizes: Any) -> nn.Module:
    """A random transformers model of two layers, without dropout, in evaluation mode: opt, bert, llama, vit or t5."""
    import transformers

    common: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    classes: dict[str, tuple[str, dict[str, Any]]] = {
        "opt": (
            "OPTForCausalLM",
            common | {"ffn_dim": 96, "max_position_embeddings": 32, "word_embed_proj_dim": 64, "dropout": 0.0},
        ),
        "bert": (
            "BertModel",
            common | {"intermediate_size": 96, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ),
        "llama": ("LlamaForCausalLM", common | {"intermediate_size": 96, "num_key_value_heads": 2}),
        "vit": (
            "ViTModel",
            {k: v for k, v in common.items() if k != "vocab_size"}
            | {"intermediate_size": 96, "image_size": 16, "patch_size": 8},
        ),
        "t5": (
            "T5ForConditionalGeneration",
            {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4},
        ),
    }
    kind, defaults = classes[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model: nn.Module = model_class(model_class.config_class(**(defaults | sizes)))
    return model.eval()


def tokens(batch: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    """Token numbers for `tiny_model`."""
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


class Kept:
    """Counts what autograd keeps for backward, by storage."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.dtypes: list[torch.dtype] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        self.dtypes.append(tensor.dtype)
        return tensor

    def beyond(self, *known: Tensor | None) -> int:
        """Bytes in storages that are none of ``known``'s."""
        ours = {tensor.untyped_storage().data_ptr() for tensor in known if tensor is not None}
        return sum(size for pointer, size in self.storages.items() if pointer not in ours)


def kept_by(forward: Callable[[], Tensor]) -> tuple[Kept, Tensor]:
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        y = forward()
    return kept, y  # the output is held, so that no storage is reused before it is counted


def of_diffusers(model: nn.Module) -> nn.Module:
    """The same model, told to be one of diffusers, by the module of its class and ``from_config``."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": "diffusers.models.made_up", "from_config": None})
    return model


def of_transformers(model: nn.Module) -> nn.Module:
    """The same model, told to be one of transformers, by the module of its class and ``_from_config``."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": "transformers.models.made_up", "_from_config": None})
    return model
