"""`QExpert`: one expert's matrix, ``(out, in)``, of the parameters that a module of experts holds in three dimensions.

The module that holds them reads them by itself, so no expert is ever called. It keeps its parameters, with their names,
and its own forward; `qat.layers.experts_forward` hands it fake-quantized matrices.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from qat.layers.base import MASTER_DTYPES
from qat.layers.linear import LinearForm
from qat.quantizers.activation import ActivationQuantizer
from qat.quantizers.base import WeightQuantizer

__all__ = ["ExpertMatrix", "Form", "QExpert", "experts_in", "form_of"]


class Form(NamedTuple):
    """How a module of experts keeps its matrices, and where its forward learns which of them it reads."""

    keys: tuple[str, ...]
    """Names of its parameters, ``(experts, out, in)``."""
    transposed: bool = False
    """Whether they are ``(experts, in, out)``."""
    argument: str = ""
    """The argument of its forward that says which experts are read; empty: all are."""
    kind: Literal["indices", "sizes", "rows"] = "indices"
    """What that holds: an expert's number for each token, the tokens of each expert, or equal parts for all experts."""
    counts: tuple[str, ...] = ("num_experts",)
    """Attributes that count experts. Numbers from the first one on are no experts of these parameters."""


_GATED = ("gate_up_proj", "down_proj")
_MODELS = "transformers.models"
_FORMS = {
    f"{_MODELS}.llama4.modeling_llama4.Llama4TextExperts": Form(_GATED, True, "hidden_states", "rows"),
    f"{_MODELS}.inkling.modeling_inkling.InklingSharedExperts": Form(
        ("gate_proj", "up_proj", "down_proj"), counts=("n_shared_experts",)
    ),
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts": Form(("weight",), False, "expert_size", "sizes"),
    f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": Form(
        _GATED, False, "top_k_index", counts=("num_routed_experts", "total_experts")
    ),
    f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts": Form(_GATED, False, "top_k_index"),
    "diffusers.models.transformers.transformer_nucleusmoe_image.SwiGLUExperts": Form(
        _GATED, True, "num_tokens_per_expert", "sizes"
    ),
}
"""Classes of experts whose forward is known one by one."""
_INTERFACE = "transformers.integrations.moe"  # whose decorator gives all others their forward, and says how it reads


def form_of(module: nn.Module) -> Form | None:
    """How a float module of experts reads its matrices; None for any other module, and where its forward is unknown."""
    cls = type(module)
    form = _FORMS.get(f"{cls.__module__}.{cls.__qualname__}")
    if form is None and getattr(cls.forward, "__globals__", {}).get("__name__") == _INTERFACE:
        kept: Any = module
        argument = list(inspect.signature(cls.forward).parameters)[2]
        form = Form(("gate_up_proj" if kept.has_gate else "up_proj", "down_proj"), kept.is_transposed, argument)
    known = form is not None and all(getattr(module._parameters.get(key), "ndim", 0) == 3 for key in form.keys)
    return form if known else None


def experts_in(module: nn.Module) -> Iterator[tuple[str, ExpertMatrix]]:
    """The matrices of a float module of experts, by their names below it; nothing for any other module."""
    form = form_of(module)
    if form is None:
        return
    for index in range(max(len(module._parameters[key]) for key in form.keys)):  # type: ignore[arg-type]
        for key in form.keys:
            if index < len(module._parameters[key]):  # type: ignore[arg-type]
                yield f"{index}.{key}", ExpertMatrix(module, key, index, form)


class ExpertMatrix(nn.Module):
    """A view of one expert's matrix; the parameter stays with its ``owner``."""

    def __init__(self, owner: nn.Module, key: str, index: int, form: Form) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, in which no module looks for modules
        self.key, self.index, self.form = key, index, form

    @property
    def owner(self) -> Any:
        """The module that holds the parameter, and reads it."""
        return self._owner[0]


class QExpert(LinearForm, ExpertMatrix):
    """One expert's matrix with fake quantization. Its owner reads what `qat.layers.experts_forward` makes of it."""

    replaces: ClassVar[type[nn.Module]] = ExpertMatrix
    targets: ClassVar[tuple[str, ...]] = ("transformers",)
    called: ClassVar[bool] = False
    bias: Any = None  # which stays float, with the owner

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        """The expert's part of the parameter, as ``(out, in)``."""
        weight: Tensor = module.owner._parameters[module.key][module.index]
        return weight.t() if module.form.transposed else weight

    @staticmethod
    def masters(module: Any) -> dict[str, nn.Parameter]:
        """The whole parameter, which holds other experts too."""
        return {module.key: module.owner._parameters[module.key]}

    @staticmethod
    def holder(module: Any) -> nn.Module:
        """Its owner."""
        owner: nn.Module = module.owner
        return owner

    def weight_in(self, state: Mapping[str, Any], prefix: str) -> Tensor | None:
        """The expert's part of the parameter in a checkpoint."""
        above = prefix.removesuffix(f"{self.index}.{self.key}.")
        whole: Tensor | None = state.get(f"{above}{self.key}") if above != prefix else None
        if whole is None:
            return None
        return whole[self.index].t() if self.form.transposed else whole[self.index]

    @staticmethod
    def install(model: nn.Module, names: Sequence[str], frozen: nn.Module) -> None:
        """Put a frozen layer below the owner; with the last expert of a parameter, the parameter goes."""
        above, index, key = names[0].rsplit(".", 2)
        owner = model.get_submodule(above)
        _place(owner, index, key, frozen)
        _let_go(owner, key)

    def released(self) -> None:
        """Let the parameter go with its last prepared expert."""
        _let_go(self.owner, self.key)

    @staticmethod
    def object_fault(module: Any) -> str | None:
        """Why the owner is not what its class says, or None."""
        owner, key = module.owner, module.key
        if "forward" in vars(owner):
            return (
                "the object of its experts has a forward of its own (as accelerate's hooks and adapters' patches set "
                "it), which would run instead of the quantized one: remove the hook or merge the adapter first"
            )
        if owner._parameters.get(key) is None or key in vars(owner):
            return f"its {key} is no parameter of its own but computed before each forward: make it permanent first"
        if getattr(owner, "_is_expert_parallel", False):
            return "its experts are spread over processes (expert parallelism): prepare the model on one process"
        return None

    @classmethod
    def adoption_fault(cls, module: Any) -> str | None:
        """Why an expert's matrix cannot be quantized, or None."""
        fault = cls.object_fault(module)
        if fault is not None:
            return fault
        weight = module.owner._parameters[module.key]
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            return f"its weight is a {type(weight).__name__}, not a plain nn.Parameter: prepare before it is converted"
        if weight.dtype not in MASTER_DTYPES:
            return f"its weight has dtype {weight.dtype}: a master weight is float32, bfloat16 or float16"
        return None if weight.numel() else f"its weight has shape {tuple(weight.shape)}, without elements"

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer | None = None,
        output_quantizer: ActivationQuantizer | None = None,
    ) -> Self:
        """Turn the view into a layer of its owner, which runs by the fake-quantized matrices from now on."""
        layer = super().adopt(module, weight_quantizer, input_quantizer, output_quantizer)
        _place(layer.owner, str(layer.index), layer.key, layer)
        return layer

    def extra_repr(self) -> str:
        """Shape and type, for ``print(model)``."""
        out_features, in_features = self.effective_weight(self).shape
        return f"{in_features}, {out_features}{super().extra_repr()}"


def _place(owner: nn.Module, index: str, key: str, layer: nn.Module) -> None:
    from qat.layers.experts_forward import QExperts, quantized_class

    if not isinstance(owner, QExperts):
        form, cls = form_of(owner), cast(Any, type(owner))
        assert form is not None
        owner.__class__ = quantized_class(cls, form)
    if index not in owner._modules:
        owner.add_module(index, nn.ModuleDict())
    owner.get_submodule(index).add_module(key, layer)


@torch.no_grad()
def _let_go(owner: nn.Module, key: str) -> None:
    whole = owner._parameters.get(key)
    if whole is None:
        return
    for index in reversed(range(len(whole))):  # the last one is the last to come, as a rule
        expert = owner._modules.get(str(index))
        layer = None if expert is None else expert._modules.get(key)
        if layer is None or isinstance(layer, QExpert):
            return
    del owner._parameters[key]
