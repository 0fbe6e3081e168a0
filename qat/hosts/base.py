"""What a host is: the library that builds a model and loads it. A host knows nothing about numbers.

A host is asked in two roles. As the *library of a class* it builds a model from its configuration and writes that
configuration. As the *loader of a target* it says what it can express, in which dtype it holds each tensor, and how it
is called. A plain module (`Host` itself, as `qat.hosts.MODULE`) has no configuration, and every name of its own.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.adapters import adapters
from qat.errors import ExportError, LoadError, UnjudgedError, listed
from qat.files.evidence import FrozenRecord
from qat.files.manifest import Manifest
from qat.files.weights import SAFETENSORS, Container, write_json
from qat.formats import Format
from qat.layers import float_layers, quantized_layers
from qat.numerics import QType
from qat.spec import QuantSpec

__all__ = ["FloatGrid", "Host", "Reloaded", "matches_path_part", "python_block", "shown_call"]


class Reloaded(NamedTuple):
    """A model from a directory, and how it was loaded."""

    model: nn.Module
    how: str


class FloatGrid(NamedTuple):
    """How a stock load finds the codes of on-grid float32 weights again."""

    arguments: dict[str, Any]
    """Arguments of the class that configures the load."""
    dtype: str = ""
    """What the call must say of the dtype, as it stands there."""
    one_file: bool = False
    """Whether all weights belong into one file, for programs that read no other."""


@dataclass(frozen=True)
class Host:
    """A library of models; this base is that of plain modules. Subclasses override what differs."""

    name: str
    weights_stem: str = "model"
    """How the names of weight files begin."""
    container: Container = SAFETENSORS
    """How tensors lie in the weight files that the loader reads."""
    families: str = "names float layers by the last part of their name"
    """Why there are layers that the loader cannot tell apart, if there are."""
    quantizes_inputs_of_experts: bool = True
    """Whether the loader can quantize what experts read."""
    keeps_packed: bool = True
    """Whether the loader's layers hold codes. If not, it makes a float model of them, and `qat.load` fills its own."""

    def owns(self, model: Any) -> bool:
        """Whether a model, or a class, is one of this library; told without importing it."""
        cls = model if isinstance(model, type) else type(model)
        return any(base.__module__.partition(".")[0] == self.name for base in cls.__mro__)

    def can_build(self, cls: type) -> bool:
        """Whether a configuration alone builds models of this class."""
        return False

    def build(self, cls: Any, config: Any, dtype: torch.dtype, *, empty: bool) -> nn.Module:
        """Build a model as its library's loader does when it serves ``dtype``; ``config`` is not changed.

        With ``empty``, parameters are on the meta device; buffers are real.
        """
        raise LoadError(f"model: no configuration builds a {cls.__name__}: pass the float model as model=")

    def build_from(self, cls: Any, directory: Path, manifest: Manifest, *, empty: bool) -> nn.Module:
        """Build the model of an exported directory from its configuration."""
        raise UnjudgedError(
            f"{str(directory)!r} cannot be judged without its model: no configuration builds a {cls.__name__}: pass "
            "the float model as model="
        )

    def config_fields(self, model: Any, dtype: torch.dtype) -> dict[str, Any] | None:
        """The fields of ``config.json``; None for models that no configuration builds."""
        return None

    def write_config(
        self, model: Any, directory: Path, dtype: torch.dtype, quantization_config: Mapping[str, Any] | None
    ) -> bool:
        """Write ``config.json`` and, for models that generate, ``generation_config.json``; say whether there is one."""
        fields = self.config_fields(model, dtype)
        if fields is None:
            return False
        if quantization_config is not None:
            fields["quantization_config"] = dict(quantization_config)
        write_json(directory / "config.json", fields)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None and model.can_generate():
            try:
                generation.save_pretrained(directory)
            except ValueError as error:
                raise ExportError(
                    f"the model's generation_config does not validate ({error}); mend model.generation_config first"
                ) from error
        return True

    def set_dtype(self, model: Any, dtype: torch.dtype) -> None:
        """Tell the model's configuration which dtype its weights have now."""

    def without_cache(self, model: Any) -> AbstractContextManager[None]:
        """Within the block, a model keeps nothing of a call for the next one, unless the call asks for it."""
        return nullcontext()

    def ties(self, model: Any) -> Mapping[str, str] | None:
        """Names of tensors that the library ties again on load, with the name each is tied to; None: it ties none."""
        return None

    def untie(self, model: Any) -> None:
        """Tell a model, and no other that shares its configuration, that its embeddings are not tied any more."""

    def can_untie(self, model: Any) -> bool:
        """Whether a configuration can say that a model's embeddings are not tied, so that a load leaves them so."""
        return True

    def attention(self, model: Any) -> str | None:
        """The attention implementation that a model runs with, where it has one: it decides how outputs round."""
        return None

    def experts(self, model: Any) -> str | None:
        """The implementation of experts that a model runs with, where it has several: it decides how outputs round."""
        return None

    def computes_in_float32(self, model: nn.Module, name: str, dtype: torch.dtype) -> bool:
        """Whether a model's forward computes with its tensor or module ``name`` in float32, whatever is served."""
        return False

    def sensitive_part(self, model: nn.Module, name: str) -> str | None:
        """In which part of a model that quantized activations harm a linear layer stands, or None."""
        return None

    def is_language_model(self, cls: type) -> bool:
        """Whether a class is the library's causal language model for its configuration."""
        return False

    def added_faults(self, model: nn.Module) -> list[str]:
        """The fault of a model with parameters that a fresh one of its class and configuration lacks.

        Adapters of peft are none, since freezing merges them.
        The fresh model is built on the meta device; where none can be built, there is no fault.
        """
        config: Any = getattr(model, "config", None)
        if config is None or not self.can_build(type(model)):
            return []
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                fresh = self.build(type(model), config, torch.float32, empty=False)
        except Exception:  # whatever a class does on the meta device, or asks for beyond its configuration
            return []
        known = {name for name, _ in fresh.named_parameters(remove_duplicate=False)}
        known |= {f"{name}.weight" for name, _, cls in float_layers(fresh) if not cls.called}  # once they are frozen
        learned = {id(p) for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()}
        learned |= {id(p) for _, module in adapters(model) for p in module.parameters()}
        added = [name for name, p in model.named_parameters() if name not in known and id(p) not in learned]
        if not added:
            return []
        return [
            f"model: target {self.name!r} builds a {type(model).__name__} without the parameters {listed(added, 3)}, "
            "so no load could fill them: merge adapters first (in peft: merge_and_unload), or use target 'quanto'"
        ]

    def export_notes(self, model: nn.Module) -> list[str]:
        """What a reader of an export of such a model, of this library, should know."""
        cls = type(model)
        if not self.can_build(cls) or cls.__module__.partition(".")[0] == self.name:
            return []
        return [
            f"the class {cls.__name__} is defined in {cls.__module__}, not in {self.name}, and its code is not copied: "
            "a load needs that code imported, or beside the weights"
        ]

    def source(self, model: Any) -> str | None:
        """Where a model was loaded from, as it says itself: a directory or a name on the hub."""
        found = getattr(getattr(model, "config", None), "_name_or_path", None)
        return found if isinstance(found, str) and found else None

    def task(self, cls: type) -> str | None:
        """What models of a class are for, as the hub calls it."""
        return None

    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """What the spec asks for that the loader cannot express, each with its remedy."""
        if spec.outputs:
            return []
        return [
            "quantize_outputs=False: this target's loader is stock, and stock requantize quantizes every output: leave "
            "it out; models of transformers can have float outputs with target='transformers', all other modules cannot"
        ]

    def model_faults(self, model: nn.Module) -> list[str]:
        """Why the loader cannot load such a model at all, each with its remedy."""
        return []

    def kept_in_float32(self, model: nn.Module, name: str, dtype: torch.dtype) -> bool:
        """Whether the loader holds the tensor or module called ``name`` in float32 when serving ``dtype``."""
        return False

    def own_dtypes(self, model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtypes of the stored floating tensors that a model built to serve ``dtype`` holds in another one."""
        return {}

    def layer_fault(self, model: nn.Module, name: str, weights: QType, dtype: torch.dtype) -> str | None:
        """Why the loader cannot hold the linear layer called ``name`` with such weights, or None."""
        return "kept in float32 by the loader" if self.kept_in_float32(model, name, dtype) else None

    def layer_key(self, model: nn.Module, name: str) -> str:
        """What the linear layer called ``name`` shares with those that the loader cannot tell from it.

        They are all float or all of one type. It is a pattern that matches their names; without a dot, the end of one.
        """
        return name

    def unstored(self, module: nn.Module) -> dict[str, Tensor | None]:
        """The tensors of one module, of this library's models, that no file holds."""
        return {key: module._buffers[key] for key in module._non_persistent_buffers_set}

    def constructed(self, build: Callable[[torch.dtype], dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """What the loader that serves ``dtype`` makes of them; ``build`` gives those of a model built in a dtype."""
        return build(dtype)

    def writes_map(self) -> bool:
        """Whether the format's own file of types stands beside the weights."""
        return True

    def float_layers(self, model: nn.Module, record: FrozenRecord) -> list[str] | None:
        """The linear layers that ``config.json`` calls float, as the loader names them; None: it says nothing of them.

        Raises:
            ExportError: when it cannot tell them from the others.
        """
        return None

    def as_stored(self, model: nn.Module, record: FrozenRecord) -> FrozenRecord:
        """The record by the names, or patterns of names, that ``config.json`` has for the layers."""
        return record

    def stock_faults(self, model: nn.Module, packed: bool) -> list[str]:
        """Why the library's own loader of quantized models cannot load one; ``packed``: it must hold packed codes."""
        return []

    def load_settings(self, model: nn.Module, record: FrozenRecord, format: Format) -> dict[str, Any]:
        """What ``config.json`` says beside the format's fields of how the library loads the weights."""
        return {}

    def grid_arguments(self, model: nn.Module, record: FrozenRecord, format: Format) -> dict[str, Any]:
        """Check that a stock float32 load gives every code back; return the argument that names the one weight type.

        It quantizes float weights with scales that it derives afresh: absmax a row for 8-bit types, min-max a group for
        the others. Codes come back only where each row or group uses its whole range, so it is simulated here.

        Raises:
            ExportError: the spec is more than a stock load can express, or codes would change; it names the layers.
        """
        if record.spec.dtype != "float32":
            raise ExportError(
                "float_grid=True needs dtype='float32' in the spec, for a stock load re-derives scales in the dtype it "
                f"loads in and {record.spec.dtype} moves codes; freeze with dtype='float32' or export packed weights"
            )
        kinds = sorted({layer.weights for layer in record.layers.values()})
        if len(kinds) != 1:
            raise ExportError(f"float_grid=True: a stock load has one weight type for all layers, not {kinds}")
        active = [name for name, layer in record.layers.items() if layer.activations is not None]
        if active:
            raise ExportError(
                f"float_grid=True: stock loads quantize no activations, but {listed(active, 5)} do: pack the weights"
            )
        changed = []
        for name in record.layers:
            layer = format.read(model.get_submodule(name))
            count = int((layer.weight.codes.float() != format.stock_codes(layer).float()).sum())
            if count:
                changed.append(f"{name} ({count} codes)")
        if changed:
            raise ExportError(
                f"float_grid=True: a stock load would change codes in {len(changed)} of {len(record.layers)} layers: "
                f"{listed(changed, 5)}, which do not use the whole range of each scale: export packed weights"
            )
        return {format.libraries[self.name].weights_argument: kinds[0]}

    def float_grid(self, model: nn.Module, record: FrozenRecord, format: Format) -> FloatGrid:
        """How a stock load finds the codes again; `ExportError` if none does."""
        raise ExportError("float_grid=True: no stock load of this target quantizes: use 'transformers' or 'diffusers'")

    def load(self, cls: Any, directory: Path, manifest: Manifest, format: Format) -> Reloaded | None:
        """Load a directory as users of the library do; None for plain modules, which have no such call."""
        return None

    def attention_arguments(self, manifest: Manifest) -> dict[str, str]:
        """How a load gets the implementations of attention and experts that the model was trained with."""
        return {}

    def stock_config(self, manifest: Manifest, format: Format) -> dict[str, Any]:
        """The argument by which a stock load quantizes a float grid; packed weights need none."""
        if manifest.stock_arguments is None:
            return {}
        config = getattr(importlib.import_module(self.name), format.libraries[self.name].config_class)
        return {"quantization_config": config(**manifest.stock_arguments)}

    def pretrained_code(self, manifest: Manifest, module: str, cls: str, format: Format) -> str:
        """The lines that load by ``from_pretrained``, as Markdown."""
        code = ["import torch", f"from {module} import {cls}"]
        arguments, rules = f"directory, dtype=torch.{manifest.dtype}", format.libraries[self.name]
        if manifest.float_grid:
            code += [
                f"from {self.name} import {rules.config_class}",
                "",
                f"quantization = {shown_call(rules.config_class, manifest.stock_arguments or {})}",
            ]
            arguments += ", quantization_config=quantization"
        else:
            if rules.plugin is not None and rules.stock_below is None:
                code.append(f"import {rules.plugin}  # stock {self.name} cannot read packed weights")
            code.append("")
        return python_block([*code, f"model = {cls}.from_pretrained({arguments})"])

    def card(self, manifest: Manifest, module: str, cls: str, format: Format) -> list[str]:
        """Paragraphs and code of a model card that load the model; its class ``cls`` is imported from ``module``."""
        load = "model = qat.load(directory)"
        if any("no config.json" in note for note in manifest.notes):
            load = "model = qat.load(directory, model=float_model)  # the float model, to be filled"
        return [python_block(["import qat", "", load]), *format.card_loading()]


def matches_path_part(name: str, keys: set[str]) -> bool:
    """Whether one of ``keys`` is a whole part, or a run of parts, of the dotted ``name``.

    >>> matches_path_part("decoder.wo.weight", {"wo"}), matches_path_part("decoder.wolf", {"wo"})
    (True, False)
    """
    return any(f".{key}." in f".{name}." for key in keys)


def shown_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as it stands in code.

    >>> shown_call("QuantoConfig", {"weights": "int8"})
    "QuantoConfig(weights='int8')"
    """
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def python_block(lines: list[str]) -> str:
    """Lines of Python as Markdown."""
    return "\n".join(["```python", *lines, "```"])
