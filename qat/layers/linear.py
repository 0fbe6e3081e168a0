"""`QLinear`: an `nn.Linear` that trains with the weight it will be served with.

It keeps the names ``weight`` and ``bias`` for its float masters, so a float checkpoint loads straight into a prepared
model, and holds everything of quantization in submodules. `QLinear.adopt` turns an existing layer into one *in
place*: the object stays the same, so hooks, optimizers that already hold its parameters, and a layer that is
registered under several names all stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import StateError
from qat.layers.functional import quantized_linear
from qat.quantizers.activation import ActivationQuantizer, fake_quantize_output
from qat.quantizers.base import Algorithm, WeightQuantizer

__all__ = ["QLinear", "quantized_layers"]

_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")


class QLinear(nn.Linear):
    """A linear layer with a fake-quantized weight and, if asked, fake-quantized inputs and outputs.

    Attributes:
        weight: float master weight, ``(out, in)``.
        weight_quantizer: scales the weight.
        input_quantizer: scales the input, or None.
        output_quantizer: scales the output, or None.
        fake_quantizing: off means a plain float forward (a delayed start).
        quantizing_activations: off means that only the weight is fake-quantized.
        observing: activation observers record.
        started_afresh: whether the last checkpoint that held the weight held no quantizer state; None: none held it.
        called: whether the layer has run, outside compiled code, since it was prepared.
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None
    fake_quantizing: bool
    quantizing_activations: bool
    observing: bool
    started_afresh: bool | None
    called: bool

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer | None = None,
        output_quantizer: ActivationQuantizer | None = None,
    ) -> QLinear:
        """Turn ``linear`` into a `QLinear`, in place, and return it.

        Raises:
            StateError: it is not exactly an `nn.Linear` (a subclass has a forward of its own, which would be lost).
        """
        if type(linear) is not nn.Linear:
            raise StateError(
                f"linear: only an exact nn.Linear can be prepared, got {type(linear).__name__}: leave it float"
            )
        linear.__class__ = cls
        assert isinstance(linear, QLinear)
        linear.weight_quantizer = weight_quantizer
        linear.input_quantizer = input_quantizer
        linear.output_quantizer = output_quantizer
        linear.fake_quantizing = True
        linear.quantizing_activations = True
        linear.observing = False
        linear.started_afresh = None
        linear.called = False
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        if not torch.compiler.is_compiling():  # compiled code under activation checkpointing may not set attributes
            self.called = True
        if self.observing and self.input_quantizer is not None:
            self.input_quantizer.observe(input)
        y = self._linear(input)
        if self.output_quantizer is not None:
            if self.observing:
                self.output_quantizer.observe(y)
            if self.fake_quantizing and self.quantizing_activations:
                self.output_quantizer.require_scale()
                y = fake_quantize_output(y, self.output_quantizer)
        return y

    def _linear(self, x: Tensor) -> Tensor:
        if not self.fake_quantizing:
            return nn.functional.linear(x, self.weight, self.bias)
        quantizer, activation = self.weight_quantizer, self.input_quantizer
        scale, shift = (None, None) if quantizer.own_range else quantizer.serving(self.weight)
        quantizes_input = activation is not None and self.quantizing_activations and not self.input_arrives_quantized
        if quantizes_input and activation is not None:
            activation.require_scale()
        return quantized_linear(
            x,
            self.weight,
            scale,
            shift,
            self.bias,
            qtype=quantizer.qtype,
            dtype=quantizer.dtype,
            masked=quantizer.masked,
            input_scale=activation.scale if quantizes_input and activation is not None else None,
            input_qtype=activation.qtype if activation is not None else "",
        )

    @property
    def input_arrives_quantized(self) -> bool:
        """Whether calibration saw that the input comes quantized from its producer."""
        return self.input_quantizer is not None and self.input_quantizer.arrives_quantized

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A float checkpoint has none of the quantizers' keys: then they start afresh, and preparation's hook says
        # so once for the model. A part of them missing is an error as usual. A checkpoint that leaves out the weight
        # says nothing of its scales.
        own = {f"{prefix}{key}": value for key, value in self._quantizer_state().items()}
        absent = bool(own) and own.keys().isdisjoint(state_dict)
        self.started_afresh = absent if f"{prefix}weight" in state_dict else None
        if self.started_afresh:
            state_dict.update(own)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _quantizer_state(self) -> dict[str, Tensor]:
        modules = {name: getattr(self, name) for name in _QUANTIZERS}
        return {f"{n}.{key}": v for n, m in modules.items() if m is not None for key, v in m.state_dict().items()}

    @property
    def has_quantizer_state(self) -> bool:
        """Whether a checkpoint of this layer holds more than weight and bias."""
        return bool(self._quantizer_state())

    @torch.no_grad()
    def start_afresh(self, algorithm: Algorithm) -> None:
        """Give the quantizers the state of newly made ones, for the weight as it is now.

        Parameters stay the same objects, so an optimizer that holds them goes on.
        """
        new = algorithm.make(self.weight, self.weight_quantizer.qtype, self.weight_quantizer.dtype)
        self.weight_quantizer.load_state_dict(new.state_dict())
        for quantizer in self.activation_quantizers():
            quantizer.reset()

    def activation_quantizers(self) -> Iterator[ActivationQuantizer]:
        """The quantizers of the input and of the output, as far as there are any."""
        return (quantizer for quantizer in (self.input_quantizer, self.output_quantizer) if quantizer is not None)

    def quantizer_parameters(self) -> Iterator[nn.Parameter]:
        """Everything the quantizers learn."""
        for name in _QUANTIZERS:
            quantizer: nn.Module | None = getattr(self, name)
            if quantizer is not None:
                yield from quantizer.parameters()

    def extra_repr(self) -> str:
        """Shape and format, for ``print(model)``."""
        return f"{super().extra_repr()}, weights={self.weight_quantizer.qtype}"


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QLinear]]:
    """Every `QLinear` below ``module`` with its full name, each object once."""
    for name, child in module.named_modules():
        if isinstance(child, QLinear):
            yield name, child
