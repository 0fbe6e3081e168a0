"""`QuantizedLayer`: what every layer with fake quantization has in common.

A layer keeps the object and the names of its float parameters, and holds everything of quantization in submodules:
docs/architecture.md, "How a layer works".
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat.errors import StateError
from qat.layers.functional import autocast_dtype
from qat.numerics import QType
from qat.quantizers.activation import ActivationQuantizer, LearnedScale, fake_quantize_output, with_unused
from qat.quantizers.base import Algorithm, Quantized, WeightQuantizer
from qat.tensors import is_sharded, matrices

__all__ = ["Mode", "QuantizedLayer", "inside_layer", "within_layer"]

_MASTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Thread(threading.local):
    inside = False


_thread = _Thread()


def inside_layer() -> bool:
    """Whether this thread is in the forward of a prepared layer, outside compiled code."""
    return _thread.inside


@contextmanager
def within_layer() -> Iterator[None]:
    """Let `inside_layer` be true: weights that are read in the block are read by their layers."""
    outer, _thread.inside = _thread.inside, True
    try:
        yield
    finally:
        _thread.inside = outer


class Mode(NamedTuple):
    """What a prepared layer does in its forward."""

    weights: bool = True
    """Fake-quantize the weight; off: a plain float forward, activations included."""
    activations: bool = True
    """Fake-quantize inputs and outputs too, where the layer has quantizers for them."""
    observe: bool = False
    """Let the observers of activations record."""
    codes: bool = True
    """Multiply codes where loaders do; off: the values that they stand for, to compare."""
    watch: Callable[[ActivationQuantizer, Tensor], None] | None = None
    """Is told of each activation before it is quantized."""


class QuantizedLayer(nn.Module):
    """A layer with a fake-quantized weight and, if asked, fake-quantized inputs and outputs; abstract.

    A subclass derives from this and from the float class that it `replaces`. It says what its weight is as a matrix
    (`effective_weight`) and how its forward uses the fake-quantized form (`compute`). It stands in `qat.layers.LAYERS`.
    """

    replaces: ClassVar[type[nn.Module]]
    targets: ClassVar[tuple[str, ...]] = ()
    """Names of the targets whose loaders can hold such a layer; empty: all."""
    called: ClassVar[bool] = True
    """Whether a model calls the layer itself; else the module around it reads its weight, and no hook of it runs."""
    linear: ClassVar[bool] = True
    """Whether it multiplies the last dimension of its input by its weight, as `nn.Linear` does. Others keep float
    activations, have no inputs for a start from data, and meet no hazard of such products."""
    float_by_default: ClassVar[str] = ""
    """What a layer is called that is quantized only where a pattern names it; empty: quantized by default."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None
    learns_activations = False
    mode: Mode
    shares: bool = False
    """Whether another layer uses the same master and the same weight quantizer, as a head tied to its embedding."""
    reached: bool
    """Whether the layer ran with its quantized weight, outside compiled code, since it was prepared or loaded."""
    trained: int = 0
    """Whether it then ran with gradients: 2 in training mode, 1 in evaluation mode alone."""

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        """The matrix ``(out, in)`` that is quantized: a view of a parameter, or computed from several.

        ``module`` is a float module of the class that this one replaces, or a prepared one.
        """
        weight: Tensor = module.weight
        return weight

    @classmethod
    def like_weight(cls, module: Any) -> Tensor:
        """A tensor of the effective weight's shape, dtype and device; a subclass may spare computing its numbers."""
        return cls.effective_weight(module)

    @staticmethod
    def compensable(module: Any) -> Tensor | None:
        """What a start may write a compensated weight to, ``(out, in)``; None where the effective weight is no view."""
        return module.effective_weight(module).detach()  # type: ignore[no-any-return]

    @staticmethod
    def stored_kernel(module: Any) -> tuple[int, ...]:
        """The dimensions of the stored weight after the first two, where it is no matrix."""
        return ()

    @staticmethod
    def masters(module: Any) -> dict[str, nn.Parameter]:
        """The parameters that the effective weight is made of, by their names below the layer."""
        return matrices(module)

    @staticmethod
    def holder(module: nn.Module) -> nn.Module:
        """The module that has these parameters: the layer itself, unless it is not `called`."""
        return module

    def weight_in(self, state: Mapping[str, Any], prefix: str) -> Tensor | None:
        """The effective weight that a checkpoint holds; None where it holds it not, or not in full.

        ``prefix`` is the layer's name in the checkpoint, with a dot at its end, or empty.
        """
        if not all(f"{prefix}{key}" in state for key in self.masters(self) or ("weight",)):
            return None
        found = {key: state[f"{prefix}{key}"] for key in self._parameters if f"{prefix}{key}" in state}
        return self.effective_weight(SimpleNamespace(**{**vars(self), **found}))

    @staticmethod
    def install(model: nn.Module, names: Sequence[str], frozen: nn.Module) -> None:
        """Put a frozen layer in the place of a float one, under each of its names in ``model``."""
        for name in names:
            model.set_submodule(name, frozen)

    def released(self) -> None:
        """Let go of what the layer holds elsewhere in the model: its frozen form has taken its place."""

    @abstractmethod
    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        """The layer's function of ``x``, ``(..., in)``; without a fake-quantized weight, it uses the float one."""
        raise NotImplementedError(f"{type(self).__name__}: a subclass must say how it computes")

    def compute_quantized(self, x: Tensor, weight: Quantized, output: ActivationQuantizer) -> Tensor:
        """`compute` with a fake-quantized output; a subclass may do both in one pass, with the same bits."""
        return fake_quantize_output(self.compute(x, weight), output)

    def multiplies_codes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether `compute` wants the weight's codes for this input and compute dtype; a subclass may say so."""
        return False

    @classmethod
    def adoption_fault(cls, module: nn.Module) -> str | None:
        """Why a module cannot become such a layer, or None. Subclasses and patched objects are refused.

        >>> from qat.layers import QLinear
        >>> QLinear.adoption_fault(nn.Linear(4, 4)) is None
        True
        """
        if not cls.takes(module):
            of = "nn." if cls.replaces.__module__.startswith("torch.") else ""
            return f"{type(module).__name__} is not exactly {of}{cls.replaces.__name__}: its own forward would be lost"
        fault = cls.object_fault(module)
        if fault is not None:
            return fault
        weight: Any = module._parameters["weight"]
        if (fault := cls.parameter_fault(weight)) is not None:
            return fault
        if weight.ndim != 2 + len(cls.stored_kernel(module)) or not weight.numel():
            return f"its weight has shape {tuple(weight.shape)}, which is no matrix with elements: prepare it unsharded"
        return None

    @staticmethod
    def parameter_fault(weight: Any) -> str | None:
        """Why a parameter cannot be a master weight, whatever its shape, or None."""
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            return f"its weight is a {type(weight).__name__}, not a plain nn.Parameter: prepare before it is converted"
        if weight.dtype not in _MASTER_DTYPES:
            return f"its weight has dtype {weight.dtype}: a master weight is float32, bfloat16 or float16"
        return None

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether the class of ``module`` computes exactly what this one does."""
        return type(module) is cls.replaces

    @classmethod
    def class_for(cls, module: nn.Module) -> type[Self]:
        """The class that ``module`` gets: this one, or one derived from it."""
        return cls

    @staticmethod
    def usage_fault(module: Any) -> str | None:
        """What must be mended before the module is quantized, where it would be wrong to leave it float; or None."""
        return None

    @staticmethod
    def object_fault(module: nn.Module) -> str | None:
        """Why the object is not what its class says, or None; asked before it is adopted and before it is frozen."""
        if "forward" in vars(module):
            return (
                "its object has a forward of its own (as accelerate's hooks and adapters' patches set it), which would "
                "run instead of the quantized one: remove the hook or merge the adapter first"
            )
        computed = [key for key in ("weight", "bias") if key in vars(module)]
        if computed or "weight" not in module._parameters:
            return (
                f"its {(computed or ['weight'])[0]} is no parameter of its own but computed before each forward (as "
                "pruning and weight_norm do), and would be stale when frozen: make it permanent first, as with "
                "torch.nn.utils.prune.remove"
            )
        return None

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer | None = None,
        output_quantizer: ActivationQuantizer | None = None,
    ) -> Self:
        """Turn ``module`` into a layer of this class, in place, and return it; `StateError` on an `adoption_fault`."""
        fault = cls.adoption_fault(module)
        if fault is not None:
            raise StateError(f"module: {fault}")
        module.__class__ = cls.class_for(module)
        assert isinstance(module, cls)
        module.weight_quantizer = weight_quantizer
        module.input_quantizer = input_quantizer
        module.output_quantizer = output_quantizer
        module.learns_activations = any(isinstance(q, LearnedScale) for q in (input_quantizer, output_quantizer))
        module.mode = Mode()
        module.reached, module.trained = False, 0
        return module

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``.

        Raises:
            StateError: a quantizer is on another device than the weight.
            CalibrationError: activations are quantized and have no scale yet.
        """
        if torch.compiler.is_compiling():  # under checkpointing, compiled code may set nothing
            return self._run(input)
        if self.mode.weights:
            self.note_run()
        outer, _thread.inside = _thread.inside, True
        try:
            return self._run(input)
        finally:
            _thread.inside = outer

    def note_run(self) -> None:
        """Remember that it runs with its quantized weight."""
        self.reached = True
        if self.trained < 2 and torch.is_grad_enabled():
            self.trained = max(self.trained, 1 + self.training)

    def _run(self, input: Tensor) -> Tensor:
        mode, weight = self.mode, self.effective_weight(self)
        if mode.weights or mode.observe:
            self._require_quantizers_beside(weight)
        if mode.observe and self.input_quantizer is not None:
            self.input_quantizer.observe(input, weight, training=mode.activations)
        dtype = autocast_dtype(input) or weight.dtype  # in which a matrix product runs
        quantized = None
        if mode.weights:
            if mode.watch is not None and (active := self.active_input_quantizer()) is not None:
                mode.watch(active, input)
            codes = mode.codes and self.multiplies_codes(input, dtype)
            quantizer = self.weight_quantizer
            quantized = quantizer.quantize_to_codes(weight) if codes else quantizer.quantize(weight, dtype)
        output = self.output_quantizer
        served = output if mode.weights and mode.activations and output is not None and output.enabled else None
        if quantized is not None and served is not None and not mode.observe and mode.watch is None:
            y = self.compute_quantized(input, quantized, served)
        else:
            y = self.compute(input, quantized)
            if output is not None and mode.observe:
                output.observe(y, training=mode.activations)
            if served is not None:
                if mode.watch is not None:
                    mode.watch(served, y)
                y = fake_quantize_output(y, served)
        return with_unused(y, self.input_quantizer, self.output_quantizer) if self.learns_activations else y

    def _require_quantizers_beside(self, weight: Tensor) -> None:
        if is_sharded(weight):
            raise StateError(
                f"{type(self).__name__}: its weight is sharded while it runs ({weight.placements}): run the model that "  # type: ignore[attr-defined]
                "qat.shard (or fully_shard) was called on, whose forward gathers it; tensor parallel is not supported"
            )
        device = weight.device
        # Meta tensors compute without numbers and without an error. Dictionaries, since looking up an attribute of a
        # module costs more than all the rest.
        for child in self._modules.values():
            for tensor in () if child is None else (*child._parameters.values(), *child._buffers.values()):
                if tensor is not None and tensor.device != device:
                    raise StateError(
                        f"{type(child).__name__}: its state is on {tensor.device}, but the layer's weight on {device}: "
                        "move the whole model at once, or load a checkpoint into the whole prepared model"
                    )

    def share(self, owner: QuantizedLayer) -> None:
        """Use the weight quantizer of a layer with the same master; only that layer has it in its state."""
        vars(self)["weight_quantizer"] = self._modules.pop("weight_quantizer")
        self.shares = owner.shares = True

    def awaited_start(self) -> str | None:
        """The start from data that its weight waits for; None where there is none, or no data can give it."""
        return self.weight_quantizer.awaited_start() if self.linear and self.called and not self.shares else None

    def example_input(self, rows: int, generator: torch.Generator) -> Tensor:
        """Some random rows that the layer can read, on the CPU of its generator."""
        return torch.randn(rows, self.like_weight(self).shape[1], generator=generator, device=generator.device)

    def active_input_quantizer(self) -> ActivationQuantizer | None:
        """The quantizer that the input goes through now; None where the input comes quantized from its producer."""
        quantizer = self.input_quantizer
        if quantizer is None or not self.mode.activations or quantizer.arrives_quantized or not quantizer.enabled:
            return None
        return quantizer

    @property
    def activation_qtype(self) -> QType | None:
        """The type of its activations when it is served, or None."""
        quantizer = self.input_quantizer
        return None if quantizer is None or not quantizer.enabled else quantizer.qtype

    def keep_float_activations(self) -> None:
        """Leave inputs and outputs float, in training and as served."""
        for quantizer in self.activation_quantizers():
            quantizer.enabled = False

    def fresh_state(self, prefix: str, weight: Tensor, algorithm: Algorithm) -> dict[str, Tensor]:
        """What a checkpoint would hold of quantizers newly made for an effective weight, on its device.

        ``prefix`` is the layer's name in the checkpoint, with a dot at its end, or empty.
        """
        quantizer = self.weight_quantizer
        fresh = algorithm.make(weight, quantizer.final_qtype, quantizer.dtype)
        made = fresh.state_dict(prefix=f"{prefix}weight_quantizer.")
        for name in ("input_quantizer", "output_quantizer"):
            old: Any = self._modules.get(name)
            if old is not None:
                made |= (
                    type(old)(old.qtype, old.dtype, old.rule).to(weight.device).state_dict(prefix=f"{prefix}{name}.")
                )
        return made

    def activation_quantizers(self) -> Iterator[ActivationQuantizer]:
        """The quantizers of the input and of the output, as far as there are any."""
        return (quantizer for quantizer in (self.input_quantizer, self.output_quantizer) if quantizer is not None)

    def quantizer_parameters(self) -> Iterator[nn.Parameter]:
        """Everything the quantizers learn."""
        for quantizer in (self.weight_quantizer, *self.activation_quantizers()):
            yield from quantizer.parameters()

    def extra_repr(self) -> str:
        """Shape and type, for ``print(model)``."""
        return f"{super().extra_repr()}, weights={self.weight_quantizer.qtype.name}"
