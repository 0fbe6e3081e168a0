"""The tensors of a frozen model under the keys of its format, fetched one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from qat.errors import ExportError
from qat.files.shards import TensorEntry
from qat.formats.base import Format
from qat.tensors import own_tensors, stored_tensors

__all__ = ["ModelState"]


class ModelState:
    """The tensors of a frozen model, by the keys under which they are stored.

    A layer whose weight is in a kernel's own order is brought back to the stored one when it is fetched, and only one
    such layer is held at any moment.
    """

    def __init__(
        self,
        model: nn.Module,
        format: Format,
        ties: Mapping[str, str] | None = None,
        *,
        float_layers: Collection[str] = (),
        untie: bool = False,
    ) -> None:
        """Look at a frozen model.

        ``ties`` are the names that a library ties again on load; None: the model is filled in place, where names share
        their tensors already. ``float_layers`` names quantized layers that are written as float32 weights, without
        activation scales. With ``untie``, a tensor is written for each module that holds it, for a loader that ties
        none again.

        Raises:
            ExportError: when a tensor has no data (meta device) or a class that safetensors cannot hold.
        """
        self._format = format
        self._float_layers = frozenset(float_layers)
        self._sources: dict[str, Callable[[], Tensor]] = {}
        self._held: tuple[nn.Module | None, dict[str, Tensor]] = (None, {})
        self.tied: dict[str, str] = {}
        """Names that share another tensor and are not written, with the name that is."""
        self.entries: tuple[TensorEntry, ...] = tuple(self._walk(model, ties, untie))
        """Dtype and shape of every tensor that is written, in the model's order."""

    def fetch(self, name: str) -> Tensor:
        """The tensor of a name, as it is to be written."""
        return self._sources[name]()

    def _walk(self, model: nn.Module, declared: Mapping[str, str] | None, untie: bool) -> Iterator[TensorEntry]:
        kept = _kept_names(model, declared or {})
        first: dict[int, str] = {}
        last: nn.Module | None = None
        for prefix, module in model.named_modules(remove_duplicate=False):
            frozen = self._format.is_frozen(module)
            for key, tensor in own_tensors(module):
                name = f"{prefix}.{key}" if prefix else key
                source = f"{first.setdefault(id(module), prefix)}.{key}" if untie and prefix else kept[id(tensor)]
                if name != source and (declared is None or name in declared):
                    self.tied[name] = source
                elif frozen and key.startswith("weight"):
                    if module is not last:  # all tensors of its weight are written with the first
                        yield from self._layer(prefix, module, name.removesuffix(key))
                    last = module
                elif not (prefix in self._float_layers and key in ("input_scale", "output_scale")):
                    yield self._plain(name, tensor)

    def _plain(self, name: str, tensor: Tensor) -> TensorEntry:
        if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
            raise ExportError(
                f"tensor {name!r} is a {type(tensor.data).__name__}, which safetensors cannot hold: make it a plain one"
            )
        _check_data(name, tensor)
        self._sources[name] = tensor.detach
        return TensorEntry(name, tensor.dtype, tuple(tensor.shape))

    def _layer(self, prefix: str, module: nn.Module, base: str) -> Iterator[TensorEntry]:
        shape = self._format.shape(module)
        if prefix in self._float_layers:
            self._sources[f"{base}weight"] = lambda: self._format.values(module).float()
            yield TensorEntry(f"{base}weight", torch.float32, shape)
            return
        types = self._format.declared(module)
        for key, slot in self._format.slots(types, shape, bias=False).items():
            if key.startswith("weight"):
                self._sources[base + key] = lambda key=key: self._packed(module)[key]  # type: ignore[misc]
                yield TensorEntry(base + key, slot.dtype, slot.shape, slot.is_code)

    def _packed(self, module: nn.Module) -> dict[str, Tensor]:
        if self._held[0] is not module:
            tensors = self._format.pack(self._format.read(module))
            for key, tensor in tensors.items():
                _check_data(key, tensor)
            self._held = (module, tensors)
        return self._held[1]


def _check_data(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ExportError(f"tensor {name!r} is on the meta device and has no data: load or initialise the model first")


def _kept_names(model: nn.Module, declared: Mapping[str, str]) -> dict[int, str]:
    """For each tensor the one name it is written under: where there are several, one that no loader restores."""
    names: dict[int, str] = {}
    for name, tensor in stored_tensors(model):
        if names.setdefault(id(tensor), name) in declared and name not in declared:
            names[id(tensor)] = name
    return names
