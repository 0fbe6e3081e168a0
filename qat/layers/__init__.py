"""Layers with fake quantization, one file each."""

from qat.layers.linear import QLinear, quantized_layers

__all__ = ["QLinear", "quantized_layers"]
