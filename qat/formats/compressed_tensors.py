"""compressed-tensors' format (https://github.com/vllm-project/compressed-tensors), read by transformers and by vLLM.

Keys below a layer's name
    ``weight`` (codes of 8 bits) and ``weight_scale``, ``(out, 1)``; or ``weight_packed`` (int32 words along a row, the
    first code lowest), ``weight_scale``, ``(out, groups)``, ``weight_shape``, and ``weight_zero_point`` (int32 words
    along a column of groups); ``input_scale``, ``(1,)``, with static activations; ``bias``. int8 weights without an
    activation type are packed: vLLM reads no others (``_get_scheme_from_parts``, compressed_tensors.py, at be696453).

Activations
    The stock loader of transformers fake-quantizes inputs, and leaves outputs float. Weights are dequantized before the
    product, so no kernel for integers runs there.

Zero points
    transformers 5.23 with compressed-tensors 0.20 cannot hold them packed: it expects ``weight_zero_point`` unpacked,
    and raises. So config.json says ``dequantize`` for such models (`Host.load_settings`), and its loader makes float
    weights of equal values. That path knows one type for a whole model, and drops activation scales: both are refused
    beside zero points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.errors import SpecError
from qat.files.evidence import FrozenRecord
from qat.formats.base import Format, FrozenLayer, InLibrary, LayerTypes, Slot
from qat.formats.compressed_modules import FrozenExpert, FrozenLinear, packed_weight, packs, unpacked_weight
from qat.formats.compressed_types import QTYPES
from qat.layers import ExpertMatrix
from qat.numerics import QType
from qat.spec import LayerSpec, QuantSpec

__all__ = ["COMPRESSED_TENSORS"]

_BYTES = ("int8", "float8")


class _CompressedTensors(Format):
    name: ClassVar[str] = "compressed-tensors"
    qtypes: ClassVar[Mapping[str, QType]] = QTYPES
    activation_qtypes: ClassVar[Mapping[str, QType]] = {name: QTYPES[name] for name in _BYTES}
    library: ClassVar[str] = "compressed-tensors"
    tags: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    libraries: ClassVar[Mapping[str, InLibrary]] = {
        "transformers": InLibrary("CompressedTensorsConfig", "config_groups")
    }
    package: ClassVar[str] = "compressed_tensors"
    own_modules: ClassVar[bool] = True

    def types(self, weights: str, activations: str | None, dtype: torch.dtype, outputs: bool = True) -> LayerTypes:
        types = super().types(weights, activations, dtype, outputs)
        if activations is not None and types.weights is not types.activations:
            raise SpecError(
                f"activations: format {self.name!r} has {activations} inputs beside {activations} weights alone, got "
                f"weights={weights!r}: give the layer LayerSpec(weights={weights!r}), without activations"
            )
        return types

    def spec_faults(self, spec: QuantSpec) -> list[str]:
        faults = []
        if spec.quantize_outputs:
            faults.append(
                "quantize_outputs=True: loaders of compressed-tensors leave the outputs of layers float: leave it out"
            )
        given = {name: self.qtypes[name] for name in spec.weight_types() if name in self.qtypes}
        whole = sorted(name for name, qtype in given.items() if qtype.whole_shift)
        if whole and (len(set(given.values())) > 1 or spec.activation_type is not None):
            faults.append(
                f"weights={whole[0]!r}: transformers reads zero points of models with one weight type and float "
                f"activations alone, got {sorted(given)} and activations={spec.activation_type!r}: use types without "
                "_zp, or this one for all layers"
            )
        return faults

    def layer_hazard(self, types: LayerTypes, shape: tuple[int, int]) -> str | None:
        """Groups never cross the end of a row. Zero points of 4 bits in one word are unpacked by no loader."""
        size = types.weights.group_size(shape[1])
        if size is not None and shape[1] % size != 0:
            return f"in_features ({shape[1]}) is not a multiple of the group size of {types.weights.name}, {size}"
        if types.weights.whole_shift and types.weights.bits == 4 and shape[0] <= 8:
            return f"compressed-tensors 0.20 cannot unpack zero points of {shape[0]} rows: 4 bits need nine or more"
        return None

    def slots(self, types: LayerTypes, shape: tuple[int, int], bias: bool) -> dict[str, Slot]:
        (out_features, in_features), qtype, dtype = shape, types.weights, types.dtype
        size = qtype.group_size(in_features)
        groups = 1 if size is None else in_features // size
        scale = {"weight_scale": Slot(dtype, ((out_features, groups),))}
        if not packs(types):
            slots = {"weight": Slot(qtype.storage, (shape,), is_code=True)} | scale
        else:
            words = torch.int32, -(-in_features * qtype.bits // 32)
            slots = {"weight_packed": Slot(words[0], ((out_features, words[1]),), is_code=True)} | scale
            if qtype.has_shift:
                slots["weight_zero_point"] = Slot(torch.int32, ((-(-out_features * qtype.bits // 32), groups),))
            slots["weight_shape"] = Slot(torch.int64, ((2,),))
        if bias:
            slots["bias"] = Slot(dtype, ((out_features,),))
        return slots if types.activations is None else slots | {"input_scale": Slot(dtype, ((1,), ()))}

    def pack(self, layer: FrozenLayer) -> dict[str, Tensor]:
        tensors = packed_weight(layer.weight, layer.types)
        if layer.bias is not None:
            tensors["bias"] = layer.bias
        return tensors if layer.types.activations is None else tensors | {"input_scale": layer.input_scale.reshape(1)}

    def build(
        self,
        types: LayerTypes,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        *,
        like: nn.Module,
        plain_on_cpu: bool = False,
    ) -> nn.Module:
        return (FrozenExpert if isinstance(like, ExpertMatrix) else FrozenLinear)(types, shape, tensors)

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, FrozenLinear) or getattr(module, "quantization_scheme", None) is not None

    def is_frozen(self, module: nn.Module) -> bool:
        """Ours; or the stock loader's, until its first forward turns it into floats."""
        status = getattr(getattr(module, "quantization_status", None), "value", None)
        return isinstance(module, FrozenLinear) or (status == "compressed" and _stock_types(module) is not None)

    def declared(self, module: nn.Module) -> LayerTypes:
        types = module.types if isinstance(module, FrozenLinear) else _stock_types(module)
        assert types is not None
        return types

    def shape(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.out_features, layer.in_features

    def shared(self, module: nn.Module) -> Tensor:
        return _stored(module)["weight_scale"]

    def read(self, module: nn.Module) -> FrozenLayer:
        types, tensors = self.declared(module), _stored(module)
        one = torch.ones((), dtype=types.dtype, device=tensors["weight_scale"].device)
        weight = unpacked_weight(tensors, types, self.shape(module))
        bias: Any = module.bias
        return FrozenLayer(weight, bias, types, tensors.get("input_scale", one).reshape(()), one)

    def values(self, module: nn.Module) -> Tensor:
        """Of a stock module by its own arithmetic, not ours."""
        if isinstance(module, FrozenLinear):
            return module.weight
        from compressed_tensors.compressors import BaseCompressor

        stock: Any = module
        compressor = BaseCompressor.get_value_from_registry(stock.quantization_scheme.format)
        return compressor.decompress(_stored(module), stock.quantization_scheme)["weight"]  # type: ignore[no-any-return]

    def tie(self, layers: Sequence[nn.Module]) -> None:
        """Nothing to do: its loaders tie no packed weights."""

    def needs_packed(self, spec: QuantSpec) -> bool:
        default = spec.activations  # which an override by a name keeps, as in `QuantSpec.resolve`
        given = (
            (v.weights, v.activations) if isinstance(v, LayerSpec) else (v, default) for v in spec.overrides.values()
        )
        groups = {(spec.weights, default), *given}
        types = [self.types(*group, spec.torch_dtype) for group in groups if group[0] != "float"]
        return len(types) > 1 and any(map(packs, types))

    def hides_weights(self, record: FrozenRecord) -> tuple[bool, bool]:
        types = [self.recorded(record, name) for name in record.layers]
        return any(map(packs, types)), not any(one.weights.whole_shift for one in types)

    def quantization_config(self, library: str, record: FrozenRecord, floats: list[str]) -> dict[str, Any]:
        """Groups of layers with equal types, those of patterns first, since the first match counts.

        A single group beside patterns is called ``Linear``. Several name their layers: vLLM takes ``Linear`` for its
        fused layers too (q, k and v; gate and up), before it looks for their parts (``find_matched_target`` in
        quantization/compressed_tensors/utils.py, at 008014e).
        """
        groups: dict[tuple[bool, str, str | None], list[str]] = {}
        for name, layer in record.layers.items():
            groups.setdefault((not name.startswith("re:"), layer.weights, layer.activations), []).append(name)
        named = sum(plain for plain, *_ in groups) > 1
        schemes = [
            self._scheme(weights, active, ["Linear"] if plain and not named else names)
            for (plain, weights, active), names in sorted(groups.items(), key=lambda item: item[0][0])
        ]
        formats = {scheme["format"] for scheme in schemes}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{place}": scheme for place, scheme in enumerate(schemes)},
            "ignore": floats,
        }

    def _scheme(self, weights: str, activations: str | None, targets: Iterable[str]) -> dict[str, Any]:
        types = self.types(weights, activations, torch.float32)
        qtype = types.weights
        format = "pack-quantized" if packs(types) else "float-quantized" if qtype.floating else "int-quantized"
        scheme: dict[str, Any] = {"targets": list(targets), "format": format, "weights": _arguments(qtype)}
        if activations is not None:
            inputs = _arguments(self.activation_qtypes[activations])
            scheme["input_activations"] = inputs | {"strategy": "tensor", "dynamic": False}
        return scheme


def _arguments(qtype: QType) -> dict[str, Any]:
    """A type in the format's words."""
    size = qtype.group_size(0)
    words = {"num_bits": qtype.bits, "type": "float" if qtype.floating else "int", "symmetric": not qtype.has_shift}
    return words | ({"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size})


def _stock_types(module: Any) -> LayerTypes | None:
    """The types of a layer that the stock loader made; None where its scheme is none of this format's."""
    scheme, scale = module.quantization_scheme, getattr(module, "weight_scale", None)
    weights, inputs = _said(scheme.weights), scheme.input_activations
    active = _said(inputs)
    if (
        scale is None
        or weights is None
        or scheme.output_activations is not None
        or (active is None) != (inputs is None)
    ):
        return None
    if inputs is not None and (
        inputs.dynamic is not False or getattr(inputs.strategy, "value", inputs.strategy) != "tensor"
    ):
        return None
    return LayerTypes(weights, active, scale.dtype, outputs=False)


def _said(arguments: Any) -> QType | None:
    """The type that arguments of a scheme say; None where there are none, or it is none of this format's."""
    if arguments is None:
        return None
    kind = getattr(arguments.type, "value", arguments.type)  # the default is an enumeration's member
    return _BY_SCHEME.get((arguments.num_bits, kind, arguments.symmetric, arguments.group_size))


_BY_SCHEME = {
    (qtype.bits, "float" if qtype.floating else "int", not qtype.has_shift, qtype.group_size(0)): qtype
    for qtype in QTYPES.values()
}


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a frozen layer, by their names in a file."""
    if isinstance(module, FrozenLinear):
        return module.stored()
    return {key: tensor.detach() for key, tensor in module.named_parameters(recurse=False)}


COMPRESSED_TENSORS = _CompressedTensors()
