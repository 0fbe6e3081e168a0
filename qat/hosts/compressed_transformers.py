"""transformers as the loader of compressed-tensors, where each expert lies in a file under a name of its own.

transformers keeps experts in parameters of three dimensions, ``experts.gate_up_proj``. Published checkpoints have
``experts.3.gate_proj.weight`` and ``experts.3.up_proj.weight`` instead, and so has vLLM. transformers' table of
conversions (conversion_mapping.py) says which of them it merges into which parameter. With a quantized checkpoint it
dequantizes each expert first (``HfQuantizer.update_weight_conversions``). `Names` reads that table backwards. A name
counts only if the table, read forwards, leads back to the parameter.

All experts of a model have one scheme there (``get_experts_scheme``), without zero points and activations.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qat.files.evidence import FrozenRecord, frozen_record
from qat.files.manifest import Manifest, TensorRecord
from qat.files.shards import ALIGNMENT, DTYPE_NAMES, Header, TensorEntry
from qat.files.weights import SAFETENSORS, Container, Written
from qat.formats import Format
from qat.formats.compressed_modules import FrozenExpert, joined_rows, split_rows, split_shape
from qat.hosts.transformers import _Transformers
from qat.layers import float_layers
from qat.numerics import QType
from qat.tensors import digest

__all__ = ["COMPRESSED_TRANSFORMERS"]

_MERGES = {1: [("MergeModulelist", 0)], 2: [("MergeModulelist", 0), ("Concatenate", 1)]}
"""What a conversion does to one weight, or to two, of each expert, so that its rows are runs of the parameter's."""


class Names:
    """What published checkpoints call the tensors of a model."""

    _known: ClassVar[WeakKeyDictionary[nn.Module, Names]] = WeakKeyDictionary()

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        forwards, own = get_model_conversion_mapping(model), get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [part for part in forwards if isinstance(part, WeightRenaming)]
        self._converters = [part for part in forwards if isinstance(part, WeightConverter)]
        renamed = [part for part in own if isinstance(part, WeightRenaming) and not isinstance(part, PrefixChange)]
        self._back = [part.reverse_transform() for part in reversed(renamed)]
        self._merges = [(part, part.reverse_transform()) for part in self._converters if _merges(part)]

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Those of a model, gathered once."""
        if model not in cls._known:
            cls._known[model] = cls(model)
        return cls._known[model]

    def stored(self, name: str) -> str:
        """The name of a tensor that is stored whole; its own, where no other one leads back to it."""
        found = self._renamed(name, self._back)
        return found if self._loaded(found) == (name, None) else name

    def experts(self, parameter: str, index: int) -> tuple[str, ...]:
        """The names of the weights whose rows are an expert's part of a parameter; none where no load merges them."""
        for converter, back in self._merges:
            first, pattern = back.rename_source_key(parameter)
            if pattern is None:
                continue
            names = (first.replace(back.target_patterns[0], other) for other in back.target_patterns)
            found = tuple(self._renamed(name.replace("*", str(index)), self._back) for name in names)
            if [self._loaded(name) for name in found] == [(parameter, source) for source in converter.source_patterns]:
                return found
        return ()

    def _loaded(self, stored: str) -> tuple[str, str | None]:
        """The name that a load gives, and the pattern of the conversion on the way."""
        from transformers.core_model_loading import apply_converters

        return apply_converters(self._renamed(stored, self._renamings), self._converters)

    @staticmethod
    def _renamed(name: str, renamings: Any) -> str:
        from transformers.core_model_loading import apply_renamings

        return apply_renamings(name, renamings)


def _merges(part: Any) -> bool:
    done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in part.operations]
    whole = all(source.endswith(".weight") for source in part.source_patterns)
    return whole and len(part.target_patterns) == 1 and done == _MERGES.get(len(part.source_patterns))


def _expert(model: nn.Module, layer: str) -> tuple[str, int] | None:
    """The parameter that a layer is an expert's part of, and the expert's number; None for any other layer."""
    *above, index, key = ["", "", *layer.split(".")]
    owner, parameter = ".".join(above[2:]), ".".join([*above[2:], key])
    if not index.isdigit():
        return None
    held = getattr(_submodule(model, owner), "_parameters", {}).get(key)
    if (held is None or held.ndim != 3) and not isinstance(_submodule(model, layer), FrozenExpert):
        return None
    return parameter, int(index)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _pattern(model: nn.Module, layer: str) -> str:
    """A pattern of the names that all experts beside one, and those of other blocks, have in files and in vLLM."""
    parameter, index = _expert(model, layer) or (layer, 0)
    stored = (*Names.of(model).experts(parameter, index), layer)[0]
    owner = re.escape(stored.rpartition(f".{index}.")[0])
    return "re:" + re.sub(r"\d+", r"\\d+", owner) + r"\.\d+\..*"


class _Published(Container):
    """safetensors, in which models with quantized experts have the names of published checkpoints."""

    def write(
        self,
        model: nn.Module,
        entries: Sequence[TensorEntry],
        fetch: Callable[[str], Tensor],
        directory: Path,
        max_shard_size: int,
        stem: str,
        progress: bool = False,
    ) -> Written:
        rest = (directory, max_shard_size, stem, progress)
        experts = {name for name in frozen_record(model).layers if isinstance(_submodule(model, name), FrozenExpert)}
        if not experts:
            return SAFETENSORS.write(model, entries, fetch, *rest)
        names, stored_as, parts = Names.of(model), dict[str, tuple[str, ...]](), dict[str, tuple[TensorEntry, int]]()
        for entry in entries:
            layer, _, key = entry.name.rpartition(".")
            place = _expert(model, layer) if layer in experts else None
            if place is None:
                found: tuple[str, ...] = (names.stored(entry.name),)
            else:
                found = tuple(name.removesuffix("weight") + key for name in names.experts(*place))
            stored_as[entry.name] = found
            parts |= {name: (entry, number) for number, name in enumerate(found)}
        digests: dict[str, str] = {}

        @functools.lru_cache(1)
        def whole(name: str) -> Tensor:
            tensor = fetch(name)
            if len(stored_as[name]) > 1 and name not in digests:
                digests[name] = digest(tensor)
            return tensor

        def fetch_part(name: str) -> Tensor:
            entry, number = parts[name]
            count = len(stored_as[entry.name])
            return whole(entry.name) if count == 1 else split_rows(entry.name, whole(entry.name), count)[number]

        def planned(name: str) -> TensorEntry:
            entry, _ = parts[name]
            count = len(stored_as[entry.name])
            shape = entry.shape if count == 1 else split_shape(entry.name, entry.shape, count)
            return TensorEntry(name, entry.dtype, shape, entry.is_code)

        files, tensors = SAFETENSORS.write(model, [planned(name) for name in parts], fetch_part, *rest)
        return files, {
            entry.name: TensorRecord(
                file=tensors[stored_as[entry.name][0]].file,
                dtype=DTYPE_NAMES[entry.dtype],
                shape=entry.shape,
                sha256=digests.get(entry.name, tensors[stored_as[entry.name][0]].sha256),
                stored_as=() if stored_as[entry.name] == (entry.name,) else stored_as[entry.name],
            )
            for entry in entries
        }

    def headers(self, directory: Path, manifest: Manifest) -> dict[str, Header]:
        """By the model's names where all parts of a tensor have their shape, and by those in the files otherwise."""
        found = SAFETENSORS.headers(directory, manifest)
        for name, kept in manifest.tensors.items():
            parts = [found[part] for part in kept.stored_as if part in found]
            if not parts or len(parts) < len(kept.stored_as):
                continue
            file, first, _ = parts[0]
            dtype, shape = first.dtype, first.shape
            if len(parts) > 1:
                form = dtype, split_shape(name, kept.shape, len(parts))
                if any((part.entry.dtype, part.entry.shape) != form for part in parts):
                    continue
                shape = kept.shape
            for part in kept.stored_as:
                del found[part]
            start = max((part.start for part in parts), key=lambda start: start % ALIGNMENT)
            found[name] = Header(file, TensorEntry(name, dtype, shape), start)
        return found

    def reader(self, directory: Path, manifest: Manifest) -> Callable[[str], Tensor]:
        from safetensors import safe_open

        names = [n for n in manifest.files if n.startswith(manifest.weights_stem) and n.endswith(".safetensors")]
        opened: list[Any] = [safe_open(directory / name, framework="pt") for name in names]
        holders = {key: file for file in opened for key in file.keys()}  # noqa: SIM118

        def read(name: str) -> Tensor:
            parts = manifest.tensors[name].stored_as or (name,)
            return joined_rows(name, [holders[part].get_tensor(part) for part in parts])

        return read


@dataclass(frozen=True)
class _CompressedTransformers(_Transformers):
    families: str = "reads all experts of a model by one scheme"
    quantizes_inputs_of_experts: bool = False

    def stock_faults(self, model: nn.Module, packed: bool) -> list[str]:
        """Also of the classes of experts that a quantized load replaces by modules with other parameters."""
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REPLACED

        replaced: Any = REPLACED
        held = {kind for kind, new in replaced.items() if "compressed-tensors" in new["quantization_methods"]}
        faults = [
            f"model: transformers replaces a {kind} in a quantized load, which then holds none of its weights: use "
            "target 'transformers'"
            for kind in sorted({type(module).__name__ for module in model.modules()} & held)
        ]
        return faults or super().stock_faults(model, packed)

    def layer_fault(self, model: nn.Module, name: str, weights: QType, dtype: torch.dtype) -> str | None:
        place = _expert(model, name)
        if place is not None and not Names.of(model).experts(*place):
            what = f"transformers merges no packed experts of a {type(model).__name__}"
            return f"{what} (conversion_mapping.py): use target 'transformers'"
        if place is not None and weights.whole_shift:
            return "transformers drops the zero points of experts: use a type without _zp, or target 'transformers'"
        return super().layer_fault(model, name, weights, dtype)

    def layer_key(self, model: nn.Module, name: str) -> str:
        """One for all experts that a load merges."""
        place = _expert(model, name)
        return "*.experts.[0-9]*" if place is not None and Names.of(model).experts(*place) else name

    def load_settings(self, model: nn.Module, record: FrozenRecord, format: Format) -> dict[str, Any]:
        """Experts hide no ``weight`` of a module: they are dequantized in any case."""
        called = {name: layer for name, layer in record.layers.items() if _expert(model, name) is None}
        return super().load_settings(model, replace(record, layers=called), format)

    def as_stored(self, model: nn.Module, record: FrozenRecord) -> FrozenRecord:
        """One pattern for all experts, which have one type."""
        named = (
            (name if _expert(model, name) is None else _pattern(model, name), layer)
            for name, layer in record.layers.items()
        )
        return replace(record, layers=dict(named))

    def float_layers(self, model: nn.Module, record: FrozenRecord) -> list[str]:
        """Float experts too, which vLLM would take for quantized ones."""
        floats = (name for name, _, cls in float_layers(model) if not cls.called and name not in record.layers)
        return super().float_layers(model, record) + sorted({_pattern(model, name) for name in floats})


COMPRESSED_TRANSFORMERS = _CompressedTransformers("transformers", container=_Published())
