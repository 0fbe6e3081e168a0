"""The host transformers: ``from_pretrained`` with the plug-in `qat.integrations.transformers`.

The plug-in reads each module's type from the directory, so mixed types, activations, and outputs left float are
expressible.

What the loader adds is its own rule for dtypes: modules in ``_keep_in_fp32_modules`` stay float32 when float16 is asked
for, those in ``_keep_in_fp32_modules_strict`` also with bfloat16 (``PreTrainedModel._get_dtype_plan``, transformers 5).
Models are built on the meta device, so that buffers which no file holds are computed afterwards, by ``_init_weights``.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import ExportError, listed
from qat.files.evidence import FrozenRecord
from qat.files.manifest import Manifest
from qat.formats import Format
from qat.hosts.base import FloatGrid, Host, Reloaded, matches_path_part
from qat.spec import QuantSpec

__all__ = ["TRANSFORMERS"]


@dataclass(frozen=True)
class _Transformers(Host):
    def can_build(self, cls: type) -> bool:
        return hasattr(cls, "_from_config")

    def build(self, cls: Any, config: Any, dtype: torch.dtype, *, empty: bool) -> nn.Module:
        from accelerate import init_empty_weights

        config = copy.deepcopy(config)
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False) if empty else nullcontext():
            return cls._from_config(config, dtype=dtype)  # type: ignore[no-any-return]

    def build_from(self, cls: Any, directory: Path, manifest: Manifest, *, empty: bool) -> nn.Module:
        """By the class's own configuration class, which runs no code of the directory."""
        from transformers import GenerationConfig

        attention = self.attention_arguments(manifest)
        config = cls.config_class.from_pretrained(directory, trust_remote_code=False, **attention)
        model: Any = self.build(cls, config, getattr(torch, manifest.dtype), empty=empty)
        if "generation_config.json" in manifest.files:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        return model  # type: ignore[no-any-return]

    def config_fields(self, model: Any, dtype: torch.dtype) -> dict[str, Any] | None:
        """What ``save_pretrained`` writes, with the serving dtype."""
        if not self.can_build(type(model)) or getattr(model, "config", None) is None:
            return None
        config: Any = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        _set_config_dtype(config, dtype)
        config.architectures = [type(model).__name__]
        if getattr(config, "tie_word_embeddings", False):
            weights = dict(model.named_parameters(remove_duplicate=False))
            pairs = [(weights.get(one), weights.get(other)) for one, other in (self.ties(model) or {}).items()]
            # A frozen layer has a bias of its own, which stands in the files under both names.
            config.tie_word_embeddings = all(a is b for a, b in pairs if a is None or a.ndim >= 2)
        return json.loads(config.to_json_string(use_diff=True))  # type: ignore[no-any-return]

    def set_dtype(self, model: Any, dtype: torch.dtype) -> None:
        config = getattr(model, "config", None)
        if hasattr(config, "sub_configs"):
            _set_config_dtype(config, dtype)

    @contextmanager
    def without_cache(self, model: Any) -> Iterator[None]:
        kept = getattr(model.config, "use_cache", None)
        if kept:
            model.config.use_cache = False
        try:
            yield
        finally:
            if kept:
                model.config.use_cache = kept

    def ties(self, model: Any) -> Mapping[str, str] | None:
        ties = getattr(model, "all_tied_weights_keys", None)
        return ties if isinstance(ties, Mapping) else None

    def untie(self, model: Any) -> None:
        if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            config = copy.copy(model.config)
            config.tie_word_embeddings = False
            model.config = config
            if self.ties(model) is not None:
                model.all_tied_weights_keys = {}

    def can_untie(self, model: Any) -> bool:
        """Those of T5 and others say "tied" whatever they are given."""
        config: Any = getattr(model, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            return True
        other = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
        return not other.tie_word_embeddings

    def attention(self, model: Any) -> str | None:
        return getattr(getattr(model, "config", None), "_attn_implementation", None)

    def experts(self, model: Any) -> str | None:
        """Of classes that have several."""
        several = getattr(model, "_can_set_experts_implementation", None)
        return model.config._experts_implementation if several is not None and several() else None

    def attention_arguments(self, manifest: Manifest) -> dict[str, str]:
        """Where every machine has it."""
        kept, experts = manifest.attn_implementation, manifest.experts_implementation
        found = {"attn_implementation": kept} if kept in ("eager", "sdpa") else {}
        return found | ({"experts_implementation": experts} if experts in ("eager", "batched_mm") else {})

    def is_language_model(self, cls: Any) -> bool:
        from transformers import AutoModelForCausalLM

        mapping: Any = AutoModelForCausalLM._model_mapping
        config = getattr(cls, "config_class", None)
        return config in mapping and mapping[config] is cls

    def task(self, cls: type) -> str | None:
        from transformers.modelcard import TASK_MAPPING

        mappings: Mapping[str, Any] = TASK_MAPPING
        tasks = (name for name, classes in mappings.items() if cls.__name__ in classes.values())
        return next(tasks, None)

    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """None: the plug-in can leave outputs float, too."""
        return []

    def model_faults(self, model: nn.Module) -> list[str]:
        if self.owns(model) and self.can_build(type(model)):
            return self.added_faults(model)
        inside = [name for name, module in model.named_modules() if self.owns(module) and self.can_build(type(module))]
        remedy = f"pass the model inside it, {inside[0]!r}" if inside else "use target 'quanto'"
        return [f"model: this target loads models of transformers alone, got a {type(model).__name__}: {remedy}"]

    def kept_in_float32(self, model: nn.Module, name: str, dtype: torch.dtype) -> bool:
        kept: set[str] = set()
        if dtype is torch.float16:
            kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        if dtype in (torch.float16, torch.bfloat16):
            kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        return matches_path_part(name, kept)

    def own_dtypes(self, model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Those that the class names itself, which the loader leaves (``A_log`` of a linear attention)."""
        config = getattr(model, "config", None)
        if config is None or not self.can_build(type(model)):
            return {}
        try:
            fresh = self.build(type(model), config, dtype, empty=True)
        except TypeError:  # a class that its config alone does not build has no such loader
            return {}
        state = fresh.state_dict().items()
        return {name: tensor.dtype for name, tensor in state if tensor.is_floating_point() and tensor.dtype != dtype}

    def constructed(self, build: Callable[[torch.dtype], dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Computed in float32 and cast, since it builds on the meta device and computes them afterwards."""
        served = build(dtype)
        if dtype is torch.float32:
            return served
        return {name: tensor.to(served[name].dtype) for name, tensor in build(torch.float32).items()}

    def stock_faults(self, model: nn.Module, packed: bool) -> list[str]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        what = f"model: transformers loads no quantized {type(model).__name__}"
        parts = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
        faults = [
            f"{what}, since it splits {part.source_patterns[0]!r} of checkpoints: use another target"
            for part in parts
            if isinstance(part, WeightConverter) and len(part.target_patterns) > 1
        ]
        if packed and (fault := self._packed_fault(model)) is not None:
            faults.append(f"{what} with packed weights of several types ({fault}): use one type, or float8")
        return faults

    def load_settings(self, model: nn.Module, record: FrozenRecord, format: Format) -> dict[str, Any]:
        """``dequantize`` where its modules cannot hold what is packed; it makes equal floats while it loads."""
        hidden, held = format.hides_weights(record)
        return {"dequantize": True} if hidden and (not held or self._packed_fault(model) is not None) else {}

    def _packed_fault(self, model: Any) -> str | None:
        """Why a model cannot be built whose linear layers hold codes in place of ``weight``: its class reads that."""
        fresh: Any = self.build(type(model), model.config, torch.float32, empty=True)
        for module in fresh.modules():
            vars(module).pop("_is_hf_initialized", None)
            if isinstance(module, nn.Linear):
                module._parameters.pop("weight")
                module._is_hf_initialized = True  # type: ignore[assignment]
        try:
            fresh.initialize_weights()  # on the meta device
        except AttributeError as error:
            return f"its class initializes weights by name: {error}"
        return None

    def float_layers(self, model: nn.Module, record: FrozenRecord) -> list[str]:
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return [name for name in linear if name not in record.layers]

    def float_grid(self, model: nn.Module, record: FrozenRecord, format: Format) -> FloatGrid:
        """The type, and the modules to skip where the default does not skip exactly the float ones."""
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        arguments = self.grid_arguments(model, record, format)
        fresh = self.build(type(model), model.config, torch.float32, empty=True)
        others = [name for name in record.layers if not isinstance(fresh.get_submodule(name), nn.Linear)]
        if others:
            raise ExportError(
                f"float_grid=True: a stock load replaces nn.Linear alone, not {listed(others, 5)}: export packed "
                "weights (float_grid=False)"
            )
        quantized, floats = set(record.layers), self.float_layers(model, record)
        kept = getattr(model, "_keep_in_fp32_modules", None)
        replaced: set[str] = set()
        for named in (None, floats):
            # transformers changes the list that it is given.
            skip = HfQuantizer.get_modules_to_not_convert(model, copy.copy(named), kept)  # type: ignore[arg-type]
            replaced = {name for name in (*quantized, *floats) if should_convert_module(name, skip)}
            if replaced == quantized:
                return FloatGrid(arguments | ({} if named is None else {"modules_to_not_convert": named}))
        wrong = sorted(replaced ^ quantized)
        raise ExportError(
            "float_grid=True: no modules_to_not_convert makes a stock load replace exactly the quantized layers; it "
            f"would differ in {listed(wrong, 5)}; export packed weights (float_grid=False)"
        )

    def load(self, cls: Any, directory: Path, manifest: Manifest, format: Format) -> Reloaded:
        """``from_pretrained``, with the format's plug-in, which leaves float grids to the stock classes."""
        plugin = format.libraries[self.name].plugin
        if plugin is not None:
            importlib.import_module(plugin)
        arguments = {"dtype": getattr(torch, manifest.dtype), **self.attention_arguments(manifest)}
        arguments |= self.stock_config(manifest, format)
        loaded = cls.from_pretrained(directory, trust_remote_code=False, **arguments)
        return Reloaded(loaded, f"{type(loaded).__name__}.from_pretrained")

    def card(self, manifest: Manifest, module: str, cls: str, format: Format) -> list[str]:
        code = self.pretrained_code(manifest, module, cls, format)
        return [code, f"No package but transformers and {format.library} is needed."] if manifest.float_grid else [code]


def _set_config_dtype(config: Any, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            getattr(config, key).dtype = dtype


TRANSFORMERS = _Transformers("transformers")
