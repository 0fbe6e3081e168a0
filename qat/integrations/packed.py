"""What a directory of packed weights declares, what its files hold, and whether the two agree.

The loaders underneath are lenient: codes of the wrong type are read as other numbers, a missing bias stays
uninitialised memory, a float weight lands in a quantized module. All of that can be seen in the declaration
(the group ``qat`` of config.json) and the headers of the safetensors files, before one tensor is read. So it is
checked here, without a model, and the price is that every header is read twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qat.errors import LoadError
from qat.qtypes import QTYPES, ActivationType, ServingDtype, WeightType, group_size

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "WEIGHT_SLOTS",
    "LayerShape",
    "PackedGroup",
    "PackedModule",
    "TensorHeader",
    "layer_faults",
    "one_error",
    "packed_weight",
    "parse_group",
    "read_headers",
]

WEIGHT_SLOTS = ("weight._data._data", "weight._data", "weight._scale", "weight._shift")
"""The names under a module's name from which its weight is rebuilt."""

_FILE_DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
}
_ALIGNMENT = 64
_FAULTS_SHOWN = 8


class PackedModule(BaseModel):
    """How one module is packed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: WeightType
    """Type of the codes."""
    activations: ActivationType | None = None
    """Type of the quantized input and output; None: both stay float."""
    group_size: int | None = None
    """Elements of a row that share a scale; None: the whole row."""


class PackedGroup(BaseModel):
    """The group ``qat`` of ``quantization_config``: what the plug-in needs beyond a stock configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    """Version of this group."""
    dtype: ServingDtype
    """The serving dtype, which scales and shifts hold and which cannot be cast afterwards."""
    modules: dict[str, PackedModule]
    """Every packed module by its full name; no other module is packed."""
    quantize_outputs: bool = True
    """Whether layers with an activation type quantize their output too, as stock layers do."""


@dataclass(frozen=True)
class LayerShape:
    """The size of one linear layer."""

    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a safetensors file says about one tensor."""

    dtype: str
    """The file format's name of the dtype: F32, BF16, F16, I8, U8, F8_E4M3."""
    shape: tuple[int, ...]


def parse_group(group: object) -> PackedGroup:
    """Validate the group ``qat``.

    Raises:
        LoadError: when a field is missing, unknown, or has a value that the format does not know.
    """
    try:
        return PackedGroup.model_validate(group)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'qat'}: {fault['msg']}" for fault in error.errors()]
        raise one_error("quantization_config's group 'qat' in config.json is not valid", faults) from error


def one_error(what: str, faults: Sequence[str]) -> LoadError:
    """One error for all faults, shortened to the first few."""
    shown = [f"  - {fault}" for fault in faults[:_FAULTS_SHOWN]]
    if len(faults) > _FAULTS_SHOWN:
        shown.append(f"  - and {len(faults) - _FAULTS_SHOWN} more")
    return LoadError("\n".join([f"{what}:", *shown, "Export the model again with qat.export, or restore its files."]))


def read_headers(files: Iterable[str] | None) -> dict[str, TensorHeader]:
    """Read the header of every safetensors file; no tensor is read.

    Raises:
        LoadError: when there are no files, or one is not a readable safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    headers: dict[str, TensorHeader] = {}
    for file in files or ():
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    view = opened.get_slice(key)
                    headers[key] = TensorHeader(view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise LoadError(
                f"{file} is not a readable safetensors file ({error}); packed weights are read from safetensors only. "
                "Restore the file, or export the model again with qat.export."
            ) from error
    if not headers:
        raise LoadError("packed weights are read from a directory of safetensors files, and no tensor was found there")
    return headers


def _expected(declared: PackedModule, size: LayerShape, dtype: str) -> dict[str, tuple[str, set[tuple[int, ...]]]]:
    """Name, dtype and admitted shapes of each tensor of a packed layer."""
    qtype = QTYPES[declared.weights]
    codes, serving = _FILE_DTYPES[qtype.storage], _FILE_DTYPES[dtype]
    expected: dict[str, tuple[str, set[tuple[int, ...]]]] = {
        "input_scale": (serving, {()}),
        "output_scale": (serving, {()}),
    }
    if size.bias:
        expected["bias"] = (serving, {(size.out_features,)})
    if qtype.affine:
        width = declared.group_size or size.in_features
        rows = size.out_features * size.in_features // width
        expected["weight._data._data"] = (codes, {(ceil(rows / (8 // qtype.bits)), width)})
        expected["weight._shift"] = (serving, {(rows, 1)})
    else:
        rows = size.out_features
        expected["weight._data"] = (codes, {(rows, size.in_features)})
    expected["weight._scale"] = (serving, {(rows, 1)} if rows > 1 or qtype.affine else {(1, 1), ()})
    return expected


def layer_faults(
    name: str, declared: PackedModule, size: LayerShape, found: Mapping[str, TensorHeader], dtype: str
) -> list[str]:
    """Say where the tensors of a layer do not fit what is declared for it.

    Args:
        name: the module's full name, for the messages.
        declared: what config.json says of it.
        size: the layer's size in the model.
        found: the headers of its tensors, by their name below the module's.
        dtype: the serving dtype.

    Returns:
        One sentence for each fault; empty when the layer can be loaded.
    """
    group = group_size(declared.weights, size.in_features)
    if declared.group_size != group:
        return [
            f"{name} is declared with group_size={declared.group_size}, but loaders of the format use {group} "
            f"for {declared.weights} and {size.in_features} input features"
        ]
    if "weight" in found:
        return [f"{name} is declared {declared.weights}, but the files hold a float weight for it ({name}.weight)"]
    expected = _expected(declared, size, dtype)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    faults = [f"{name}.{slot} is missing (needed for {declared.weights})" for slot in missing]
    faults += [f"{name}.{slot} does not belong to a layer declared {declared.weights}" for slot in unexpected]
    for slot in sorted(expected.keys() & found.keys()):
        wanted, shapes = expected[slot]
        header = found[slot]
        if header.dtype != wanted or header.shape not in shapes:
            faults.append(
                f"{name}.{slot} is {header.dtype} {list(header.shape)}, but {declared.weights} weights served in "
                f"{dtype} need {wanted} {' or '.join(str(list(shape)) for shape in sorted(shapes))}"
            )
    return faults


def packed_weight(qmodule: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the weight of a quanto layer from its stored tensors.

    Args:
        qmodule: the ``optimum.quanto.nn.QLinear`` that will hold it (its own weight may be on the meta device).
        tensors: the stored tensors, by the names of ``WEIGHT_SLOTS``.

    Returns:
        A quanto weight tensor of the class that quanto's own loader makes.
    """
    from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor

    from qat.packing import keep_bias

    aligned = {slot: _aligned(tensor) if "._data" in slot else tensor for slot, tensor in tensors.items()}
    common = {
        "state_dict": aligned,
        "prefix": "weight.",
        "qtype": qmodule.weight_qtype,
        "axis": 0,
        "size": qmodule.weight.size(),
        "stride": qmodule.weight.stride(),
        "missing_keys": [],
    }
    if qmodule.weight_qtype.bits == 8:
        weight = WeightQBytesTensor.load_from_state_dict(activation_qtype=qmodule.activation_qtype, **common)
    else:
        weight = WeightQBitsTensor.load_from_state_dict(group_size=qmodule.weight_group_size, **common)
    if qmodule.bias is not None:
        weight = keep_bias(weight)
    return weight.optimize() if _can_optimize(weight) else weight


def _aligned(codes: Tensor) -> Tensor:
    # Views of the memory-mapped file lie wherever the file put them; torch's int8 kernel on CPU crashes or gives
    # wrong numbers unless codes start on a 16-byte boundary. Fresh memory is aligned to 64.
    return codes.clone() if codes.device.type == "cpu" and codes.data_ptr() % _ALIGNMENT else codes


def _can_optimize(weight: Any) -> bool:
    """Whether ``optimize()`` can convert a weight: TinyGemm's packing raises on other row counts."""
    from torch import bfloat16

    if weight.qtype.name != "qint4" or weight.dtype != bfloat16 or weight._group_size != 128:
        return True
    rows: int = weight.shape[0]
    return rows % (16 if weight.device.type == "cpu" else 8) == 0
