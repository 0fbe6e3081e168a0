"""`QExpert`: one expert's matrix, ``(out, in)``, of the parameters that a module of experts holds in three dimensions.

The module that holds them reads them by itself, so no expert is ever called. It keeps its parameters, with their names,
and its own forward; `qat.layers.experts_forward` hands it fake-quantized matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from qat.layers.expert_forms import ExpertMatrix, form_of
from qat.layers.linear import LinearForm
from qat.quantizers.activation import ActivationQuantizer
from qat.quantizers.base import WeightQuantizer

__all__ = ["QExpert"]


class QExpert(LinearForm, ExpertMatrix):
    """One expert's matrix with fake quantization. Its owner reads what `qat.layers.experts_forward` makes of it."""

    replaces: ClassVar[type[nn.Module]] = ExpertMatrix
    targets: ClassVar[tuple[str, ...]] = ("transformers", "compressed-tensors")
    called: ClassVar[bool] = False
    _shared: tuple[ActivationQuantizer | None] = (None,)
    bias: Any = None  # which stays float, with the owner

    @property
    def input_quantizer(self) -> ActivationQuantizer | None:
        """That of all experts at this parameter, of which the first one is the parent in the model."""
        return self._shared[0]

    @input_quantizer.setter
    def input_quantizer(self, quantizer: ActivationQuantizer | None) -> None:
        """Whatever is set, `adopt` says what is shared: nn.Module takes a quantizer before this is asked."""

    def activation_quantizers(self) -> Iterator[ActivationQuantizer]:
        """Only the first expert has one to take care of."""
        return (quantizer for quantizer in self._shared if quantizer is not None and self.index == 0)

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
        if (fault := cls.parameter_fault(weight)) is not None:
            return fault
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
        layer._shared = (input_quantizer,)
        if layer.index:
            layer._modules.pop("input_quantizer", None)
        _place(layer.owner, str(layer.index), layer.key, layer)
        return layer

    def extra_repr(self) -> str:
        """Shape and type, for ``print(model)``."""
        out_features, in_features = self.effective_weight(self).shape
        return f"{in_features}, {out_features}{super().extra_repr()}"


def _place(owner: nn.Module, index: str, key: str, layer: nn.Module) -> None:
    # Late, since its decorator imports torch's compiler, which takes seconds.
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
