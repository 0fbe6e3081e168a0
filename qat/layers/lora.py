"""`QLoraLinear`: a linear layer under peft's LoRA, of which base and adapter are fake-quantized as one weight.

The weight is ``W + scaling * B A``, or DoRA's ``m (W + scaling * B A) / |W + scaling * B A|``, computed as peft merges
it, with the same bits. So what is trained is what the merged model serves.

A base that needs no gradient gets none. Between forward and backward the layer keeps its input and the adapter. The
weight is computed again in backward. Neither it nor its gradient outlives a step of the graph. What it trades away:
each product ``B A`` is computed twice, and the weight's whole gradient once, where plain LoRA has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.errors import StateError
from qat.layers.functional import Recipe
from qat.layers.linear import LinearForm, QLinear
from qat.layers.packed import PackedForm, PackedLinear
from qat.quantizers.activation import with_unused

__all__ = ["QLoraLinear"]

_NOW = "_qat_merged"  # the weight of the forward that runs


def _exact(tensor: Tensor) -> Any:
    """A block in which autocast changes nothing."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _product(scaling: float, a: Tensor, b: Tensor) -> Tensor:
    """``scaling * B A`` as peft computes it; half precision is widened on a CPU."""
    wide = b.device.type == "cpu" and b.dtype in (torch.float16, torch.bfloat16)
    product = (b.float() @ a.float() if wide else b @ a).mul_(scaling)
    return product.to(b.dtype) if wide else product


class _Form(NamedTuple):
    """What is no tensor of a merged weight."""

    scaling: float
    packed: PackedForm | None
    """Where the base is held as codes: how they make its weight."""

    def base(self, weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """The base's weight, ``(out, in)``."""
        return weight if self.packed is None or scale is None else self.packed.weight(weight, scale, shift)


@torch.no_grad()
def _merge(
    form: _Form,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """The merged weight, ``(out, in)``, in the dtype of the base; without an adapter, the base's."""
    base = form.base(weight, scale, shift)
    if a is None or b is None:
        return base
    with _exact(base):
        change = _product(form.scaling, a, b)
        if magnitude is None:
            return torch.add(base, change, out=torch.empty_like(base))
        value, norm = _direction(base, change)
        return ((magnitude / norm).view(-1, 1) * value).to(base.dtype)


def _direction(base: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The weight that DoRA scales, and the norm of each of its rows."""
    value = base + change
    return value, torch.linalg.norm(value, dim=1).to(value.dtype)


class _Merged(torch.autograd.Function):
    """The merged weight, whose gradient goes on to base, A, B and magnitude; peft's norm of DoRA has none."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, form: _Form, *parts: Tensor | None) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.form = form
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *held, a, b, magnitude = ctx.saved_tensors
        of_base = of_magnitude = None
        with _exact(grad):
            grad = grad.to(b.dtype)
            if magnitude is not None:
                value, norm = _direction(ctx.form.base(*held), _product(ctx.form.scaling, a, b))
                of_magnitude = ((grad * value).sum(1) / norm).to(magnitude.dtype)
                grad = (grad * (magnitude / norm).view(-1, 1)).to(b.dtype)
            if ctx.needs_input_grad[2]:
                of_base = grad.to(held[0].dtype)
            of_a, of_b = (part.mul_(ctx.form.scaling) for part in (b.t() @ grad, grad @ a.t()))
        return None, None, of_base, None, None, of_a, of_b, of_magnitude


class QLoraLinear(LinearForm, Linear):
    """``x V^T + b`` with the merged weight V fake-quantized, and, if asked, inputs and outputs.

    Without an active adapter, as within peft's ``disable_adapter()``, V is the base weight. While nothing is quantized
    (`Mode`), the layer is peft's own.
    """

    replaces: ClassVar[type[nn.Module]] = Linear

    @staticmethod
    def masters(module: Any) -> dict[str, nn.Parameter]:
        """The weights of the base, unless it is packed, and of the active adapter."""
        return {key: part for key, part in _parts(module).items() if isinstance(part, nn.Parameter)}

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        """The merged weight, ``(out, in)``, with gradients to the adapter, and to the base where it wants one.

        Raises:
            StateError: several adapters are active.
        """
        if (now := vars(module).get(_NOW)) is not None:
            return now  # type: ignore[no-any-return]
        if not isinstance(module, QLoraLinear) and QLoraLinear.adoption_fault(module) is not None:
            return module.base_layer.weight  # type: ignore[no-any-return]  # of whatever shape, it stays float
        form, parts = _form(module), _parts(module)
        if not _active(module) or module.fan_in_fan_out:  # over a Conv1D, which is not adopted
            weight: Tensor = module.base_layer.weight
            return weight.t() if module.fan_in_fan_out else weight
        value = _merge(form, *parts.values())  # type: ignore[arg-type]
        return _Merged.apply(value, form, *parts.values())  # type: ignore[no-any-return,no-untyped-call]

    @staticmethod
    def compensable(module: Any) -> Tensor | None:
        """The base, while it is the effective weight: it holds no codes, and every LoRA over it is still zero."""
        base, changes = module.base_layer, (b.weight for b in module.lora_B.values())
        apart = not isinstance(base, nn.Linear) or module.lora_variant or any(bool(b.any()) for b in changes)
        return None if apart else base.weight.detach()

    @classmethod
    def like_weight(cls, module: Any) -> Tensor:
        """One number that stands for all, whatever the base is."""
        base = module.base_layer
        held, dtype = (
            (base.packed, base.form.dtype) if isinstance(base, PackedLinear) else (base.weight, base.weight.dtype)
        )
        return torch.empty((), dtype=dtype, device=held.device).expand(module.out_features, module.in_features)

    def recipe(self) -> Recipe | None:
        """How backward computes the merged weight again."""
        if torch.compiler.is_compiling() or (isinstance(self.base_layer, nn.Linear) and not _active(self)):
            return None
        return Recipe(_merge, (_form(self),), tuple(_parts(self).values()))

    def weight_in(self, state: Mapping[str, Any], prefix: str) -> Tensor | None:
        """The merged weight that a checkpoint holds; None where it lacks base or adapter."""
        parts = _parts(self)
        if not all(f"{prefix}{key}" in state for key, part in parts.items() if part is not None):
            return None
        return _merge(_form(self), *(state.get(f"{prefix}{key}") for key in parts))  # type: ignore[arg-type]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in peft; `StateError` where the base holds codes, which cannot take the adapter."""
        if not isinstance(self.base_layer, nn.Linear):
            raise StateError("model: its base is packed, and no float weight takes the adapter: qat.freeze merges it")
        super().merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(self, *_: Any, **__: Any) -> None:
        """Refuse peft's ``merge_and_unload`` and ``unload``, which would leave a float layer in its place."""
        raise StateError(
            "model: is prepared, and peft would put float layers in the place of quantized ones: qat.freeze merges the "
            "adapters; for a float model, merge a copy before qat.prepare"
        )

    @classmethod
    def adoption_fault(cls, module: nn.Module) -> str | None:
        """As for any layer. The base is an exact `nn.Linear`, and the adapters are LoRA or DoRA."""
        if type(module) is not cls.replaces:
            return f"{type(module).__name__} is not exactly peft's lora.Linear: its own forward would be lost"
        base: nn.Module = module.base_layer  # type: ignore[assignment]
        fault = cls.object_fault(module) or QLinear.adoption_fault(base)
        if fault is not None:
            return f"under its adapter, {fault}"
        others = {type(v).__name__ for v in module.lora_variant.values() if type(v) is not DoraLinearVariant}  # type: ignore[operator]
        return f"its adapter has a forward of its own ({', '.join(sorted(others))})" if others else None

    @staticmethod
    def object_fault(module: nn.Module) -> str | None:
        """As for any layer, and its base likewise."""
        if "forward" in vars(module):
            return "its object has a forward of its own, which would run instead of the quantized one: remove the hook"
        base: nn.Module = module.base_layer  # type: ignore[assignment]
        return None if isinstance(base, PackedLinear) else QLinear.object_fault(base)

    @staticmethod
    def usage_fault(module: Any) -> str | None:
        """Several active adapters, dropout, or a bias of the adapter: none is part of one merged weight."""
        names = _found(module)
        if len(names) > 1:
            return (
                f"has several active adapters {names}, but one weight is trained and served: activate one "
                "(set_adapter), or merge the others first"
            )
        for name in names:
            if (p := getattr(module.lora_dropout[name], "p", 0.0)) > 0:
                return (
                    f"has lora_dropout={p}, which drops inputs of the adapter alone, and the merged weight has no such "
                    "input: use LoraConfig(lora_dropout=0.0)"
                )
            if module.lora_bias[name]:
                return "has a bias in its adapter: use lora_bias=False, and bias='lora_only' to train that of the base"
        if module.disable_adapters and module.merged:
            return "has a merged adapter that is disabled: unmerge it first (unmerge_adapter)"
        return None

    def _run(self, input: Tensor) -> Tensor:
        if (fault := self.usage_fault(self)) is not None:
            raise StateError(f"model: a layer under LoRA {fault}")
        if not self.mode.weights and not self.mode.observe:
            y = Linear.forward(self, input)
            return with_unused(y, self.input_quantizer, self.output_quantizer) if self.learns_activations else y
        if torch.compiler.is_compiling():  # in which the compiler finds what is computed twice
            return super()._run(input)
        vars(self)[_NOW] = self.effective_weight(self)
        try:
            return super()._run(input)
        finally:
            vars(self).pop(_NOW, None)


def _found(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _active(module: Any) -> list[str]:
    """The name of the adapter that is part of the weight, if one is."""
    if module.disable_adapters or module.merged:
        return []
    names = _found(module)
    if len(names) > 1:
        raise StateError(f"model: a layer under LoRA {QLoraLinear.usage_fault(module)}")
    return names


def _form(module: Any) -> _Form:
    names, base = _active(module), module.base_layer
    return _Form(module.scaling[names[0]] if names else 1.0, base.form if isinstance(base, PackedLinear) else None)


def _parts(module: Any) -> dict[str, Tensor | None]:
    """The tensors of the merged weight in the order of `_merge`, by their names below the layer."""
    base = module.base_layer
    found: dict[str, Tensor | None] = {"base_layer.weight": None, "base_layer.scale": None, "base_layer.shift": None}
    if isinstance(base, PackedLinear):
        found = {f"base_layer.{key}": getattr(base, key) for key in ("packed", "scale", "shift")}
    else:
        found["base_layer.weight"] = base.weight
    for name in _active(module):
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            held = getattr(module, part)
            found[f"{part}.{name}.weight"] = held[name].weight if name in held else None
    return found
