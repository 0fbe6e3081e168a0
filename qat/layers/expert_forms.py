"""How modules of experts keep their matrices in parameters of three dimensions, and how their forwards read them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import nn

__all__ = ["ExpertMatrix", "Form", "experts_in", "form_of"]


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
    inner: str = ""
    """The attribute whose result the last matrix reads; empty where the forward has none."""
    counts: tuple[str, ...] = ("num_experts",)
    """Attributes that count experts. Numbers from the first one on are no experts of these parameters."""

    @property
    def shows_inputs(self) -> bool:
        """Whether what all matrices read can be seen, and so quantized."""
        return bool(self.inner) or len(self.keys) == 1


_GATED = ("gate_up_proj", "down_proj")
_GATE = "_apply_gate"
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
    f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts": Form(_GATED, False, "top_k_index", inner=_GATE),
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
        keys, inner = (_GATED, _GATE) if kept.has_gate else (("up_proj", "down_proj"), "act_fn")
        form = Form(keys, kept.is_transposed, argument, inner=inner)
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
