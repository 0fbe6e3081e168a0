"""optimum-quanto's format and its kernels (https://github.com/huggingface/optimum-quanto). Types: `quanto_types`.

Keys below a layer's name
    ``weight._data`` and ``weight._scale`` (8 bits); ``weight._data._data``, ``weight._scale`` and ``weight._shift``
    (packed along dim 0); ``bias``; ``input_scale`` and ``output_scale``, which are 1 when they are not used.

Tensor classes
    A plain class holds what is stored. Moving a weight, even by ``.to("cpu")``, may turn it into a kernel's own class,
    whose products round differently. `build` and `settle` make the class that the loader of a target holds.

Every measured fault of optimum-quanto 0.2.7 and torch 2.13 that a layer must avoid is a hazard here, and has a test.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.files.evidence import FrozenRecord
from qat.formats.base import Format, FrozenLayer, InLibrary, LayerTypes, Notice, Slot
from qat.formats.quanto_extensions import guard_extensions
from qat.formats.quanto_marlin import keep_bias, loses_bias_on_cuda
from qat.formats.quanto_tinygemm import (
    can_optimize,
    is_tinygemm_on_cpu,
    parts_of_tinygemm,
    plain,
    tinygemm_from_plain,
    unpacked,
)
from qat.formats.quanto_types import QTYPES, QTYPES_OF_QUANTO, QUANTO_NAMES, widened
from qat.numerics import FrozenWeight, QType
from qat.tensors import inner_tensors

__all__ = ["QUANTO", "WEIGHT_KEYS"]

WEIGHT_KEYS = ("weight._data._data", "weight._data", "weight._scale", "weight._shift")
"""The names below a layer's name from which its weight is rebuilt."""

_BLOCK_ELEMENTS = 1 << 18  # of a weight, dequantized at a time; eight times as many on a GPU, which each block awaits
_ALIGNMENT = 64  # bytes; fresh memory has it


def _codes(weight: Any) -> Tensor:
    """The codes of a plain weight, ``(out, in)``."""
    data = unpacked(weight._data) if hasattr(weight._data, "unpack") else weight._data
    return data.reshape(weight.shape[0], -1)


def _aligned(codes: Tensor) -> Tensor:
    # Views of a memory-mapped file lie wherever the file put them; torch's int8 kernel on a CPU crashes or gives
    # wrong numbers unless codes start on a 16-byte boundary.
    return codes.clone() if codes.device.type == "cpu" and codes.data_ptr() % _ALIGNMENT else codes


class _Quanto(Format):
    name: ClassVar[str] = "quanto"
    qtypes: ClassVar[Mapping[str, QType]] = QTYPES
    activation_qtypes: ClassVar[Mapping[str, QType]] = {name: QTYPES[name] for name in ("int8", "float8")}
    map_name: ClassVar[str] = "quanto_qmap.json"
    library: ClassVar[str] = "optimum-quanto"
    tags: ClassVar[tuple[str, ...]] = ("quanto",)
    libraries: ClassVar[Mapping[str, InLibrary]] = {
        "transformers": InLibrary("QuantoConfig", "weights", plugin="qat.integrations.transformers"),
        "diffusers": InLibrary("QuantoConfig", "weights_dtype", plugin="qat.integrations.diffusers", stock_below=1),
    }

    def layer_hazard(self, types: LayerTypes, shape: tuple[int, int]) -> str | None:
        """Shapes that the bfloat16 kernels of a CPU cannot run; one of them ends the process."""
        out_features, in_features = shape
        weights = types.weights
        if types.dtype is not torch.bfloat16:
            return None
        if weights.storage is torch.int8 and in_features % 4 == 0 and in_features % 16 != 0:
            return (
                f"kernel: int8 with bfloat16 on a CPU crashes when in_features ({in_features}) is not a multiple of 16"
            )
        if weights.anchor(types.dtype, in_features) and out_features % 16 != 0:
            return f"kernel: int4 with bfloat16 in groups of 128 needs out_features ({out_features}) divisible by 16"
        return None

    def input_hazard(self, types: LayerTypes, x: Tensor) -> str | None:
        """Layouts that the bfloat16 kernels of a CPU cannot read.

        They flatten the input to rows without a copy where its strides allow that, and then want it contiguous: int4
        wholly (a pooler that reads ``hidden[:, 0]`` fails), int8 within a row.
        """
        if types.dtype is not torch.bfloat16 or x.numel() == 0:
            return None
        rows = x.detach().reshape(-1, x.shape[-1])
        if types.weights.anchor(types.dtype, x.shape[-1]) and not rows.is_contiguous():
            return (
                "kernel: int4 with bfloat16 in groups of 128 raises on a CPU when the input is not contiguous, as here"
            )
        int8 = types.weights.storage is torch.int8
        if int8 and x.shape[-1] % 4 == 0 and len(rows) > 1 and rows.stride(-1) != 1:
            return "kernel: int8 with bfloat16 raises on a CPU when the input is not contiguous within a row, as here"
        return None

    def call_hazard(self, x: Tensor, *, keyword: bool) -> str | None:
        """Its hook sees no keywords. Of 1 or 4 dimensions, the product has another shape, or none on CUDA."""
        fault = "passed by keyword" if keyword else None if x.ndim in (2, 3) else f"of {x.ndim} dimensions"
        return fault and f"optimum-quanto cannot quantize an input {fault}: call it by position, with 2 or 3 dimensions"

    def notices(self, layers: Iterable[tuple[LayerTypes, tuple[int, int], bool]]) -> list[Notice]:
        """Of the biases that a kernel loses, with the lines that mend it."""
        losing = sum(bias and loses_bias_on_cuda(types, shape) for types, shape, bias in layers)
        if not losing:
            return []
        fact = (
            f"{losing} float8 layers have a bias that optimum-quanto 0.2.7 leaves out on a CUDA GPU of compute "
            "capability 8.0 or later"
        )
        warning = (
            f"{fact}: serve them by qat.load, which avoids that kernel, or mark their weights as the model card shows; "
            "int8 is not affected"
        )
        text = (
            f"{fact}. `qat.load` and the plug-ins `qat.integrations` avoid that kernel. Loaded otherwise, mark the "
            "weights before the model goes to the GPU:\n\n"
            "```python\n"
            "from optimum.quanto import qfloat8_e4m3fn\n\n"
            "for module in model.modules():\n"
            '    if hasattr(module, "weight_qtype"):\n'
            "        module.weight.activation_qtype = qfloat8_e4m3fn  # rules that kernel out\n"
            'model.to("cuda")\n'
            "```"
        )
        return [Notice(warning, "On a CUDA GPU", text)]

    def card_loading(self) -> list[str]:
        return [f"Without `qat`: `optimum.quanto.requantize` with `{self.map_name}` fills a float model built on CPU."]

    def slots(self, types: LayerTypes, shape: tuple[int, int], bias: bool) -> dict[str, Slot]:
        out_features, in_features = shape
        qtype, dtype = types.weights, types.dtype
        size = qtype.group_size(in_features)
        rows = out_features * in_features // (size or in_features)
        row: tuple[int, ...] = (in_features,)
        scalar, ones = ((),), (1, *row[:0])
        if size is not None:
            row = (size,)
        elif types.kernel:  # groups are rows of a matrix, and whole rows keep their dimensions
            row, ones = (in_features // prod(types.kernel), *types.kernel), (1,) * (1 + len(types.kernel))
        slots = {}
        if qtype.has_shift:
            packed = (-(-rows // (8 // qtype.bits)), *row)  # packing fills whole bytes along dim 0
            slots["weight._data._data"] = Slot(torch.uint8, (packed,), is_code=True)
            slots["weight._scale"] = slots["weight._shift"] = Slot(dtype, ((rows, *ones),))
        else:
            slots["weight._data"] = Slot(qtype.storage, ((out_features, *row),), is_code=True)
            # One row has a scale of its own for all: a scalar, as quanto has it.
            slots["weight._scale"] = Slot(dtype, ((rows, *ones),) if rows > 1 else ((), (1, *ones)))
        if bias:
            slots["bias"] = Slot(dtype, ((out_features,),))
        return slots | {"input_scale": Slot(dtype, scalar), "output_scale": Slot(dtype, scalar)}

    def pack(self, layer: FrozenLayer) -> dict[str, Tensor]:
        """Codes of 4 and 2 bits are packed by quanto itself."""
        weight = layer.weight
        if weight.shift is not None:
            from optimum.quanto.tensor.packed import PackedTensor

            rows = weight.qtype.grouped(weight.codes).contiguous()
            packed = PackedTensor.pack(rows, weight.qtype.bits)._data
            tensors = {"weight._data._data": packed, "weight._scale": weight.scale, "weight._shift": weight.shift}
        else:
            tensors = {"weight._data": weight.codes, "weight._scale": weight.scale}
        slots = self.slots(layer.types, (weight.shape[0], weight.shape[1]), bias=False)
        tensors = {key: tensor.reshape(slots[key].shape) for key, tensor in tensors.items()}
        if layer.bias is not None:
            tensors["bias"] = layer.bias
        return tensors | {"input_scale": layer.input_scale, "output_scale": layer.output_scale}

    def map(self, record: FrozenRecord) -> dict[str, Any]:
        """The types of every layer, in quanto's names.

        None where outputs stay float: quanto's own loader would quantize them whatever its map says.
        """
        if not record.spec.outputs:
            return {}
        return {
            name: {
                "weights": QUANTO_NAMES[layer.weights],
                "activations": "none" if layer.activations is None else QUANTO_NAMES[layer.activations],
            }
            for name, layer in record.layers.items()
        }

    def quantization_config(self, library: str, record: FrozenRecord, floats: list[str]) -> dict[str, Any]:
        """Of diffusers the stock fields alone; of transformers also the group ``qat``, for the plug-in.

        To transformers ``weights`` is deliberately no type's name: without the plug-in, ``QuantoConfig`` raises on it
        and shows the text, instead of leaving weights random.
        """
        rules, spec = self.libraries[library], record.spec
        fields: dict[str, Any] = {"quant_method": "quanto", rules.weights_argument: spec.weights}
        if rules.stock_below is not None:
            return fields | {"modules_to_not_convert": floats}
        return fields | {
            "weights": f"load with `import {rules.plugin}`: packed by qat as {spec.weights}",
            "activations": spec.activation_type,
            "modules_to_not_convert": floats,
            "qat": {
                "format": 1,
                "dtype": spec.dtype,
                "quantize_outputs": spec.outputs,
                "modules": {
                    name: {"weights": layer.weights, "activations": layer.activations, "group_size": layer.group_size}
                    for name, layer in record.layers.items()
                },
            },
        }

    def empty(self, types: LayerTypes, shape: tuple[int, int], bias: bool, like: nn.Module) -> Any:
        """A quanto layer on the meta device, to be filled; ``like`` is the layer whose place it takes."""
        from qat.formats.quanto_modules import empty_module

        layer = empty_module(
            like,
            shape,
            bias,
            dtype=types.dtype,
            weights=QUANTO_NAMES[types.weights.name],
            activations=None if types.activations is None else QUANTO_NAMES[types.activations.name],
        )
        layer.optimizer = None  # would only serve a second quantization, which must never happen
        if not types.outputs:
            layer.disable_output_quantization()
        return layer

    def weight(self, layer: Any, tensors: Mapping[str, Tensor], *, plain_on_cpu: bool = False) -> nn.Parameter:
        """The weight of a ``QLinear`` from its tensors of `WEIGHT_KEYS`, in the class in which it runs.

        The layer's own weight may be on the meta device.
        """
        from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor

        stored = {key: _aligned(value) if "._data" in key else value for key, value in tensors.items()}
        common = {
            "state_dict": stored,
            "prefix": "weight.",
            "qtype": layer.weight_qtype,
            "axis": 0,
            "size": layer.weight.size(),
            "stride": layer.weight.stride(),
            "missing_keys": [],
        }
        if layer.weight_qtype.bits == 8:
            weight = WeightQBytesTensor.load_from_state_dict(activation_qtype=layer.activation_qtype, **common)
        else:
            guard_extensions()
            weight = WeightQBitsTensor.load_from_state_dict(group_size=layer.weight_group_size, **common)
        weight = weight if layer.bias is None else keep_bias(weight)
        return nn.Parameter(_held(layer, weight, plain_on_cpu), requires_grad=False)

    def build(
        self,
        types: LayerTypes,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        *,
        like: nn.Module,
        plain_on_cpu: bool = False,
    ) -> nn.Module:
        layer = self.empty(types, shape, "bias" in tensors, like)
        parts = {key: tensors[key] for key in WEIGHT_KEYS if key in tensors}
        layer.weight = self.weight(layer, parts, plain_on_cpu=plain_on_cpu)
        if "bias" in tensors:
            layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)
        layer.input_scale, layer.output_scale = tensors["input_scale"], tensors["output_scale"]
        return layer  # type: ignore[no-any-return]

    def owns(self, module: nn.Module) -> bool:
        return getattr(module, "weight_qtype", None) is not None

    def is_frozen(self, module: nn.Module) -> bool:
        return getattr(module, "weight_qtype", None) is not None and bool(getattr(module, "frozen", False))

    def values(self, module: nn.Module) -> Tensor:
        """By quanto's own arithmetic, not ours."""
        weight: Any = module.weight
        value: Tensor = (plain(weight) if is_tinygemm_on_cpu(weight) else weight).dequantize()
        return value.reshape(self.shape(module))

    def keeper(self, layers: Sequence[Any]) -> Any:
        """One with quantized activations or a bias, since its weight is marked for them."""
        marked = (layer for layer in layers if layer.activation_qtype is not None or layer.bias is not None)
        return next(marked, layers[0])

    def value_blocks(self, module: nn.Module, layer: FrozenLayer) -> Iterator[Tensor]:
        """Quanto's arithmetic too, on weights of some rows each, whose codes need no unpacking or slow cast before."""
        from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor

        kept: Any = module
        weight, form = layer.weight, (kept.weight_qtype, 0)
        groups = weight.scale.shape[0] // weight.shape[0]
        step = max(1, (1 if weight.codes.is_cpu else 8) * _BLOCK_ELEMENTS // weight.shape[1])
        for first in range(0, weight.shape[0], step):
            codes = weight.codes[first : first + step]
            rows, size = slice(first * groups, (first + step) * groups), (codes.size(), codes.stride())
            if weight.shift is None:
                codes = widened(codes, weight.dtype) if weight.qtype.floating and codes.is_cpu else codes
                block = WeightQBytesTensor(*form, *size, codes, weight.scale[rows], kept.activation_qtype)
            else:
                # Quanto packs plain tensors, to unpack them again; a parameter is none.
                parts = (nn.Parameter(weight.qtype.grouped(codes), False), weight.scale[rows], weight.shift[rows])
                block = WeightQBitsTensor(*form, kept.weight_group_size, *size, *parts)
            yield block.dequantize()

    def declared(self, module: nn.Module) -> LayerTypes:
        layer: Any = module
        active = layer.activation_qtype
        return LayerTypes(
            QTYPES_OF_QUANTO[layer.weight_qtype.name],
            None if active is None else QTYPES_OF_QUANTO[active.name],
            layer.weight.dtype,
            kernel=tuple(layer.weight.shape[2:]),
        )

    def read(self, module: nn.Module) -> FrozenLayer:
        layer: Any = module
        types = self.declared(module)
        parts = parts_of_tinygemm(layer.weight)
        if parts is None:
            weight = plain(layer.weight)
            shift = getattr(weight, "_shift", None)
            groups = weight._scale.reshape(-1, 1), None if shift is None else shift.reshape(-1, 1)
            frozen = FrozenWeight(_codes(weight), *groups, types.weights)
        else:
            frozen = FrozenWeight(*parts, types.weights)
        return FrozenLayer(frozen, layer.bias, types, layer.input_scale, layer.output_scale)

    def is_settled(self, module: nn.Module, *, plain_on_cpu: bool) -> bool:
        weight: Any = module.weight
        return type(_held(module, weight, plain_on_cpu)) is type(weight.data)

    def settle(self, module: nn.Module, *, plain_on_cpu: bool) -> None:
        """Undo what a move between devices did to the tensor class."""
        layer: Any = module
        kept = layer.weight if layer.bias is None else keep_bias(layer.weight)
        held = _held(layer, kept, plain_on_cpu)
        if type(held) is not type(layer.weight.data):
            layer.weight = nn.Parameter(held, requires_grad=False)

    def fill(self, model: nn.Module, directory: Path, files: Iterable[str]) -> tuple[nn.Module, str] | None:
        """None for layers of other classes than those that quanto's loader replaces."""
        from optimum.quanto import requantize
        from safetensors.torch import load_file

        types = json.loads((directory / self.map_name).read_text(encoding="utf-8"))
        if not all(isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d) for name in types):
            return None
        state: dict[str, Tensor] = {}
        for file in files:
            state |= load_file(directory / file)
        requantize(model, state, types)
        return model.eval(), "optimum.quanto.requantize on a model built on CPU"

    def load_language_model(self, directory: Path, **arguments: Any) -> tuple[nn.Module, str]:
        from optimum.quanto import QuantizedModelForCausalLM

        wrapper: Any = QuantizedModelForCausalLM.from_pretrained(str(directory), trust_remote_code=False, **arguments)
        return wrapper._wrapped, "QuantizedModelForCausalLM.from_pretrained"

    def stock_codes(self, layer: FrozenLayer) -> Tensor:
        """The codes that quanto derives from a layer's values in float32, by its default optimizers: ``(out, in)``."""
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes, quantize_weight

        weight = layer.weight.dequantize().float()
        qtype, size = qtypes[QUANTO_NAMES[layer.types.weights.name]], layer.types.weights.group_size(weight.shape[1])
        with torch.no_grad():
            if qtype.bits == 8:
                scale, shift = AbsmaxOptimizer()(weight, qtype=qtype, axis=0), None
            else:
                scale, shift = MaxOptimizer()(weight, qtype=qtype, axis=0, group_size=size)
            parts: dict[str, Any] = {"scale": scale, "shift": shift, "group_size": size}
            return _codes(plain(quantize_weight(weight, qtype=qtype, axis=0, optimized=False, **parts)))


def _held(layer: Any, weight: Any, plain_on_cpu: bool) -> Any:
    """The weight of a layer in the class in which a target's loader holds it on the weight's device."""
    if getattr(layer, "held_plain", False):
        return plain(weight)
    # Stock diffusers leaves the wrapper on the meta device; its parts say where the data is.
    if plain_on_cpu and inner_tensors(weight)[0].device.type == "cpu":
        return plain(weight) if hasattr(weight, "weight_qbits_tensor") else weight
    if not can_optimize(weight):
        return weight
    in_blocks = tinygemm_from_plain(weight) if type(weight).__name__ == "WeightQBitsTensor" else None
    return weight.optimize() if in_blocks is None else in_blocks


QUANTO = _Quanto()
