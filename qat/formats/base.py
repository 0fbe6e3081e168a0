"""What a format is: how a stored weight is made of numbers. A format knows nothing about models.

It says which types there are and how their values are computed (`QType`), which tensors a layer is stored as and under
which keys, and which module runs a frozen layer::

    FrozenLayer --pack--> tensors --build--> module --read--> FrozenLayer
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import ExportError, SpecError, meant
from qat.files.evidence import FrozenRecord, LayerEvidence
from qat.files.shards import DTYPE_NAMES, TensorEntry
from qat.files.weights import write_json
from qat.numerics import FrozenWeight, QType
from qat.spec import QuantSpec
from qat.tensors import digest

__all__ = ["Format", "FrozenLayer", "InLibrary", "LayerTypes", "Notice", "Slot"]


@dataclass(frozen=True)
class LayerTypes:
    """The types of one layer, resolved from the strings of a spec; ``dtype`` is the serving dtype."""

    weights: QType
    activations: QType | None
    """The type of its inputs and outputs, or None."""
    dtype: torch.dtype
    outputs: bool = True
    """Whether a layer with an activation type quantizes its output too."""
    kernel: tuple[int, ...] = ()
    """The dimensions of the stored weight after the first two, which are one in its matrix."""


@dataclass(frozen=True)
class FrozenLayer:
    """One layer as it is final; tensors are in the serving dtype."""

    weight: FrozenWeight
    bias: Tensor | None
    types: LayerTypes
    input_scale: Tensor
    """Scalar; 1 without an activation type."""
    output_scale: Tensor

    def evidence(self, value: str, codes: str | None = None) -> LayerEvidence:
        """Digests of the layer; ``value`` is that of what its weight dequantizes to, ``codes`` theirs, if at hand."""
        weight, active = self.weight, self.types.activations
        out_features, in_features = weight.shape
        return LayerEvidence(
            weights=weight.qtype.name,
            activations=None if active is None else active.name,
            shape=(out_features, in_features),
            group_size=weight.qtype.group_size(in_features),
            codes=codes or digest(weight.codes),
            scale=digest(weight.scale),
            shift=None if weight.shift is None else digest(weight.shift),
            weight=value,
            input_scale=None if active is None else float(self.input_scale),
            output_scale=None if active is None else float(self.output_scale),
            bias=None if self.bias is None else digest(self.bias),
            kernel=self.types.kernel,
        )


@dataclass(frozen=True)
class Slot:
    """One stored tensor of a layer: its dtype, and the shapes that a loader takes (the first one is written)."""

    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    is_code: bool = False
    """Whether it holds codes, which kernels want aligned."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that is written."""
        return self.shapes[0]


class Notice(NamedTuple):
    """What a user should know of frozen layers."""

    warning: str
    """A sentence, for inspection."""
    title: str
    """Of the section of a model card on the same subject; below, its Markdown."""
    text: str


@dataclass(frozen=True)
class InLibrary:
    """How a model library knows a format."""

    config_class: str
    """The library's class that configures a load which quantizes into the format."""
    weights_argument: str
    """Its argument for the type of weights."""
    plugin: str | None = None
    """The module to import before the library can load packed weights."""
    stock_below: int | None = None
    """The major release of the library below which its own code loads them, too; None: it has no such code."""


class Format(ABC):
    """A way to store quantized weights; abstract."""

    name: ClassVar[str]
    qtypes: ClassVar[Mapping[str, QType]]
    """Types of weights by the name that a spec uses; below, those of activations."""
    activation_qtypes: ClassVar[Mapping[str, QType]]
    map_name: ClassVar[str] = ""
    """A file beside the weights in which the format says which layer has which type."""
    library: ClassVar[str]
    """Name of the package that reads the format, for model cards; below, their tags."""
    tags: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[Mapping[str, InLibrary]] = {}
    """The model libraries that load the format, by name."""
    package: ClassVar[str] = ""
    """The module that its loaders need beside a model library; an extra of qat of the same name installs it."""
    own_modules: ClassVar[bool] = False
    """Whether stock loaders make other modules than `build`, so that `qat.load` fills a float model instead."""

    def types(self, weights: str, activations: str | None, dtype: torch.dtype, outputs: bool = True) -> LayerTypes:
        """Resolve the names that a spec uses into objects; `SpecError` if the format has no such type."""
        for argument, name, known in (
            ("weights", weights, self.qtypes),
            ("activations", activations, self.activation_qtypes),
        ):
            if name is not None and name not in known:
                what = f"{argument}: format {self.name!r} has {sorted(known)}, got {name!r}"
                raise SpecError(f"{what}: choose one{meant(name, known)}")
        active = None if activations is None else self.activation_qtypes[activations]
        return LayerTypes(self.qtypes[weights], active, dtype, outputs)

    def package_faults(self) -> list[str]:
        """The fault of a missing package."""
        if not self.package or find_spec(self.package) is not None:
            return []
        extra = self.package.replace("_", "-")
        return [f"target: its loaders need the package {extra}, which is missing: pip install 'qat[{extra}]'"]

    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """What the spec asks for that no loader of the format gives, each with its remedy; its types are known."""
        if spec.activation_type is None or self.activation_qtypes:
            return []
        return [f"activations={spec.activation_type!r}: format {self.name!r} has none: use None, or another target"]

    def shape_fault(self, types: LayerTypes, shape: tuple[int, int]) -> str | None:
        """Why the format cannot store a weight of this shape (``(out, in)``), or None."""
        return None

    def layer_hazard(self, types: LayerTypes, shape: tuple[int, int]) -> str | None:
        """Why the format's kernels cannot run a layer of this shape (``(out, in)``), or None."""
        return None

    def input_hazard(self, types: LayerTypes, x: Tensor) -> str | None:
        """Why the format's kernels cannot read ``x`` as the input of such a layer, or None."""
        return None

    def call_hazard(self, x: Tensor, *, keyword: bool) -> str | None:
        """Why the format's layers cannot quantize the input ``x``, which is passed by ``keyword`` or not, or None."""
        return None

    def notices(self, layers: Iterable[tuple[LayerTypes, tuple[int, int], bool]]) -> list[Notice]:
        """What a user should know of these layers: types, shape, and whether there is a bias."""
        return []

    def card_loading(self) -> list[str]:
        """How a plain module is filled without `qat`, in Markdown."""
        return []

    @abstractmethod
    def slots(self, types: LayerTypes, shape: tuple[int, int], bias: bool) -> dict[str, Slot]:
        """The tensors that a layer is stored as, by their names below the layer's.

        Those of the weight, and no others, have names that begin with ``weight``.
        """

    @abstractmethod
    def pack(self, layer: FrozenLayer) -> dict[str, Tensor]:
        """The stored tensors of a layer, as `slots` declares them."""

    def nbytes(self, types: LayerTypes, shape: tuple[int, int]) -> int:
        """Bytes of a stored weight: codes, scales and shifts."""
        weight = (slot for key, slot in self.slots(types, shape, bias=False).items() if key.startswith("weight"))
        return sum(prod(slot.shape) * slot.dtype.itemsize for slot in weight)

    def recorded(self, record: FrozenRecord, name: str) -> LayerTypes:
        """The types of a layer that was frozen."""
        layer, spec = record.layers[name], record.spec
        types = self.types(layer.weights, layer.activations, spec.torch_dtype, spec.outputs)
        return replace(types, kernel=layer.kernel)

    def faults(
        self,
        name: str,
        types: LayerTypes,
        shape: tuple[int, int],
        bias: bool,
        group_size: int | None,
        found: Mapping[str, TensorEntry],
    ) -> list[str]:
        """Say where the stored tensors of a layer do not fit what is declared for it.

        Loaders are lenient: codes of the wrong type are read as other numbers, a missing bias stays uninitialised
        memory. All of that can be seen in the headers of the files, before one tensor is read.

        ``types`` and ``group_size`` are declared; ``shape`` and ``bias`` are those of the layer in the model; ``found``
        is what the headers say, by the tensors' names below the layer's.
        """
        weights, dtype = types.weights.name, str(types.dtype).removeprefix("torch.")
        computed = types.weights.group_size(shape[1])
        if group_size != computed:
            return [f"{name} is declared with group_size={group_size}, but loaders of {weights} use {computed}"]
        slots = self.slots(types, shape, bias)
        if "weight" in found and "weight" not in slots:
            return [f"{name} is declared {weights}, but the files hold a float weight for it ({name}.weight)"]
        missing, unexpected = sorted(slots.keys() - found.keys()), sorted(found.keys() - slots.keys())
        faults = [f"{name}.{key} is missing (needed for {weights})" for key in missing]
        faults += [f"{name}.{key} does not belong to a layer declared {weights}" for key in unexpected]
        for key in sorted(slots.keys() & found.keys()):
            slot, entry = slots[key], found[key]
            if entry.dtype != slot.dtype or entry.shape not in slot.shapes:
                shapes = " or ".join(str(list(shape)) for shape in sorted(slot.shapes))
                faults.append(
                    f"{name}.{key} is {DTYPE_NAMES[entry.dtype]} {list(entry.shape)}, but {weights} weights served in "
                    f"{dtype} need {DTYPE_NAMES[slot.dtype]} {shapes}"
                )
        return faults

    def quantization_config(self, library: str, record: FrozenRecord, floats: list[str]) -> dict[str, Any]:
        """What ``config.json`` tells a model library about the weights; ``floats`` names its float linear layers."""
        raise NotImplementedError(f"format {self.name!r} names no model libraries")

    def map(self, record: FrozenRecord) -> dict[str, Any]:
        """What the file `map_name` says of a frozen model; empty where it must not be there."""
        return {}

    def write_map(self, record: FrozenRecord, directory: Path) -> None:
        """Write the file `map_name`, if such a model has one."""
        if fields := self.map(record):
            write_json(directory / self.map_name, fields)

    def map_faults(self, record: FrozenRecord, directory: Path) -> list[str]:
        """Where the file `map_name`, which loaders trust, differs from the evidence that freezing left."""
        wanted = self.map(record)
        try:
            found = json.loads((directory / self.map_name).read_text(encoding="utf-8"))
            names = sorted(wanted.keys() | found.keys())
        except (OSError, ValueError, AttributeError) as error:
            return [f"{self.map_name} cannot be read: {error}"]
        differ = [name for name in names if wanted.get(name) != found.get(name)]
        return [f"{self.map_name} declares {n} as {found.get(n)}, freezing left {wanted.get(n)}" for n in differ]

    @abstractmethod
    def build(
        self,
        types: LayerTypes,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        *,
        like: nn.Module,
        plain_on_cpu: bool = False,
    ) -> nn.Module:
        """The module that runs a frozen layer, made of its stored tensors, on their device.

        ``shape`` is ``(out, in)``. ``like`` is the float or prepared layer whose place it takes: its class says which
        function the module computes, and its attributes say with which options. With ``plain_on_cpu``, codes on a CPU
        stay as they are stored, instead of in a kernel's own order.
        """

    @abstractmethod
    def is_frozen(self, module: nn.Module) -> bool:
        """Whether a module holds a quantized weight of this format."""

    def owns(self, module: nn.Module) -> bool:
        """Whether a module is one of this format's, with packed weights or not yet."""
        return self.is_frozen(module)

    @abstractmethod
    def declared(self, module: nn.Module) -> LayerTypes:
        """The types of a frozen layer, without reading its weight."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """``(out, in)`` of a frozen layer, without reading its weight."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.numel() // weight.shape[0]

    @abstractmethod
    def read(self, module: nn.Module) -> FrozenLayer:
        """What a frozen layer holds, on whichever device it is now."""

    def values(self, module: nn.Module) -> Tensor:
        """What the weight of a frozen layer dequantizes to when it runs, ``(out, in)``, in the serving dtype."""
        return self.read(module).weight.dequantize()

    def shared(self, module: nn.Module) -> Tensor:
        """A tensor of a frozen layer that is one object in all layers which share a weight."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    def needs_packed(self, spec: QuantSpec) -> bool:
        """Whether a stock loader must hold the packed weights of a spec, since it cannot make floats of all of them."""
        return False

    def hides_weights(self, record: FrozenRecord) -> tuple[bool, bool]:
        """Whether stock modules of a model have no ``weight`` while they hold codes, and whether they can hold them."""
        return False, True

    def keeper(self, layers: Sequence[Any]) -> Any:
        """Of frozen layers that are to share one weight, the one whose weight serves them all."""
        return layers[0]

    def tie(self, layers: Sequence[nn.Module]) -> None:
        """Let frozen layers with equal weights share one."""
        shared = self.keeper(layers).weight
        for layer in layers:
            layer.weight = shared

    def value_blocks(self, module: nn.Module, layer: FrozenLayer) -> Iterator[Tensor]:
        """`values`, perhaps some rows at a time; ``layer`` is what `read` gives of the module."""
        yield self.values(module)

    def is_settled(self, module: nn.Module, *, plain_on_cpu: bool) -> bool:
        """Whether `settle` would leave a frozen layer as it is."""
        return True

    def settle(self, module: nn.Module, *, plain_on_cpu: bool) -> None:
        """Bring the weight of a frozen layer back to how `build` leaves it, after moves between devices."""
        return

    def fill(self, model: nn.Module, directory: Path, files: Iterable[str]) -> tuple[nn.Module, str] | None:
        """Fill a float model by the format's own loader of plain modules, and name it; None: there is only `qat.load`.

        The model is built on the CPU, its tensors in the dtypes of the files.
        """
        return None

    def load_language_model(self, directory: Path, **arguments: Any) -> tuple[nn.Module, str] | None:
        """Load a causal language model by the format's own loader; None where it has none."""
        return None

    def stock_codes(self, layer: FrozenLayer) -> Tensor:
        """The codes, ``(out, in)``, that a stock load derives from values in float32, if there is such a load."""
        raise ExportError(f"float_grid=True: no stock load quantizes into format {self.name!r}: export packed weights")
