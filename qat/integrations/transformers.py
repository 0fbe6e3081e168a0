"""Teach transformers to load packed weights: ``import qat.integrations.transformers``, then ``from_pretrained``.

Stock transformers quantizes float weights on the way in and cannot read packed ones: it would leave them random.
Importing this module replaces the quantizer and the configuration that are registered under the name "quanto", so
that a directory written by ``qat.export(..., target="transformers")`` gives frozen optimum-quanto layers, bit for
bit as exported. A directory is ours when its ``quantization_config`` has the group ``qat``; everything else,
above all a float model loaded with ``QuantoConfig``, goes to the stock classes untouched.

How it fits into a load, in transformers' order:

1. ``merge_quantization_configs``: the directory's configuration wins; a `QuantoConfig` given by the user must agree.
2. ``update_dtype``: the serving dtype, or an error, because scales cannot be cast.
3. ``_process_model_before_weight_loading``: exactly the declared modules become quanto layers, on the meta device.
4. ``update_weight_conversions``: key names are settled, and the headers of all files are checked (`Format.faults`):
   an error raised later, while tensors are converted, would be swallowed into a report.
5. ``PackedLoad``: the tensors of one weight become one quanto tensor.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.core_model_loading import ConversionOps, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.quantizer_quanto import QuantoHfQuantizer
from transformers.utils.quantization_config import QuantoConfig

from qat.errors import LoadError, load_error
from qat.files.shards import TensorEntry, read_headers
from qat.formats import LayerTypes
from qat.formats.quanto import QUANTO, WEIGHT_KEYS
from qat.integrations.transformers_config import PackedModule, PackedQuantoConfig
from qat.layers import float_layers, layer_class
from qat.tensors import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PackedLoad", "PackedQuantizer", "PackedQuantoConfig"]

if "model" not in inspect.signature(QuantoHfQuantizer.update_weight_conversions).parameters:
    raise ImportError(
        f"transformers: packed weights are read by version 5.23 and newer, got {transformers.__version__}: upgrade it"
    )


class PackedQuantizer(QuantoHfQuantizer):
    """Loads packed weights; made with any other configuration it is the stock quantizer instead."""

    quantization_config: PackedQuantoConfig
    # One list for all types, since a model may mix them.
    serialized_names = {"weight": list(WEIGHT_KEYS)}  # noqa: RUF012 (transformers declares it so)

    def __new__(cls, quantization_config: QuantoConfig, **kwargs: Any) -> Any:
        """Choose between this class and the stock one."""
        if isinstance(quantization_config, PackedQuantoConfig):
            return super().__new__(cls)
        return QuantoHfQuantizer(quantization_config, **kwargs)

    def __init__(self, quantization_config: PackedQuantoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise LoadError(
                "quantization_config is that of a packed directory, but this one is not: pass QuantoConfig(weights=...)"
            )
        self.group = quantization_config.group()
        self.serving_dtype: torch.dtype = getattr(torch, self.group.dtype)
        """The dtype that scales were packed in."""
        self.layers: dict[str, PackedModule] = {}
        self.canonical: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        """Packed layers whose weight is that of another one, and its name."""
        self.headers: dict[str, TensorEntry] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise when the device map would offload packed tensors."""
        device_map = kwargs.get("device_map")
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise LoadError(f"device_map={device_map!r} offloads parts, which packed weights cannot: use one device")

    def update_attn_implementation(self, config: Any) -> Any:
        """Make the serving dtype the one that is used when the user names none.

        This is the one hook that sees the configuration before the dtype is settled. config.json says the same,
        except after ``save_pretrained`` of a model whose first parameter is kept in another dtype.
        """
        config.dtype = self.serving_dtype
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse any dtype but the serving dtype."""
        if dtype != self.serving_dtype:
            raise LoadError(f"dtype={dtype}: scales are packed in {self.serving_dtype} and never cast: leave dtype out")
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Cast nothing that belongs to a packed layer, whatever a model class keeps in float32."""
        if any(self._owner(target) for target in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes of a stored element, from which device maps are computed."""
        owner = self._owner(param_name)
        if owner is None or owner[1] != "weight":
            return param.element_size()
        return QUANTO.qtypes[self.layers[owner[0]].weights].bits / 8

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Nothing is quantized while loading."""
        return False

    def is_serializable(self) -> bool:
        """Say that ``save_pretrained`` writes packed weights again."""
        return True

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """The operation that joins the tensors of one weight."""
        return {"deserialize": PackedLoad}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Replace exactly the declared modules by quanto layers on the meta device."""
        if not checkpoint_files:
            raise LoadError("packed weights are read from a directory of safetensors files, and none was found there")
        headers = read_headers(Path(file) for file in checkpoint_files)
        self.headers = {key: header.entry for key, header in headers.items()}
        modules = dict(model.named_modules(remove_duplicate=False))
        layers = {name: (module, cls) for name, module, cls in float_layers(model)}
        faults = []
        for declared_name, declared in self.group.modules.items():
            place = self._name_in_model(declared_name, modules.keys() | layers.keys(), model)
            module, cls = layers.get(place, (modules.get(place), None))
            if module is None:
                # Another class than the exported one may lack a part, such as the head, as in a float load.
                if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
                    faults.append(f"{declared_name} is declared, but {type(model).__name__} has no such module")
            elif (cls := cls or layer_class(module)) is None:
                faults.append(f"{declared_name} is declared, but a {type(module).__name__} is no layer to quantize")
            elif (fault := cls.adoption_fault(module)) is not None:
                faults.append(f"{declared_name} is declared, but {fault}")
            elif place not in self.canonical:
                self.layers[place] = declared
                # A layer registered under several names stays one object.
                out_features, in_features = cls.effective_weight(module).shape
                bias = getattr(module, "bias", None) is not None
                qmodule = QUANTO.empty(self._types(declared), (out_features, in_features), bias, module)
                aliases = [alias for alias, other in modules.items() if other is module] or [place]
                self.canonical |= dict.fromkeys(aliases, place)
                cls.install(model, aliases, qmodule)
                if not cls.called:  # else transformers would initialise what its owner had before
                    setattr(cls.holder(module), "_is_hf_initialized", True)  # noqa: B010
        for target, source in model.all_tied_weights_keys.items():
            ends = [None if (owner := self._owner(key)) is None else owner[0] for key in (target, source)]
            if not target.endswith("weight"):
                continue  # a bias stands in the files under both names
            if ends[0] != ends[1] and None in ends:
                faults.append(
                    f"{target} is tied to {source}, but one of them is packed; set tie_word_embeddings to false in "
                    "config.json"
                )
            elif ends[0] != ends[1]:
                self.tied[str(ends[0])] = str(ends[1])
        if faults:
            raise load_error("the declared modules do not fit the model", faults)

    def _types(self, declared: PackedModule) -> LayerTypes:
        outputs = self.group.quantize_outputs
        return QUANTO.types(declared.weights, declared.activations, self.serving_dtype, outputs)

    @staticmethod
    def _name_in_model(name: str, modules: Collection[str], model: PreTrainedModel) -> str:
        """Translate a declared name for a base model (``LlamaModel`` for ``LlamaForCausalLM``), or the reverse."""
        prefix = f"{model.base_model_prefix}."
        return next((other for other in (name, name.removeprefix(prefix), prefix + name) if other in modules), name)

    def _owner(self, key: str) -> tuple[str, str] | None:
        """The packed layer that a key belongs to, and the key's name below it."""
        name = key
        while name:
            if name in self.canonical:
                return self.canonical[name], key[len(name) + 1 :]
            name = name.rpartition(".")[0]
        return None

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Settle the names of all keys, and check the files against the declaration.

        Exports use the model's own module names. transformers' renamings are for the names of original checkpoints;
        on own names they are at best idle, so they are applied only when own names do not fit (``key_mapping``).
        """
        if self.headers is None:  # a later call, for an adapter
            return weight_conversions
        renamings: list[WeightRenaming] = []
        found, strays, others = self._placed(renamings, model)
        if not all(found.values()):
            renamings = [conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)]
            found, strays, others = self._placed(renamings, model)
        faults = [f"{key} is packed, but not declared in the group 'qat' of config.json" for key in strays]
        for name, source in self.tied.items():
            here, there = (any(key.startswith("weight") for key in found[end]) for end in (name, source))
            if not (here and there):  # a load ties the one that the files lack to the other, whichever it is
                weight = {key: entry for key, entry in (found[name] | found[source]).items() if key[:6] == "weight"}
                found[name], found[source] = found[name] | weight, found[source] | weight
        for name, declared in self.layers.items():
            module: Any = model.get_submodule(name)
            shape, bias = QUANTO.shape(module), module.bias is not None
            faults += QUANTO.faults(name, self._types(declared), shape, bias, declared.group_size, found[name])
        if type(model).__name__ in (model.config.architectures or ()):  # another class may have a part of its own
            faults += [f"{key} is in no file, and would begin afresh" for key in self._unfilled(model, others)]
        if faults:
            raise load_error("the files do not hold what config.json declares", faults)
        self.headers = None
        return [*renamings, *self.get_weight_conversions()]  # type: ignore[no-untyped-call]

    def _placed(
        self, renamings: list[WeightRenaming], model: PreTrainedModel
    ) -> tuple[dict[str, dict[str, TensorEntry]], list[str], set[str]]:
        """Headers by layer and name below it, as transformers will place them; packed keys of other modules; the rest.

        The rest are names in the model.
        """
        found: dict[str, dict[str, TensorEntry]] = {name: {} for name in self.layers}
        strays, others = [], set()
        # Renamings remember what they saw, so the rehearsal uses copies.
        renamings = copy.deepcopy(renamings)
        converters: list[Any] = self.get_weight_conversions()  # type: ignore[no-untyped-call]
        prefix, state = model.base_model_prefix, model.state_dict()
        for key, header in (self.headers or {}).items():
            target, slot = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, slot = rename_source_key(key, [], [], prefix, state)
            owner = self._owner(target)
            if owner is not None:
                found[owner[0]][slot or owner[1]] = header
            elif slot is not None and key.removesuffix(f".{slot}") not in self.group.modules:
                strays.append(key)
            else:
                others.add(target)
        return found, strays, others

    def _unfilled(self, model: PreTrainedModel, held: Collection[str]) -> list[str]:
        """The tensors of float modules that no file holds, and that are tied to none."""
        tied = {id(tensor) for name, tensor in stored_tensors(model) if name in held}
        tied |= {id(t) for name, t in stored_tensors(model) if model.all_tied_weights_keys.get(name) in held}
        ignored = model._keys_to_ignore_on_load_missing or ()
        return [
            name
            for name, tensor in stored_tensors(model)
            if id(tensor) not in tied and self._owner(name) is None
            if not any(re.search(pattern, name) for pattern in ignored)
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check that every layer is whole, and let ``save_pretrained`` write own names without converters."""
        setattr(model, "_weight_conversions", [])  # noqa: B010 (mypy takes the plain form for a parameter)
        for part in model.modules():
            if isinstance(part, transformers.PreTrainedModel):  # a mark by which some models compute otherwise (Jamba)
                vars(part.config).pop("_is_quantized", None)
        faults = []
        for name in self.layers:
            qmodule: Any = model.get_submodule(name)
            tensors = [qmodule.weight, qmodule.bias, qmodule.input_scale, qmodule.output_scale]
            if not qmodule.frozen or any(tensor is not None and tensor.is_meta for tensor in tensors):
                faults.append(f"{name} did not receive its packed tensors")
        if faults:
            raise load_error("the load is incomplete", faults)


class PackedLoad(ConversionOps):
    """Joins codes, scale and shift of one weight into one quanto tensor."""

    def __init__(self, hf_quantizer: PackedQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLoad:
        """Stay one object: transformers copies the operation for every key, and it has no state of its own."""
        return self

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[torch.Tensor]],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the weight of one layer, frozen."""
        name = full_layer_name.removesuffix(".weight")
        qmodule = model.get_submodule(name)
        ties = self.hf_quantizer.tied.items()
        ends = [target if source == name else source for target, source in ties if name in (target, source)]
        keeper = QUANTO.keeper([qmodule, *map(model.get_submodule, ends)])
        weight = QUANTO.weight(keeper, {slot: tensors[0] for slot, tensors in input_dict.items()})
        # The other names of a shared layer have no tensors of their own; transformers would fill them anew.
        for alias, canonical in self.hf_quantizer.canonical.items():
            if missing_keys is not None and canonical == self.hf_quantizer.canonical[name] and alias != name:
                missing_keys -= {f"{alias}.{slot}" for slot in ("weight", "bias", "input_scale", "output_scale")}
        return {full_layer_name: weight}


_stock_merge = AutoHfQuantizer.merge_quantization_configs


def _merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """Compare both configurations; the stock method drops the user's with a warning."""
    if not (isinstance(quantization_config, dict) and "qat" in quantization_config):
        return _stock_merge(quantization_config, quantization_config_from_args)
    packed = PackedQuantoConfig.from_dict(quantization_config)
    if quantization_config_from_args is not None:
        packed.require_agreement(quantization_config_from_args)
    return packed


AUTO_QUANTIZER_MAPPING["quanto"] = PackedQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"] = PackedQuantoConfig
setattr(AutoHfQuantizer, "merge_quantization_configs", classmethod(_merge))  # noqa: B010 (mypy refuses the plain form)
