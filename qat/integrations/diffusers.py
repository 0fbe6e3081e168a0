"""Teach diffusers to load packed weights in every version: ``import qat.integrations.diffusers``, then load.

diffusers before 1.0 reads exported directories by itself; its release 1.0 drops the backend that does. Importing this
module registers a quantizer under the name "quanto", and a `QuantoConfig` where diffusers has none that works.

What it changes, against the stock backend of diffusers 0.42:

- The numbers are the same, bit for bit.
- ``from_single_file(file, config=directory, quantization_config=QuantoConfig(...))`` works. Float weights, also of an
  original checkpoint, are quantized on the way in, as by ``from_pretrained``. Packed weights are read under the
  model's own names. Stock code takes every single file for a packed one, and then reads none.
- Headers are checked before anything is read. Files that do not fit are one `LoadError`, never random weights.
- float8 weights are marked, so that no CUDA kernel drops their biases (`keep_bias`).
- No weight stays on the meta device, and codes are aligned for the kernels of a CPU.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from accelerate.utils import CustomDtype, set_module_tensor_to_device
from diffusers.loaders import single_file_model
from diffusers.quantizers import quantization_config as stock_configs
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from qat.errors import LoadError, listed, load_error
from qat.files.shards import TensorEntry, read_headers
from qat.formats.quanto import QUANTO, WEIGHT_KEYS
from qat.formats.quanto_marlin import keep_bias
from qat.formats.quanto_types import QUANTO_NAMES
from qat.hosts.base import shown_call
from qat.hosts.diffusers import DIFFUSERS
from qat.tensors import meta_names

__all__ = ["PackedQuantizer", "QuantoConfig", "register"]

logger = logging.getLogger("qat")


class _Method(StrEnum):
    """The name that diffusers asks for; its own enumeration may lose it."""

    QUANTO = "quanto"


class QuantoConfig(stock_configs.QuantizationConfigMixin):
    """The class of that name, for versions of diffusers without one; ``diffusers.QuantoConfig`` there.

    Args:
        weights_dtype: int8, float8, int4 or int2.
        modules_to_not_convert: last parts of the names of layers that stay float. None leaves no layer float when
            float weights are quantized. With packed weights it means what the files say.

    Raises:
        LoadError: when there is no such type.

    >>> QuantoConfig(weights_dtype="int4").to_dict()["weights_dtype"]
    'int4'
    """

    def __init__(
        self, weights_dtype: str = "int8", modules_to_not_convert: list[str] | None = None, quant_method: str = "quanto"
    ) -> None:
        if weights_dtype not in QUANTO.qtypes:
            known = ", ".join(QUANTO.qtypes)
            raise LoadError(f"weights_dtype: must be one of {known}, got {weights_dtype!r}: choose one")
        self.quant_method: Any = _Method(quant_method)
        self.weights_dtype = weights_dtype
        self.modules_to_not_convert = modules_to_not_convert

    def __repr__(self) -> str:
        """The base class's fails, and diffusers logs it."""
        return shown_call("QuantoConfig", vars(self))


class _PackedFile(dict[str, Tensor]):
    """The tensors of a packed single file, which no converter of names can read."""


class PackedQuantizer(DiffusersQuantizer):
    """Loads packed weights, and quantizes float ones, as the quanto backend of diffusers 0.42 does."""

    quantization_config: Any
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.single_file = "pre_quantized" not in kwargs  # which only a directory's load knows
        self.dtype = torch.float32
        self.entries: dict[str, TensorEntry] = {}
        """What the files hold, by key, where weights are packed."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise when the device map would spread packed tensors."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and len(device_map) > 1:
            raise LoadError(f"device_map={device_map!r} spreads the model, which packed weights cannot: use one device")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Keep the dtype of the load; float32 where none is given."""
        self.dtype = torch_dtype or torch.float32
        return self.dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """What accelerate takes a weight for when it makes a device map."""
        qtype = QUANTO.qtypes[self.quantization_config.weights_dtype]
        if qtype.floating:
            return CustomDtype.FP8
        return {8: torch.int8, 4: CustomDtype.INT4, 2: CustomDtype.INT2}[qtype.bits]

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Leave a tenth for what quantization needs."""
        return {key: value * 0.9 for key, value in max_memory.items()}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Iterable[str]) -> list[str]:
        """Read the headers of a directory's files; packed ones need no declaration."""
        self.pre_quantized = self.pre_quantized or _is_packed(loaded_keys)
        if self.pre_quantized:
            headers = read_headers(Path(file) for file in checkpoint_files)
            self.entries = {key: header.entry for key, header in headers.items()}
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Look into a single file before its names are converted; a directory's files come here too, later."""
        if not self.single_file:
            return state_dict
        self.pre_quantized = _is_packed(state_dict)
        return _PackedFile(state_dict) if self.pre_quantized else state_dict

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Float files lack the scales of activations, which are not used."""
        return [key for key in missing_keys if not key.endswith((".input_scale", ".output_scale"))]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> bool:
        """Whether a tensor is part of a packed weight, or a float weight to be quantized."""
        owner, name = _owner(model, param_name)
        return isinstance(owner, Tensor) or (QUANTO.owns(owner) and name == "weight")

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a part of a packed weight into its place, or quantize a float weight."""
        owner, name = _owner(model, param_name)
        if self.pre_quantized:
            setattr(owner, name, param_value)
            return
        dtype = kwargs.get("dtype", torch.float32)
        set_module_tensor_to_device(model, param_name, target_device, param_value, dtype)
        owner.freeze()
        owner.weight.requires_grad = False
        if owner.bias is not None:
            owner.weight = nn.Parameter(keep_bias(owner.weight), requires_grad=False)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        keep_in_fp32_modules: Collection[str] = (),
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace linear layers as stock code does, and hold what packed files hold against the result."""
        if state_dict is not None:
            # A directory's model is built in the dtype of the load, its buffers too; a single file's is not.
            vars(model).update(vars(DIFFUSERS.build(type(model), model.config, self.dtype, empty=True)))
            self.entries = {key: TensorEntry(key, part.dtype, tuple(part.shape)) for key, part in state_dict.items()}
        linear = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
        packed = {key.rpartition(".weight.")[0] for key in self.entries if key.endswith(WEIGHT_KEYS)}
        config = self.quantization_config
        if self.pre_quantized and config.modules_to_not_convert is None:
            config = self.quantization_config = copy.copy(config)
            config.modules_to_not_convert = sorted(
                {DIFFUSERS.layer_key(model, name) for name in linear.keys() - packed}
            )
        floats = config.modules_to_not_convert or ()
        skipped = {*([floats] if isinstance(floats, str) else floats), *keep_in_fp32_modules}
        layers = {n: self._layer(m) for n, m in linear.items() if DIFFUSERS.layer_key(model, n) not in skipped}
        if not layers:
            logger.warning("%s has no linear layer to quantize: it is loaded as it is", type(model).__name__)
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        if self.pre_quantized and (faults := self._faults(model, layers, packed)):
            raise load_error("the files do not hold what quantization_config and the model's class ask for", faults)
        self.entries = {}
        model.register_to_config(quantization_config=config)

    def _layer(self, linear: nn.Linear) -> Any:
        """A quanto layer on the meta device."""
        from optimum.quanto import QLinear, qtypes

        weights = qtypes[QUANTO_NAMES[self.quantization_config.weights_dtype]]
        size, bias = (linear.in_features, linear.out_features), linear.bias is not None
        with init_empty_weights():
            layer = QLinear(*size, bias=bias, dtype=self.dtype, weights=weights).requires_grad_(False)
        if self.pre_quantized:
            layer.freeze()
            if bias:  # before a move to a GPU changes the class
                keep_bias(layer.weight)
        return layer

    def _faults(self, model: Any, layers: Mapping[str, Any], packed: Collection[str]) -> list[str]:
        """Where the keys, dtypes and shapes in the files differ from what the model needs."""
        kind, config = type(model).__name__, self.quantization_config
        faults = [
            f"{name} is packed, but {kind} has no such linear layer, or leaves it float (modules_to_not_convert="
            f"{config.modules_to_not_convert!r})"
            for name in sorted(packed - layers.keys())
        ]
        found: dict[str, dict[str, TensorEntry]] = {name: {} for name in layers}
        others = set()
        for key, entry in self.entries.items():
            name = _part_of(key, layers)
            if name:
                found[name][key[len(name) + 1 :]] = entry
            elif not _part_of(key, packed):
                others.add(key)
        for name, layer in layers.items():
            shape, scale = (layer.out_features, layer.in_features), found[name].get("weight._scale")
            dtype = self.dtype if scale is None or not scale.dtype.is_floating_point else scale.dtype
            types = QUANTO.types(config.weights_dtype, None, dtype)
            group_size = types.weights.group_size(layer.in_features)
            faults += QUANTO.faults(name, types, shape, layer.bias is not None, group_size, found[name])
        needed = {key for key in model.state_dict() if not _part_of(key, layers)}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        strays = {key for key in others - needed if not any(re.search(pattern, key) for pattern in ignored)}
        faults += [f"{key} is missing" for key in sorted(needed - others)]
        return faults + [f"{key} belongs to nothing in a {kind}" for key in sorted(strays)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Refuse what was not filled, and make the wrappers of packed weights anew, where their data is."""
        if names := meta_names(model):
            raise LoadError(
                f"the files hold nothing for {listed(names, 5)} of a {type(model).__name__}: load all files"
            )
        for module in model.modules():
            if QUANTO.is_frozen(module) and module.weight.is_meta:
                state = module.state_dict()
                stored = {k: state[k] for k in WEIGHT_KEYS if k in state}
                # With a gradient, as in stock code: the order of sums in torch.matmul depends on it.
                module.weight = QUANTO.weight(module, stored, plain_on_cpu=True).requires_grad_()
        return model

    @property
    def is_trainable(self) -> bool:
        """As the stock backend says."""
        return True

    @property
    def is_serializable(self) -> bool:
        """``save_pretrained`` writes packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """As the stock backend says."""
        return True


def _is_packed(keys: Iterable[str]) -> bool:
    return any(key.endswith(WEIGHT_KEYS) for key in keys)


def _part_of(key: str, names: Collection[str]) -> str:
    """The module among ``names`` that a key lies below, or nothing."""
    while key and key not in names:
        key = key.rpartition(".")[0]
    return key


def _owner(model: Any, key: str) -> tuple[Any, str]:
    """What holds a tensor, a module or the wrapper of a packed weight, and the name of the tensor there."""
    *path, name = key.split(".")
    return functools.reduce(getattr, path, model), name


_NEEDS_CONVERSION = "_should_convert_state_dict_to_diffusers"
_stock_needs_conversion: Any = getattr(single_file_model, _NEEDS_CONVERSION, None)  # private: it may go


def _needs_conversion(model_state: dict[str, Tensor], checkpoint: dict[str, Tensor]) -> bool:
    """Leave packed files to the check of their keys: stock code converts whatever differs from a float model."""
    return not isinstance(checkpoint, _PackedFile) and _stock_needs_conversion(model_state, checkpoint)


def register() -> None:
    """Register the quantizer, and the configuration where diffusers has none that works; importing this does it."""
    AUTO_QUANTIZER_MAPPING["quanto"] = PackedQuantizer
    setattr(single_file_model, _NEEDS_CONVERSION, _needs_conversion)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"]()
    except (KeyError, ValueError):  # gone, or refusing, as diffusers' helper for deprecations does from 1.0 on
        AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"] = QuantoConfig
        for module in (diffusers, stock_configs):
            setattr(module, "QuantoConfig", QuantoConfig)  # noqa: B010


register()
