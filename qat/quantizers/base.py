"""What a quantizer is, and what an algorithm is.

A *quantizer* is a submodule beside a layer's weight (or at its input or output) that knows how to scale it. It owns
whatever is learned, as float32 parameters; the layer adds the straight-through gradient and the recomputation. An
*algorithm* is the frozen configuration that makes quantizers. docs/extending.md shows how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat import kernels
from qat.numerics import FrozenWeight, QType, qtype_of
from qat.quantizers.gradients import masked_beyond, smooth_rounding
from qat.spec import NamedArguments

__all__ = ["BASE_KEY", "FINAL_KEY", "TYPE_KEY", "Algorithm", "Quantized", "QuantizerModule", "WeightQuantizer"]

TYPE_KEY = "first_type"
"""Key of a quantizer's state that names the type that it trains with, where it is not the one to be served."""
FINAL_KEY = "final_qtype"
"""Key that names the type to be served, where the state has anything that depends on it."""
BASE_KEY = "base_qtype"
"""Key that names the type of a base which is held as packed codes, and which the file of an adapter lacks."""


class Quantized(NamedTuple):
    """A fake-quantized weight, and the scales that made it."""

    value: Tensor
    """``(out, in)`` in the dtype that was asked for, without a gradient."""
    scale: Tensor
    """Serving scale, float32, ``(groups, 1)``; differentiable where it is learned."""
    shift: Tensor | None
    """Serving shift likewise; None for types without one."""


class QuantizerModule(nn.Module):
    """A module whose float32 state stays float32, whatever the model is cast to.

    A scale in bfloat16 cannot move by a thousandth of itself, and would change codes: so `Module.to(dtype)`, and
    with it Lightning's ``bf16-true``, moves a quantizer between devices but never narrows it.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype is torch.float32 and moved.is_floating_point() and moved.dtype is not torch.float32:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call,no-any-return]


class WeightQuantizer(QuantizerModule, ABC):
    """How one weight is scaled; abstract. Subclasses implement `quantize`.

    ``qtype`` is the type that it quantizes to, ``final_qtype`` the one that it will be frozen to: training may begin
    with another, and a state dict then holds it (`qat.training.annealing`). ``dtype`` is the serving dtype. ``masked``
    stops the gradient of weights outside the codes' range, which is needed once a range clips; with a ``margin``, those
    farther outside than that many steps. ``float8_backward`` is `Algorithm.float8_backward`, where weight and input are
    float8. ``smooth`` is `Algorithm.gradient`, where codes are integers.
    """

    by_groups: bool = False
    """Whether groups do not depend on each other, so that weights below each other can be quantized in one call."""
    float8_backward = False
    smooth = False
    compensated: bool = False
    """Whether a start from data has changed the master weight too, so that it is not the float model's any more."""
    base_qtype = ""
    """Key of the type of the packed codes under its adapter, if there are any."""

    def __init__(self, qtype: QType, dtype: torch.dtype, *, masked: bool = False, margin: float = 0.0) -> None:
        super().__init__()
        self.qtype = self.final_qtype = qtype
        self.dtype = dtype
        self.margin = margin if masked else 0.0
        self.masked = masked and not margin  # with a margin, `through` does it

    @abstractmethod
    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """Fake-quantize an effective master weight, ``(out, in)``, any float dtype.

        Most subclasses find a scale and a shift, differentiable with respect to the quantizer's own parameters, and
        return `by_scale` of them. The gradient that arrives there is that of LSQ (Esser et al. 2020, eq. 3). The result
        depends on nothing but the quantizer's state and ``weight``.
        """

    def with_state(self, state: dict[str, Tensor | None]) -> Self:
        """A copy that holds ``state`` as its buffers, and no parameter; `copy` meets a refusal of ``fully_shard``."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), _parameters={}, _buffers=state)
        return other

    def quantize_to_codes(self, weight: Tensor) -> Quantized:
        """`quantize` with the codes, ``(out, in)`` in the type's `storage` dtype, in place of the values."""
        _, scale, shift = self.quantize(weight, self.dtype)
        fixed = None if shift is None else shift.detach()
        return Quantized(self.qtype.encode(weight, scale.detach(), fixed), scale, shift)

    def through(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, scale and shift as a layer's backward sees them: what it finds for them goes on to the arguments.

        ``scale`` and ``shift`` are those that `quantize` returned for ``weight``. From the three that come back, the
        layer computes the value again, with the same bits. A quantizer with gradients of its own, or one that rounds
        something else than ``weight``, puts its function in between here.
        """
        if self.smooth:
            weight = smooth_rounding(weight, scale, shift, self.qtype)
        if not self.margin:
            return weight, scale, shift
        weight = masked_beyond(weight, scale, shift, self.qtype, self.margin)
        return weight, scale.detach(), None if shift is None else shift.detach()

    def by_scale(self, weight: Tensor, scale: Tensor, shift: Tensor | None, out_dtype: torch.dtype) -> Quantized:
        """Fake-quantize by a scale and a shift, float32, ``(groups, 1)``, not yet rounded to the serving dtype."""
        return self.by_served(weight, *self.qtype.serve(scale, shift, self.dtype, weight.shape[1]), out_dtype)

    def by_served(self, weight: Tensor, scale: Tensor, shift: Tensor | None, out_dtype: torch.dtype) -> Quantized:
        """Fake-quantize by a scale and a shift that the serving dtype holds already."""
        fixed = None if shift is None else shift.detach()
        options = (self.qtype.key, self.dtype, out_dtype)
        value = kernels.fake_quantize_weight(weight.detach(), scale.detach(), fixed, *options)
        return Quantized(value, scale, shift)

    def awaited_start(self) -> str | None:
        """The start in `qat.starts.DATA_STARTS` that waits for data; `restart` then takes it. None: nothing waits."""
        return None

    def stop_awaiting(self) -> None:
        """Training goes on from what there is: no start is awaited any more."""

    def restart(self, low: Tensor | None, high: Tensor) -> None:
        """Begin with another range, float32, ``(groups, 1)``; only where a start is awaited."""
        raise NotImplementedError(f"{type(self).__name__}: awaits no start, so it takes none")

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[FrozenWeight, Tensor]:
        """The final codes, and the value that the fake-quantized forward used, in the serving dtype."""
        value = self.quantize(weight, self.dtype).value
        return self.final_codes(weight), value

    @torch.no_grad()
    def final_codes(self, weight: Tensor) -> FrozenWeight:
        """The codes alone, with scale and shift as they are stored."""
        codes, scale, shift = self.quantize_to_codes(weight)
        kept = self.qtype.scale_dtype(self.dtype)
        narrow = None if shift is None else shift.to(kept)
        return FrozenWeight(codes.contiguous(), scale.to(kept), narrow, self.qtype, self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = any(tensor is not None for tensor in (*self._parameters.values(), *self._buffers.values()))
        first = self.qtype.key if self.qtype != self.final_qtype else ""
        final = self.final_qtype.key if held else ""
        for key, text in ((TYPE_KEY, first), (FINAL_KEY, final), (BASE_KEY, self.base_qtype)):
            if text:
                destination[f"{prefix}{key}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.pop(f"{prefix}{TYPE_KEY}", None)
        for key in (FINAL_KEY, BASE_KEY):  # which were compared before anything is loaded
            state_dict.pop(f"{prefix}{key}", None)
        self.qtype = self.final_qtype if found is None else qtype_of(bytes(found.tolist()).decode())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The type, for ``print(model)``."""
        return f"{self.qtype.name}, dtype={str(self.dtype).removeprefix('torch.')}"


class Algorithm(NamedArguments):
    """Configuration of how scales are found or learned; makes one quantizer a layer. Abstract."""

    kind: Any
    """Names the algorithm in a configuration file; a subclass has a literal here."""
    float8_backward: bool = False
    """Multiply gradients in float8 too, where weights and inputs are float8: faster, and no longer exact."""
    gradient: Literal["straight_through", "stable"] = "straight_through"
    """Of the rounding to integer codes: 1, or StableQAT's, which is smaller the nearer a weight is to its code."""
    learn_activations: bool = False
    """Learn the scales of activations from where calibration left them (LSQ), with the rate of learned ranges."""
    static_activations: tuple[str, ...] = ()
    """Layers whose activations keep their calibrated scales all the same: ``fnmatch`` patterns on their names."""

    def learns_activations(self, name: str) -> bool:
        """Whether the activation scales of the layer called ``name`` are learned."""
        return self.learn_activations and not any(fnmatchcase(name, pattern) for pattern in self.static_activations)

    def for_type(self, qtype: QType) -> Algorithm:
        """The algorithm that makes the quantizers of layers of this type: itself, unless it chooses by type."""
        return self

    def __str__(self) -> str:
        """Its name, with the options that are not the defaults."""
        given = [f"{k}={v!r}" for k, v in self if v != type(self).model_fields[k].default]
        return f"{type(self).__name__}({', '.join(given)})"

    @abstractmethod
    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> WeightQuantizer:
        """A quantizer for ``weight`` (``(out, in)``, read now if a start range is needed), on its device."""
